"""Collects the calls of chosen modules in one run of a model, and captures each kind of call once.

Layers that are alike share a capture: the same class, attributes, structure and kind of call give the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import Tensor, nn

from mhc_rewrite.capture.call import CallShape, as_now, flatten
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.capture.trace import ModuleGraph, capture_error, trace
from mhc_rewrite.errors import CaptureError
from mhc_rewrite.passes.find_residuals import Residuals, find_residuals
from mhc_rewrite.passes.same_site import Known, SiteKey, learned
from mhc_rewrite.torch_private import without_hooks

# Attributes that say how a module is run and not what it computes: the mode is part of every key, and checkpointing
# wraps a forward from outside.
_MODES = frozenset({"training", "gradient_checkpointing"})

Captured = tuple[ModuleGraph, Residuals]


@dataclass(frozen=True)
class CallKind:
    """What a capture depends on besides the module: its mode, and the call's key."""

    module: str
    training: bool
    key: tuple[Any, ...]


class Captures:
    """The captures made so far, by kind of call and by likeness of modules."""

    def __init__(self, model: nn.Module, inlined: dict[str, set[str]]) -> None:
        self.model = model
        self.inlined = inlined
        self.by_kind: dict[CallKind, Captured | CaptureError] = {}
        self.leaves: dict[CallKind, dict[str, Any]] = {}
        self.known: dict[Any, dict[SiteKey, Known]] = {}  # by likeness of carriers
        self._alike: dict[Any, Captured] = {}
        self._likenesses: dict[str, Any] = {}

    def collect(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> None:
        """Runs the model and captures every kind of call of the carriers that it shows for the first time."""
        waiting: list[tuple[CallKind, Any, dict[str, Any]]] = []
        seen: set[Any] = set()

        def before(name: str) -> Callable[..., None]:
            shape = CallShape.of(type(self.model.get_submodule(name)).forward)

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                bound = shape.bind(args, kwargs)
                key, leaves = flatten(bound)
                kind = CallKind(name, training, key)
                if kind in self.by_kind or any(kind == other for other, *_ in waiting):
                    return
                like = (self.likeness(name), training, key)
                # Only the first of its like is called again, so only it needs its arguments as they are now.
                waiting.append((kind, like, bound if like in seen or like in self._alike else as_now(bound)))
                seen.add(like)
                self.leaves[kind] = {path: _form(value) for path, value in leaves.items()}

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True)
            for name in self.inlined
        ]  # fmt: skip
        try:
            with undisturbed(self.model):
                self.model.train(training)
                self.model(*as_now(args), **as_now(kwargs))
        finally:
            for handle in handles:
                handle.remove()
        for kind, like, bound in waiting:
            carrier = self.model.get_submodule(kind.module)
            if "forward" in carrier.__dict__:
                why = "something replaced the instance's forward; remove that wrapper first"
                self.by_kind[kind] = capture_error(kind.module, carrier, None, why)
                continue
            captured = self._alike.get(like)
            if captured is None:
                try:
                    captured = capture_forward(
                        carrier, kind.module, bound,
                        {self.model.get_submodule(part) for part in self.inlined[kind.module]}, training,
                        known=self.known.get(like[0]),
                    )  # fmt: skip
                except CaptureError as error:
                    self.by_kind[kind] = error
                    continue
                self.known[like[0]] = learned(self.known.get(like[0], {}), captured[1].sites(), captured[1].refused)
                if not captured[0].constants:  # objects from elsewhere may belong to this very module
                    self._alike[like] = captured
            self.by_kind[kind] = captured

    def settle(self, decided: Mapping[str, Mapping[SiteKey, Known]]) -> None:
        """Looks at captures anew after decisions about sites, by carrier."""
        for name, sites in decided.items():
            self.known_of(name).update(sites)
        changed = {self.likeness(name) for name in decided}
        anew: dict[int, Captured] = {}
        for kind, captured in self.by_kind.items():
            like = self.likeness(kind.module)
            if like in changed and not isinstance(captured, CaptureError):
                graph = captured[0]
                if id(graph) not in anew:
                    carrier = self.model.get_submodule(kind.module)
                    anew[id(graph)] = graph, find_residuals(graph, carrier, self.known_of(kind.module))
                self.by_kind[kind] = anew[id(graph)]
        self._alike = {like: anew.get(id(captured[0]), captured) for like, captured in self._alike.items()}

    def known_of(self, name: str) -> dict[SiteKey, Known]:
        """What is known about the sites of a carrier."""
        return self.known.setdefault(self.likeness(name), {})

    def likeness(self, name: str) -> Any:
        """What a module's graph can depend on. Equal for layers that differ in weights and in their number alone."""
        if name not in self._likenesses:
            self._likenesses[name] = self._likeness(name)
        return self._likenesses[name]

    def _likeness(self, name: str) -> Any:
        carrier = self.model.get_submodule(name)
        inlined = {self.model.get_submodule(part) for part in self.inlined[name]} | {carrier}
        return tuple(
            (path, type(module), _attributes(module, module in inlined),
             tuple((n, tuple(t.shape), t.dtype) for n, t in module.named_parameters(recurse=False)))
            for path, module in carrier.named_modules()
        )  # fmt: skip


def capture_forward(
    module: nn.Module, name: str, bound: dict[str, Any], inlined: Iterable[nn.Module], training: bool,
    forward: Callable[..., Any] | None = None, known: Mapping[SiteKey, Known] | None = None,
) -> Captured:  # fmt: skip
    """Captures a carrier's forward on bound arguments and finds its residual adds; leaves the module as it was.

    Args:
        module: the carrier, `name` its name in the model.
        bound: arguments by name.
        inlined: the modules captured with it.
        training: the mode of the carrier and all below it, if they are not in a mode of their own.
        forward: its original forward; by default its class's.
        known: the sites that earlier captures of this forward showed.

    Raises:
        CaptureError: the forward can't be captured.
    """
    with undisturbed(module), without_hooks(module):
        if module.training is not training:
            module.train(training)
        graph = trace(module, name, forward or type(module).forward, bound, set(inlined))
        return graph, find_residuals(graph, module, known)


def _form(value: Any) -> Any:
    """A leaf for later comparison of dtypes and sizes: a tensor without memory of its own."""
    return value.new_empty(1).expand(value.shape) if isinstance(value, Tensor) else None


def plain_attributes(carrier: nn.Module, inlined: Iterable[str]) -> tuple[tuple[str, str, Any], ...]:
    """The plain attributes that captured code may have read: (path from the carrier, name, value)."""
    return tuple(
        (path, name, value)
        for path in ("", *inlined)
        for name, value in _attributes(carrier.get_submodule(path), traced=True)
        if value is None or isinstance(value, (bool, int, float, str))
    )


def _attributes(module: nn.Module, traced: bool) -> Any:
    """The attributes that a module's own code names: all of them where the code is captured, flags otherwise."""
    used = _names_used(type(module))
    found: list[tuple[str, Any]] = []
    for name, value in module.__dict__.items():
        if name.startswith("_") or name not in used or name in _MODES:
            continue
        if isinstance(value, (bool, str)) or value is None:
            found.append((name, value))
        elif traced:
            found.append((name, value if isinstance(value, (int, float)) else ("object", id(value))))
    return tuple(found)


def _names_used(kind: type) -> frozenset[str]:
    """Names that any method of a class but its constructor mentions."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, function in vars(base).items():
            while hasattr(function, "__wrapped__"):
                names.update(function.__code__.co_names if isinstance(function, FunctionType) else ())
                function = function.__wrapped__
            if isinstance(function, FunctionType) and name != "__init__":
                names.update(function.__code__.co_names)
    return frozenset(names)

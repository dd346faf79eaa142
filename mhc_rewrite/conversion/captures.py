"""Collects the calls of chosen modules in one run of a model, and captures each kind of call once.

Layers that are alike share a capture: of the same class, structure and kind of call, and all that the captured Python
read says the same in both.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.call import CallShape, as_now, flatten, modules_in
from mhc_rewrite.capture.decisions import decided
from mhc_rewrite.capture.graph import ModuleGraph
from mhc_rewrite.capture.reads import holds
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.capture.trace import trace
from mhc_rewrite.capture.tracer import capture_error
from mhc_rewrite.errors import CaptureError, MHCError, UnsupportedModelError
from mhc_rewrite.passes.find_residuals import Residuals, find_residuals
from mhc_rewrite.passes.layouts import unify
from mhc_rewrite.passes.parts import spell_out
from mhc_rewrite.passes.same_site import Known, SiteKey, learned
from mhc_rewrite.torch_private import saved_tensors_hooks_on_top, without_hooks

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
        self._alike: dict[Any, list[Captured]] = {}
        self.known: dict[Any, dict[SiteKey, Known]] = {}  # by likeness of carriers
        self._likenesses: dict[str, Any] = {}

    def collect(self, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> None:
        """Runs the model and captures every kind of call of the carriers that it shows for the first time."""
        waiting: list[tuple[CallKind, Any, dict[str, Any]]] = []

        def before(name: str) -> Callable[..., None]:
            shape = CallShape.of(type(self.model.get_submodule(name)).forward)

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                bound = shape.bind(args, kwargs)
                key, leaves = flatten(bound)
                kind = CallKind(name, training, key)
                if kind in self.by_kind or any(kind == other for other, *_ in waiting):
                    return
                waiting.append((kind, (self.likeness(name), training, key), as_now(bound)))
                self.leaves[kind] = {path: _form(value) for path, value in leaves.items()}

            return hook

        handles = [
            self.model.get_submodule(name).register_forward_pre_hook(before(name), with_kwargs=True)
            for name in self.inlined
        ]  # fmt: skip
        try:
            with undisturbed(self.model):
                self.model.train(training)
                args, kwargs = as_now((args, kwargs))
                children = dict(self.model.named_modules())
                self.model(*args, **kwargs)
                _check_children(children, dict(self.model.named_modules()))
        finally:
            for handle in handles:
                handle.remove()
        for kind, like, bound in waiting:
            carrier = self.model.get_submodule(kind.module)
            if "forward" in carrier.__dict__:
                why = "something replaced the instance's forward; remove that wrapper first"
                self.by_kind[kind] = capture_error(kind.module, carrier, None, why)
                continue
            alike = self._alike.setdefault(like, [])
            captured = next(
                (made for made in alike if holds(carrier, made[0].reads) and _fits(made[0], self.leaves[kind])), None
            )
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
                try:
                    self._check_other_ways(kind, bound, captured)
                except CaptureError as error:
                    self.by_kind[kind] = error
                    continue
                if not captured[0].constants:  # objects from elsewhere may belong to this very module
                    alike.append(captured)
            self.by_kind[kind] = captured

    def _check_other_ways(self, kind: CallKind, bound: dict[str, Any], captured: Captured) -> None:
        """Refuses a forward whose trunks depend on what tensors contain: streams could not be linked.

        Adds that are known from the other mode, say, may be left out: a layer that is skipped hands on what it got.
        """
        graph, residuals = captured
        carrier = self.model.get_submodule(kind.module)
        inlined = {self.model.get_submodule(part) for part in self.inlined[kind.module]}
        asked = [node for node in graph.graph.nodes if node.target is decided]
        for index, (outcome, node) in enumerate(zip(graph.outcomes, asked, strict=True)):
            if not isinstance(outcome, bool):
                continue  # a text has no other
            answers = (*graph.outcomes[:index], not outcome)
            known = self.known_of(kind.module)
            try:
                other = capture_forward(carrier, kind.module, bound, inlined, kind.training, None, known, answers)[1]
                why = "" if _agree(residuals, other, known) else "its residual adds depend on it"
            except CaptureError as error:
                if error.__cause__ is not None:  # raised by the forward itself, which is what it may be there for
                    continue
                why = f"of the other way, {error}"
            if why:
                source = node.meta["source"]
                raise capture_error(kind.module, carrier, source, f"it branches on the content of a tensor, and {why}")

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
        self._alike = {like: [anew.get(id(one[0]), one) for one in made] for like, made in self._alike.items()}

    def known_of(self, name: str) -> dict[SiteKey, Known]:
        """What is known about the sites of a carrier."""
        return self.known.setdefault(self.likeness(name), {})

    def likeness(self, name: str) -> Any:
        """What a module is made of. Layers that are alike share a capture where what it read is the same in both."""
        if name not in self._likenesses:
            self._likenesses[name] = self._likeness(name)
        return self._likenesses[name]

    def _likeness(self, name: str) -> Any:
        return tuple(
            (path, type(module), _flags(module),
             tuple((n, tuple(t.shape), t.dtype) for n, t in module.named_parameters(recurse=False)))
            for path, module in self.model.get_submodule(name).named_modules()
        )  # fmt: skip


def capture_forward(
    module: nn.Module, name: str, bound: dict[str, Any], inlined: Iterable[nn.Module], training: bool,
    forward: Callable[..., Any] | None = None, known: Mapping[SiteKey, Known] | None = None,
    answers: tuple[Any, ...] = (),
) -> Captured:  # fmt: skip
    """Captures a carrier's forward on bound arguments and finds its residual adds; leaves the module as it was.

    Args:
        module: the carrier, `name` its name in the model.
        bound: arguments by name.
        inlined: the modules captured with it.
        training: the mode of the carrier and all below it, if they are not in a mode of their own.
        forward: its original forward; by default its class's.
        known: the sites that earlier captures of this forward showed.
        answers: to its first questions about the content of tensors.

    Raises:
        CaptureError: the forward can't be captured.
    """
    gradients, inlined = torch.is_grad_enabled(), set(inlined)
    called = modules_in(list(bound.values()))  # by way of a callable that the forward is given
    with undisturbed(module, *called), without_hooks(module, *called):
        if module.training is not training:
            module.train(training)
        run, first = forward or type(module).forward, answers

        def traced() -> ModuleGraph:
            return trace(module, name, run, bound, inlined, first)

        graph = traced()
        first = graph.outcomes
        if gradients and any(read.root is torch.is_grad_enabled for read in graph.reads):
            with torch.enable_grad(), _nobody_told_of_what_is_saved():  # it asks: as in the call that it is made for
                graph = traced()
        if any(read.root is torch.compiler.is_compiling for read in graph.reads):
            _check_compiled(graph, traced)
        spell_out(graph.graph)
        unify(graph.graph)
        with torch.no_grad():
            return graph, find_residuals(graph, module, known)


def _nobody_told_of_what_is_saved() -> contextlib.AbstractContextManager[Any]:
    """A checkpoint around a call counts what the call saves, and would count what its capture saves beside it."""
    if saved_tensors_hooks_on_top() is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


def _check_children(before: dict[str, nn.Module], after: dict[str, nn.Module]) -> None:
    """A forward that exchanges modules leaves others behind than those that it was called with."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) is not after.get(name):
            raise UnsupportedModelError(
                f"A call of the model exchanges or adds the module {name!r}, so that what it is made of depends on "
                "the calls before. Call it once with these example inputs, outside of mhcify, and convert it then."
            )


def _agree(residuals: Residuals, other: Residuals, known: Mapping[SiteKey, Known]) -> bool:
    """Whether both ways pass on their trunks alike, and the other one has no add that was not seen yet."""

    def ways(found: Residuals) -> list[Any]:
        return [(trunk.source and trunk.source.meta["leaf"], trunk.sinks) for trunk in found.trunks]

    seen = all(site.key in known for site in other.sites())
    return seen and (ways(residuals) == ways(other) or not residuals.trunks or not other.trunks)


def _fits(captured: ModuleGraph, leaves: dict[str, Any]) -> bool:
    """Whether leaves are of the ranks and dtypes that a capture was made with, and of its sizes if it is pinned."""
    for node in captured.graph.find_nodes(op="placeholder"):
        if "leaf" in node.meta and "shape" in node.meta:
            leaf, shape = leaves[node.meta["leaf"]], node.meta["shape"]
            if (leaf.dim(), leaf.dtype) != (len(shape), node.meta["dtype"]) or (
                captured.pinned and leaf.shape != shape
            ):
                return False
    return True


def _check_compiled(graph: ModuleGraph, again: Callable[[], ModuleGraph]) -> None:
    """Drops the read of `torch.compiler.is_compiling` where the forward does the same under torch.compile.

    Most ask to leave out a warning or a check. Where it does something else, no eager call can show what.
    """
    thread, life = threading.get_ident(), torch.compiler.is_compiling
    with mock.patch.object(torch.compiler, "is_compiling", lambda: threading.get_ident() == thread or life()):
        try:
            compiled = again()
        except (MHCError, RuntimeError):
            return
    unasked = not any(read.root is life for read in compiled.reads)
    if unasked and compiled.graph.python_code("self").src == graph.graph.python_code("self").src:
        graph.reads = tuple(read for read in graph.reads if read.root is not life)


def _form(value: Any) -> Any:
    """A leaf for later comparison of dtypes and sizes: a tensor without memory of its own."""
    return value.new_empty(1).expand(value.shape) if isinstance(value, Tensor) else None


def _flags(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Attributes that a module's own code names and that may change what it does, and not only how much."""
    used = _names_used(type(module))
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if name in used and not name.startswith("_") and name not in _MODES
        and (value is None or isinstance(value, (bool, str)))
    )  # fmt: skip


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

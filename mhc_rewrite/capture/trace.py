"""Captures one module's forward as an FX graph, with its children as leaves.

The forward runs once on values that carry the real tensors of an example beside their graph node. So `None`, tuples,
dtypes and ranks answer as in life, children are really called, and no Python of theirs has to be traceable. Sizes stay
symbolic: they are nodes, and a branch on one becomes a guard of the captured variant. A branch on a tensor's content
is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.assertions import only_checks
from mhc_rewrite.capture.call import CallShape, copied, flatten, replace_leaves
from mhc_rewrite.capture.record import source_line, user_line
from mhc_rewrite.errors import CaptureError
from mhc_rewrite.plans import SourceLine

_COMPARISONS = {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne}
_CONCRETE = (bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))
_AUGMENTED = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor".split()


@dataclass
class Guard:
    """A condition on sizes under which a graph holds: `node`'s value is `expected`."""

    node: fx.Node
    expected: Any


@dataclass
class ModuleGraph:
    """A forward as captured.

    Node metadata: `shape`, `dtype` (of tensors), `source` (SourceLine), `holder` (the inlined module that ran it,
    relative to the carrier), `serial` and `holder_call` (when it ran, and when that module's call began), `mixes` and
    `axes` (of child calls), `storage`, `inplace`.

    Attributes:
        module: the carrier's name.
        graph: its placeholders are the leaves of the call, then the constants.
        leaves: paths of the call's leaves, in the placeholders' order.
        constants: objects that the forward got from elsewhere.
        guards: conditions on sizes.
        asks_dtype: whether the forward looked at a dtype.
        parameter_dtypes: the dtypes of parameters and buffers that it looked at, by path.
        pinned: whether it holds for inputs of the example's sizes only.
    """

    module: str
    graph: fx.Graph
    leaves: tuple[str, ...] = ()
    constants: tuple[Any, ...] = ()
    guards: list[Guard] = field(default_factory=list)
    asks_dtype: bool = False
    parameter_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    pinned: bool = False


class TracedValue(fx.Proxy):
    """A node together with the value it has on the example."""

    tracer: ModuleTracer

    def __init__(self, node: fx.Node, tracer: ModuleTracer, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """`isinstance(x, Tensor)` answers as in life. Torch's own dispatch looks at `__torch_function__` first."""
        return Tensor if isinstance(self.value, Tensor) else TracedValue

    def __repr__(self) -> str:
        return f"TracedValue({self.node.name})"

    def __getattr__(self, name: str) -> Any:
        with self.tracer.as_shadow():
            attribute = getattr(self.value, name)  # an AttributeError here is the user's, as it would be in life
        if callable(attribute) and not isinstance(attribute, Tensor):
            return lambda *args, **kwargs: self.tracer.create_proxy("call_method", name, (self, *args), kwargs)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.decide(self, bool))

    def __index__(self) -> int:
        return int(self.tracer.decide(self, operator.index))

    def __int__(self) -> int:
        return int(self.tracer.decide(self, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self, float))

    def __hash__(self) -> int:
        return id(self)

    def __len__(self) -> int:
        return len(self.tracer.unwrap_sized(self))

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, index) for index in range(len(self))])

    def __setitem__(self, key: Any, item: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, item), {})

    def __contains__(self, item: Any) -> bool:
        return any(item is mine or item == mine for mine in self)


def _augmented(name: str) -> Callable[[TracedValue, Any], Any]:
    function = getattr(operator, name)

    def apply(self: TracedValue, other: Any) -> Any:
        if not isinstance(self.value, Tensor):
            return NotImplemented  # numbers are immutable: Python falls back to the plain operator
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return apply


for _name in _AUGMENTED:
    setattr(TracedValue, f"__{_name}__", _augmented(_name))


class _Functions(TorchFunctionMode):
    """Sees torch functions whether a traced value is among their arguments or not: `torch.rand(3)` must be a node."""

    def __init__(self, tracer: ModuleTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.tracer.shadowing:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            self.tracer.refuse_gradient_switch()
        traced = any(isinstance(leaf, TracedValue) for leaf in tree_leaves((args, kwargs)))
        if vocabulary.name_of(func) in vocabulary.FORM and not traced:
            result = func(*args, **kwargs)
            if isinstance(result, torch.dtype) and id(args[0]) in self.tracer.tensor_paths:
                self.tracer.captured.parameter_dtypes[self.tracer.tensor_paths[id(args[0])]] = result
            return result
        if getattr(func, "__name__", "") == "__get__":
            return self.tracer.create_proxy("call_function", getattr, (args[0], vocabulary.name_of(func)), {})
        if is_tensor_method_or_property(func):
            return self.tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return self.tracer.create_proxy("call_function", func, args, kwargs)


class _ChildWatch(TorchFunctionMode):
    """What a child does with its tensors: whether it mixes, and along which axis of each of them."""

    def __init__(self, child: nn.Module, tensors: list[Tensor]) -> None:
        super().__init__()
        self.followers = {id(t): vocabulary.AxisFollower(id(t), t.dim()) for t in tensors}
        self.axes: dict[int, int] = {}
        self.mixes = False
        self.saw_anything = False
        self.has_matrices = any(p.dim() >= 2 for p in child.parameters())
        self.kept: list[Any] = list(tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.saw_anything = True
        self.mixes = self.mixes or vocabulary.is_mixing(func)
        self.kept.append(result)
        inputs = [id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        rank = result.dim() if isinstance(result, Tensor) else None
        for key, follower in self.followers.items():
            if key not in self.axes:
                axis = follower.step(func, inputs, args, kwargs, id(result), rank)
                if axis is not None:
                    self.axes[key] = axis
        return result


class ModuleTracer(fx.Tracer):
    """One capture. `inlined` are the modules, besides the carrier, whose forwards are part of it."""

    def __init__(self, module: nn.Module, name: str, inlined: set[nn.Module]) -> None:
        super().__init__()
        self.root, self.module_name, self.inlined = module, name, inlined
        self.graph = fx.Graph(tracer_cls=type(self))
        self.paths = {child: path for path, child in module.named_modules() if path}
        self.tensor_paths = {id(t): path for path, t in (*module.named_parameters(), *module.named_buffers())}
        self.holders = [""]
        self.holder_call, self.serials = 0, itertools.count(1)
        self.shadowing = False
        self.captured = ModuleGraph(name, self.graph)
        self.constants: dict[int, tuple[fx.Node, Any]] = {}
        self.kept: list[Any] = []

    # -- what the forward sees ---------------------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], bound: dict[str, Any], shape: CallShape) -> ModuleGraph:
        """Runs `forward` on copies of `bound` and returns what it did."""
        _, leaves = flatten(bound)
        traced = {path: self.placeholder(path, value) for path, value in leaves.items()}
        self.captured.leaves = tuple(leaves)
        given = {name: replace_leaves(bound[name], name, traced) for name in bound}
        args, kwargs = shape.unbind(given)
        key = flatten(given)[0]
        self.context = self._context()
        modules = [self.root, *self.inlined]
        before = [dict(module.__dict__) for module in modules]
        try:
            with self._factories(), mock.patch.object(nn.Module, "__call__", self._module_call(nn.Module.__call__)), \
                    _Functions(self):  # fmt: skip
                result = forward(self.root, *args, **kwargs)
            if flatten(given)[0] != key:
                raise self._error(None, "it changes a list or dict that it was given, which a graph would not repeat")
            self._refuse_changes(
                modules, before, lambda: forward(self.root, *shape.unbind(bound)[0], **shape.unbind(bound)[1])
            )
        finally:
            for module, attributes in zip(modules, before, strict=True):
                module.__dict__.clear()
                module.__dict__.update(attributes)
        self.graph.output(self.create_arg(result))
        self.graph.eliminate_dead_code(is_impure_node=has_effects)
        self.captured.constants = tuple(value for _, value in self.constants.values())
        self._check_guards()
        return self.captured

    def placeholder(self, path: str, value: Any) -> TracedValue:
        if isinstance(value, Tensor):
            value = value.detach().clone()  # in-place operations must not reach the caller
        elif not isinstance(value, torch.Generator):
            value = copied(value)  # a cache must not grow
        node = self.graph.placeholder(path.replace(".", "_").replace("*", "args_"))
        node.meta["leaf"] = path
        return self._wrap(node, value, keep_opaque=True)

    def _factories(self) -> contextlib.AbstractContextManager[Any]:
        """Torch functions that take sizes and no tensor: torch's argument parser would refuse a traced size."""

        def traced(function: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(function)
            def call(*args: Any, **kwargs: Any) -> Any:
                if self.shadowing or not any(isinstance(leaf, TracedValue) for leaf in tree_leaves((args, kwargs))):
                    return function(*args, **kwargs)
                return self.create_proxy("call_function", function, args, kwargs)

            return call

        patched: dict[str, Any] = {name: traced(getattr(torch, name)) for name in vocabulary.FACTORIES}
        return mock.patch.multiple(torch, **patched)

    def _module_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        here = threading.get_ident()

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = self.paths.get(module)
            if self.shadowing or threading.get_ident() != here:
                return original(module, *args, **kwargs)
            if path is None or module in self.inlined:
                self.holders.append(path if path is not None else self.holders[-1])
                outer, self.holder_call = self.holder_call, next(self.serials)
                try:
                    return module.forward(*args, **kwargs)
                finally:
                    self.holders.pop()
                    self.holder_call = outer
            return self.create_proxy("call_module", path, args, kwargs)

        return call

    # -- nodes -------------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        source = user_line()
        self._check_context(source)
        with self.as_shadow():  # the tracer's own torch calls are not the forward's
            value, facts = self._shadow(kind, target, args, kwargs)
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TracedValue)]
            if isinstance(value, _CONCRETE) and not self._must_stay(kind, target, inputs, value, source):
                self.captured.asks_dtype |= isinstance(value, torch.dtype) or target == "is_floating_point"
                return value
            node = self.graph.create_node(kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs)))
            node.meta.update(facts, source=source, holder=self.holders[-1])
            node.meta.update(serial=next(self.serials), holder_call=self.holder_call)
            if kind == "call_method" and isinstance(args[0], TracedValue):
                node.meta["on_object"] = not isinstance(args[0].value, (Tensor, int, float))
            changed = self._written(kind, target, kwargs, inputs, value)
            if changed is not None:
                node.meta["inplace"] = True
                self._describe(node, changed.value)
                changed.node = node  # every name that the forward has for this tensor now means the result
                return changed
            if isinstance(value, bool):
                node.meta["guard"] = True
                self.captured.guards.append(Guard(node, value))
                return value
            if isinstance(value, (tuple, list)) and vocabulary.counts_by_size(target, args, kwargs):
                self.captured.pinned = True
            return self._wrap(node, value)

    @contextlib.contextmanager
    def as_shadow(self) -> Iterator[None]:
        outer, self.shadowing = self.shadowing, True
        try:
            yield
        finally:
            self.shadowing = outer

    def _shadow(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The value on the example, and what running a child showed."""
        facts: dict[str, Any] = {}
        real_args, real_kwargs = _real(args), _real(kwargs)
        if kind == "call_function":
            return target(*real_args, **real_kwargs), facts
        if kind == "call_method":
            return getattr(real_args[0], target)(*real_args[1:], **real_kwargs), facts
        child = self.root.get_submodule(target)
        tensors = [t for t in tree_leaves((real_args, real_kwargs)) if isinstance(t, Tensor) and t.dim() >= 2]
        with _ChildWatch(child, tensors) as watch:
            value = child(*real_args, **real_kwargs)
        facts["mixes"] = watch.mixes or (watch.has_matrices and not watch.saw_anything)
        traced = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, TracedValue)]
        facts["axes"] = {t.node.name: watch.axes[id(t.value)] for t in traced if id(t.value) in watch.axes}
        return value, facts

    def _written(
        self, kind: str, target: Any, kwargs: Any, inputs: list[TracedValue], value: Any
    ) -> TracedValue | None:
        """The traced value that this operation changed in place, if it did."""
        if target is operator.setitem:
            return inputs[0]
        same = next((leaf for leaf in inputs if leaf.value is value and isinstance(value, Tensor)), None)
        if same is None:
            return None
        if kind == "call_module":
            return same if getattr(self.root.get_submodule(target), "inplace", False) else None
        return same if vocabulary.is_inplace(target, kwargs) else None

    def _wrap(self, node: fx.Node, value: Any, keep_opaque: bool = False) -> Any:
        if isinstance(value, Tensor) or keep_opaque:
            self._describe(node, value)
            return TracedValue(node, self, value)
        if isinstance(value, _CONCRETE):
            return value
        if isinstance(value, (tuple, list)):
            items = [self._item(node, index, item) for index, item in enumerate(value)]
            if isinstance(value, torch.Size):
                return tuple(items)
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if type(value) is dict:
            return {key: self._item(node, key, item) for key, item in value.items()}
        return TracedValue(node, self, value)

    def _item(self, node: fx.Node, key: Any, item: Any) -> Any:
        if isinstance(item, _CONCRETE):
            return item
        getitem = self.graph.call_function(operator.getitem, (node, key))
        getitem.meta.update(source=node.meta.get("source"), holder=self.holders[-1])
        return self._wrap(getitem, item)

    def _describe(self, node: fx.Node, value: Any) -> None:
        self.kept.append(value)  # storage addresses stay unique while the tensors live
        if isinstance(value, Tensor):
            node.meta.update(shape=tuple(value.shape), dtype=value.dtype)
            with contextlib.suppress(RuntimeError, NotImplementedError):
                node.meta["storage"] = value.untyped_storage()._cdata

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and id(a) in self.tensor_paths:
            return self._get_attr(self.tensor_paths[id(a)], a)
        if isinstance(a, (TracedValue, int, float, complex, str, bytes, type(None), torch.dtype, torch.device,
                          torch.layout, torch.memory_format, type(Ellipsis))):  # fmt: skip
            return a.node if isinstance(a, TracedValue) else a
        if isinstance(a, torch.Size):
            return tuple(a)
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            given = {field.name: self.create_arg(getattr(a, field.name)) for field in dataclasses.fields(a)}
            return self.graph.call_function(
                type(a), (), {name: item for name, item in given.items() if item is not None}
            )
        if hasattr(a, "_fields"):
            return self.graph.call_function(type(a), tuple(self.create_arg(item) for item in a))
        if isinstance(a, (tuple, list, dict, slice, range)):
            return super().create_arg(a)
        return self._constant(a)

    def _get_attr(self, path: str, tensor: Tensor) -> fx.Node:
        node = self.graph.get_attr(path)
        node.meta.update(shape=tuple(tensor.shape), dtype=tensor.dtype, holder=self.holders[-1])
        return node

    def _constant(self, value: Any) -> fx.Node:
        """An object from outside: handed to the graph as one more placeholder."""
        if id(value) not in self.constants:
            last = next(
                n for n in reversed([n for n in self.graph.nodes if n.op == "placeholder"] or [self.graph._root])
            )
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"constant_{len(self.constants)}")
            self._describe(node, value)
            self.constants[id(value)] = (node, value)
        return self.constants[id(value)][0]

    # -- sizes -------------------------------------------------------------------------------------------------------

    def decide(self, traced: TracedValue, convert: Callable[[Any], Any]) -> Any:
        """A plain value for a traced one; a size's is guarded, a tensor's refused."""
        if isinstance(traced.value, Tensor) or not isinstance(traced.value, (int, float, bool)):
            if isinstance(traced.value, Tensor) and not only_checks(user_line()):
                raise self._error(user_line(), "it branches on the content of a tensor")
            return convert(traced.value)
        expected = traced.value
        node = self.graph.call_function(operator.eq, (traced.node, expected))
        node.meta["source"] = user_line()
        node.meta["guard"] = True
        self.captured.guards.append(Guard(node, True))
        return convert(expected)

    def unwrap_sized(self, traced: TracedValue) -> Any:
        if isinstance(traced.value, Tensor):
            self.decide(traced.shape[0], int)
        return traced.value

    def _must_stay(self, kind: str, target: Any, inputs: list[TracedValue], value: Any, source: Any) -> bool:
        """Whether something whose result is plain needs a node all the same: a guard, or a call for its effect."""
        if isinstance(value, bool):
            if not any(isinstance(leaf.value, Tensor) for leaf in inputs):
                return bool(inputs) and target in _COMPARISONS
            form = vocabulary.name_of(target) in vocabulary.FORM or target is getattr
            if not form and not only_checks(source):
                raise self._error(source, "it branches on the content of a tensor")
            return False
        return value is None and target is not getattr

    def _check_guards(self) -> None:
        """A guard is evaluated before the graph runs, so it may depend on the sizes of the inputs alone.

        A branch on an intermediate result's size pins the capture to the sizes of its inputs instead.
        """
        kept = []
        for guard in self.captured.guards:
            origin = _origin(guard.node)
            if origin == "content" and only_checks(guard.node.meta.get("source")):
                guard.node.meta["guard"] = False
                continue
            if origin == "content":
                raise self._error(guard.node.meta.get("source"), "it branches on the content of a tensor")
            if origin == "inputs":
                kept.append(guard)
            else:
                self.captured.pinned = True
        self.captured.guards = kept

    # -- what may not be ---------------------------------------------------------------------------------------------

    @staticmethod
    def _context() -> tuple[Any, ...]:
        autocast = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        return torch.is_inference_mode_enabled(), autocast

    def refuse_gradient_switch(self) -> None:
        raise self._error(user_line(), "it switches gradients on or off inside, which a graph would lose")

    def _check_context(self, source: SourceLine | None) -> None:
        if not self.shadowing and self._context() != self.context:
            raise self._error(source, "it switches autocast on or off inside, which a graph would lose")

    def _refuse_changes(self, modules: list[nn.Module], before: list[dict[str, Any]], again: Callable[[], Any]) -> None:
        """A graph stores nothing on a module. Plain attributes that settle, as a window that is cut to the image's size
        does, need no storing: the graph has them built in."""
        after = [dict(module.__dict__) for module in modules]
        changed = [
            (name, new.get(name))
            for old, new in zip(before, after, strict=True)
            for name in new
            if name not in old or old[name] is not new[name]
        ]
        if not changed:
            return
        if all(isinstance(value, (bool, int, float, str, type(None))) for _, value in changed):
            again()
            if all(module.__dict__[name] == new[name] for module, new in zip(modules, after, strict=True)
                   for name, _ in changed if name in new):  # fmt: skip
                return
        raise self._error(None, f"it stores {changed[0][0]!r} on the module, which a graph would not repeat")

    def _error(self, source: SourceLine | None, why: str) -> CaptureError:
        return capture_error(self.module_name, self.root, source, why)


def capture_error(name: str, module: nn.Module, source: SourceLine | None, why: str) -> CaptureError:
    """The error for a forward that can't be captured, with the way out."""
    where = f" at {source}" if source else ""
    way_out = f"Change that line, or leave the module out with exclude=({name!r},)." if name else "Change that line."
    kind = type(module).__name__
    return CaptureError(f"The forward of {name or 'the model'!r} ({kind}) can't be captured{where}: {why}. "
                        f"{way_out}")  # fmt: skip


def _real(structure: Any) -> Any:
    return fx.node.map_aggregate(structure, lambda leaf: leaf.value if isinstance(leaf, TracedValue) else leaf)


def _origin(node: fx.Node) -> str:
    """What a size, or a condition on sizes, comes from: `"inputs"`, `"intermediate"` results or `"content"`."""
    origin, todo = "inputs", [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            continue
        if "shape" in node.meta:
            origin = "intermediate"
            continue
        reads_form = (node.op == "call_method" and node.target in vocabulary.FORM) or node.target is getattr
        arithmetic = node.op == "call_function" and getattr(node.target, "__module__", "") in (
            "_operator", "operator", "builtins", "math")  # fmt: skip
        if not (reads_form or arithmetic):
            return "content"
        todo.extend(node.all_input_nodes)
    return origin


def is_structure(node: fx.Node) -> bool:
    """Whether a node puts results together: a dataclass, such as transformers' outputs, or a named tuple."""
    return node.op == "call_function" and isinstance(node.target, type)


def has_effects(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads it."""
    if node.op in ("placeholder", "output", "call_module") or node.meta.get("inplace") or node.meta.get("guard"):
        return True
    if node.op == "call_method":  # a method of an object that is no tensor, a cache say
        return bool(node.meta.get("on_object")) and node.target not in vocabulary.FORM
    return False


def trace(
    module: nn.Module, name: str, forward: Callable[..., Any], bound: dict[str, Any], inlined: set[nn.Module]
) -> ModuleGraph:
    """Captures `forward(module, **bound)`. The caller protects the state (capture.state).

    Args:
        module: the carrier.
        name: its name in the model, for messages.
        forward: its original forward function.
        bound: arguments by name, as `CallShape.bind` gives them.
        inlined: descendants that are captured as part of it.

    Raises:
        CaptureError: the forward does what a graph can't repeat, or failed on the example.
    """
    tracer = ModuleTracer(module, name, inlined)
    try:
        return tracer.run(forward, bound, CallShape.of(forward))
    except CaptureError:
        raise
    except Exception as error:
        frame, line = error.__traceback__, None
        while frame is not None:
            file = frame.tb_frame.f_code.co_filename
            if "/torch/" not in file and "/mhc_rewrite/" not in file:
                line = source_line(file, frame.tb_lineno)
            frame = frame.tb_next
        raise capture_error(name, module, line, f"{type(error).__name__}: {error}".splitlines()[0]) from error

"""The tracer: runs a forward once on traced values and writes down what it does as a graph."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import operator
import threading
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.assertions import only_checks
from mhc_rewrite.capture.call import CallShape, copied, flatten, replace_leaves
from mhc_rewrite.capture.children import ChildWatch
from mhc_rewrite.capture.decisions import decided, lasting_change, sized_by_content
from mhc_rewrite.capture.functions import FunctionMode, call_argument, calls_seen, is_opaque
from mhc_rewrite.capture.graph import Guard, InlinedCall, ModuleGraph, has_effects, origin
from mhc_rewrite.capture.made import MadeObjects
from mhc_rewrite.capture.reads import attributes_of
from mhc_rewrite.capture.record import frames_within, user_line
from mhc_rewrite.capture.stores import Stores
from mhc_rewrite.capture.sums import Sums
from mhc_rewrite.capture.values import TRACED, TracedTensor, TracedValue, real
from mhc_rewrite.capture.watch import Watch
from mhc_rewrite.errors import CaptureError
from mhc_rewrite.plans import SourceLine
from mhc_rewrite.torch_private import inside_function_transform

_COMPARISONS = {operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne}
# Reads of an object that a call got: a guard may read them again.
_READS = {getattr, operator.getitem}
# Branches on content, of which each way may be a graph of its own.
_MOST_DECISIONS = 32
_MODULE_CALL = nn.Module.__call__
_CONCRETE = (bool, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))


class ModuleTracer(fx.Tracer):
    """One capture. `inlined` are the modules, besides the carrier, whose forwards are part of it.

    The first questions about content get `answers`; further ones what is true of the example. Objects of the `kinds`
    that the forward makes are made by the graph.
    """

    def __init__(
        self, module: nn.Module, name: str, inlined: set[nn.Module], answers: tuple[Any, ...] = (),
        kinds: frozenset[type] = frozenset(),
    ) -> None:  # fmt: skip
        super().__init__()
        self.root, self.module_name, self.inlined, self.answers = module, name, inlined, answers
        self.graph = fx.Graph(tracer_cls=type(self))
        self.paths = {child: path for path, child in module.named_modules() if path}
        self.tensor_paths = {id(t): path for path, t in (*module.named_parameters(), *module.named_buffers())}
        self.weights = {child: _ids(child) for child in self.paths}
        self.holders = [""]
        self.serials = itertools.count(1)
        self.calls: tuple[InlinedCall, ...] = (InlinedCall("", 0, ()),)
        self.shadowing = False
        self.thread = threading.get_ident()
        self.transformed = inside_function_transform()
        self.captured = ModuleGraph(name, self.graph)
        self.constants: dict[int, tuple[fx.Node, Any]] = {}
        self.strays: list[Tensor] = []
        self.refused: CaptureError | None = None
        self.kept: list[Any] = []
        self.sums = Sums(real)
        self.made = MadeObjects(self, kinds)

    # -- what the forward sees ---------------------------------------------------------------------------------------

    def run(self, forward: Callable[..., Any], bound: dict[str, Any], shape: CallShape) -> ModuleGraph:
        """Runs `forward` on copies of `bound` and returns what it did."""
        _, leaves = flatten(bound)
        traced = {path: self.placeholder(path, value) for path, value in leaves.items()}
        self.captured.leaves = tuple(leaves)
        given = {name: replace_leaves(bound[name], name, traced) for name in bound}
        args, kwargs = shape.unbind(given)
        key, held = flatten(given)
        self.context = self._context()
        modules = [self.root, *self.inlined]
        stores = Stores(self, modules)
        self.watch = Watch(self, forward)
        try:
            with self.watch, calls_seen(self), self.made.watched():
                result = forward(self.root, *args, **kwargs)
                self.shadowing = True
                self.watch.check_numpy()
                if self.refused is not None:  # the forward's own code may have caught it
                    raise self.refused
                given_key, given_leaves = flatten(given)
                if given_key != key or any(given_leaves[path] is not leaf for path, leaf in held.items()):
                    self.refuse("it changes a list or dict that it was given, which a graph would not repeat", None)

                def again() -> None:
                    args, kwargs = shape.unbind(bound)
                    forward(self.root, *args, **kwargs)

                stores.refuse_changes(again)
                stores.keep_buffers()
                self.graph.output(self.create_arg(result))
                self.captured.reads = self.watch.reads()
        finally:
            stores.put_back()
        self.graph.eliminate_dead_code(is_impure_node=has_effects)
        self.captured.constants = tuple(value for _, value in self.constants.values())
        self._check_guards()
        change = lasting_change(self.graph.nodes)
        if change is not None:
            why = "it branches on the content of a tensor after it has changed what lives longer than the call"
            self.refuse(why, change.meta.get("source"))
        return self.captured

    def placeholder(self, path: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            # In-place operations must not reach the caller. Gradients are recorded only for who asks about them.
            value = value.detach().clone().requires_grad_(value.requires_grad)
            value = value.clone() if torch.is_grad_enabled() else value
        elif not isinstance(value, torch.Generator) and not callable(value):
            value = copied(value)  # a cache must not grow
        node = self.graph.placeholder(path.replace(".", "_").replace("*", "args_"))
        node.meta["leaf"] = path
        return self._wrap(node, value, keep_opaque=True)

    def called(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module call: a node for a child, and part of this capture otherwise."""
        path = self.paths.get(module)
        if path is not None and module not in self.inlined:
            tensors = (*module.parameters(), *module.buffers())
            if self.weights[module] != _ids(module) or any(type(tensor) in TRACED for tensor in tensors):
                self.refuse(f"it calls {path!r} with other weights than its own, which a graph would not repeat")
            return self.create_proxy("call_module", path, args, kwargs)
        if original is not _MODULE_CALL:  # a class's own __call__, which ends in the module's
            return original(module, *args, **kwargs)
        return self._inline(module, path, args, kwargs)

    def reads_form(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The shape, dtype or the like of a tensor that is no value of the graph: a parameter, say."""
        result = function(*args, **kwargs)
        path, name = self.tensor_paths.get(id(args[0])), vocabulary.name_of(function)
        if path is not None and isinstance(result, torch.dtype):
            self.captured.parameter_dtypes[path] = result
        if path is not None and name in vocabulary.GRADIENT:
            self.watch.note((None, attributes_of(f"{path}.{name}")), result)
        return result

    def outside(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A torch function on a traced tensor that the mode does not see."""
        if threading.get_ident() != self.thread:
            self.refuse("it computes in a thread of its own, where a graph can't follow", None)
        if not self.shadowing:
            self.refuse("it computes where torch functions are switched off, so that a graph can't follow")
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map(lambda x: x.value if type(x) in TRACED else x, (args, kwargs))
            return function(*args, **kwargs)

    def _inline(self, module: nn.Module, path: str | None, args: Any, kwargs: Any) -> Any:
        self.holders.append(path if path is not None else self.holders[-1])
        outer = self.calls
        self.calls = (*self.calls_here(), InlinedCall(self.holders[-1], next(self.serials), ()))
        try:
            return module.forward(*args, **kwargs)
        finally:
            self.holders.pop()
            self.calls = outer

    def calls_here(self) -> tuple[InlinedCall, ...]:
        """The calls that are under way, the innermost with the frames that lead to here."""
        *outer, inner = self.calls
        return (*outer, dataclasses.replace(inner, frames=frames_within((self.run.__code__, self._inline.__code__))))

    # -- nodes -------------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        if threading.get_ident() != self.thread:
            self.refuse("it computes in a thread of its own, where a graph can't follow", None)
        if target == "__call__" and type(args[0]) is TracedValue:
            kind, target = "call_function", call_argument
        plain = self.sums.plain(target, args, kwargs) if kind != "call_module" else None
        if plain is not None:
            with FunctionMode(self):
                return plain()
        with self.as_shadow():  # the tracer's own torch calls are not the forward's
            source = user_line()
            self._check_context(source)
            if inside_function_transform() is not self.transformed:
                why = "it runs a transform of torch.func (vmap, grad and the like), which a graph can't hold"
                self.refuse(why, source)
            where = vocabulary.EXITS.get(target if isinstance(target, str) else getattr(target, "__name__", ""))
            if where is not None and type(args[0]) in TRACED and isinstance(args[0].value, Tensor):
                self.refuse(f"it hands a tensor over to {where}, where a graph can't follow", source)
            value, facts = self._shadow(kind, target, args, kwargs)
            if kind != "call_module":
                self.sums.note(target, args, kwargs, value)
            inputs = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) in TRACED]
            if isinstance(value, _CONCRETE) and not self._must_stay(kind, target, args, inputs, value, source):
                self.captured.asks_dtype |= isinstance(value, torch.dtype) or target == "is_floating_point"
                return value
            node = self.graph.create_node(kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs)))
            node.meta.update(facts, source=source, holder=self.holders[-1])
            node.meta.update(serial=next(self.serials), calls=self.calls_here())
            if kind == "call_method" and type(args[0]) in TRACED:
                node.meta["on_object"] = not isinstance(args[0].value, (Tensor, int, float))
            node.meta["on_object"] = node.meta.get("on_object", target is call_argument)
            node.meta["counted"] = sized_by_content(node, [x.node for x in inputs if isinstance(x.value, int)])
            changed = self._written(kind, target, kwargs, inputs, value)
            if changed is not None:
                node.meta["inplace"] = True
                self._describe(node, changed.value)
                changed.node = node  # every name that the forward has for this tensor now means the result
                return changed
            if isinstance(value, _CONCRETE) and (value is not None or target in _READS):
                if origin(node) == "content" and isinstance(value, (bool, str)):
                    return value if only_checks(source) else self._decision(node, value)
                node.meta["guard"] = True
                self.captured.guards.append(Guard(node, value))
                return value
            if isinstance(value, (tuple, list)) and vocabulary.counts_by_size(target, args, kwargs):
                self.captured.pinned = True
            return self._wrap(node, value)

    @contextlib.contextmanager
    def as_shadow(self) -> Iterator[None]:
        if self.shadowing:
            yield
            return
        self.shadowing = True
        self.watch.pause()
        try:
            yield
        finally:
            self.shadowing = False
            self.watch.resume()

    def _shadow(self, kind: str, target: Any, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """The value on the example, and what running a child showed."""
        real_args, real_kwargs = self.made.real(args), self.made.real(kwargs)
        child, run = None, target
        if kind == "call_module":
            child = run = self.root.get_submodule(target)
        elif kind == "call_method":
            owner, *real_args = real_args
            run = getattr(owner, target)
            if isinstance(owner, Tensor) or not callable(owner):
                return run(*real_args, **real_kwargs), {}
        elif target is not call_argument and not is_opaque(target):
            return target(*real_args, **real_kwargs), {}
        tensors = [t for t in tree_leaves((real_args, real_kwargs)) if isinstance(t, Tensor) and t.dim() >= 2]
        self.watch.check_numpy()
        with ChildWatch(child, tensors) as watch:
            value = run(*real_args, **real_kwargs)
        self.watch.check_numpy(drawn=True)
        traced = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) in TRACED]
        axes = {t.node.name: watch.followed(t.value, value) for t in traced if id(t.value) in watch.followers}
        same = next((leaf for leaf in traced if isinstance(value, Tensor) and leaf.value is value), None)
        gives_back = same.node.name if same is not None else None
        return value, {**watch.facts(same is not None), "axes": axes, "gives_back": gives_back}

    def _written(self, kind: str, target: Any, kwargs: Any, inputs: list[Any], value: Any) -> Any:
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
        if isinstance(value, Tensor):
            self._describe(node, value)
            return TracedTensor.of(node, self, value)
        if keep_opaque:
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
        getitem.meta.update(
            source=node.meta.get("source"), holder=self.holders[-1], counted=node.meta.get("counted", False)
        )
        return self._wrap(getitem, item)

    def _describe(self, node: fx.Node, value: Any) -> None:
        self.kept.append(value)  # storage addresses stay unique while the tensors live
        if isinstance(value, Tensor):
            node.meta.update(shape=tuple(value.shape), dtype=value.dtype)
            with contextlib.suppress(RuntimeError, NotImplementedError):
                node.meta["storage"] = value.untyped_storage()._cdata

    def create_arg(self, a: Any) -> Any:
        if type(a) in TRACED:
            return a.node
        if isinstance(a, Tensor):
            return self._tensor(a)
        if isinstance(a, enum.Enum):
            return self._constant(a)
        if type(a) is not bool and isinstance(a, (int, float, complex)):  # of numpy, say, which code could not name
            kind: Any = next(kind for kind in (int, float, complex) if isinstance(a, kind))
            return kind(a)
        if isinstance(a, (int, float, complex, str, bytes, type(None), torch.dtype, torch.device,
                          torch.layout, torch.memory_format, type(Ellipsis))):  # fmt: skip
            return a
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
        return self.made.node(a) or self._constant(a)

    def _tensor(self, tensor: Tensor) -> fx.Node:
        """A tensor that no node made: read anew where it is an attribute, and guarded where it is elsewhere."""
        path, way = self.tensor_paths.get(id(tensor)), self.watch.tensors.get(id(tensor))
        if path is None and way is not None and way[0] is None and all(kind == "attr" for kind, _ in way[1]):
            path = ".".join(name for _, name in way[1])
        if path is not None:
            return self._get_attr(path, tensor)
        if way is not None:
            self.watch.same(way, tensor)
        elif id(tensor) not in self.constants:
            self.strays.append(tensor)
        return self._constant(tensor)

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

    def decide(self, traced: Any, convert: Callable[[Any], Any]) -> Any:
        """A plain value for a traced one: a size's is guarded, whether a tensor is true is asked again in the graph."""
        if isinstance(traced.value, Tensor):
            with self.as_shadow():
                value = convert(traced.value)
            if only_checks(user_line()):
                return value
            if convert is bool:
                return self._decision(traced.node, value)
            self.refuse("it takes a number from the content of a tensor to branch or to loop by")
        if not isinstance(traced.value, (int, float, bool)):
            return self._of_object(operator.truth, traced) if convert is bool else convert(traced.value)
        expected = traced.value
        if origin(traced.node) == "content" and not only_checks(user_line()):
            if convert is bool:
                return self._decision(traced.node, bool(expected))
            self.refuse("it takes a number from the content of a tensor to branch or to loop by")
        node = self.graph.call_function(operator.eq, (traced.node, expected))
        node.meta["source"] = user_line()
        node.meta["guard"] = True
        self.captured.guards.append(Guard(node, True))
        return convert(expected)

    def _decision(self, node: fx.Node, value: bool | str) -> Any:
        """What a branch on content sees, and the same question in the graph."""
        index = len(self.captured.outcomes)
        if index == _MOST_DECISIONS:
            self.refuse(f"it branches on the content of tensors more than {index} times")
        outcome = self.answers[index] if index < len(self.answers) else value
        self.captured.outcomes += (outcome,)
        asks = self.graph.call_function(decided, (node, index, outcome))
        asks.meta.update(source=user_line(), holder=self.holders[-1], effect=True)
        return outcome

    def unwrap_sized(self, traced: Any) -> Any:
        if isinstance(traced.value, Tensor):
            self.decide(traced.shape[0], int)
        else:
            self._of_object(len, traced)
        return traced.value

    def _of_object(self, function: Callable[[Any], Any], traced: Any) -> Any:
        """Whether an object that a call got is empty, and the like: guarded. What a child returned is the child's."""
        value = function(traced.value)
        if hasattr(traced.value, "__len__") and origin(traced.node) == "inputs":
            node = self.graph.call_function(function, (traced.node,))
            node.meta.update(source=user_line(), guard=True)
            self.captured.guards.append(Guard(node, value))
        return value

    def _must_stay(self, kind: str, target: Any, args: Any, inputs: list[Any], value: Any, source: Any) -> bool:
        """Whether something whose result is plain needs a node all the same: a guard, or a call for its effect."""
        of_tensor = any(isinstance(leaf.value, Tensor) for leaf in inputs)
        name = vocabulary.name_of(target)
        if of_tensor and (name in vocabulary.GRADIENT or (target is getattr and args[1] in vocabulary.GRADIENT)):
            if "leaf" not in inputs[0].node.meta:
                self.refuse("it asks whether a result needs gradients, which is another matter in each call", source)
            self.watch.asked(torch.is_grad_enabled)
            return True
        if inputs and not of_tensor and (target in _READS or target in _COMPARISONS):
            return True
        if inputs and not of_tensor and kind == "call_method" and isinstance(value, (bool, str)):
            self.refuse(f"it decides by what {name}() of an object says, which may be something else next time", source)
        if isinstance(value, bool):
            form = name in vocabulary.FORM or target is getattr
            return of_tensor and not form and not only_checks(source)
        return value is None and target is not getattr

    def _check_guards(self) -> None:
        """A guard is evaluated before the graph runs, so it may depend on the sizes of the inputs alone.

        A branch on an intermediate result's size pins the capture to the sizes of its inputs instead.
        """
        kept = []
        for guard in self.captured.guards:
            of = origin(guard.node)
            if of == "content" and only_checks(guard.node.meta.get("source")):
                guard.node.meta["guard"] = False
                continue
            if of == "content":
                self.refuse("it branches on the content of a tensor", guard.node.meta.get("source"))
            if of == "inputs":
                kept.append(guard)
            else:
                self.captured.pinned = True
        self.captured.guards = kept

    # -- what may not be ---------------------------------------------------------------------------------------------

    @staticmethod
    def _context() -> tuple[Any, ...]:
        autocast = tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        return torch.is_inference_mode_enabled(), autocast

    def _check_context(self, source: SourceLine | None) -> None:
        if self._context() != self.context:
            self.refuse("it switches autocast on or off inside, which a graph would lose", source)

    def refuse(self, why: str, source: SourceLine | EllipsisType | None = ...) -> NoReturn:
        """Ends the capture, also where the forward's own code catches the error."""
        error = capture_error(self.module_name, self.root, user_line() if source is ... else source, why)
        self.refused = self.refused or error
        raise error


def capture_error(name: str, module: nn.Module, source: SourceLine | None, why: str) -> CaptureError:
    """The error for a forward that can't be captured."""
    where = f" at {source}" if source else ""
    text = f"The forward of {name or 'the model'!r} ({type(module).__name__}) can't be captured{where}: {why}."
    return CaptureError(f"{text} Change that line.", name)


def _ids(module: nn.Module) -> list[int]:
    return [id(parameter) for parameter in module.parameters()]

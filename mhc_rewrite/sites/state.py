"""Streams on their way from module to module: a tensor that is n streams to this package and their mean to all else.

Its memory is the streams', so autograd, checkpoints and whatever else looks below Python carries all of them with their
gradient. Every function of torch that reads it gets the mean, in the trunk's shape; copies of it stay n streams.

Of streams that are a DTensor it is this rank's part, and reads as the DTensor's mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mhc_rewrite.kernels.sharding import is_dtensor
from mhc_rewrite.sites.streams import collapse_gradient, one_stream, read_mean, spread_gradient
from mhc_rewrite.torch_private import constant_while_tracing

# What every stream answers as the mean does.
_FORM = frozenset({"shape", "size", "dtype", "device", "dim", "ndim", "numel", "nelement", "layout", "is_cuda",
                   "is_floating_point", "is_complex", "get_device", "element_size", "is_meta", "is_sparse",
                   "is_quantized", "is_nested", "is_mkldnn", "itemsize", "nbytes", "__len__"})  # fmt: skip
# What belongs to the object in autograd's books, whoever asks.
_BOOKS = frozenset({"requires_grad", "grad", "_grad", "grad_fn", "is_leaf", "retain_grad",
                    "retains_grad", "output_nr", "_version", "_backward_hooks"})  # fmt: skip
_COPIES = frozenset(
    {"clone", "detach", "to", "cpu", "cuda", "float", "double", "half", "bfloat16", "type", "pin_memory"}
)
_AUGMENTED = frozenset("add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split())


class Spread(NamedTuple):
    """How a rank's part lies in a DTensor."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def whole(self, part: Tensor) -> Tensor:
        """The DTensor of which this rank has `part`."""
        from torch.distributed.tensor import DTensor

        form: Any = {"shape": self.shape, "stride": self.stride}
        return DTensor.from_local(part, self.mesh, self.placements, run_check=False, **form)


class StreamState(Tensor):
    """n streams that read as one tensor.

    Attributes:
        channel_dim: of the trunk.
        reads_as: "mean"; or "itself": what came out where a stream ended, no state.
        streams: the same as a plain tensor in autograd's graph, for compiled code; None where it isn't in the graph.
        spread: of which DTensor this is a part, if it is.
        number: of the stream.
        turns: how often the module that ends the stream has passed it on.
        written: what stands here since somebody wrote to it in place.
    """

    channel_dim: ClassVar[int]
    reads_as: ClassVar[str]
    streams: Tensor | None
    spread: Spread | None
    number: int
    turns: int
    written: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is checkpoint:
            return _checkpoint(*args, **kwargs)
        name, first = _name_of(func), args[0] if args else None
        if isinstance(first, StreamState) and first.written is None:
            if name in _FORM:
                return func(_form(first), *args[1:], **kwargs)
            if name in _BOOKS:
                return _ask_books(name, func, first, args[1:], kwargs)
            if name == "requires_grad_":
                return _start_a_graph(first, *args[1:], **kwargs)
            if name == "register_hook":
                return _register_hook(first, *args[1:], **kwargs)
            if name == "contiguous":
                return first
            if name in _COPIES or (name == "view_as" and args[1] is first):
                return _copy(name, func, first, plain(args[1:]), plain(kwargs))
        if func is torch.autograd.grad:
            return _gradients(*args, **kwargs)
        if func is torch.autograd.backward:
            return _backward(*args, **kwargs)
        target = _written_to(name, args, kwargs)
        if target is None:
            return func(*plain(args), **plain(kwargs))
        return _write(target, func, args, kwargs)


def _kind(channel_dim: int, reads_as: str) -> type[StreamState]:
    name = f"StreamState_{reads_as}_{'last' if channel_dim == -1 else channel_dim}"
    return type(name, (StreamState,), {"channel_dim": channel_dim, "reads_as": reads_as, "__module__": __name__})


KINDS = {(dim, how): _kind(dim, how) for dim in (-1, 1) for how in ("mean", "itself")}


def _refuse(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    raise NotImplementedError(f"{func} below Python, on streams that have no memory")


# For streams that are no plain tensors themselves, fake ones say: only the attribute is read.
SHELLS = {
    key: type(kind.__name__, (kind,), {"__torch_dispatch__": classmethod(_refuse)}) for key, kind in KINDS.items()
}


def state(
    streams: Tensor, channel_dim: int, reads_as: str, number: int, turns: int, in_graph: bool = True
) -> StreamState:
    """Streams as a state. `in_graph`: whether the graph of `streams` is the one that gradients will take."""
    spread = None
    if is_dtensor(streams):
        dtensor: Any = streams
        spread = Spread(dtensor.device_mesh, dtensor.placements, dtensor.shape, dtensor.stride())
        streams = dtensor.to_local()
    if torch.compiler.is_dynamo_compiling() or type(streams) is Tensor:
        made = streams.as_subclass(KINDS[channel_dim, reads_as])
    else:
        form = streams if reads_as == "itself" else one_stream(streams, channel_dim)
        made = Tensor._make_wrapper_subclass(
            SHELLS[channel_dim, reads_as], form.shape, dtype=form.dtype, device=form.device, layout=form.layout,
            requires_grad=streams.requires_grad,
        )  # fmt: skip
    made.streams = streams if in_graph else None
    made.spread = spread
    made.number, made.turns, made.written = number, turns, None
    return made


def is_state(value: Any) -> bool:
    """Whether a value is n streams still."""
    return isinstance(value, StreamState) and value.written is None and type(value).reads_as != "itself"


def streams_of(state: StreamState) -> Tensor:
    """The streams, a plain tensor or a DTensor."""
    if state.streams is not None and (torch.compiler.is_compiling() or not _is_memory(state)):
        return _whole(state, state.streams)
    return in_eager(state) if torch.compiler.is_compiling() else _from_memory(state)


def _from_memory(state: StreamState) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        part = state.as_subclass(Tensor)
    return _whole(state, part)


def _whole(state: StreamState, part: Tensor) -> Tensor:
    """What lies as the state's memory does, a gradient say, as what the streams are."""
    return part if state.spread is None else state.spread.whole(part)


# The same for compiled code, whose graph ends there: `meet_dynamo` sees to it. A function of autograd that hands on its
# arguments, as FSDP's does, makes a state whose graph is known to autograd alone.
in_eager = _from_memory


def plain(value: Any) -> Any:
    """A value, or tuples, lists and dicts of values, with what states read as in place of them."""
    if isinstance(value, StreamState):
        return _value(value)
    if type(value) is tuple or type(value) is list:
        return type(value)([plain(item) for item in value])
    if type(value) is dict:
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[plain(item) for item in value])
    return value


def _is_memory(state: StreamState) -> bool:
    return state.streams is None or type(state.streams) is Tensor


def _value(state: StreamState) -> Tensor:
    if state.written is not None:
        return state.written
    how = type(state).reads_as
    streams = streams_of(state)
    return streams if how == "itself" else read_mean(streams, type(state).channel_dim)


def _form(state: StreamState) -> Tensor:
    streams = streams_of(state)
    return streams if type(state).reads_as == "itself" else one_stream(streams, type(state).channel_dim)


def _like(state: StreamState, streams: Tensor, in_graph: bool = True) -> StreamState:
    return _made(streams, type(state), state.number, state.turns, in_graph)


def _made(streams: Tensor, kind: type[StreamState], number: int, turns: int, in_graph: bool) -> StreamState:
    return state(streams, kind.channel_dim, kind.reads_as, number, turns, in_graph)


@constant_while_tracing
def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    return func.__self__.__name__ if name in ("__get__", "__set__", "__delete__") else name


def _copy(name: str, func: Any, state: StreamState, args: Any, kwargs: Any) -> Any:
    kwargs = {name: value for name, value in kwargs.items() if name != "memory_format"}  # a layout of the mean's
    if not args and not kwargs and func is Tensor.to:
        return state
    streams = streams_of(state)
    if name == "view_as":
        args = (streams,)
    copied = func(streams, *args, **kwargs)
    if not isinstance(copied, Tensor):
        return copied
    # A function of autograd that returns what it got asks for a view of it, without gradients, and has the graph later.
    return _like(state, copied, torch.is_grad_enabled() or not state.requires_grad)


def _checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Dynamo asks here what to do with a checkpointed region: the streams go in, and are a state inside again."""

    def run(*given: Any, **options: Any) -> Any:
        own = [_like(old, new) if is_state(old) else new for old, new in zip(args, given, strict=True)]
        return function(*own, **options)

    return checkpoint(run, *[streams_of(x) if is_state(x) else plain(x) for x in args], **kwargs)


def _ask_books(name: str, func: Any, state: StreamState, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        answer = func(state, *args, **kwargs)
        if name == "requires_grad" and answer is None and _is_memory(state):  # it was set
            state.streams = state.as_subclass(Tensor)
    if isinstance(answer, Tensor):
        # A leaf is a copy that checkpoints make, to hand on the gradients of the streams.
        whole = state.is_leaf or not is_state(state)
        return answer if whole else collapse_gradient(_whole(state, answer), type(state).channel_dim)
    return answer


def _start_a_graph(state: StreamState, requires_grad: bool = True) -> Tensor:
    """Somebody asks for the gradient of this very tensor, so it is no part of a stream any longer."""
    if requires_grad and not state.requires_grad:
        state.written = _value(state).detach().requires_grad_()
    return state


def _register_hook(state: StreamState, hook: Callable[[Tensor], Any]) -> Any:
    dim, whole = type(state).channel_dim, type(state).reads_as == "itself"

    def seen(gradient: Tensor) -> Any:
        all_ranks = _whole(state, gradient)
        other: Any = hook(all_ranks if whole else collapse_gradient(all_ranks, dim))
        if other is None:
            return None
        other = other if whole else spread_gradient(other, all_ranks, dim)
        return other.to_local() if is_dtensor(other) else other

    with torch._C.DisableTorchFunctionSubclass():
        if _is_memory(state) and not torch.compiler.is_compiling():
            with torch.enable_grad():  # whatever the mode is, by the state itself, or the hook would not see it
                state.streams = state.as_subclass(Tensor)
        return state.register_hook(seen)


def _gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with torch.enable_grad():
        outputs = plain(outputs)
    given = tuple(x.written if isinstance(x, StreamState) and x.written is not None else x for x in given)
    with torch._C.DisableTorchFunctionSubclass():  # the objects themselves are in the graph
        found = torch.autograd.grad(outputs, given, *plain(args), **plain(kwargs))
    return tuple(
        gradient if gradient is None or not is_state(x) else collapse_gradient(_whole(x, gradient), type(x).channel_dim)
        for x, gradient in zip(given, found, strict=True)
    )


def _backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
    """Reentrant checkpoints run it with the gradients of the streams."""
    roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    given = (grad_tensors,) if isinstance(grad_tensors, Tensor) else tuple(grad_tensors or [None] * len(roots))
    with torch.enable_grad():  # whatever the mode is, what a state reads as is part of its graph
        own = [
            root if is_state(root) and gradient is not None and gradient.dim() > root.dim() else plain(root)
            for root, gradient in zip(roots, given, strict=True)
        ]
    with torch._C.DisableTorchFunctionSubclass():  # the inputs are the objects themselves
        torch.autograd.backward(own, None if grad_tensors is None else plain(given), *args, **kwargs)


def _written_to(name: str, args: Any, kwargs: Any) -> StreamState | None:
    """The state that a function writes to, if it does."""
    target = kwargs.get("out")
    if target is None and args:
        augmented = name.startswith("__i") and name[3:-2] in _AUGMENTED
        in_place = name.endswith("_") and not name.startswith("__")
        if augmented or in_place or name == "__setitem__" or kwargs.get("inplace") is True:
            target = args[0]
    return target if isinstance(target, StreamState) else None


def _write(target: StreamState, func: Any, args: Any, kwargs: Any) -> Any:
    """Whoever holds the state sees what was written: from here on it is a plain tensor."""
    value = _value(target)

    def swap(item: Any) -> Any:
        return value if item is target else plain(item)

    result = func(*[swap(item) for item in args], **{name: swap(item) for name, item in kwargs.items()})
    target.written = value
    return result

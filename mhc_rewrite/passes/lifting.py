"""Operations on the trunk: which ones act on every stream alone, and how each is written on the streams.

One table a question. `carried` says which input of an operation is the trunk, if the operation may be lifted at all;
`write` puts the lifted operation into a graph.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.passes.axes import axis_operation, indexing
from mhc_rewrite.sites import streams

_NORMALIZE = ("input", "p", "dim", "eps")


@dataclass(frozen=True)
class Lift:
    """One way to lift a node.

    Attributes:
        node: the operation.
        trunk: its input that is the trunk.
        kind: a key of `_WRITERS`.
        operands: other tensors it reads, gates say: they may not depend on the trunk.
        channel_dims: the trunk's layouts for which it acts per token.
        in_order: whether every token is still there, in the same order.
        linear: whether the mean of the streams comes out as it would by itself, whatever the streams are; offsets that
            are the same for all of them may be added.
    """

    node: fx.Node
    trunk: fx.Node
    kind: str
    operands: tuple[fx.Node, ...] = ()
    channel_dims: tuple[int, ...] = (-1, 1)
    in_order: bool = True
    linear: bool = True


def carried(node: fx.Node, carrier: nn.Module) -> list[Lift]:
    """The ways to lift `node`: none, one, or two where either operand of a product or sum may be the trunk."""
    shape = node.meta.get("shape")
    if shape is None or node.op not in ("call_function", "call_method", "call_module"):
        return []
    inputs = [a for a in node.all_input_nodes if "shape" in a.meta]
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_module":
        return _carried_by_module(node, carrier)
    name = vocabulary.name_of(node.target)
    bare = name.rstrip("_")
    if copied := _copied(node, name):
        return [Lift(node, copied, "same")]
    if bare in vocabulary.DROPOUT and first in inputs:
        return [Lift(node, first, "dropout")]
    if candidates := _pointwise_operands(node, name, bare, inputs):
        reads = inputs if bare not in ("to", "type_as") else []  # these read no more than another tensor's form
        return [
            Lift(
                node,
                trunk,
                "operand",
                tuple(other for other in reads if other is not trunk),
                linear=_keeps_means(node, trunk),
            )
            for trunk in candidates
            if trunk.meta["shape"] == shape
            and (trunk.meta["dtype"].is_floating_point or trunk.meta["dtype"].is_complex)
        ]
    if first in inputs and (channel_dims := _normalizes(node, name)):
        gains = tuple(other for other in inputs if other is not first)
        return [Lift(node, first, "norm", gains, channel_dims, linear=False)]
    moved = axis_operation(node, first.meta["shape"]) if first in inputs else None
    if moved is not None:
        operands = tuple(other for other in inputs if other is not first)
        return [Lift(node, first, "axes", operands, moved.channel_dims, moved.in_order)]  # type: ignore[arg-type]
    if name == "setitem" and isinstance(node.args[2], (int, float)):  # x[mask] = 0
        written = indexing(node, len(shape))
        operands = tuple(other for other in inputs if other is not first)
        return [Lift(node, first, "written", operands, written.channel_dims)] if written else []  # type: ignore[arg-type]
    return []


def _copied(node: fx.Node, name: str) -> fx.Node | None:
    """What a node is a mere copy of: `x + 0`, as Python's `sum` begins; all of a tensor written with another."""
    if name in vocabulary.ADD and any(isinstance(term, (int, float)) and term == 0 for term in node.args):
        source: Any = next(iter(node.all_input_nodes), None)
    elif name == "copy_":
        source = node.args[1]
    elif name == "setitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        source = node.args[2] if all(entry in (slice(None), ...) for entry in index) else None
    else:
        return None
    same = isinstance(source, fx.Node) and all(source.meta.get(key) == node.meta[key] for key in ("shape", "dtype"))
    return source if same else None


def _pointwise_operands(node: fx.Node, name: str, bare: str, inputs: list[fx.Node]) -> list[fx.Node]:
    """The tensors of an operation element by element that may be the trunk."""
    if bare in vocabulary.POINTWISE:
        return inputs[:1]
    if name in vocabulary.SCALING or bare in vocabulary.OFFSETS:
        return inputs if name in vocabulary.ADD or "mul" in name or "sub" in name else inputs[:1]
    if name == "where":  # torch.where(condition, x, y), x.where(condition, y)
        values = [*node.args[:1], *node.args[2:]] if node.op == "call_method" else list(node.args[1:])
        return [value for value in values if value in inputs]  # type: ignore[misc]
    return []


def _keeps_means(node: fx.Node, trunk: fx.Node) -> bool:
    name = vocabulary.name_of(node.target)
    if "div" in name:
        divided = node.args[0] if node.args else node.kwargs.get("input")
        return divided is trunk and node.kwargs.get("rounding_mode") is None
    return name in vocabulary.KEEPING_MEANS or name.rstrip("_") in vocabulary.KEEPING_MEANS


def _normalizes(node: fx.Node, name: str) -> tuple[int, ...]:
    """The layouts in which a function is a norm over the features alone."""
    if name == "normalize":
        given, rank = {**dict(zip(_NORMALIZE, node.args, strict=False)), **node.kwargs}, len(node.meta["shape"])
        axis = given.get("dim", 1)
        return (-1,) if axis in (-1, rank - 1) else (1,) if axis in (1, 1 - rank) else ()
    over = node.kwargs.get("normalized_shape", node.args[1] if len(node.args) > 1 else ())
    alone = name in ("layer_norm", "rms_norm") and isinstance(over, (tuple, list)) and len(over) == 1
    return (-1,) if alone else ()


def _carried_by_module(node: fx.Node, carrier: nn.Module) -> list[Lift]:
    if lift := _applied_by_module(node, carrier):
        return [lift]
    back = [source for source in node.all_input_nodes if source.name == node.meta["gives_back"]]
    return [Lift(node, source, "given back") for source in back]  # an adapter that has nothing to add in this call, say


def _applied_by_module(node: fx.Node, carrier: nn.Module) -> Lift | None:
    given = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, fx.Node)]
    if len(given) != 1 or given != node.all_input_nodes or node.meta["mixes"]:
        return None
    (first,) = given
    if first.meta.get("shape") != node.meta["shape"]:
        return None
    module = carrier.get_submodule(str(node.target))
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return Lift(node, first, "dropout module")

    def call(value: Tensor) -> Tensor:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: value)
        result: Tensor = module(*args, **kwargs)
        return result

    channel_dims, linear = tried(module, call, first.meta["shape"], first.meta["dtype"])
    if not channel_dims:
        return None
    in_place = any(getattr(part, "inplace", False) for part in module.modules())
    return Lift(node, first, "module in place" if in_place else "module", channel_dims=channel_dims, linear=linear)


def tried(
    module: nn.Module, call: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[int, ...], bool]:
    """The trunk layouts for which a module, called in this way, treats every stream as if it were alone; and whether it
    keeps means. By trying, in training mode too, where BatchNorm's statistics would run over all streams.
    """
    if any(isinstance(child, nn.modules.dropout._DropoutNd) for child in module.modules()):
        return (), False
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    if device.type == "meta":
        alone = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
        return (-1, 1) if alone else (), isinstance(module, nn.Identity)
    generator = torch.Generator().manual_seed(0)
    # Of different means and sizes: statistics that run over both are then neither's.
    ones = [
        (size * torch.randn(shape, generator=generator, dtype=torch.float32) + mean).to(device, dtype)
        for size, mean in ((1, 0), (3, 2))
    ]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-2
    found = []
    for channel_dim in (-1, 1) if len(shape) > 2 else (-1,):
        try:
            if all(_acts_alone(module, call, ones, channel_dim, training, tolerance) for training in (False, True)):
                found.append(channel_dim)
        except Exception:
            continue  # it can't take the streams' shape, so it can't be lifted this way
    return tuple(found), bool(found) and all(
        _averages(module, call, ones, training, tolerance) for training in (False, True)
    )


def _acts_alone(
    module: nn.Module, call: Callable[[Tensor], Tensor], ones: list[Tensor], channel_dim: int, training: bool,
    tolerance: float,
) -> bool:  # fmt: skip
    with undisturbed(module):
        module.train(training)
        dim = streams.stream_dim(channel_dim)
        alone = torch.stack([call(x.clone()) for x in ones], dim)
        together = torch.stack(ones, dim)
        lifted = call(together) if channel_dim == -1 else streams.fold(call, together)
    return lifted.shape == alone.shape and torch.allclose(lifted, alone, atol=tolerance, rtol=tolerance)


def _averages(
    module: nn.Module, call: Callable[[Tensor], Tensor], ones: list[Tensor], training: bool, tolerance: float
) -> bool:
    with undisturbed(module):
        module.train(training)
        whole = call(torch.stack(ones).mean(0))
        parts = torch.stack([call(x.clone()) for x in ones]).mean(0)
    return torch.allclose(whole, parts, atol=tolerance, rtol=tolerance)


# -- writing ---------------------------------------------------------------------------------------------------------


def write(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    """Puts the lifted operation into `graph`.

    Args:
        graph: the graph under construction, its insertion point where the operation belongs.
        lift: what to write.
        source: the streams, in `graph`.
        mapped: node of the old graph -> node of the new one, for everything but the trunk.
        channel_dim: the trunk's layout.
    """
    return _WRITERS[lift.kind](graph, lift, source, mapped, channel_dim)


def _operand(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    rank = len(lift.trunk.meta["shape"])

    def aligned(other: fx.Node) -> Any:
        operand = mapped(other)
        if "shape" not in other.meta:
            return operand
        return graph.call_function(streams.align, (operand, rank, channel_dim))

    node = lift.node
    args, kwargs = _arguments(lift, source, aligned)
    # Streams may share memory at the entry, so what was in place becomes a new tensor.
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    if isinstance(node.target, str):
        return graph.call_method(node.target.rstrip("_"), args, kwargs)
    return graph.call_function(_out_of_place(node.target), args, kwargs)


def _norm(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    args, kwargs = _arguments(lift, source, mapped)
    if vocabulary.name_of(lift.node.target) == "normalize":
        dim = -1 if channel_dim == -1 else 1 - len(lift.trunk.meta["shape"])
        args, kwargs = (), {**dict(zip(_NORMALIZE, args, strict=False)), **kwargs, "dim": dim}
    target: Any = lift.node.target
    return graph.call_function(target, args, kwargs)


def _same(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    return source


def _axes(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    operation = axis_operation(lift.node, lift.trunk.meta["shape"])
    assert operation is not None
    args = (source, *fx.node.map_arg(operation.arguments(channel_dim), mapped))
    if isinstance(operation.target, str):
        return graph.call_method(operation.target, args)
    return graph.call_function(operation.target, args)


def _written(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    operation = indexing(lift.node, len(lift.trunk.meta["shape"]))
    assert operation is not None
    (index,) = fx.node.map_arg(operation.arguments(channel_dim), mapped)
    return graph.call_function(streams.with_number, (source, index, lift.node.args[2]))


def _dropout(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    args, kwargs = _arguments(lift, source, mapped)
    given = dict(zip(("input", "p", "train"), args, strict=False)) | dict(kwargs)
    training = given.get("training", given.get("train", True))
    return graph.call_function(streams.shared_dropout, (source, given.get("p", 0.5), training, channel_dim))


def _module(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    args, kwargs = _arguments(lift, source, mapped)
    if channel_dim == -1:
        return graph.call_module(str(lift.node.target), args, kwargs)
    return graph.call_function(streams.fold, (graph.get_attr(str(lift.node.target)), *args), kwargs)


def _module_in_place(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    """On a copy: streams may share memory, or be a view of an operator's result, which nobody may write to."""
    own = graph.call_method("clone", (source,), {"memory_format": torch.contiguous_format})
    return _module(graph, lift, own, mapped, channel_dim)


def _given_back(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    """It gets the mean. What it gives back is known when it does."""
    mean = graph.call_function(streams.read_mean, (source, channel_dim))
    result = graph.call_module(str(lift.node.target), *_arguments(lift, mean, mapped))
    return graph.call_function(streams.unless_changed, (source, mean, result, channel_dim))


def _dropout_module(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    module = graph.get_attr(str(lift.node.target))
    return graph.call_function(streams.shared_dropout_module, (module, source, channel_dim))


def _arguments(lift: Lift, source: fx.Node, mapped: Any) -> tuple[Any, Any]:
    def swap(node: fx.Node) -> Any:
        return source if node is lift.trunk else mapped(node)

    return fx.node.map_arg(lift.node.args, swap), fx.node.map_arg(lift.node.kwargs, swap)


def _out_of_place(target: Any) -> Any:
    """`operator.imul` -> `operator.mul`, `torch.relu_` -> `torch.relu`."""
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target and name.startswith("i"):
        return getattr(operator, name[1:], target)
    if name.endswith("_") and not name.endswith("__"):
        home = inspect.getmodule(target) or torch
        return getattr(home, name[:-1], getattr(torch, name[:-1], target))
    return target


_WRITERS = {
    "same": _same,
    "norm": _norm,
    "operand": _operand,
    "axes": _axes,
    "written": _written,
    "dropout": _dropout,
    "dropout module": _dropout_module,
    "module": _module,
    "module in place": _module_in_place,
    "given back": _given_back,
}

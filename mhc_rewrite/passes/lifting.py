"""Operations on the trunk: which ones act on every stream alone, and how each is written on the streams.

One table a question. `carried` says which input of an operation is the trunk, if the operation may be lifted at all;
`write` puts the lifted operation into a graph.
"""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.sites import streams


@dataclass(frozen=True)
class Lift:
    """One way to lift a node.

    Attributes:
        node: the operation.
        trunk: its input that is the trunk.
        kind: a key of `_WRITERS`.
        operands: other tensors it reads, gates say: they may not depend on the trunk.
        channel_dims: the trunk's layouts for which it acts per token.
    """

    node: fx.Node
    trunk: fx.Node
    kind: str
    operands: tuple[fx.Node, ...] = ()
    channel_dims: tuple[int, ...] = (-1, 1)


def carried(node: fx.Node, carrier: nn.Module) -> list[Lift]:
    """The ways to lift `node`: none, one, or two where either operand of a product or sum may be the trunk."""
    shape = node.meta.get("shape")
    if shape is None or node.op not in ("call_function", "call_method", "call_module"):
        return []
    inputs = [a for a in node.all_input_nodes if "shape" in a.meta]
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if node.op == "call_module":
        return _carried_by_module(node, first, inputs, carrier)
    name = vocabulary.name_of(node.target)
    same = first is not None and first.meta.get("shape") == shape
    bare = name.rstrip("_")
    if bare in vocabulary.DROPOUT and same:
        return [Lift(node, first, "dropout")]  # type: ignore[arg-type]
    if (name in vocabulary.POINTWISE or bare in vocabulary.POINTWISE) and same:
        return [Lift(node, first, "pointwise")]  # type: ignore[arg-type]
    if name in vocabulary.SCALING or name in vocabulary.ADD:
        either = inputs if name in vocabulary.ADD or "mul" in name else inputs[:1]
        return [
            Lift(node, trunk, "operand", tuple(other for other in inputs if other is not trunk))
            for trunk in either
            if trunk.meta["shape"] == shape and trunk.meta["dtype"].is_floating_point
        ]
    if name in ("view", "reshape") and first is not None and len(inputs) == 1 and _keeps_last_axis(first, node):
        return [Lift(node, first, "reshape", channel_dims=(-1,))]
    if name in ("flatten", "transpose") and first is not None and _leading_axes(node, first):
        return [Lift(node, first, "pointwise", channel_dims=(-1,))]
    if name == "getitem" and first is not None and "shape" in first.meta and _slices_leading_axes(node, first):
        return [Lift(node, first, "pointwise", channel_dims=(-1,))]
    if name == "unflatten" and first is not None and len(node.args) == 3 and isinstance(node.args[1], int) \
            and 0 <= node.args[1] < len(first.meta["shape"]) - 1:  # fmt: skip
        return [Lift(node, first, "pointwise", channel_dims=(-1,))]
    return []


def _carried_by_module(node: fx.Node, first: fx.Node | None, inputs: list[fx.Node], carrier: nn.Module) -> list[Lift]:
    if first is None or inputs != [first] or first.meta.get("shape") != node.meta["shape"] or node.meta["mixes"]:
        return []
    module = carrier.get_submodule(str(node.target))
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [Lift(node, first, "dropout module")]
    if channel_dims := acts_per_token(module, first.meta["shape"], first.meta["dtype"]):
        return [Lift(node, first, "module", channel_dims=channel_dims)]
    return []


def acts_per_token(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The trunk layouts for which a module treats every stream as if it were alone: found by trying.

    It is tried in training mode too, where BatchNorm's statistics would run over all streams.
    """
    if any(isinstance(child, nn.modules.dropout._DropoutNd) for child in module.modules()):
        return ()
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    if device.type == "meta":
        return (-1, 1) if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()) else ()
    generator = torch.Generator().manual_seed(0)
    ones = [torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype) for _ in range(2)]
    tolerance = 1e-6 if dtype == torch.float64 else 1e-2
    found = []
    for channel_dim in (-1, 1) if len(shape) > 2 else (-1,):
        try:
            if all(_acts_alone(module, ones, channel_dim, training, tolerance) for training in (False, True)):
                found.append(channel_dim)
        except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):
            continue  # it can't take the streams' shape, so it can't be lifted this way
    return tuple(found)


def _acts_alone(module: nn.Module, ones: list[Tensor], channel_dim: int, training: bool, tolerance: float) -> bool:
    with undisturbed(module):
        module.train(training)
        dim = streams.stream_dim(channel_dim)
        alone = torch.stack([module(x.clone()) for x in ones], dim)
        together = torch.stack(ones, dim)
        lifted = module(together) if channel_dim == -1 else streams.fold(module, together)
    return lifted.shape == alone.shape and torch.allclose(lifted, alone, atol=tolerance, rtol=tolerance)


def _keeps_last_axis(first: fx.Node, node: fx.Node) -> bool:
    before, after = first.meta["shape"], node.meta["shape"]
    return len(before) > 1 and len(after) > 1 and before[-1] == after[-1] and _numel(before) == _numel(after)


def _slices_leading_axes(node: fx.Node, trunk: fx.Node) -> bool:
    """Whether an index takes slices of axes before the last and keeps all axes: `x[:, :k]`, `x[:, :k, :]`."""
    key = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    rank = len(trunk.meta["shape"])
    leading, last = key[: rank - 1], key[rank - 1 :]
    return all(isinstance(part, slice) for part in leading) and list(last) in ([], [slice(None)])


def _leading_axes(node: fx.Node, first: fx.Node) -> bool:
    """Whether flatten or transpose names axes before the last, counted from the front."""
    axes = (*node.args[1:], *node.kwargs.values())
    rank = len(first.meta["shape"])
    return len(axes) == 2 and all(isinstance(axis, int) and 0 <= axis < rank - 1 for axis in axes)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


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


def _pointwise(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    node = lift.node
    args, kwargs = _arguments(lift, source, mapped)
    # Streams may share memory at the entry, so what was in place becomes a new tensor.
    kwargs = {name: value for name, value in kwargs.items() if name != "inplace"}
    if isinstance(node.target, str):
        return graph.call_method(node.target.rstrip("_"), args, kwargs)
    return graph.call_function(_out_of_place(node.target), args, kwargs)


def _operand(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    rank = len(lift.trunk.meta["shape"])

    def aligned(other: fx.Node) -> Any:
        operand = mapped(other)
        if "shape" not in other.meta:
            return operand
        return graph.call_function(streams.align, (operand, rank, channel_dim))

    return _pointwise(graph, lift, source, aligned, channel_dim)


def _reshape(graph: fx.Graph, lift: Lift, source: fx.Node, mapped: Any, channel_dim: int) -> fx.Node:
    args, kwargs = _arguments(lift, source, mapped)
    return graph.call_function(streams.reshape_tokens, (*args, *kwargs.values()))


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
    "pointwise": _pointwise,
    "operand": _operand,
    "reshape": _reshape,
    "dropout": _dropout,
    "dropout module": _dropout_module,
    "module": _module,
}

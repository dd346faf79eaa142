"""Operations that move, fold or cut a tensor's axes, and the same operations on streams.

Streams have one axis more than the trunk, next to C: (..., n, C), or (B, n, C, ...) where channels are first. What
leaves C where it is works on them as well, once its axes are counted from the side that has no new axis: from the front
where C is last, from the end where channels are first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.sites import streams

# Parameters behind the tensor, with their defaults; `...` where there is none.
_PARAMETERS: dict[str, dict[str, Any]] = {
    "transpose": {"dim0": ..., "dim1": ...},
    "swapdims": {"dim0": ..., "dim1": ...},
    "swapaxes": {"axis0": ..., "axis1": ...},
    "movedim": {"source": ..., "destination": ...},
    "moveaxis": {"source": ..., "destination": ...},
    "permute": {"dims": ...},
    "flatten": {"start_dim": 0, "end_dim": -1},
    "unflatten": {"dim": ..., "sizes": ...},
    "unsqueeze": {"dim": ...},
    "squeeze": {"dim": ...},
    "select": {"dim": ..., "index": ...},
    "narrow": {"dim": ..., "start": ..., "length": ...},
    "index_select": {"dim": ..., "index": ...},
    "repeat_interleave": {"repeats": ..., "dim": ...},
    "roll": {"shifts": ..., "dims": ...},
    "flip": {"dims": ...},
}
_AXES = {"dim", "dims", "dim0", "dim1", "axis0", "axis1", "source", "destination", "start_dim", "end_dim"}
_IN_ORDER = {"flatten", "unflatten", "unsqueeze", "squeeze", "view", "reshape"}
_WHOLE = slice(None)


@dataclass(frozen=True)
class AxisOperation:
    """One such operation on a trunk.

    Attributes:
        channel_dims: the trunk's layouts in which it leaves C alone.
        in_order: whether every token is still there, in the same order.
        arguments: channel_dim -> its arguments behind the streams.
        target: what is called with the streams and these.
    """

    channel_dims: tuple[int, ...]
    in_order: bool
    arguments: Callable[[int], tuple[Any, ...]]
    target: Any


def axis_operation(node: fx.Node, before: tuple[int, ...]) -> AxisOperation | None:
    """What `node` does to the axes of its first tensor, whose shape is `before`; None for anything else."""
    name, rank = vocabulary.name_of(node.target), len(before)
    if node.target is getattr and node.args[1] == "mT" and rank > 2:
        return AxisOperation((1,) if rank > 3 else (), False, lambda _: (-2, -1), torch.transpose)
    if name in ("view", "reshape"):
        return _reshape(node, before)
    if name == "getitem":
        return indexing(node, rank)
    if name == "pad":
        return _pad(node, rank)
    if name not in _PARAMETERS:
        return None
    given = _bound(name, node)
    if given is None:
        return None
    grown = rank + 1 if name == "unsqueeze" else rank
    axes = {key: _axes(value, grown) for key, value in given.items() if key in _AXES}
    if None in axes.values():
        return None
    touched = _touched(name, [axis for found in axes.values() for axis in found or ()])

    def arguments(channel_dim: int) -> tuple[Any, ...]:
        def again(axis: int) -> int:
            return axis % grown if channel_dim == -1 else axis % grown - grown

        if name == "permute":
            dims = [axis for axis in axes["dims"] or ()]
            at = rank - 1 if channel_dim == -1 else 1
            wide = [axis if axis < at else axis + 1 for axis in dims]
            return (tuple([*wide[:at], at, *wide[at:]]),)
        return tuple(_mapped(value, again) if key in _AXES else value for key, value in given.items())

    # A new axis may come directly before C.
    return AxisOperation(_layouts(touched, rank, grown - 1), name in _IN_ORDER, arguments, node.target)


def _bound(name: str, node: fx.Node) -> dict[str, Any] | None:
    parameters = _PARAMETERS[name]
    args: tuple[Any, ...] = node.args[1:]
    if parameters.keys() == {"dims"} and args and isinstance(args[0], int):
        args = (args,)  # x.permute(0, 2, 1)
    given = {**parameters, **dict(zip(parameters, args, strict=False)), **node.kwargs}
    return given if given.keys() == parameters.keys() and ... not in given.values() else None


def _axes(value: Any, rank: int) -> tuple[int, ...] | None:
    """Axes counted from the front; None where they are not known."""
    axes = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(axis % rank for axis in axes) if all(isinstance(axis, int) for axis in axes) else None


def _mapped(value: Any, function: Callable[[int], int]) -> Any:
    return tuple(map(function, value)) if isinstance(value, (tuple, list)) else function(value)


def _touched(name: str, axes: list[int]) -> set[int]:
    """The axes that are no longer what or where they were."""
    if name == "permute":
        return {axis for axis, source in enumerate(axes) if axis != source}
    if name in ("movedim", "moveaxis", "flatten"):
        return set(range(min(axes), max(axes) + 1)) if len(set(axes)) > 1 else set()
    if name in ("transpose", "swapaxes", "swapdims") and axes[0] == axes[1]:
        return set()
    return set(axes)


def _layouts(touched: set[int], rank: int, end: int) -> tuple[int, ...]:
    """The layouts whose C is not touched; `end` is the first axis that may not be where C is last."""
    last = (-1,) if all(axis < end for axis in touched) else ()
    first = (1,) if rank > 2 and all(axis > 1 for axis in touched) else ()
    return last + first


def _reshape(node: fx.Node, before: tuple[int, ...]) -> AxisOperation | None:
    after = node.meta["shape"]
    sizes = node.args[1:] or tuple(node.kwargs.values())
    if torch.Size(before).numel() != torch.Size(after).numel() or any(isinstance(s, torch.dtype) for s in sizes):
        return None
    last = (-1,) if min(len(before), len(after)) > 1 and before[-1] == after[-1] else ()
    first = (1,) if min(len(before), len(after)) > 2 and before[:2] == after[:2] else ()
    return AxisOperation(last + first, True, lambda channel_dim: (channel_dim, *sizes), streams.reshape_tokens)


def indexing(node: fx.Node, rank: int) -> AxisOperation | None:
    """`x[:, :k]`, `x[:, 0]`, `x[..., 1:, :]`, `x[:, kept]`, `x[:, None]`; the same of what is written to."""
    index: Any = node.args[1]
    entries = list(index) if isinstance(index, (tuple, list)) else [index]
    if isinstance(index, list):
        return None
    consumed = [_consumed(entry) for entry in entries]
    if None in consumed or sum(isinstance(entry, fx.Node) and "shape" in entry.meta for entry in entries) > 1:
        return None
    missing = rank - sum(count or 0 for count in consumed)
    at = next((i for i, entry in enumerate(entries) if entry is Ellipsis), len(entries))
    entries[at : at + 1] = [_WHOLE] * missing
    consumed[at : at + 1] = [1] * missing
    tensors = any(isinstance(entry, fx.Node) and "shape" in entry.meta for entry in entries)
    if missing < 0 or (tensors and any(isinstance(entry, int) or entry is None for entry in entries)):
        return None
    touched, axis = set(), 0
    for entry, count in zip(entries, consumed, strict=True):
        if entry is None:
            touched.add(min(axis, rank - 2) if axis < rank else axis)  # a new axis may come directly before C
        elif entry != _WHOLE:
            touched.update(range(axis, axis + (count or 0)))
        axis += count or 0

    def arguments(channel_dim: int) -> tuple[Any, ...]:
        if channel_dim == 1:
            return ((_WHOLE, *entries),)  # B, n and C stay whole
        return (tuple(entries[:-1]),)

    in_order = all(entry is None or entry == _WHOLE for entry in entries)
    return AxisOperation(_layouts(touched, rank, rank - 1), in_order, arguments, operator.getitem)


def _consumed(entry: Any) -> int | None:
    """How many axes an entry of an index stands for; None where that is not known."""
    if entry is None or entry is Ellipsis:
        return 0
    if isinstance(entry, fx.Node) and "shape" in entry.meta:
        return len(entry.meta["shape"]) if entry.meta["dtype"] == torch.bool else 1
    return 1 if isinstance(entry, (int, slice, fx.Node)) and not isinstance(entry, bool) else None


def _pad(node: fx.Node, rank: int) -> AxisOperation | None:
    """`F.pad(x, (0, 0, 0, k))`: pairs from the last axis on."""
    names = ("pad", "mode", "value")
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    pad: Any = given["pad"]
    if not isinstance(pad, (tuple, list)) or given.get("mode", "constant") != "constant":
        return None
    touched = {rank - 1 - k // 2 for k, width in enumerate(pad) if width != 0}
    rest = ("constant", given.get("value"))

    def arguments(channel_dim: int) -> tuple[Any, ...]:
        wide = (*pad[:2], 0, 0, *pad[2:]) if channel_dim == -1 else tuple(pad)
        return (wide, *rest)

    return AxisOperation(_layouts(touched, rank, rank - 1), False, arguments, node.target)

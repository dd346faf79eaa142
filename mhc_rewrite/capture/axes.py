"""Follows a tensor's axes through operations, and notes what shows which of them carries the features.

Each axis of a result is a product of axes of the tensor that is followed, or parts of them, or nothing of it. So
`x.flatten(2).transpose(1, 2)` of an image has the axes batch, height times width, and channels; a linear layer on it
is evidence for the channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.capture.vocabulary import CONVOLUTIONS, PERMUTING, REDUCTIONS, name_of

# A stretch of an axis: the followed tensor's axes that it runs over, and its size.
Stretch = tuple[frozenset[int], int]
Axis = tuple[Stretch, ...]  # slowest first
Axes = tuple[Axis, ...]

# Kinds of evidence for an axis. Parameters stand along it: a norm's gain, a bias or a layer scale; the weight of an
# operator that mixes its tensor's last axis; that of one that mixes the axis of channels; that of an einsum that mixes
# another; a matrix from the left, which mixes the axis before it. Without parameters: an average or a norm along it.
AFFINE, LAST, CHANNEL, INNER, ROWS, REDUCED = "affine", "last", "channel", "inner", "rows", "reduced"

_SAME_ELEMENTS = frozenset("view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as".split())
_PARTS = frozenset(
    "chunk split tensor_split narrow split_with_sizes index_select gather cat concat concatenate".split()
)
_UNFOLLOWED = frozenset("pixel_shuffle pixel_unshuffle channel_shuffle unfold fold as_strided".split())
_SUMS = REDUCTIONS | frozenset("sum amax amin prod logsumexp max min argmax argmin".split())


@dataclass
class Followed:
    """What a child does with one of its tensors.

    Attributes:
        evidence: (axis of that tensor, kind) -> how often.
        result: the axes of what it returns, in terms of that tensor; by position where it returns several.
    """

    evidence: Counter[tuple[int, str]] = field(default_factory=Counter)
    result: dict[int | None, Axes] = field(default_factory=dict)


class AxisFollower:
    """Follows one tensor. `key` names tensors, by ids while running and by nodes in a graph; `shape` tells theirs."""

    def __init__(
        self, start: Any, key: Callable[[Any], Hashable | None], shape: Callable[[Any], Sequence[int] | None],
        parameters: set[Hashable],
    ) -> None:  # fmt: skip
        self.key, self.shape, self.parameters = key, shape, parameters
        self.axes: dict[Hashable, Axes] = {key(start): _own(_sizes(shape(start)))}
        self.items: dict[Hashable, dict[int | None, Axes]] = {}  # of results that are several tensors
        self.evidence: Counter[tuple[int, str]] = Counter()

    def step(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        """One operation. `output` is its result, a tensor or several."""
        name = name_of(target)
        operands = _flat((kwargs.get("input"), args, kwargs))
        followed = [value for value in operands if self.key(value) in self.axes]
        if not followed:
            self._item(name, args, output)
            return
        shape = self.shape(output)
        if name == "setitem" or name in _UNFOLLOWED:
            return
        given = [kwargs[first] for first in ("input", "self") if first in kwargs] + list(args)
        given += [kwargs[second] for second in ("other", "mat2", "tensor2") if second in kwargs]
        try:
            axes = self._result(name, given, kwargs, followed, operands, shape)
        except (IndexError, RuntimeError, TypeError, ValueError):
            return  # called in a way that is not understood: followed no further
        if axes is None:
            return
        if shape is not None:
            self._note(output, axes)
        else:
            self.items[self.key(output)] = {None: axes}
            for item in output if isinstance(output, (tuple, list)) else ():
                if self.shape(item) is not None:
                    self._note(item, axes)

    def enter(self, source: Any, child: Followed, output: Any) -> None:
        """A child that took `source` and is known to do `child` with it."""
        axes = self.axes.get(self.key(source))
        if axes is None or any(axis >= len(axes) for axis, _ in child.evidence):
            return
        for (axis, kind), count in child.evidence.items():
            self._vote(axes[axis], kind, count)
        results = {i: tuple(_translated(axis, axes) for axis in result) for i, result in child.result.items()}
        if self.shape(output) is not None and None in results:
            self._note(output, results[None])
        elif results:
            self.items.setdefault(self.key(output), {}).update(results)

    def _item(self, name: str, args: Sequence[Any], output: Any) -> None:
        """One of several results."""
        items = self.items.get(self.key(args[0])) if name == "getitem" and args else None
        if items is not None and isinstance(args[1], int) and self.shape(output) is not None:
            axes = items.get(args[1], items.get(None))
            if axes is not None:
                self._note(output, axes)

    def _note(self, output: Any, axes: Axes) -> None:
        sizes = _sizes(self.shape(output))
        if len(axes) == len(sizes):
            self.axes.setdefault(self.key(output), tuple(_fitted(axis, size) for axis, size in zip(axes, sizes)))

    def _vote(self, axis: Axis, kind: str, count: int = 1) -> None:
        found = single(axis)
        if found is not None:
            self.evidence[found, kind] += count

    # -- one operation -----------------------------------------------------------------------------------------------

    def _result(
        self, name: str, args: list[Any], kwargs: dict[str, Any], followed: list[Any], operands: list[Any],
        shape: Sequence[int] | None,
    ) -> Axes | None:  # fmt: skip
        source = followed[0]
        axes = self.axes[self.key(source)]
        first = bool(args) and args[0] is source
        if name in ("linear", "layer_norm", "rms_norm", "lstm", "gru", "rnn_tanh", "rnn_relu",
                    "multi_head_attention_forward"):  # fmt: skip
            return self._last(name, args, kwargs, axes) if first else None
        if name in CONVOLUTIONS or (name.endswith("_norm") and name in ("batch_norm", "group_norm", "instance_norm")):
            return self._channels(name, args, kwargs, axes) if first else None
        if name in ("matmul", "rmatmul", "imatmul", "mm", "bmm", "baddbmm", "addmm"):
            left, right = args[1:3] if name in ("baddbmm", "addmm") else args[1::-1] if name == "rmatmul" else args[:2]
            return self._product(left, right, shape)
        if name == "einsum":
            return self._einsum(args)
        if name == "scaled_dot_product_attention":
            return axes if first else None
        if name in _SUMS and (reduced := _axes_named(args, kwargs, len(axes))) is not None:
            return self._reduced(name, reduced, kwargs, args, axes)
        if name in PERMUTING:
            return tuple(axes[i] for i in _permuted(name, len(axes), args[1:], kwargs))
        if name in _SAME_ELEMENTS and shape is not None:
            return _reshaped(axes, shape)
        if name == "getitem":
            return _indexed(axes, args[1], self.shape, len(_sizes(shape)))
        if name in ("select", "unbind"):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return tuple(axis for i, axis in enumerate(axes) if i != dim % len(axes)) if isinstance(dim, int) else None
        if name == "stack":
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            at = dim % (len(axes) + 1)
            return (*axes[:at], ((frozenset(), len(followed)),), *axes[at:])
        if name in _PARTS:
            return axes
        return self._elementwise(followed, operands, shape if shape is not None else [])

    def _last(self, name: str, args: list[Any], kwargs: dict[str, Any], axes: Axes) -> Axes | None:
        if name in ("layer_norm", "rms_norm"):
            normalized = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
            if not isinstance(normalized, int) and len(normalized) != 1:
                return axes
            weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
            self._vote(axes[-1], AFFINE if weight is not None else REDUCED)
            return axes
        self._vote(axes[-1], LAST)
        return (*axes[:-1], _nothing)

    def _channels(self, name: str, args: list[Any], kwargs: dict[str, Any], axes: Axes) -> Axes | None:
        at = len(axes) - 1 - int(name[-2]) if name in CONVOLUTIONS else 1
        if not 0 <= at < len(axes):
            return None
        if name in CONVOLUTIONS:
            self._vote(axes[at], CHANNEL)
            return (*axes[:at], _nothing, *axes[at + 1 :])
        statistics = name == "batch_norm" or kwargs.get("weight") is not None or len(args) > 2
        self._vote(axes[at], AFFINE if statistics else REDUCED)
        return axes

    def _product(self, left: Any, right: Any, shape: Sequence[int] | None) -> Axes | None:
        """A matrix product. One of two tensors that both follow from the trunk is attention, and says nothing."""
        rows, columns = self.axes.get(self.key(left)), self.axes.get(self.key(right))
        if rows is not None and columns is None:
            self._vote(rows[-1], LAST)
        if columns is not None and rows is None and len(columns) > 1 and self.key(left) in self.parameters:
            self._vote(columns[-1], ROWS)
        if shape is None or min(len(rows or (0, 0)), len(columns or (0, 0))) < 2:
            return None
        outer = max((rows or (), columns or ()), key=len)
        lead = (*(_nothing for _ in range(len(shape) - len(outer))), *outer[:-2])
        return (*lead, rows[-2] if rows else _nothing, columns[-1] if columns else _nothing)

    def _einsum(self, args: list[Any]) -> Axes | None:
        if not isinstance(args[0], str):
            return None
        tensors = list(args[1]) if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
        inputs, _, output = args[0].replace(" ", "").partition("->")
        names = inputs.split(",")
        letters: dict[str, Axis] = {}
        for letter_names, tensor in zip(names, tensors, strict=True):
            axes = self.axes.get(self.key(tensor))
            if axes is None:
                continue
            for letter, axis in zip(_spelled(letter_names, len(axes)), axes, strict=True):
                letters.setdefault(letter, axis)
                others = [n for n, t in zip(names, tensors, strict=True) if self.key(t) not in self.axes]
                if letter not in output and any(letter in other for other in others):
                    self._vote(axis, LAST if letter == letter_names[-1] else INNER)
        if "->" not in args[0]:
            return None
        count = sum(letter.isdigit() for letter in letters)
        return tuple(
            letters.get(letter, _nothing) for letter in _spelled(output, len(output.replace("...", "")) + count)
        )

    def _reduced(
        self, name: str, reduced: tuple[int, ...], kwargs: dict[str, Any], args: list[Any], axes: Axes
    ) -> Axes | None:
        keeps = kwargs.get("keepdim", args[2] if name not in ("var", "std", "norm") and len(args) > 2 else False)
        if not isinstance(keeps, bool):
            return None
        if name in REDUCTIONS and keeps and len(reduced) == 1:
            self._vote(axes[reduced[0]], REDUCED)
        if keeps:
            return tuple(((frozenset(), 1),) if i in reduced else axis for i, axis in enumerate(axes))
        return tuple(axis for i, axis in enumerate(axes) if i not in reduced)

    def _elementwise(self, followed: list[Any], operands: list[Any], shape: Sequence[int]) -> Axes | None:
        """Anything else: element by element, with broadcasting from the right."""
        result: list[Axis] = [_nothing] * len(shape)
        for value in followed[::-1]:
            axes = self.axes[self.key(value)]
            if len(axes) > len(shape):
                return None
            for back in range(1, len(axes) + 1):
                if math.prod(size for _, size in axes[-back]) > 1:
                    result[-back] = axes[-back]
        for value in operands:
            if self.key(value) in self.parameters and (sizes := self.shape(value)) is not None:
                along = [back for back in range(1, min(len(sizes), len(shape)) + 1) if sizes[-back] > 1]
                if len(along) == 1:
                    self._vote(result[-along[0]], AFFINE)
        return tuple(result)


_nothing: Axis = ((frozenset(), 0),)


def single(axis: Axis) -> int | None:
    """The one axis of the followed tensor that this one runs over, whole or in part; None where it is not one."""
    over = {frozen for frozen, size in axis if size != 1}
    return next(iter(next(iter(over)))) if len(over) == 1 and len(next(iter(over))) == 1 else None


def _own(sizes: tuple[int, ...]) -> Axes:
    return tuple(((frozenset({i}), size),) for i, size in enumerate(sizes))


def _sizes(shape: Sequence[int] | None) -> tuple[int, ...]:
    return tuple(shape or ())


def _fitted(axis: Axis, size: int) -> Axis:
    """The axis with another size, of which only what it runs over is known."""
    if math.prod(part for _, part in axis) == size:
        return axis
    return ((frozenset().union(*(over for over, _ in axis)), size),)


def _translated(axis: Axis, axes: Axes) -> Axis:
    """An axis in terms of a child's tensor, in terms of what that one's axes follow from."""
    result: list[Stretch] = []
    for over, size in axis:
        whole = axes[next(iter(over))] if len(over) == 1 and next(iter(over)) < len(axes) else None
        if whole is not None and math.prod(part for _, part in whole) == size:
            result += whole
        else:
            known = (part for i in over if i < len(axes) for part, _ in axes[i])
            result.append((frozenset().union(*known), size))
    return tuple(result)


def _reshaped(axes: Axes, shape: Sequence[int]) -> Axes | None:
    """The axes of the same elements in another shape."""
    stretches = [stretch for axis in axes for stretch in axis if stretch[1] != 1]
    if math.prod(size for _, size in stretches) != math.prod(shape) or 0 in shape:
        return None
    result: list[Axis] = []
    for size in shape:
        mine: list[Stretch] = []
        left = size
        while left > 1:
            over, length = stretches.pop(0)
            if left % length == 0:
                mine.append((over, length))
                left //= length
            elif length % left == 0:
                mine.append((over, left))
                stretches.insert(0, (over, length // left))
                left = 1
            else:  # it cuts across: what follows runs over both
                return None
        result.append(tuple(mine) or ((frozenset(), 1),))
    return tuple(result)


def _indexed(axes: Axes, index: Any, shape: Callable[[Any], Sequence[int] | None], rank: int) -> Axes | None:
    """The axes after `x[index]`, a tensor of that rank, with at most one tensor in the index."""
    entries = list(index) if isinstance(index, tuple) else [index]
    tensors = sum(shape(entry) is not None for entry in entries)
    if tensors > 1:
        return None
    taken = sum(entry is not None and entry is not Ellipsis for entry in entries)
    sized = [len(given) for entry in entries if (given := shape(entry)) is not None]
    if sized and sized[0] > 1 and len(entries) == 1 and rank == len(axes) - sized[0] + 1:  # a mask of several axes
        return (_nothing, *axes[sized[0] :])
    if Ellipsis not in [entry for entry in entries if shape(entry) is None]:
        entries.append(Ellipsis)
    left, result = list(axes), []
    for entry in entries:
        given = shape(entry)
        if given is not None:
            left.pop(0)
            result += [_nothing] * len(given)
        elif entry is None:
            result.append(((frozenset(), 1),))
        elif entry is Ellipsis:
            for _ in range(len(axes) - taken):
                result.append(left.pop(0))
        elif isinstance(entry, slice):
            result.append(left.pop(0))
        else:  # a number, or a node that is one
            left.pop(0)
    return tuple(result)


def _spelled(letters: str, rank: int) -> str:
    """An einsum operand's letters with digits for the axes under an ellipsis, the last of them 0."""
    hidden = rank - len(letters.replace("...", ""))
    return letters.replace("...", "".join(str(i) for i in range(hidden - 1, -1, -1)))


def _axes_named(args: Sequence[Any], kwargs: dict[str, Any], rank: int) -> tuple[int, ...] | None:
    dim = kwargs.get("dim", kwargs.get("axis", next((a for a in args[1:] if isinstance(a, (int, tuple, list))), None)))
    dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    if not all(isinstance(i, int) and -rank <= i < rank for i in dims) or not dims:
        return None
    return tuple(i % rank for i in dims)


def _permuted(name: str, rank: int, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Where each axis comes from, found by permuting a tensor whose sizes are the axes' numbers."""
    probe = torch.empty([axis + 1 for axis in range(rank)], device="meta")
    with torch._C.DisableTorchFunction():
        moved = getattr(probe, name)
        return tuple(size - 1 for size in (moved if isinstance(moved, Tensor) else moved(*args, **kwargs)).shape)


def _flat(value: Any) -> list[Any]:
    """What is in nested arguments."""
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in _flat(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [value]

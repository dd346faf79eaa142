"""Counts what kernels move: the lanes of every load, store and atomic in Triton's interpreter, element by element.

    with counted() as launches:
        triton_post.post(X, y, h_post, h_res)
    launches[0].moved["X"].per_token("fetched", tokens)

A lane that its mask switches off moves nothing; one that points outside all tensors of its launch is an error. Caches
are not simulated: whatever is read a second time, or was written by the same launch, is counted apart, see `Moved`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.runtime import interpreter

WHAT = ("fetched", "repeated", "own", "written", "rewritten")


class Moved:
    """How often one launch moved each element of one tensor; an array (elements,) for each of these.

    - fetched: 1 where an element was read that the launch had not written before: it came from memory.
    - repeated: further reads of those, from the cache if they are still there.
    - own: reads of what the launch had written itself, from the cache likewise.
    - written: 1 where an element was written.
    - rewritten: further writes.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._counts = {what: np.zeros(int(np.prod(shape)), np.int64) for what in WHAT}

    def total(self, what: str) -> int:
        return int(self._counts[what].sum())

    def per_token(self, what: str, tokens: int) -> int:
        """Elements moved for each token, where axis 0 holds the tokens; all tokens must move the same."""
        of_each = self._counts[what].reshape(tokens, -1).sum(1)
        assert (of_each == of_each[0]).all(), f"{what}: from {of_each.min()} to {of_each.max()} elements a token"
        return int(of_each[0])

    def read(self, lanes: np.ndarray) -> None:
        """One load; lanes that name the same element count as many reads."""
        elements, times = np.unique(lanes, return_counts=True)
        mine = self._counts["written"][elements] > 0
        known = self._counts["fetched"][elements]
        self._counts["own"][elements] += np.where(mine, times, 0)
        self._counts["repeated"][elements] += np.where(mine, 0, times - 1 + known)
        self._counts["fetched"][elements] = np.where(mine, known, 1)

    def write(self, lanes: np.ndarray) -> None:
        elements, times = np.unique(lanes, return_counts=True)
        self._counts["rewritten"][elements] += times - 1 + self._counts["written"][elements]
        self._counts["written"][elements] = 1


@dataclass(frozen=True)
class Traffic:
    """One launch: the kernel's name and what it moved, by the names of the kernel's arguments. Tensors that share
    memory stand under the first one's name."""

    kernel: str
    moved: dict[str, Moved]


class _Recorder:
    """The launch that runs now: finds the tensor behind an address."""

    def __init__(self, kernel: str, tensors: dict[str, Tensor]) -> None:
        self._places: list[tuple[int, int, int, Moved]] = []  # first address, behind the last, bytes of an element
        self.traffic = Traffic(kernel, {})
        for name, tensor in tensors.items():
            start, size = tensor.data_ptr(), tensor.element_size()
            if not tensor.numel() or any(begin <= start < end for begin, end, _, _ in self._places):
                continue
            assert tensor.is_contiguous(), f"{name}: only contiguous tensors are counted"
            moved = self.traffic.moved[name] = Moved(tuple(tensor.shape))
            self._places.append((start, start + tensor.numel() * size, size, moved))

    def record(self, addresses: Any, mask: Any, *ways: str) -> None:
        left = np.asarray(addresses)[np.broadcast_to(np.asarray(mask), np.shape(addresses))].astype(np.int64)
        for begin, end, size, moved in self._places:
            if not left.size:
                return
            inside = (begin <= left) & (left < end)
            if inside.any():
                for way in ways:
                    getattr(moved, way)((left[inside] - begin) // size)
                left = left[~inside]
        if left.size:
            raise IndexError(f"{self.traffic.kernel}: {left.size} lanes outside every tensor of the launch")


@contextlib.contextmanager
def counted() -> Iterator[list[Traffic]]:
    """Inside, every launch adds its `Traffic` to the list. Kernels must have been decorated with TRITON_INTERPRET=1."""
    launches: list[Traffic] = []
    running: list[_Recorder] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    update, exchange, launch = builder.create_atomic_rmw, builder.create_atomic_cas, executor.__call__

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        running[-1].record(pointers.data, mask.data, "read")
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        running[-1].record(pointers.data, mask.data, "write")
        return store(self, pointers, value, mask, *rest, **options)

    def counted_update(self: Any, how: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        running[-1].record(pointers.data, mask.data, "read", "write")
        return update(self, how, pointers, value, mask, *rest)

    def counted_exchange(self: Any, pointers: Any, *rest: Any) -> Any:
        running[-1].record(pointers.data, True, "read", "write")
        return exchange(self, pointers, *rest)

    def counted_launch(self: Any, *args: Any, **named: Any) -> None:
        given = {**dict(zip(self.arg_names, args)), **named}
        tensors = {name: given[name] for name in self.arg_names if isinstance(given.get(name), Tensor)}
        running.append(_Recorder(self.fn.__name__, tensors))
        launch(self, *args, **named)
        launches.append(running.pop().traffic)

    with (
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", counted_update),
        mock.patch.object(builder, "create_atomic_cas", counted_exchange),
        mock.patch.object(executor, "__call__", counted_launch),
    ):
        yield launches

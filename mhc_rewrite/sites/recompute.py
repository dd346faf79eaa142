"""Recomputation in eager execution: of every segment of sites the first state is kept, the rest is made again.

While a carrier's rewritten forward runs, hooks see what autograd is about to save. What a site has made (X, u, H_post,
H_res) is recognised by its memory, whoever saves it, and a note of where it comes from is kept in its place. When
backward asks for the first of a segment, the segment's operators run once more, from its first state and the blocks'
outputs, which are kept; blocks never run again. A state that something has changed on the way from one site to the next
(a norm or dropout on the trunk) begins a segment. Where backward comes in two runs, as schedules of pipelines have it,
operators run once more for both: what the first asks for and the second will, u by a norm with weights, is kept until
then. Source: arXiv:2512.24880, eq. 20.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mhc_rewrite.errors import StreamError
from mhc_rewrite.kernels import ops
from mhc_rewrite.torch_private import inside_function_transform, runs_again, saved_tensors_hooks_on_top

X = 0  # of what is made at a site: X, u, H_post, H_res


# -- how states come about ---------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Segment:
    """Sites whose states are made from the first one's. It holds none of them: a cycle would keep memory for longer.

    Attributes:
        handles: what autograd holds in place of what the sites made.
        pending: those of them that backward has not asked for since the last replay.
        made: what the last replay made, until all of it was asked for; by the state's id and the output.
    """

    handles: weakref.WeakSet[Handle] = field(default_factory=weakref.WeakSet)
    pending: weakref.WeakSet[Handle] = field(default_factory=weakref.WeakSet)
    made: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def give(self, handle: Handle) -> Tensor:
        """What a handle stands for. One that asks again belongs to another backward, and all is made again."""
        if handle not in self.pending:
            self._replay()
        self.pending.discard(handle)
        key = id(handle.state), handle.output
        value = self.made[key]
        if not any((id(other.state), other.output) == key for other in self.pending):
            del self.made[key]
        if not self.pending:
            self.made = {}
        return value

    @torch.no_grad()
    def _replay(self) -> None:
        self.pending = weakref.WeakSet(self.handles)
        wanted = {(id(handle.state), handle.output) for handle in self.pending}
        states = {state for handle in self.pending for state in handle.state.and_before()}
        made: dict[int, tuple[Any, ...]] = {}
        for state in sorted(states, key=lambda state: state.position):
            state.check_operands()
            if state.before is None:
                made[id(state)] = state.kept, *ops.pre(state.kept, *state.operands)
                continue
            streams, _, *mix = made[id(state.before)][:4]
            if state.operands:
                made[id(state)] = ops.boundary(streams, state.kept, *mix, *state.operands)
            else:
                made[id(state)] = (ops.post(streams, state.kept, *mix),)
        self.made = {(state, output): made[state][output] for state, output in wanted}


@dataclass(eq=False)
class State:
    """The state that a site reads, and where it comes from.

    Attributes:
        kept: a segment's first state itself; for others the output of the block before, from which `post` makes it.
        before: the state of the site before; None for a segment's first.
        segment: it belongs to.
        operands: of this site's `pre`, once that was called.
    """

    kept: Tensor
    before: State | None = None
    segment: Segment = field(default_factory=Segment)
    operands: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        self.kept = self.kept.detach()  # the memory, not the graph that made it
        self.position: int = 0 if self.before is None else self.before.position + 1

    def and_before(self) -> Iterator[State]:
        """This state and those that it is made from."""
        state: State | None = self
        while state is not None:
            yield state
            state = state.before

    def read_by(self, operands: tuple[Any, ...], copies: bool) -> None:
        """Notes the operands of the site; copies of them where their memory may be freed before backward."""
        tensors = [value.detach() if isinstance(value, Tensor) else value for value in operands]
        self.operands = tuple(value.clone() if copies and isinstance(value, Tensor) else value for value in tensors)

    def check_operands(self) -> None:
        """Refuses what is no longer there: sharding gives a module's parameters their memory only while it runs."""
        for value in self.operands:
            if isinstance(value, Tensor) and _memory(value) is not None and value.untyped_storage().size() == 0:
                raise StreamError(
                    "recompute= makes the states of several sites again in backward, and the parameters of one of them "
                    "have been freed since the forward (ZeRO). Convert with recompute=None, and put the layers under "
                    "activation checkpointing instead: it gathers their parameters again."
                )


@dataclass(eq=False)
class Handle:
    """In place of a saved tensor: what it is a view of.

    Attributes:
        again: that, between two runs of one backward that both ask.
    """

    state: State
    output: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: Any
    again: Tensor | None = None

    def __post_init__(self) -> None:
        self.state.segment.handles.add(self)

    def tensor(self) -> Tensor:
        value, self.again = self.again, None
        if value is None:
            value = self.state.segment.give(self)
            node = runs_again()
            if node is not None and not ops.asks_once(node):
                self.again = value
        return value.as_strided(self.size, self.stride, self.offset)


# -- hooks -------------------------------------------------------------------------------------------------------------


class Made(NamedTuple):
    """A tensor that a site made, without its graph. Autograd lets nobody write to it."""

    tensor: Tensor
    state: State
    output: int


class _Thread(threading.local):
    on: bool = False
    # Of the last site that was called. Whatever saves them does so before the next site is called, or not at all.
    at_hand: tuple[Made, ...] = ()


_thread = _Thread()


@contextlib.contextmanager
def recomputation() -> Iterator[None]:
    """Around a carrier's forward. Where the user has such hooks, or a checkpoint, they hold and nothing is done."""
    on_top = saved_tensors_hooks_on_top()
    mine = on_top is not None and on_top[0] is _pack
    before = _thread.on
    _thread.on = torch.is_grad_enabled() and not inside_function_transform() and (mine or on_top is None)
    hooks = torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)
    try:
        with hooks if _thread.on and not mine else contextlib.nullcontext():
            yield
    finally:
        _thread.on = before


def forget() -> None:
    """Where a stream has ended: no state may follow the last one."""
    _thread.at_hand = ()


def _pack(tensor: Tensor) -> Any:
    for made in _thread.at_hand:
        if made.output == X and made.state.before is None:
            continue  # kept
        if _same_memory(tensor, made) and tensor.dtype == made.tensor.dtype:
            return Handle(made.state, made.output, tensor.size(), tensor.stride(), tensor.storage_offset())
    return tensor, tensor._version


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Handle):
        return packed.tensor()
    tensor, version = packed
    if tensor._version != version:  # with hooks autograd does not look
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version}."
        )
    return tensor


def _same_memory(tensor: Tensor, made: Made) -> bool:
    mine = _memory(tensor)
    return mine is not None and mine == _memory(made.tensor)


def _memory(tensor: Tensor) -> int | None:
    """Where a tensor's values lie; None where it has none of its own: no elements, or in other tensors (DTensor)."""
    if tensor.numel() == 0 or hasattr(tensor, "__tensor_flatten__"):
        return None
    return tensor.untyped_storage().data_ptr()


# -- operators ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operators:
    """Those of kernels/ops.py, with an account of what they make; segments have `length` sites.

    `copies`: the parameters' memory may be freed behind the site.
    """

    length: int
    copies: bool = False

    def pre(self, streams: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        outputs = ops.pre(streams, *operands)
        if _thread.on:
            state = _state((streams, X))
            if state is None or state.operands:
                state = State(streams)
            state.read_by(operands, self.copies)
            _hand_on(state, streams, *outputs[:3])
        return outputs

    def post(self, streams: Tensor, branch: Tensor, *mix: Tensor) -> Tensor:
        made = ops.post(streams, branch, *mix)
        if _thread.on:
            _hand_on(self._next(streams, branch, mix, made), made)
        return made

    def boundary(
        self, streams: Tensor, branch: Tensor, h_post: Tensor, h_res: Tensor, *operands: Any
    ) -> tuple[Tensor, ...]:
        outputs = ops.boundary(streams, branch, h_post, h_res, *operands)
        if _thread.on:
            state = self._next(streams, branch, (h_post, h_res), outputs[X])
            state.read_by(operands, self.copies)
            _hand_on(state, *outputs[:4])
        return outputs

    def post_collapse(self, streams: Tensor, branch: Tensor, *mix: Tensor) -> Tensor:
        """Ends the stream."""
        return ops.post_collapse(streams, branch, *mix)

    def _next(self, streams: Tensor, branch: Tensor, mix: tuple[Tensor, ...], made: Tensor) -> State:
        before = _state((streams, X), (mix[0], X + 2), (mix[1], X + 3))
        if before is None or before.position + 1 == self.length:
            return State(made)
        return State(branch, before, before.segment)


def _hand_on(state: State, *tensors: Tensor) -> None:
    _thread.at_hand = tuple(Made(tensor.detach(), state, output) for output, tensor in enumerate(tensors))


def _state(*places: tuple[Tensor, int]) -> State | None:
    """The state of the last site, if these tensors are what it made, whole."""
    for tensor, output in places:
        made = _thread.at_hand[output] if output < len(_thread.at_hand) else None
        if made is None or not _same_memory(tensor, made) or not _same_form(tensor, made.tensor):
            return None
    return _thread.at_hand[X].state


def _same_form(tensor: Tensor, other: Tensor) -> bool:
    mine, its = ((t.dtype, t.size(), t.stride(), t.storage_offset()) for t in (tensor, other))
    return mine == its

"""Tells a recurrence over time from a residual stream through layers.

Both may add to a state in a loop. A recurrence takes another slice of one input at every turn and has the same
parameters at all of them; layers have parameters of their own, or see the same inputs at every turn.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.passes.lineage import operands

RULE = "recurrence"
REASON = "a state that is carried on from step to step of an input, with the same parameters: a recurrence over time"

# How far behind a turn a slice is looked for: inputs may be cut and prepared before the loop.
_DEPTH = 4

Value = TypeVar("Value", bound=Hashable)


@dataclass(frozen=True)
class Turn(Generic[Value]):
    """What one turn of a loop reads besides its state: slices (of what, where), and parameters."""

    slices: frozenset[tuple[Value, Hashable]]
    parameters: frozenset[Hashable]


@dataclass(frozen=True)
class Reading(Generic[Value]):
    """How to read a graph or a recording.

    Attributes:
        sources: what a value is computed from.
        slice_of: what a value is a slice of, and where; None if it is none.
        parameters: the parameters that a value is, or that the operation that made it has.
        age: when it was made.
    """

    sources: Callable[[Value], Iterable[Value]]
    slice_of: Callable[[Value], tuple[Value, Hashable] | None]
    parameters: Callable[[Value], Iterable[Hashable]]
    age: Callable[[Value], int]

    def turn(self, operands: Iterable[Value], state: Value) -> Turn[Value]:
        """What goes into a sum of `operands`, which adds to `state`."""
        slices: set[tuple[Value, Hashable]] = set()
        parameters: set[Hashable] = set()
        todo = [(value, 0) for value in operands]
        seen = {state, *operands}
        while todo:
            value, depth = todo.pop()
            own = tuple(self.parameters(value))
            parameters.update(own if depth <= 1 else ())
            cut = self.slice_of(value)
            if cut is not None and (given := tuple(self.parameters(cut[0]))):
                parameters.update((parameter, cut[1]) for parameter in given)
                continue
            if cut is not None and self.age(cut[0]) < self.age(state):
                slices.add(cut)
                continue
            behind = depth + 1 if self.age(value) < self.age(state) else 0
            for source in self.sources(value) if behind <= _DEPTH else ():
                if source not in seen:
                    seen.add(source)
                    todo.append((source, behind))
        return Turn(frozenset(slices), frozenset(parameters))


def is_recurrence(turns: Sequence[Turn[Value]]) -> bool:
    """Whether the turns of a loop are steps of one.

    What is read behind the add of one turn belongs to the next, so the first may lack something.
    """
    return _are_steps(turns) or _are_steps(turns[1:])


def _are_steps(turns: Sequence[Turn[Value]]) -> bool:
    if len(turns) < 2 or len({turn.parameters for turn in turns}) > 1:
        return False
    shared = frozenset.intersection(*(frozenset(source for source, _ in turn.slices) for turn in turns))
    for source in shared:
        places = {frozenset(where for other, where in turn.slices if other == source) for turn in turns}
        if len(places) == len(turns):
            return True
    return False


def reading_of_graph(order: Mapping[fx.Node, int], own: Set[Hashable]) -> Reading[fx.Node]:
    """How to read a captured forward.

    Args:
        order: its nodes' places.
        own: the nodes that hold parameters.
    """

    def slice_of(node: fx.Node) -> tuple[fx.Node, Hashable] | None:
        if node.op not in ("call_function", "call_method") or vocabulary.name_of(node.target) not in vocabulary.SLICING:
            return None
        source = node.args[0]
        assert isinstance(source, fx.Node)
        several = "shape" not in source.meta and slice_of(source)
        where = (str(node.target), repr(node.args[1:]), repr(node.kwargs))
        return (several[0], (several[1], where)) if several else (source, where)

    def parameters(node: fx.Node) -> tuple[Hashable, ...]:
        has = node.op == "call_module" or (node.op == "get_attr" and node in own)
        return (node.target,) if has else ()

    return Reading(operands, slice_of, parameters, order.__getitem__)

"""Which axis of a trunk carries the features: what the branches do with its axes is the evidence, and it is voted on.

Nothing is taken for granted, the last axis neither: where nothing shows it, the sites are rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

from torch import fx, nn

from mhc_rewrite.capture import axes
from mhc_rewrite.capture.axes import AxisFollower
from mhc_rewrite.passes.lifting import Lift

# (axis, -1 for the last; strength) -> how often
Votes = Counter[tuple[int, int]]

# Parameters along an axis that stays say most. What mixes an axis where it stands says more than what mixes it after it
# was moved: tokens are mixed by moving them to the last axis and back. An average along an axis only breaks a tie.
_AFFINE, _IN_PLACE, _MOVED, _AVERAGED = 3, 2, 1, 0

# Streams of fewer features are coordinates, boxes or flows: a projection of them makes no sense.
MIN_WIDTH = 4


def parameters(nodes: Iterable[fx.Node], carrier: nn.Module) -> set[Hashable]:
    """The nodes that hold parameters, or are computed from them alone."""
    own = {name for name, _ in carrier.named_parameters(remove_duplicate=False)}
    found: set[Hashable] = set()
    for node in nodes:
        inputs = [source for source in node.all_input_nodes if "shape" in source.meta]
        if node.op == "get_attr" and node.target in own:
            found.add(node)
        elif node.op in ("call_function", "call_method") and inputs and all(source in found for source in inputs):
            found.add(node)
    return found


def votes(read: fx.Node, region: Sequence[fx.Node], lifts: Sequence[Lift], parameters: set[Hashable]) -> Votes:
    """What a site's branch, and the operations on the trunk before it, say about the trunk's axes.

    Args:
        read: the trunk where the branch reads it.
        region: the branch, in execution order.
        lifts: the operations on the trunk, latest first.
        parameters: as `parameters` finds them.
    """
    found = _counted(read, region, parameters)
    for lift in lifts:
        found += _counted(lift.trunk, [lift.node], parameters)
    return found


def elected(given: Votes) -> int | None:
    """The axis that the strongest evidence is for; None where there is none, or as much for another."""
    scores = {
        axis: tuple(given[axis, strength] for strength in (_AFFINE, _IN_PLACE, _MOVED, _AVERAGED))
        for axis in {axis for axis, _ in given}
    }
    best = max(scores.values(), default=())
    first = [axis for axis, score in scores.items() if score == best]
    return first[0] if len(first) == 1 and any(best[:-1]) else None


def _counted(start: fx.Node, nodes: Sequence[fx.Node], parameters: set[Hashable]) -> Votes:
    rank = len(start.meta["shape"])
    follower = AxisFollower(start, _key, _shape, parameters)
    for node in nodes:
        if node.op == "call_module":
            for source in node.all_input_nodes:
                if source.name in node.meta["axes"]:
                    follower.enter(source, node.meta["axes"][source.name], node)
        elif node.target is getattr:
            follower.step(node.args[1], node.args[:1], {}, node)
        else:
            follower.step(node.target, node.args, node.kwargs, node)
    found: Votes = Counter()
    for (axis, kind), count in follower.evidence.items():
        found[axis if axis < rank - 1 else -1, _strength(kind, axis, rank)] += count
    return found


def _strength(kind: str, axis: int, rank: int) -> int:
    if kind == axes.AFFINE:
        return _AFFINE
    if kind == axes.REDUCED:
        return _AVERAGED
    in_place = (kind == axes.LAST and axis == rank - 1) or (kind == axes.CHANNEL and axis == 1)
    return _IN_PLACE if in_place else _MOVED


def _key(value: Any) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


def _shape(value: Any) -> tuple[int, ...] | None:
    return value.meta.get("shape") if isinstance(value, fx.Node) else None

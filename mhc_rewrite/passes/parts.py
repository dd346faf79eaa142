"""Sums that are written to some of a tensor's places, spelled out as sums of whole tensors, before a graph is analysed.

Before                                 After
    part = x[where]                        part = x[where]
    total = part + f(part)                 branch = placed(zeros_like(x), where, f(part))
    x[where] = total                       x += branch

`x[where] += f(x[where])` is the same in Python. So whoever looks for residual adds need not know of writing.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.sites import streams

# What may be computed twice and is the same: an index, spelled once to read and once to write.
_SAME_AGAIN = frozenset("invert logical_not logical_and logical_or and or eq ne lt le gt ge unsqueeze getitem".split())
# The calls that a sum ran in and all that names it stay those of the statement that writes it.
_KEPT = ("source", "holder", "serial", "calls", "shape", "dtype", "storage")


def spell_out(graph: fx.Graph) -> int:
    """Spells out all such sums of a fresh capture; returns how many. A second time there is none."""
    found = 0
    for node in list(graph.nodes):
        if node.target is operator.setitem and (branch := _branch(node)) is not None:
            _replace(graph, node, branch)
            found += 1
    if found:
        graph.lint()
    return found


def _branch(write: fx.Node) -> fx.Node | None:
    """What `write` adds to the places that it writes to; None if it does something else."""
    whole, index, total = write.args
    if not isinstance(total, fx.Node) or not isinstance(whole, fx.Node) or "dtype" not in whole.meta:
        return None
    if vocabulary.name_of(total.target) not in vocabulary.ADD or total.kwargs or len(total.args) != 2:
        return None
    if list(total.users) != [write] or not vocabulary.is_feature(whole.meta["dtype"]):
        return None
    for part, branch in (total.args, total.args[::-1]):
        if _is_part(part, whole, index) and isinstance(branch, fx.Node) and branch is not part:
            alike = all(branch.meta.get(key) == part.meta.get(key) for key in ("shape", "dtype"))  # type: ignore[union-attr]
            # In place on the branch, the sum is the branch's memory.
            if alike and not (total.meta.get("inplace") and total.args[0] is not part):
                return branch
    return None


def _is_part(part: Any, whole: fx.Node, index: Any) -> bool:
    """Whether a node is `whole[index]`."""
    return isinstance(part, fx.Node) and part.target is operator.getitem and part.args[0] is whole \
        and _alike(part.args[1], index)  # fmt: skip


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, fx.Node) and isinstance(other, fx.Node):
        again = vocabulary.name_of(one.target) in _SAME_AGAIN and not one.meta.get("inplace") and not one.kwargs
        same = one.op == other.op and one.target == other.target and not other.kwargs
        return one is other or (again and same and _alike(one.args, other.args))
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, slice) and isinstance(other, slice):
        return all(_alike(getattr(one, side), getattr(other, side)) for side in ("start", "stop", "step"))
    return type(one) is type(other) and bool(one == other)


def _replace(graph: fx.Graph, write: fx.Node, branch: fx.Node) -> None:
    whole, index, total = write.args
    assert isinstance(total, fx.Node) and isinstance(whole, fx.Node)
    kept = {key: write.meta[key] for key in _KEPT if key in write.meta}
    with graph.inserting_before(write):
        form = graph.call_function(torch.zeros_like, (whole,))
        form.meta.update(kept, storage=None)
        placed = graph.call_function(streams.placed, (form, index, branch))
        placed.meta.update(kept, dtype=branch.meta["dtype"], storage=None)
        added = graph.call_function(operator.iadd, (whole, placed))
        added.meta.update(kept, inplace=True)
    write.replace_all_uses_with(added)
    for node in (write, total, *total.args):
        if isinstance(node, fx.Node) and not node.users and node is not branch:
            graph.erase_node(node)

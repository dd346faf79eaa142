"""Branches on the content of tensors, which a captured forward decides anew at each call.

A graph goes one way. Where its forward chose by content, the graph asks again whether the same would be chosen; where
not, the call begins again with the graph of the other way (conversion/again.py). So what came before the last such
question may not have changed anything that lives longer than the call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.graph import origin


class Otherwise(Exception):
    """Raised by a graph: what its forward asked for the `index`-th time has another answer, `outcome`."""

    def __init__(self, index: int, outcome: Any) -> None:
        super().__init__(index, outcome)
        self.index, self.outcome = index, outcome


def decided(value: Any, index: int, outcome: Any) -> None:
    """In a graph: asks whether `value`, a tensor say, is still as true as it was, or the same text.

    Raises:
        Otherwise: it is not.
    """
    # Dynamo guards a number by a branch, and compares none as a bool.
    found = value if isinstance(outcome, str) else True if value else False
    if found != outcome:
        raise Otherwise(index, found)


def lasting_change(nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The first node that changes what lives longer than the call, before the last branch on content; None if none."""
    nodes = list(nodes)
    last = max((i for i, node in enumerate(nodes) if node.target is decided), default=0)
    outside = {
        node.meta["storage"] for node in nodes if node.op in ("placeholder", "get_attr") and "storage" in node.meta
    }
    for node in nodes[:last]:
        if node.meta.get("inplace") and node.meta.get("storage") in outside:
            return node
        takes_object = any(one.op == "placeholder" and "shape" not in one.meta for one in node.all_input_nodes)
        if (node.op == "call_module" and takes_object) or (node.meta.get("on_object") and node.target != getattr):
            return node
    return None


# Functions whose result is as large as the content of their tensors says.
_COUNTING = frozenset("nonzero argwhere masked_select unique unique_consecutive bincount".split())
# Those whose result has the form of their first tensor, whatever the others are.
_INTO_FIRST = frozenset(
    "setitem index_add index_copy index_fill index_put scatter scatter_add scatter_reduce masked_scatter".split()
)

_ARITHMETIC = vocabulary.OFFSETS | vocabulary.SCALING | vocabulary.POINTWISE


def sized_by_content(node: fx.Node, counts: Iterable[fx.Node]) -> bool:
    """Whether the size of what a node makes depends on what tensors contain; `counts` are its inputs that are whole
    numbers."""
    name = vocabulary.name_of(node.target).rstrip("_")
    inputs = node.all_input_nodes
    tensors = [one for one in inputs if "shape" in one.meta]
    if name in _INTO_FIRST:
        return bool(tensors) and bool(tensors[0].meta.get("counted"))
    return (
        name in _COUNTING
        or (name == "where" and len(node.args) == 1)
        or (name == "repeat_interleave" and len(tensors) > 1)
        or (name == "getitem" and any(one.meta.get("dtype") in (torch.bool, torch.uint8) for one in tensors[1:]))
        or any(one.meta.get("counted") for one in tensors)
        or (name not in _ARITHMETIC and any(origin(one) == "content" for one in counts))
    )

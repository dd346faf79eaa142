"""What is computed from what in a captured forward, and what nodes do to a tensor's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import fx

from mhc_rewrite.capture import vocabulary

if TYPE_CHECKING:
    from mhc_rewrite.passes.find_residuals import FoundSite


def ancestors(node: fx.Node) -> set[fx.Node]:
    """`node` and all whose values, not only sizes, it is computed from."""
    seen, todo = {node}, [] if reads_form(node) else [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in seen and not reads_form(source):
                seen.add(source)
                todo.append(source)
    return seen


def lineage(branch: fx.Node, sites: Mapping[fx.Node, FoundSite], of_features: bool = False) -> set[fx.Node]:
    """The ancestors of a branch, without what entered another trunk by a branch: the nearest trunk is its own.

    With `of_features` without those that it depends on by integers or conditions alone, as by a quantizer's codes.
    """
    seen, todo = {branch}, [] if reads_form(branch) else [branch]
    while todo:
        node = todo.pop()
        sources = sites[node].chain[:1] if node in sites else node.all_input_nodes
        for source in sources:
            if source not in seen and not reads_form(source) and not (of_features and _is_discrete(source)):
                seen.add(source)
                todo.append(source)
    return seen


def _is_discrete(node: fx.Node) -> bool:
    return "dtype" in node.meta and not vocabulary.is_feature(node.meta["dtype"])


def region(read: fx.Node, above: set[fx.Node], chain: set[fx.Node]) -> set[fx.Node]:
    """What is computed from `read`, off the trunk, on the way to the branch whose ancestors are `above`."""
    seen: set[fx.Node] = set()
    todo = [user for user in read.users if user in above and user not in chain]
    while todo:
        node = todo.pop()
        if node not in seen and not reads_form(node):
            seen.add(node)
            todo.extend(user for user in node.users if user in above)
    return seen


def block_of(branch: fx.Node, read: fx.Node, chain: set[fx.Node], sites: Mapping[fx.Node, FoundSite]) -> set[fx.Node]:
    """What is computed from `read`, off the trunk, on the way to the branch: the block of a site.

    A trunk that itself comes from `read` lies in the block, with all that its own blocks read. One that comes from
    elsewhere does not: its blocks read this trunk as anybody does.
    """
    above, opened = lineage(branch, sites), set[fx.Node]()
    while True:
        found = region(read, above, chain)
        inside = [node for node in found - opened if node in sites and sites[node].chain[0] in found | {read}]
        if not inside:
            return found
        opened.update(inside)
        for node in inside:
            above |= set().union(*(lineage(other, sites) for other, _ in sites[node].branches))


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values, not only sizes, a node is computed from."""
    return [source for source in node.all_input_nodes if not reads_form(source)]


def mixes(node: fx.Node) -> bool:
    """Whether a node mixes features: what makes a branch a block."""
    if "mixes" in node.meta:  # of a child, or of a function whose own calls are not in the graph
        return bool(node.meta["mixes"])
    return node.op in ("call_function", "call_method") and vocabulary.is_mixing(node.target)


def is_linear(node: fx.Node) -> bool:
    """Whether a node scales, adds or reshapes, and nothing more."""
    return node.op in ("call_function", "call_method") and vocabulary.name_of(node.target) in vocabulary.LINEAR


def reads_form(node: fx.Node) -> bool:
    """Whether a node sees a tensor's form and not its values."""
    if node.op == "call_method":
        return node.target in vocabulary.FORM or node.target in vocabulary.LIKE
    if node.target is getattr:
        return node.args[1] in vocabulary.FORM
    return node.op == "call_function" and (
        node.target in (torch.numel, torch.is_floating_point) or vocabulary.name_of(node.target) in vocabulary.LIKE
    )

"""One layout for a trunk that changes between images and tokens, before a graph is analysed.

Before                                      After
    y = x + f(x)                                y = x + f(x)                              (B, C, H, W)
    t = y.flatten(2).transpose(1, 2)            t = y.flatten(2).transpose(1, 2)          (B, N, C)
    s = t + g(t)                                z = y + g(t).transpose(1, 2).reshape(y.shape)
    z = s.transpose(1, 2).view(y.shape)

A sum of what was only laid out anew is the same sum in the layout from before, where the trunk's features stay where
they are. Streams then have one axis of features from end to end.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.passes.axes import axis_operation
from mhc_rewrite.passes.lineage import ancestors

_RESHAPING = frozenset("view reshape flatten unflatten".split())
_PERMUTING = frozenset("permute transpose swapaxes swapdims movedim moveaxis".split())
_COPYING = frozenset({"contiguous"})


def unify(graph: fx.Graph) -> int:
    """Moves such sums of a fresh capture, and undoes what is laid out and back; returns how many."""
    changed = 0
    results = [leaf.meta.get("shape") for leaf in graph.output_node().all_input_nodes]
    for node in list(graph.nodes):
        if _is_layout(node):
            changed += _undo(node)
        elif (found := _laid_out(node, results)) is not None:
            _move(graph, node, *found)
            changed += 1
    if changed:
        graph.eliminate_dead_code(is_impure_node=lambda node: not _is_layout(node))
        graph.lint()
    return changed


def _laid_out(add: fx.Node, results: list[Any]) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """Of a sum `t(x) + branch`: x, branch, and the operations of t in order.

    x is an earlier sum on the trunk, or an argument in whose layout the forward returns something as well.
    """
    if not _is_sum(add) or add.meta.get("inplace") or add.kwargs:
        return None
    for trunk, branch in (add.args, add.args[::-1]):
        base, operations = _way_back(trunk)  # type: ignore[arg-type]
        begins = _is_sum(base) or (base.op == "placeholder" and base.meta["shape"] in results)
        if _moves_features(operations) and begins and base in ancestors(branch):  # type: ignore[arg-type]
            return base, branch, operations  # type: ignore[return-value]
    return None


def _moves_features(operations: list[fx.Node]) -> bool:
    """Whether no axis stays where it is in all of them: else they can be done to every stream."""
    stay = {-1, 1}
    for operation in operations:
        before: Any = operation.args[0]
        found = axis_operation(operation, before.meta["shape"])
        if vocabulary.name_of(operation.target) not in _COPYING:
            stay &= set(found.channel_dims) if found is not None else set()
    return not stay


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two floating tensors of one shape."""
    if node.op not in ("call_function", "call_method") or vocabulary.name_of(node.target) not in vocabulary.ADD:
        return False
    terms = [term for term in node.args if isinstance(term, fx.Node) and "shape" in term.meta]
    if not len(terms) == len(node.args) == 2 or terms[0] is terms[1]:
        return False
    return terms[0].meta["shape"] == terms[1].meta["shape"] and vocabulary.is_feature(node.meta["dtype"])


def _is_layout(node: fx.Node) -> bool:
    """Whether a node lays a tensor out anew, with all its elements."""
    if node.op not in ("call_function", "call_method") or node.meta.get("inplace"):
        return False
    name = vocabulary.name_of(node.target)
    if name not in _RESHAPING | _PERMUTING | _COPYING or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before = node.args[0].meta.get("shape")
    if before == node.meta["shape"] and name in _RESHAPING:  # what `_undo` leaves: it may change sizes in another call
        return False
    same = before is not None and math.prod(before) == math.prod(node.meta["shape"])
    written = any(user.meta.get("inplace") for user in node.users)
    return same and node.args[0].meta["dtype"] == node.meta["dtype"] and not written


def _way_back(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What a tensor is laid out from, and the operations that do it, in order."""
    operations: list[fx.Node] = []
    while _is_layout(node):
        operations.insert(0, node)
        node = node.args[0]  # type: ignore[assignment]
    return node, operations


def _move(graph: fx.Graph, add: fx.Node, base: fx.Node, branch: fx.Node, operations: list[fx.Node]) -> None:
    with graph.inserting_before(add):
        back = branch
        for operation in reversed(operations):
            back = _inverse(graph, operation, back)
        shape = base.meta["shape"]
        back.meta.update(shape=shape, dtype=branch.meta["dtype"])
        total = graph.call_function(torch.add, (base, back))
        total.meta = {**add.meta, "shape": shape}
        total.meta.pop("storage", None)
        forth = total
        for operation in operations:
            forth = graph.node_copy(operation, lambda n, was=operation, now=forth: now if n is was.args[0] else n)  # type: ignore[misc]
            forth.meta = {**operation.meta, "dtype": add.meta["dtype"]}
            forth.meta.pop("storage", None)
        # The sum had memory of its own, in its own order.
        own = graph.call_method("contiguous", (forth,))
        own.meta = {**forth.meta}
    add.replace_all_uses_with(own)
    graph.erase_node(add)


def _inverse(graph: fx.Graph, operation: fx.Node, value: fx.Node) -> fx.Node:
    source: Any = operation.args[0]
    name = vocabulary.name_of(operation.target)
    if name in _COPYING:
        return value
    if name in _RESHAPING:
        form = graph.call_function(getattr, (source, "shape"))
        new = graph.call_method("reshape", (value, form))
    else:
        sized = torch.empty(tuple(range(2, 2 + len(source.meta["shape"]))), device="meta")
        axes = [size - 2 for size in _permuted(operation, sized).shape]
        new = graph.call_method("permute", (value, tuple(axes.index(axis) for axis in range(len(axes)))))
    new.meta.update(shape=source.meta["shape"], dtype=value.meta["dtype"])
    return new


def _permuted(operation: fx.Node, value: Tensor) -> Tensor:
    name = vocabulary.name_of(operation.target)
    return value if name in _COPYING else getattr(value, name)(*operation.args[1:], **operation.kwargs)


def _undo(node: fx.Node) -> bool:
    """Lets reads of what was laid out and laid out back read it as it was; returns whether `node` is that."""
    base, operations = _way_back(node)
    if all(vocabulary.name_of(operation.target) not in _PERMUTING for operation in operations):
        return False
    shape = base.meta["shape"] if _is_sum(base) else ()
    if shape != node.meta["shape"] or not _in_order(shape, operations):
        return False
    if vocabulary.name_of(node.target) in ("view", "reshape"):  # in another call its sizes may be others than the sum's
        with node.graph.inserting_before(node):
            sized = node.graph.call_method("reshape", (base, *node.args[1:]), node.kwargs)
        sized.meta = {**node.meta}
        base = sized
    node.replace_all_uses_with(base)
    return True


def _in_order(shape: tuple[int, ...], operations: list[fx.Node]) -> bool:
    """Whether operations leave every element of a tensor of that shape in its place: found by trying.

    Axes of size 1 would not show that they move. A batch of one is tried as a batch of two, where it stays in front.
    """
    shapes = [operation.meta["shape"] for operation in operations]
    batch = 2 if shape[0] == 1 and all(other[0] == 1 for other in shapes) else shape[0]
    if 1 in (batch, *shape[1:]):
        return False
    places = torch.arange(batch * math.prod(shape[1:])).reshape(batch, *shape[1:])
    value = places
    for operation, other in zip(operations, shapes, strict=True):
        if vocabulary.name_of(operation.target) in _RESHAPING:
            value = value.reshape(batch if other[0] == shape[0] else other[0], *other[1:])
        else:
            value = _permuted(operation, value)
    return torch.equal(value, places)

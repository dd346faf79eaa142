"""Keeps the stream state only at the first site of every segment of sites; what lies between is recomputed in backward.

Before (segments of 2, on the graph of Dynamo)     After
    X1, u1, p1, r1 = boundary(X, y0, ...)              X1, u1, p1, r1 = boundary(X, y0, ...)        # segment 0
    X2, u2, p2, r2 = boundary(X1, y1, ...)             X2 = post(X1, y1, p1, r1)                    # segment 0
                                                       u2, p2, r2 = pre(X2, ...)                    # segment 1
    X3, u3, p3, r3 = boundary(X2, y2, ...)             X3, u3, p3, r3 = boundary(X2, y2, ...)       # segment 1

Numbers of segments travel with the nodes into the joint graph of forward and backward. There, what a site computes is
marked to be recomputed, in an order that lets the partitioner keep what one segment hands to the next: X2. A boundary
at the start of a segment comes apart, since nothing of what its second half computes is to be kept. The blocks and
their outputs are nobody's segment and kept as they were. Source: arXiv:2512.24880, eq. 20.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import math
import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from mhc_rewrite.config import Recompute, check_recompute
from mhc_rewrite.kernels.kinds import streams_of
from mhc_rewrite.passes.fuse_boundaries import BOUNDARY, POST, PRE

log = logging.getLogger(__name__)

SEGMENT = "mhc_segment"  # in a node's meta["custom"], which torch carries into the joint graph

_PHI: dict[Any, int] = {PRE: 1, BOUNDARY: 4}  # the place of phi in the arguments


@dataclass
class Segments:
    """What was marked.

    Attributes:
        graph_module: the graph, changed in place.
        lengths: of the segments, in sites; stream by stream in execution order.
        parted: boundaries at the start of a segment that came apart.
    """

    graph_module: fx.GraphModule
    lengths: list[list[int]] = field(default_factory=list)
    parted: int = 0

    @property
    def modified(self) -> bool:
        return bool(self.lengths)


def annotate_recompute(graph_module: fx.GraphModule, example_inputs: Any = None, *, recompute: Recompute) -> Segments:
    """Marks the segments on the graph that Dynamo hands to a backend, after `fuse_boundaries`, in place.

    Sites inside of a region that the user checkpoints are recomputed as part of it and stay as they are.
    """
    done = Segments(graph_module)
    if check_recompute(recompute) is None or any(SEGMENT in _custom(node) for node in graph_module.graph.nodes):
        return done
    from mhc_rewrite.cost import best_segment  # sympy takes its time

    first = 0
    for sites in _streams(graph_module.graph):
        length = best_segment(_streams_at(sites[0]), len(sites)) if recompute == "auto" else int(recompute or 0)
        for index, site in enumerate(sites):
            segment = first + index // length
            if index:
                _mark(_between(site), first + (index - 1) // length)
                if index % length == 0 and site.target is BOUNDARY:
                    site = _part(graph_module.graph, site)
                    done.parted += 1
            _mark([site, *site.users], segment)
        first += math.ceil(len(sites) / length)
        done.lengths.append([len(sites[k : k + length]) for k in range(0, len(sites), length)])
    if done.modified:
        graph_module.graph.lint()
        graph_module.recompile()
    log.debug("annotate_recompute: segments of %s sites, %d boundaries parted", done.lengths, done.parted)
    return done


def _streams(graph: fx.Graph) -> list[list[fx.Node]]:
    """The sites, `pre` or `boundary`, stream by stream in execution order; anew where the number of streams changes."""
    streams: list[list[fx.Node]] = []
    for node in graph.nodes:
        if node.target in _PHI:
            before = _site_before(node)
            mine = next((sites for sites in streams if sites[-1] is before), None)
            if mine is None or _streams_at(mine[0]) != _streams_at(node):
                streams.append([node])
            else:
                mine.append(node)
    return streams


def _site_before(site: fx.Node) -> fx.Node | None:
    """The site whose `post` wrote the state that this site reads."""
    post = site if site.target is BOUNDARY else next((n for n in _between(site) if n.target is POST), None)
    h_post: Any = post.args[2] if post is not None else None
    if not isinstance(h_post, fx.Node) or h_post.target is not operator.getitem:
        return None
    return h_post.all_input_nodes[0]


def _between(site: fx.Node) -> list[fx.Node]:
    """The `post` that wrote the state of a `pre`, and what was done to every stream between, in execution order."""
    if site.target is BOUNDARY:
        return []
    needed: set[fx.Node] = set()
    todo: list[Any] = [site.args[0]]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(() if node.target is POST or node.target in _PHI else node.all_input_nodes)
    posts = sorted(node for node in needed if node.target is POST)
    path: list[fx.Node] = posts[-1:]
    for node in sorted(needed):
        if any(other in path for other in node.all_input_nodes) and node not in path:
            path.append(node)
    return path


def _streams_at(site: fx.Node) -> int:
    _, bias, _, kind = site.args[_PHI[site.target] + 1 : _PHI[site.target] + 5]
    return streams_of(bias.meta["example_value"].shape[-1], kind)  # type: ignore[union-attr, arg-type]


def _part(graph: fx.Graph, boundary: fx.Node) -> fx.Node:
    """`post` and `pre` in place of a boundary; gives the `pre`."""
    segment = _custom(boundary.args[2].args[0])[SEGMENT]  # type: ignore[union-attr, arg-type]
    with graph.inserting_before(boundary):
        post = graph.call_function(POST, (*boundary.args[:4], boundary.args[-1]))
        pre = graph.call_function(PRE, (post, *boundary.args[4:]))
    state, *rest = boundary.meta["example_value"]
    post.meta, pre.meta = boundary.meta | {"example_value": state}, boundary.meta | {"example_value": tuple(rest)}
    _mark([post], segment)
    for user in list(boundary.users):
        if user.args[1] == 0:
            user.replace_all_uses_with(post)
            graph.erase_node(user)
        else:
            user.args = (pre, user.args[1] - 1)  # type: ignore[operator]
    graph.erase_node(boundary)
    return pre


def _mark(nodes: Iterable[fx.Node], segment: int) -> None:
    for node in nodes:
        node.meta["custom"] = _custom(node) | {SEGMENT: segment}


def _custom(node: fx.Node) -> dict[str, Any]:
    return node.meta.get("custom") or {}


# -- the joint graph ---------------------------------------------------------------------------------------------------


def mark_joint_graph(graph: fx.Graph) -> None:
    """Marks what the segments compute in the forward part of a joint graph for the partitioner."""
    backward: set[fx.Node] = set()
    marked: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if "tangents" in node.name if node.op == "placeholder" else not backward.isdisjoint(node.all_input_nodes):
            backward.add(node)  # nodes of the backward have the marks of those they belong to
        elif SEGMENT in _custom(node) and node.op == "call_function" and not _is_random(node):
            if "recompute" not in node.meta:  # what the user's own checkpoints say holds
                node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
                node.meta["ac_graph_id"] = _custom(node)[SEGMENT]
                marked[node] = None
    handed_on = [
        _without_views(node)
        for node in marked
        if any(user.meta.get("ac_graph_id", -1) > node.meta["ac_graph_id"] for user in node.users if user in marked)
    ]
    for node in handed_on:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    log.debug("annotate_recompute: %d nodes of the joint graph marked, %d kept", len(marked), len(handed_on))


def _without_views(node: fx.Node) -> fx.Node:
    """What a view is a view of: the partitioner keeps no views, whatever they are marked."""
    while getattr(node.target, "is_view", False):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_random(node: fx.Node) -> bool:
    """A mask is kept, not drawn again."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def uuid(segments: Segments) -> str:
    """Names this pass with what it was told to mark, in the keys of the caches of compiled graphs."""
    source = inspect.getsource(sys.modules[__name__])
    return hashlib.sha256(f"{segments.lengths}\n{source}".encode()).hexdigest()

"""Where one site's `post` meets the next site's `pre`, one operator does both and the state is read once.

Before                                         After
    X = expand(unsqueeze(x))                       X = unsqueeze(x)                    one stream: C read, not n C
    u, p, r = pre(X, phi_0)                        u, p, r = pre(X, phi_0)
    X1 = post(X, f(u), p, r)                       X1, u1, p1, r1 = boundary(X, f(u), p, r, phi_1)
    u1, p1, r1 = pre(X1, phi_1)
    X2 = post(X1, g(u1), p1, r1)                   y = post_collapse(X1, g(u1), p1, r1)
    y = mean(X2, -2)

`fuse_boundaries` does it to the operators in a graph of Dynamo, `fuse_site_calls` to the calls of site modules in a
rewritten forward. X1 stays there for its other readers. What lies between `post` and `pre` may move axes there and
back, nothing else: an operation on every stream keeps the two apart.
"""

from __future__ import annotations

import logging
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mhc_rewrite.capture.vocabulary import name_of
from mhc_rewrite.kernels import ops  # noqa: F401  registers the operators
from mhc_rewrite.sites import streams

log = logging.getLogger(__name__)

PRE = torch.ops.mhc_rewrite.pre.default
POST = torch.ops.mhc_rewrite.post.default
BOUNDARY = torch.ops.mhc_rewrite.boundary.default
POST_COLLAPSE = torch.ops.mhc_rewrite.post_collapse.default
OPERATORS = PRE, POST, BOUNDARY, POST_COLLAPSE

_AXES = {"movedim", "moveaxis", "permute", "transpose", "unsqueeze", "squeeze"}
_MAY_CHANGE_NOTHING = {"contiguous", "to", "float", "double", "half", "bfloat16", "type_as", "view", "reshape"}
_IN_PLACE = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


@dataclass
class Fused:
    """What was done.

    Attributes:
        graph_module: the graph, changed in place.
        boundaries: `post` and `pre` that became one operator.
        left: why others did not, by the name of the `pre`.
        expansions: operators that read one stream in place of n equal ones.
        collapses: `post` that became `post_collapse`.
    """

    graph_module: fx.GraphModule | None = None
    boundaries: int = 0
    left: dict[str, str] = field(default_factory=dict)
    expansions: int = 0
    collapses: int = 0

    @property
    def found(self) -> int:
        """Places where a state reaches a `pre` other than by an expansion."""
        return self.boundaries + len(self.left)

    @property
    def modified(self) -> bool:
        return bool(self.boundaries or self.expansions or self.collapses)


# -- graphs of Dynamo: operators ---------------------------------------------------------------------------------------


def fuse_boundaries(graph_module: fx.GraphModule, example_inputs: Any = None) -> Fused:
    """Fuses the operators of a graph and of the graphs that it calls (those of checkpointed regions), in place.

    Args:
        graph_module: as Dynamo hands it to a backend: nodes have the `example_value` of their results.
        example_inputs: not needed.
    """
    done = Fused(graph_module)
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            before = done.boundaries, done.expansions, done.collapses
            _fuse_graph(module.graph, done)
            if before != (done.boundaries, done.expansions, done.collapses):
                module.graph.lint()
                module.recompile()
    _report("fuse_boundaries", done)
    return done


def _fuse_graph(graph: fx.Graph, done: Fused) -> None:
    for pre in _calls(graph, PRE):
        state, steps = _origin(pre.args[0])
        if _is_expansion(state) or _shape(pre.args[0])[-2:-1] == ["1"]:  # type: ignore[arg-type]
            continue
        reason = _why_apart(state, steps, pre)
        if reason:
            done.left[pre.name] = reason
        else:
            _fuse(graph, state, steps, pre)
            done.boundaries += 1
    for post in _calls(graph, POST):
        done.collapses += _collapse(graph, post)
    for node in _calls(graph, *OPERATORS):
        done.expansions += _read_one_stream(graph, node)


def _calls(graph: fx.Graph, *targets: Any) -> Iterator[fx.Node]:
    return iter([node for node in graph.nodes if node.op == "call_function" and node.target in targets])


def _why_apart(state: fx.Node, steps: list[fx.Node], pre: fx.Node) -> str:
    """Why a `pre` can't be fused with what its state comes from; empty where it can."""
    if state.op == "placeholder":
        return "its state comes from outside of the graph"
    if state.target is not POST:
        if state.target is operator.getitem and state.args[0].target is BOUNDARY:  # type: ignore[union-attr]
            return "its state was read by another site first"
        return f"{name_of(state.target)} lies between"
    if _moved_axes(state, steps) != list(range(len(_shape(state)))):
        return f"{name_of(steps[-1].target)} lies between"
    if any(user.target is not operator.getitem for user in pre.users):
        return "its results are read as one"
    node = state.next
    while node is not pre:
        if name_of(node.target) in ("set_grad_enabled", "_set_grad_enabled"):
            return "gradients are switched on or off between"
        if _writes(node):
            return f"{name_of(node.target)} writes to a tensor between"
        node = node.next
    if state in _needed_after(state, pre):
        return "its parameters are made from the state"
    return ""


def _fuse(graph: fx.Graph, post: fx.Node, steps: list[fx.Node], pre: fx.Node) -> None:
    for node in sorted(_needed_after(post, pre)):
        post.prepend(node)
    with graph.inserting_before(post):
        boundary = graph.call_function(BOUNDARY, (*post.args[:-1], *pre.args[1:]))
        state = graph.call_function(operator.getitem, (boundary, 0))
    state.meta = post.meta.copy()
    boundary.meta = {**pre.meta, "example_value": (_value(post), *(_value(pre) or ()))}
    post.replace_all_uses_with(state)
    for user in list(pre.users):
        user.args = (boundary, user.args[1] + 1)  # type: ignore[operator]
    for node in (pre, *reversed(steps), post):
        if not node.users:
            graph.erase_node(node)


def _needed_after(post: fx.Node, pre: fx.Node) -> set[fx.Node]:
    """What the parameters of `pre` are made of, as far as it does not come before `post`."""
    needed: set[fx.Node] = set()
    todo = [node for node in pre.all_input_nodes if node is not pre.args[0]]
    while todo:
        node = todo.pop()
        if node not in needed and not node < post:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    return needed


def _collapse(graph: fx.Graph, post: fx.Node) -> bool:
    """Makes `post_collapse` of a `post` whose only reader is the mean over its streams."""
    node, steps = post, []
    while len(node.users) == 1 and _is_step(next(iter(node.users))):
        node = next(iter(node.users))
        steps.append(node)
    if len(node.users) != 1:
        return False
    mean = next(iter(node.users))
    axes, dim = _moved_axes(post, steps), _mean_dim(mean)
    rank = len(_shape(post))
    if axes is None or dim is None or axes[dim] != rank - 2:
        return False
    del axes[dim]
    order = [min(axis, rank - 2) for axis in axes]  # the axis of C comes one forward
    with graph.inserting_before(post):
        collapsed = graph.call_function(POST_COLLAPSE, post.args)
        collapsed.meta = {**post.meta, "example_value": _value(mean)}
        if order != list(range(rank - 1)):
            back = [order.index(axis) for axis in range(rank - 1)]
            collapsed.meta["example_value"] = _value(mean).permute(back)
            # Cloned, as a mean may be written to and a view of an operator's result may not.
            moved = graph.call_method("permute", (collapsed, order))
            collapsed = graph.call_method("clone", (moved,), {"memory_format": torch.contiguous_format})
            moved.meta, collapsed.meta = mean.meta.copy(), mean.meta.copy()
    mean.replace_all_uses_with(collapsed)
    for node in (mean, *reversed(steps), post):
        graph.erase_node(node)
    return True


def _mean_dim(node: fx.Node) -> int | None:
    """The axis of a mean over one axis, which is not kept."""
    if node.op not in ("call_method", "call_function") or name_of(node.target) != "mean":
        return None
    dim = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if isinstance(dim, (list, tuple)) and len(dim) == 1:
        dim = dim[0]
    return dim if isinstance(dim, int) else None


def _read_one_stream(graph: fx.Graph, node: fx.Node) -> bool:
    """Gives an operator whose streams are an expansion the one stream that was expanded."""
    expansion, steps = _origin(node.args[0])
    axes = _moved_axes(expansion, steps)
    if not _is_expansion(expansion) or axes is None or axes[-2] != _expanded_axis(expansion):
        return False
    one: Any = expansion.args[0]
    with graph.inserting_before(node):
        for step in steps:
            if name_of(step.target) in _AXES:
                value = _run(step, _value(one))
                one = graph.create_node(step.op, step.target, (one, *step.args[1:]), step.kwargs)
                one.meta = {**step.meta, "example_value": value}
    node.update_arg(0, one)
    for old in (*reversed(steps), expansion):
        if not old.users:
            graph.erase_node(old)
    return True


# -- what lies between -------------------------------------------------------------------------------------------------


def _origin(node: Any) -> tuple[fx.Node, list[fx.Node]]:
    """What a state comes from, and the steps from there that may leave it as it is, first to last."""
    steps: list[fx.Node] = []
    while _is_step(node):
        steps.insert(0, node)
        node = node.args[0]
    return node, steps


def _is_step(node: fx.Node) -> bool:
    if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    name = name_of(node.target)
    return name in _AXES or (name in _MAY_CHANGE_NOTHING and _same_form(node, node.args[0]))


def _moved_axes(start: fx.Node, steps: list[fx.Node]) -> list[int] | None:
    """Where each axis of the last step comes from in `start`; None where the steps do more than move axes."""
    rank = len(_shape(start))
    if not steps:
        return list(range(rank))
    label = torch.empty(tuple(range(2, rank + 2)), device="meta")  # axes are told apart by their sizes
    try:
        for step in steps:
            label = _run(step, label) if name_of(step.target) in _AXES else label
    except (RuntimeError, IndexError):
        return None
    axes = [size - 2 for size in label.shape]
    moved = sorted(axes) == list(range(rank)) and _shape(steps[-1]) == [_shape(start)[axis] for axis in axes]
    return axes if moved else None


def _run(step: fx.Node, value: Any) -> Any:
    function: Any = getattr(torch.Tensor, step.target) if isinstance(step.target, str) else step.target
    return function(value, *step.args[1:], **step.kwargs)


def _is_expansion(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "expand" and _expanded_axis(node) is not None


def _expanded_axis(node: fx.Node) -> int | None:
    """The only axis that an expansion made longer."""
    before, after = _shape(node.args[0]), _shape(node)  # type: ignore[arg-type]
    axes = [axis for axis, sizes in enumerate(zip(before, after)) if sizes[0] != sizes[1]]
    return axes[0] if len(before) == len(after) and len(axes) == 1 and before[axes[0]] == "1" else None


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _shape(node: fx.Node) -> list[str]:
    """As text: comparing symbolic sizes would tie the graph to their values."""
    value = _value(node)
    return [str(size) for size in value.shape] if isinstance(value, torch.Tensor) else []


def _same_form(node: fx.Node, other: fx.Node) -> bool:
    mine, its = _value(node), _value(other)
    if not isinstance(mine, torch.Tensor) or not isinstance(its, torch.Tensor):
        return False
    return (_shape(node), mine.dtype, mine.device) == (_shape(other), its.dtype, its.device)


def _writes(node: fx.Node) -> bool:
    if node.op not in ("call_method", "call_function"):
        return False
    name = name_of(node.target)
    return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__")) or "out" in node.kwargs


# -- rewritten forwards: calls of site modules -------------------------------------------------------------------------


def fuse_site_calls(graph: fx.Graph) -> Fused:
    """Fuses the calls `site.pre` and `site.post` of a forward that `expand_streams` wrote, in place.

    `pre(post(X, y, mix))` becomes `boundary(X, y, mix)` of the second site, and `collapse(post(...), "mean")` becomes
    `post_collapse`. An expansion that sites alone read is one stream wide.
    """
    done = Fused()
    for pre in _site_calls(graph, "pre"):
        post: Any = pre.args[1]
        if post.target is streams.expand:
            continue
        if post.op != "call_method" or post.target != "post":
            comes_in = post.op == "placeholder"
            done.left[pre.name] = "its state comes in" if comes_in else f"{name_of(post.target)} lies between"
            continue
        with graph.inserting_before(post):
            site = graph.get_attr(pre.args[0].target)  # type: ignore[union-attr, arg-type]
            boundary = graph.call_method("boundary", (site, *post.args[1:]))
            state = graph.call_function(operator.getitem, (boundary, 0))
        state.meta = post.meta.copy()
        boundary.meta = {**pre.meta, "role": "boundary"}
        post.replace_all_uses_with(state)
        for user in list(pre.users):
            user.args = (boundary, user.args[1] + 1)  # type: ignore[operator]
        graph.erase_node(pre)
        graph.erase_node(post)
        done.boundaries += 1
    for post in _site_calls(graph, "post"):
        done.collapses += _collapse_site(graph, post)
    for node in graph.nodes:
        done.expansions += _expand_to_one(node)
    if done.modified:
        graph.eliminate_dead_code(is_impure_node=_is_no_attribute)
        graph.lint()
    _report("fuse_site_calls", done)
    return done


def _site_calls(graph: fx.Graph, method: str) -> list[fx.Node]:
    return [
        node for node in graph.nodes
        if node.op == "call_method" and node.target == method and node.args[0].op == "get_attr"
    ]  # fmt: skip


def _collapse_site(graph: fx.Graph, post: fx.Node) -> bool:
    user = next(iter(post.users))
    if len(post.users) > 1 or user.target is not streams.collapse or user.args[2] != "mean":
        return False
    with graph.inserting_before(user):
        collapsed = graph.call_method("post_collapse", post.args)
    collapsed.meta = user.meta.copy()
    user.replace_all_uses_with(collapsed)
    graph.erase_node(user)
    graph.erase_node(post)
    return True


def _expand_to_one(node: fx.Node) -> bool:
    if node.target is not streams.expand or node.args[1] == 1:
        return False
    calls = {"pre", "post", "boundary", "post_collapse"}
    if not all(user.op == "call_method" and user.target in calls and user.args[1] is node for user in node.users):
        return False
    channel_dim = node.args[2]
    node.args = (node.args[0], 1, channel_dim)
    shape = node.meta.get("shape")
    if shape is not None:
        at = len(shape) + streams.stream_dim(-1) if channel_dim == -1 else streams.stream_dim(1)
        node.meta["shape"] = (*shape[:at], 1, *shape[at + 1 :])
    return True


def _is_no_attribute(node: fx.Node) -> bool:
    return node.op != "get_attr"


def _report(name: str, done: Fused) -> None:
    log.debug(
        "%s: %d boundaries fused, %d left (%s), %d expansions and %d collapses fused",
        name, done.boundaries, len(done.left),
        ", ".join(f"{count} {reason}" for reason, count in Counter(done.left.values()).items()) or "none",
        done.expansions, done.collapses,
    )  # fmt: skip

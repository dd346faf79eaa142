"""`fuse_boundaries` on graphs of Dynamo and `fuse_site_calls` on rewritten forwards: counts, operators, numerics.

`EXPECTTEST_ACCEPT=1 pytest tests/test_fuse_boundaries.py` writes new texts; read them before they are committed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from families_text import BY_NAME
from family import output, relative
from golden import Layer, capture, rewrite, text
from mhc_rewrite import graphs, mhcify
from mhc_rewrite.kernels import ops
from mhc_rewrite.passes.fuse_boundaries import Fused, fuse_boundaries, fuse_site_calls
from oracle import perturb

N, C = 3, 4
COLUMNS = N * N + 2 * N
OPTIONS = "mhc", 5, 1e-6
State = Callable[[Tensor], Tensor]


# -- graphs of Dynamo ------------------------------------------------------------------------------------------------


def operands(*shape: int) -> tuple[Tensor, ...]:
    """x, and phi, alpha and bias of two sites, in fp64."""
    torch.manual_seed(0)
    sites = [t for _ in range(2) for t in (torch.randn(N * C, COLUMNS), torch.rand(3) + 0.5, torch.randn(COLUMNS))]
    return tuple(t.double().requires_grad_() for t in (torch.randn(shape), *sites))


def site(X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ops.pre(X, phi.to(X.dtype), alpha.to(X.dtype), bias.to(X.dtype), *OPTIONS)[:3]


def chain(between: State = lambda X: X, end: State = lambda X: X.mean(-2), first: State | None = None) -> Any:
    """Two sites in a row, with something between their states."""

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        X = first(x) if first else x.unsqueeze(-2).expand(*x.shape[:-1], N, C)
        u, p, r = site(X, *parameters[:3])
        X = between(ops.post(X, torch.sin(u), p, r))
        u, p, r = site(X, *parameters[3:])
        return end(ops.post(X, torch.cos(u), p, r))

    return function


def channels_first(x: Tensor, *parameters: Tensor) -> Tensor:
    """The same on (B, C, H, W), written as HyperConnection does: n before C between the sites."""
    X = x.unsqueeze(1).expand(-1, N, -1, -1, -1)
    for k, act in enumerate((torch.sin, torch.cos)):
        u, p, r = site(X.movedim((1, 2), (-2, -1)), *parameters[3 * k : 3 * k + 3])
        y = act(u.movedim(-1, 1))
        X = ops.post(X.movedim((1, 2), (-2, -1)), y.movedim(1, -1), p, r).movedim((-2, -1), (1, 2))
    return X.mean(1)


def read_beside(x: Tensor, *parameters: Tensor) -> Tensor:
    """A third reader of the state between, which stands before the second site."""
    u, p, r = site(x, *parameters[:3])
    X = ops.post(x, torch.sin(u), p, r)
    early = X.mean(-2).tanh()
    u, p, r = site(X, *parameters[3:])
    return ops.post(X, torch.cos(u), p, r).mean(-2) + early + X[..., 0, :]


def read_twice(x: Tensor, *parameters: Tensor) -> Tensor:
    u, p, r = site(x, *parameters[:3])
    X = ops.post(x, torch.sin(u), p, r)
    u, p, r = site(X, *parameters[3:])
    v, _, _ = site(X, *parameters[:3])
    return ops.post(X, torch.cos(u), p, r).mean(-2) + v


def parameters_of_the_state(x: Tensor, *parameters: Tensor) -> Tensor:
    u, p, r = site(x, *parameters[:3])
    X = ops.post(x, torch.sin(u), p, r)
    u, p, r = site(X, parameters[3] * X.mean(), *parameters[4:])
    return ops.post(X, torch.cos(u), p, r).mean(-2)


def written_between(x: Tensor, *parameters: Tensor) -> Tensor:
    bias = parameters[5] * 1
    u, p, r = site(x, *parameters[:3])
    X = ops.post(x, torch.sin(u), p, r)
    bias.mul_(2)
    u, p, r = site(X, *parameters[3:5], bias)
    return ops.post(X, torch.cos(u), p, r).mean(-2)


def without_gradient(x: Tensor, *parameters: Tensor) -> Tensor:
    u, p, r = site(x, *parameters[:3])
    X = ops.post(x, torch.sin(u), p, r)
    with torch.no_grad():
        u, p, r = site(X, *parameters[3:])
    return ops.post(X, torch.cos(u), p, r).mean(-2)


def run_fused(function: Callable[..., Any], *args: Tensor) -> tuple[Fused, list[str], Any]:
    """What the pass did and left, and the result of running the changed graph."""
    found: list[Any] = []

    def backend(graph_module: fx.GraphModule, _: Any) -> Any:
        found.append(fuse_boundaries(graph_module))
        again = fuse_boundaries(graph_module)
        assert not again.modified and again.left == found[0].left, "a second run changes something"
        names = [str(n.target).split(".")[1] for n in graph_module.graph.nodes if "mhc_rewrite." in str(n.target)]
        found.append(names)
        return graph_module.forward

    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, fullgraph=True)(*args)
    return *found, result


WIDE = lambda x: x  # noqa: E731  the state comes in as n streams
FLAT, STREAMS, IMAGE = (2, 3, C), (2, 2, N, C), (2, C, 3, 2)
ONE = ["pre", "boundary", "post_collapse"]
APART = ["pre", "post", "pre", "post_collapse"]

# name, function, shape of x, operators afterwards, boundaries, expansions, reasons
CASES: list[tuple[str, Callable[..., Any], tuple[int, ...], list[str], int, int, list[str]]] = [
    ("straight", chain(), FLAT, ONE, 1, 2, []),
    ("a cast to the same dtype", chain(lambda X: X.double().contiguous()), FLAT, ONE, 1, 2, []),
    ("unsqueeze and squeeze", chain(lambda X: X.unsqueeze(1).squeeze(1)), FLAT, ONE, 1, 2, []),
    ("axes there and back", chain(lambda X: X.transpose(0, 1).movedim(0, 1)), FLAT, ONE, 1, 2, []),
    ("channels first", channels_first, IMAGE, ONE, 1, 2, []),
    ("sum", chain(end=lambda X: X.sum(-2)), FLAT, ["pre", "boundary", "post"], 1, 2, []),
    ("mean over C", chain(end=lambda X: X.mean(-1)), FLAT, ["pre", "boundary", "post"], 1, 2, []),
    ("mean, kept", chain(end=lambda X: X.mean(-2, keepdim=True)), FLAT, ["pre", "boundary", "post"], 1, 2, []),
    ("mean and more", chain(end=lambda X: X.mean(-2) + X[..., 0, :]), FLAT, ["pre", "boundary", "post"], 1, 2, []),
    ("streams come in", chain(first=WIDE), STREAMS, ONE, 1, 0, ["its state comes from outside of the graph"]),
    ("tokens expanded", chain(first=lambda x: x.expand(-1, 3, -1, -1)), (2, 1, N, C), ONE, 1, 0, []),
    ("read beside", read_beside, STREAMS, ONE, 1, 0, ["its state comes from outside of the graph"]),
    ("lifted", chain(torch.relu), FLAT, APART, 0, 2, ["relu lies between"]),
    ("axes moved", chain(lambda X: X.transpose(0, 1)), FLAT, APART, 0, 2, ["transpose lies between"]),
    ("another dtype", chain(lambda X: X.float().double()), FLAT, APART, 0, 2, ["to lies between"]),
    ("reshaped", chain(lambda X: X.reshape(-1, N, C)), FLAT, APART, 0, 2, ["reshape lies between"]),
    (
        "read twice", read_twice, STREAMS, ["pre", "boundary", "pre", "post_collapse"], 1, 0,
        ["its state comes from outside of the graph", "its state was read by another site first"],
    ),
    (
        "parameters of the state", parameters_of_the_state, STREAMS, APART, 0, 0,
        ["its state comes from outside of the graph", "its parameters are made from the state"],
    ),
    (
        "written between", written_between, STREAMS, APART, 0, 0,
        ["its state comes from outside of the graph", "mul_ writes to a tensor between"],
    ),
    (
        "without gradient", without_gradient, STREAMS, APART, 0, 0,
        ["its state comes from outside of the graph", "gradients are switched on or off between"],
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_operators(case: Any) -> None:
    _, function, shape, want, boundaries, expansions, reasons = case
    args = operands(*shape)
    done, operators, got = run_fused(function, *args)
    assert operators == want
    left = [reason.replace("double", "to").replace("float", "to") for reason in done.left.values()]
    assert (done.boundaries, done.expansions, left) == (boundaries, expansions, reasons)
    assert done.collapses == operators.count("post_collapse") and done.found == boundaries + len(reasons)

    expected = function(*args)
    assert relative(got, expected) <= 1e-12
    weight = torch.randn_like(expected)
    gradients = [torch.autograd.grad((out * weight).sum(), args, allow_unused=True) for out in (got, expected)]
    for mine, its in zip(*gradients):
        assert (mine is None) == (its is None)
        assert mine is None or relative(mine, its) <= 1e-10


def test_nothing_to_do_changes_nothing() -> None:
    graph_module = fx.symbolic_trace(lambda x: torch.relu(x).mean(-1))
    before = graph_module.code
    done = fuse_boundaries(graph_module)
    assert not done.modified and done.found == 0 and graph_module.code == before


# -- rewritten forwards ----------------------------------------------------------------------------------------------


def pre_norm(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(self.norm1(x))
    return x + self.b(self.norm2(x))


def fused_text(forward: Any, *ways: bool, **options: Any) -> tuple[Fused, str]:
    graph = rewrite(capture(Layer(forward), **options), *ways).graph
    done = fuse_site_calls(graph)
    made = text(graph)
    assert not fuse_site_calls(graph).modified and text(graph) == made
    return done, made


def test_pre_norm() -> None:
    done, made = fused_text(pre_norm)
    assert (done.boundaries, done.expansions, done.collapses, done.left) == (1, 1, 1, {})
    assert_expected_inline(
        made,
        """\
x: placeholder
expand = expand(x, 1, -1)  # expand (2, 5, 1, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
norm1 = norm1(getitem)
a = a(norm1)
boundary = mhc_1.boundary(expand, a, getitem_1)  # boundary
getitem_4 = getitem(boundary, 0)  # post (2, 5, 3, 8)
getitem_2 = getitem(boundary, 1)
getitem_3 = getitem(boundary, 2)
norm2 = norm2(getitem_2)
b = b(norm2)
post_collapse = mhc_1.post_collapse(getitem_4, b, getitem_3)  # collapse (2, 5, 8)
return (post_collapse, ())""",
    )


def test_in_the_middle_of_a_stream() -> None:
    done, made = fused_text(pre_norm, True, True)
    assert (done.boundaries, done.expansions, done.collapses) == (1, 0, 0)
    assert list(done.left.values()) == ["its state comes in"]
    assert_expected_inline(
        made,
        """\
x: placeholder  # trunk (2, 5, 3, 8)
pre = mhc_0.pre(x)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
norm1 = norm1(getitem)
a = a(norm1)
boundary = mhc_1.boundary(x, a, getitem_1)  # boundary
getitem_4 = getitem(boundary, 0)  # post (2, 5, 3, 8)
getitem_2 = getitem(boundary, 1)
getitem_3 = getitem(boundary, 2)
norm2 = norm2(getitem_2)
b = b(norm2)
post_1 = mhc_1.post(getitem_4, b, getitem_3)  # post (2, 5, 3, 8)
return (post_1, (post_1,))""",
    )


def test_other_readers() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = x + self.a(x)
        early = torch.tanh(x)
        return x + self.b(x), early

    assert_expected_inline(
        fused_text(forward)[1],
        """\
x: placeholder
expand = expand(x, 1, -1)  # expand (2, 5, 1, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
boundary = mhc_1.boundary(expand, a, getitem_1)  # boundary
getitem_4 = getitem(boundary, 0)  # post (2, 5, 3, 8)
getitem_2 = getitem(boundary, 1)
getitem_3 = getitem(boundary, 2)
read_mean = read_mean(getitem_4, -1)
tanh = tanh(read_mean)
b = b(getitem_2)
post_collapse = mhc_1.post_collapse(getitem_4, b, getitem_3)  # collapse (2, 5, 8)
return ((post_collapse, tanh), ())""",
    )


def post_norm(self: Any, x: Tensor) -> Tensor:
    x = self.norm1(x + self.a(x))
    return x + self.b(x)


def scaled(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(x)
    return x * 0.5 + self.b(x)


def test_what_is_left_alone() -> None:
    done, made = fused_text(post_norm)
    assert (done.boundaries, list(done.left.values())) == (0, ["norm1 lies between"])
    assert "post(" in made and "pre(norm1" in made
    done, made = fused_text(scaled)
    assert done.boundaries == 1 and "mul(getitem_4, 0.5)" in made, made


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_layers(name: str) -> None:
    """Within a layer at conversion, from layer to layer in the graph of the whole model."""
    row = BY_NAME[name]
    model = mhcify(row.model(), row.example())
    perturb(model)
    layers = [Counter(node.role for node in graph.rewritten) for graph in graphs(model)]
    assert [(roles["pre"], roles["boundary"]) for roles in layers] == [(1, 1)] * len(layers)
    # The last layer hands on streams as well, whose mean its reader takes: layers may run more often than here.
    assert not any(roles["collapse"] for roles in layers) and layers[0]["expand"] == 1

    args, kwargs = row.arguments()
    kwargs["use_cache"] = False
    done, operators, got = run_fused(lambda: output(model(*args, **kwargs)))
    assert Counter(operators) == {"pre": 1, "boundary": row.sites - 1, "post_collapse": 1}
    assert done.boundaries == len(layers) - 1 and not done.left
    assert relative(got, output(model(*args, **kwargs))) <= 1e-12


def test_regions_that_are_checkpointed() -> None:
    """They are graphs of their own: fused within, not across."""

    def inner(x: Tensor, *parameters: Tensor) -> Tensor:
        return chain()(x, *parameters)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(inner, x, *parameters, use_reentrant=False)

    args = operands(*FLAT)
    done, _, got = run_fused(function, *args)
    assert (done.boundaries, done.expansions, done.collapses) == (1, 2, 1)
    assert relative(got, function(*args)) <= 1e-12

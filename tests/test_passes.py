"""Small captured graphs before and after `expand_streams`, as text: a change of structure shows as a difference.

`EXPECTTEST_ACCEPT=1 pytest tests/test_passes.py` writes new texts; read them before they are committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx

from golden import WIDTH, Layer, capture, features, rewrite, text
from mhc_rewrite import plan

# -- golden texts ----------------------------------------------------------------------------------------------------


def pre_norm(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(self.norm1(x))
    return x + self.b(self.norm2(x))


def test_pre_norm() -> None:
    captured = capture(Layer(pre_norm))
    assert_expected_inline(
        text(captured[0].graph),
        """\
x: placeholder
norm1 = norm1(x)
a = a(norm1)
add = add(x, a)
norm2 = norm2(add)
b = b(norm2)
add_1 = add(add, b)
return add_1""",
    )
    made = rewrite(captured)
    assert_expected_inline(
        text(made.graph),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
norm1 = norm1(getitem)
a = a(norm1)
post = mhc_0.post(expand, a, getitem_1)  # post (2, 5, 3, 8)
pre_1 = mhc_1.pre(post)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
norm2 = norm2(getitem_2)
b = b(norm2)
post_1 = mhc_1.post(post, b, getitem_3)  # post (2, 5, 3, 8)
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )
    assert made.outgoing == ()


def test_pre_norm_in_the_middle_of_a_stream() -> None:
    """Streams come in and go out: nothing is expanded and nothing collapsed."""
    made = rewrite(capture(Layer(pre_norm)), arriving=True, leaving=True)
    assert_expected_inline(
        text(made.graph),
        """\
x: placeholder  # trunk (2, 5, 3, 8)
pre = mhc_0.pre(x)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
norm1 = norm1(getitem)
a = a(norm1)
post = mhc_0.post(x, a, getitem_1)  # post (2, 5, 3, 8)
pre_1 = mhc_1.pre(post)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
norm2 = norm2(getitem_2)
b = b(norm2)
post_1 = mhc_1.post(post, b, getitem_3)  # post (2, 5, 3, 8)
return (post_1, (post_1,))""",
    )
    assert made.outgoing == (0,)


def test_pre_norm_where_a_stream_begins_and_ends() -> None:
    captured = capture(Layer(pre_norm))
    begins, passes, ends = (
        text(rewrite(captured, *ways).graph).splitlines() for ways in ((False, True), (True, True), (True, False))
    )
    assert_expected_inline(
        "\n".join(begins[:3]),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre""",
    )
    assert_expected_inline(
        "\n".join(ends[-2:]),
        """\
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )
    assert begins[-1] == passes[-1] and ends[:-2] == passes[:-1]


def test_post_norm() -> None:
    """The first norm is lifted to every stream, the second comes after the collapse."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = self.norm1(x + self.a(x))
        return self.norm2(x + self.b(x))

    captured = capture(Layer(forward))
    assert_expected_inline(
        text(captured[0].graph),
        """\
x: placeholder
a = a(x)
add = add(x, a)
norm1 = norm1(add)
b = b(norm1)
add_1 = add(norm1, b)
norm2 = norm2(add_1)
return norm2""",
    )
    made = rewrite(captured)
    assert_expected_inline(
        text(made.graph),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
post = mhc_0.post(expand, a, getitem_1)  # post (2, 5, 3, 8)
norm1 = norm1(post)  # trunk (2, 5, 3, 8)
pre_1 = mhc_1.pre(norm1)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
b = b(getitem_2)
post_1 = mhc_1.post(norm1, b, getitem_3)  # post (2, 5, 3, 8)
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
norm2 = norm2(collapse)
return (norm2, ())""",
    )
    # Where the stream goes on, the second norm is on the trunk, too.
    made = rewrite(captured, leaving=True)
    assert_expected_inline(text(made.graph).splitlines()[-2], """norm2 = norm2(post_1)  # trunk (2, 5, 3, 8)""")


def test_parallel() -> None:
    """Two branches in either association are one site: the branch is their sum."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return x + self.a(h) + self.b(h)

    assert_expected_inline(
        text(rewrite(capture(Layer(forward))).graph),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
norm1 = norm1(getitem)
a = a(norm1)
b = b(norm1)
add = add(a, b)
post = mhc_0.post(expand, add, getitem_1)  # post (2, 5, 3, 8)
collapse = collapse(post, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )

    def nested(self: Any, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return x + (self.a(h) + self.b(h))

    def turned(self: Any, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return self.a(h) + x + self.b(h)

    want = text(rewrite(capture(Layer(forward))).graph)
    assert text(rewrite(capture(Layer(nested))).graph) == text(rewrite(capture(Layer(turned))).graph) == want


def test_in_place() -> None:
    """The streams are a view of one tensor: nothing may write to them."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.a(x)
        x.add_(self.b(x), alpha=0.5)
        return x

    captured = capture(Layer(forward))
    assert_expected_inline(
        text(captured[0].graph),
        """\
x: placeholder
clone = x.clone()
a = a(clone)
iadd = iadd(clone, a)
b = b(iadd)
add_ = iadd.add_(b, alpha=0.5)
return add_""",
    )
    assert_expected_inline(
        text(rewrite(captured).graph),
        """\
x: placeholder
clone = x.clone()
expand = expand(clone, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
post = mhc_0.post(expand, a, getitem_1)  # post (2, 5, 3, 8)
pre_1 = mhc_1.pre(post)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
b = b(getitem_2)
mul = mul(b, 0.5)
post_1 = mhc_1.post(post, mul, getitem_3)  # post (2, 5, 3, 8)
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )


def test_factors() -> None:
    """`alpha` belongs to the second operand, whichever of the two is the trunk; DeepNorm's factor is lifted."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.add(x, self.a(x), alpha=0.5)
        x = torch.add(self.b(x), x, alpha=0.25)
        return x * 0.81 + self.gamma * self.a(x)

    assert_expected_inline(
        text(rewrite(capture(Layer(forward))).graph),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
mul = mul(a, 0.5)
post = mhc_0.post(expand, mul, getitem_1)  # post (2, 5, 3, 8)
pre_1 = mhc_1.pre(post)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
b = b(getitem_2)
mul_1 = mul(post, 0.25)
post_1 = mhc_1.post(mul_1, b, getitem_3)  # post (2, 5, 3, 8)
pre_2 = mhc_2.pre(post_1)  # pre
getitem_4 = getitem(pre_2, 0)
getitem_5 = getitem(pre_2, 1)
mul_2 = mul(post_1, 0.81)  # trunk (2, 5, 3, 8)
a_1 = a(getitem_4)
mul_3 = gamma.mul(a_1)
post_2 = mhc_2.post(mul_2, mul_3, getitem_5)  # post (2, 5, 3, 8)
collapse = collapse(post_2, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )


def test_excluded_site() -> None:
    """Its block reads the mean, and every stream receives its result."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + self.b(x)
        return x + self.a(x)

    assert_expected_inline(
        text(rewrite(capture(Layer(forward)), excluded=(1,)).graph),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
post = mhc_0.post(expand, a, getitem_1)  # post (2, 5, 3, 8)
read_mean = read_mean(post, -1)
b = b(read_mean)
plain_add = plain_add(post, b, -1)  # post (2, 5, 3, 8)
pre_1 = mhc_2.pre(plain_add)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
a_1 = a(getitem_2)
post_1 = mhc_2.post(plain_add, a_1, getitem_3)  # post (2, 5, 3, 8)
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )


def test_other_readers() -> None:
    """Who reads the trunk beside the sites gets the mean; who reads its form, one stream's."""

    def forward(self: Any, x: Tensor) -> Any:
        x = x + self.a(x)
        rows = x.shape[0]
        early = torch.tanh(x)
        x = x + self.b(x)
        return x, early, rows

    assert_expected_inline(
        text(rewrite(capture(Layer(forward))).graph),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
post = mhc_0.post(expand, a, getitem_1)  # post (2, 5, 3, 8)
pre_1 = mhc_1.pre(post)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
one_stream = one_stream(post, -1)
getattr_1 = getattr(one_stream, 'shape')
getitem_4 = getitem(getattr_1, 0)
read_mean = read_mean(post, -1)
tanh = tanh(read_mean)
b = b(getitem_2)
post_1 = mhc_1.post(post, b, getitem_3)  # post (2, 5, 3, 8)
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
return ((collapse, tanh, getitem_4), ())""",
    )


def dropout_on_the_trunk(self: Any, x: Tensor) -> Tensor:
    x = self.dropout(x + self.a(x))
    x = F.dropout(x, 0.2, self.training)
    return x + self.b(x)


def test_dropout_on_the_trunk() -> None:
    made = rewrite(capture(Layer(dropout_on_the_trunk), training=True))
    assert_expected_inline(
        text(made.graph),
        """\
x: placeholder
expand = expand(x, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
post = mhc_0.post(expand, a, getitem_1)  # post (2, 5, 3, 8)
shared_dropout_module = shared_dropout_module(dropout, post, -1)  # trunk (2, 5, 3, 8)
shared_dropout = shared_dropout(shared_dropout_module, 0.2, True, -1)  # trunk (2, 5, 3, 8)
pre_1 = mhc_1.pre(shared_dropout)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
b = b(getitem_2)
post_1 = mhc_1.post(shared_dropout, b, getitem_3)  # post (2, 5, 3, 8)
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )


def test_lifted_operations_are_listed_in_execution_order() -> None:
    (stream,) = plan(Layer(dropout_on_the_trunk), (features(),)).streams
    assert stream.lifted == ("model: dropout", "model: dropout_1")


def test_channels_first() -> None:
    """C is axis 1, so n is too; relu and the norm in eval mode act on every stream."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = F.relu(x + self.a(x), inplace=True)
        return F.relu(x + self.norm1(self.b(x)))

    made = rewrite(capture(Layer(forward, channels_first=True), features(2, WIDTH, 4, 4)))
    assert_expected_inline(
        text(made.graph),
        """\
x: placeholder
expand = expand(x, 3, 1)  # expand (2, 3, 8, 4, 4)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
post = mhc_0.post(expand, a, getitem_1)  # post (2, 3, 8, 4, 4)
relu = relu(post)  # trunk (2, 3, 8, 4, 4)
pre_1 = mhc_1.pre(relu)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
b = b(getitem_2)
norm1 = norm1(b)
post_1 = mhc_1.post(relu, norm1, getitem_3)  # post (2, 3, 8, 4, 4)
collapse = collapse(post_1, 1, 'mean')  # collapse (2, 8, 4, 4)
relu_1 = relu(collapse, inplace=False)
return (relu_1, ())""",
    )


def test_untouched_adds() -> None:
    """What is no site stays as it is, beside the sites and in their branches."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.gamma
        h = self.a(x)
        h = 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h**3)))
        x = x + h
        return x + self.b(x)

    assert_expected_inline(
        text(rewrite(capture(Layer(forward))).graph),
        """\
x: placeholder
add = add(x, gamma)
expand = expand(add, 3, -1)  # expand (2, 5, 3, 8)
pre = mhc_0.pre(expand)  # pre
getitem = getitem(pre, 0)
getitem_1 = getitem(pre, 1)
a = a(getitem)
mul = mul(0.5, a)
pow_1 = pow(a, 3)
mul_1 = mul(0.04, pow_1)
add_1 = add(a, mul_1)
mul_2 = mul(0.8, add_1)
tanh = tanh(mul_2)
add_2 = add(1, tanh)
mul_3 = mul(mul, add_2)
post = mhc_0.post(expand, mul_3, getitem_1)  # post (2, 5, 3, 8)
pre_1 = mhc_1.pre(post)  # pre
getitem_2 = getitem(pre_1, 0)
getitem_3 = getitem(pre_1, 1)
b = b(getitem_2)
post_1 = mhc_1.post(post, b, getitem_3)  # post (2, 5, 3, 8)
collapse = collapse(post_1, -1, 'mean')  # collapse (2, 5, 8)
return (collapse, ())""",
    )


# -- what a pass may not do ------------------------------------------------------------------------------------------


def metadata(graph: fx.Graph) -> list[Mapping[str, Any]]:
    return [dict(node.meta) for node in graph.nodes]


def test_the_passes_change_no_graph() -> None:
    """Neither finding nor rewriting writes into the captured graph; rewriting twice gives the same."""
    captured = capture(Layer(pre_norm))
    graph, residuals = captured
    before = text(graph.graph), str(graph.graph), metadata(graph.graph), list(graph.graph.nodes)
    sites = [
        (site.add, site.read, list(site.chain), set(site.region)) for trunk in residuals.trunks for site in trunk.sites
    ]
    first = text(rewrite(captured).graph)
    rewrite(captured, arriving=True, leaving=True)
    assert text(rewrite(captured).graph) == first
    assert (text(graph.graph), str(graph.graph), metadata(graph.graph), list(graph.graph.nodes)) == before
    assert sites == [(s.add, s.read, list(s.chain), set(s.region)) for trunk in residuals.trunks for s in trunk.sites]

"""What sites and operators launch on a GPU: at a fused boundary three kernels forward and five backward."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

import torch

import launches
from launches import Form, More, N, Row
from mocked_gpu import counting


def by_name(operator: str, count: float = 1) -> dict[str, float]:
    """What `count` calls launch of an operator that projects, on many tokens."""
    kernels = {
        "pre": ("project_part", "finish_part"),
        "boundary": ("post_forward", "project_part", "finish_part"),
        "pre_backward": ("dots", "coefficients", "state", "parameters"),
        "boundary_backward": ("dots", "coefficients", "state", "post_backward", "parameters"),
    }[operator]
    return {f"{operator}: _{kernel}_kernel": count for kernel in kernels}


FORWARD, BACKWARD = by_name("boundary"), by_name("boundary_backward")

# A stream of L sites has a `pre`, L - 1 boundaries and a `post_collapse`: one operator more than sites. The rest of
# what they launch are sums and means over n, and their gradients, of parameters and coefficients.
START_AND_END = {
    **by_name("pre"), **by_name("boundary", -1), "post_collapse: _post_forward_kernel": 1,
    "pre: sum": 1, "boundary: sum": 1,  # one stream meets the sum of phi's rows and of H_res's columns
    "post_collapse: mean": 2,  # of H_post and H_res
}  # fmt: skip
START_AND_END_BACKWARD = {
    **by_name("pre_backward"), **by_name("boundary_backward", -1),
    "post_collapse_backward: _post_backward_kernel": 1,
    "pre_backward: sum": 1, "boundary_backward: sum": 1, "pre_backward: repeat": 1, "boundary_backward: clone": 1,
    "post_collapse_backward: mean": 2, "post_collapse_backward: div": 2,
}  # fmt: skip
FUSED = Row(
    (More(3, FORWARD), More(5, BACKWARD)),
    # Backward besides: the two gradients of the model's input are added, and one kernel for the weights of the first
    # two norms becomes two, as they no longer read the same tensor.
    (More(4, START_AND_END), More(8 + 2, START_AND_END_BACKWARD)),
)
# Inductor fuses an activation, dropout or scale at the end of a block, and its gradient, with the residual add. At a
# boundary it stays a kernel of its own: one more each.
ACTIVATED = Row((More(3 + 1, FORWARD), More(5 + 1, BACKWARD)), FUSED.ends)
# phi's columns are spread from (C, n + 2) by Inductor: one kernel forward, one for the sums and three to put columns
# together backward.
HC = Row((More(3 + 1, FORWARD), More(5 + 1 + 3, BACKWARD)), FUSED.ends)
# A connection that is a function stands between kernels that know nothing of it. For KromHC Inductor makes four kernels
# of the function, and ten of it and its gradient with the sums of alpha and bias.
POST_PROJECT = {f"post_project: _{kernel}_kernel": 1.0 for kernel in ("post_forward", "project_part", "norm")}
PROJECT = {f"project: _{kernel}_kernel": 1.0 for kernel in ("project_part", "norm")}
PRODUCTS = {f"post_read_products: _{kernel}_kernel": 1.0 for kernel in ("dots", "products")}
SWEEP = {f"project_backward: _{kernel}_kernel": 1.0 for kernel in ("product_gradient", "state", "parameters")}
POST_SWEEP = {f"post_{name}": 1.0 for name in (*SWEEP, "project_backward: _post_backward_kernel")}
FUNCTION = Row(
    (
        More(4 + 4, {**POST_PROJECT, "read: _post_forward_kernel": 1}),
        More(6 + 10, {**PRODUCTS, **POST_SWEEP}),
    ),
    (
        More(
            3,
            {
                **PROJECT, **dict.fromkeys(POST_PROJECT, -1.0),
                "post_collapse: _post_forward_kernel": 1, "post_collapse: mean": 2,
            },
        ),
        More(
            6,
            {
                **SWEEP, "read_products: _dots_kernel": 1, **dict.fromkeys((*PRODUCTS, *POST_SWEEP), -1.0),
                "post_collapse_backward: _post_backward_kernel": 1,
                "post_collapse_backward: mean": 2, "post_collapse_backward: div": 2,
            },
        ),
    ),
)  # fmt: skip
# Two sites are a `pre`, a boundary and a `post`, of which backward repeats the first two and adds two gradients of the
# state between the pairs.
RECOMPUTED = Row(
    (
        More(6 / 2, {**by_name("pre", 0.5), **by_name("boundary", 0.5), "post: _post_forward_kernel": 0.5}),
        More(
            (5 + 4 + 5 + 1 + 1) / 2,
            {
                **by_name("pre", 0.5), **by_name("boundary", 0.5),
                **by_name("pre_backward", 0.5), **by_name("boundary_backward", 0.5),
                "post_backward: _post_backward_kernel": 0.5,
            },
        ),
    ),
    # The last `post` is a `post_collapse`; the sums are repeated as well.
    (
        More(
            4,
            {
                "post: _post_forward_kernel": -1, "post_collapse: _post_forward_kernel": 1,
                "pre: sum": 1, "boundary: sum": 1, "post_collapse: mean": 2,
            },
        ),
        More(
            10 + 1,
            {
                "post_backward: _post_backward_kernel": -1, "post_collapse_backward: _post_backward_kernel": 1,
                "pre: sum": 1, "boundary: sum": 1,
                "pre_backward: sum": 1, "boundary_backward: sum": 1,
                "pre_backward: repeat": 1, "boundary_backward: clone": 1,
                "post_collapse_backward: mean": 2, "post_collapse_backward: div": 2,
            },
        ),
    ),
)  # fmt: skip
APART = Row(
    (
        More(3, {**by_name("pre"), "post: _post_forward_kernel": 1}),
        # Inductor adds the two gradients of the state: 4.
        More(5 + 1, {"post_backward: _post_backward_kernel": 1, **by_name("pre_backward")}),
    ),
    # The expanded streams are copied out, by each operator anew; the mean is fused with the norm behind it, while its
    # gradient is spread over the streams by a kernel. The other one backward is of the norms' weights, as above.
    (More(2, {"pre: clone": 1, "post: clone": 1}), More(4, {"post_backward: clone": 1, "pre_backward: clone": 1})),
)
# Sinkhorn-Knopp is no kernel then: 20 iterations, operation by operation; a logsumexp counts as one, and is several.
# Besides, forward a product and 7 kernels of Inductor's, backward two products and 11, and 4 for means, sums and equal
# streams at the ends.
SINKHORN = {"sinkhorn: clone": 2, "sinkhorn: logsumexp": 40, "sinkhorn: sub": 40, "sinkhorn: exp": 1}
SINKHORN_BACKWARD = {
    "sinkhorn_backward: clone": 1, "sinkhorn_backward: logsumexp": 40, "sinkhorn_backward: sub": 80,
    "sinkhorn_backward: exp": 41, "sinkhorn_backward: mul": 41, "sinkhorn_backward: sum": 40,
    "sinkhorn_backward: add": 40,
}  # fmt: skip
ATEN = Row((More(83 + 8, SINKHORN), More(283 + 13, SINKHORN_BACKWARD)), (More(0, {}), More(4, {})))

EXPECTED = {
    Form("boundaries fused", layers=(2, 3)): FUSED,
    Form("boundaries fused", "bf16"): FUSED,
    Form("boundaries fused", "autocast"): FUSED,
    Form("boundaries fused, blocks end in an activation", activated=True): ACTIVATED,
    Form("boundaries fused, hc", connection="hc"): HC,
    Form("boundaries fused, kromhc", connection="kromhc"): FUNCTION,
    Form("boundaries fused, recompute=2", recompute=2): RECOMPUTED,
    Form("site by site", fused=False): APART,
    Form("boundaries fused, aten", whole=False): ATEN,
}


@pytest.mark.slow
def test_sites() -> None:
    """In a process of its own, as torch remembers the mocked device."""
    done = subprocess.run([sys.executable, launches.__file__, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [Row(*(tuple(More(*way) for way in part) for part in row)) for row in json.loads(done.stdout)]
    assert dict(zip(launches.FORMS, found)) == EXPECTED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(dtype: torch.dtype) -> None:
    """Contiguous operands of many tokens: nothing besides the kernels but at the ends of a stream."""
    pre, boundary, gradient, boundary_gradient = (
        {kernel.removeprefix(f"{operator}: "): count for kernel, count in by_name(operator).items()}
        for operator in ("pre", "boundary", "pre_backward", "boundary_backward")
    )
    post, post_gradient = {"_post_forward_kernel": 1}, {"_post_backward_kernel": 1}
    assert launches.operators(dtype=dtype) == {
        "pre": pre,
        "post": post,
        "post_collapse": {**post, "mean": 2},
        "boundary": boundary,
        "pre_backward": gradient,
        "post_backward": post_gradient,
        "post_collapse_backward": {**post_gradient, "mean": 2, "div": 2},
        "boundary_backward": boundary_gradient,
    }
    assert launches.operators(dtype=dtype, streams=1) == {
        "pre": {**pre, "sum": 1},
        "post": {**post, "sum": 1},
        "post_collapse": {**post, "mean": 2, "sum": 1},
        "boundary": {**boundary, "sum": 1},
        "pre_backward": {**gradient, "sum": 1, "repeat": 1},
        "post_backward": {**post_gradient, "sum": 1, "clone": 1},
        "post_collapse_backward": {**post_gradient, "mean": 2, "div": 2, "sum": 1, "clone": 1},
        "boundary_backward": {**boundary_gradient, "sum": 1, "clone": 1},
    }


def test_short_rows_are_projected_and_summed_in_one_launch() -> None:
    short, long = launches.operators(width=128), launches.operators(width=129)
    pre = {"_forward_kernel": 1}
    assert short == {**long, "pre": pre, "boundary": {"_post_forward_kernel": 1, **pre}}


def test_copies_count() -> None:
    """Streams behind the channels, as images have them; the coefficients are contiguous."""
    X, y = torch.empty(2, N, 64, 100, device="meta").movedim(-1, 1), torch.empty(2, 64, 100, device="meta").mT
    with counting() as counts:
        torch.ops.mhc_rewrite.post(X, y, *(torch.empty(2, 100, *axes, device="meta") for axes in ((N,), (N, N))), "")
    assert counts == {"post: clone": 2, "post: _post_forward_kernel": 1}

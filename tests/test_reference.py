"""The reference mathematics against independent ones: decimal arithmetic, einsum, and numerical gradients."""

from __future__ import annotations

import decimal
import itertools
import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS
from mhc_rewrite.kernels.reference import mix_in, mix_out, project, sinkhorn_knopp

STREAMS = (1, 2, 3, 4, 5, 16)


def gaussian(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def direct_sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """M = exp(A); every column over its sum, then every row over its sum, so many times. In fp64."""
    m = logits.double().exp()
    for _ in range(iterations):
        m = m / m.sum(dim=-2, keepdim=True)
        m = m / m.sum(dim=-1, keepdim=True)
    return m


def decimal_sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """The same for one matrix in decimal arithmetic, whose exponents end nowhere near exp(1e4): no care is needed."""
    n = len(logits)
    with decimal.localcontext(decimal.Context(prec=40)):
        m = [[Decimal(a).exp() for a in row] for row in logits.double().tolist()]
        for _ in range(iterations):
            columns = [sum(row[j] for row in m) for j in range(n)]
            m = [[a / column for a, column in zip(row, columns)] for row in m]
            m = [[a / sum(row) for a in row] for row in m]
        return torch.tensor([[float(a) for a in row] for row in m], dtype=torch.float64)


def with_entry(row: int | slice, column: int | slice, value: float, n: int = 4) -> Tensor:
    logits = gaussian(n, n)
    logits[row, column] = value
    return logits


ALL = slice(None)
EXTREMES = {
    "all equal": torch.full((4, 4), 3.0, dtype=torch.float64),
    "all equal and huge": torch.full((4, 4), 1e4, dtype=torch.float64),
    "all equal and tiny": torch.full((4, 4), -1e4, dtype=torch.float64),
    "one huge entry": with_entry(1, 2, 1e4),
    "one tiny entry": with_entry(1, 2, -1e4),
    "a column that underflows": with_entry(ALL, 2, -1e4),
    "a column that overflows": with_entry(ALL, 2, 1e4),
    "a row that underflows": with_entry(2, ALL, -1e4),
    "a row that overflows": with_entry(2, ALL, 1e4),
    "a permutation": 1e4 * torch.eye(4, dtype=torch.float64)[[2, 0, 3, 1]],
    "two rows want one column": 1e4 * torch.eye(4, dtype=torch.float64)[[0, 0, 2, 3]],
    "N(0, 30)": gaussian(4, 4, scale=30),
    "N(0, 3000)": gaussian(4, 4, scale=3000).clamp(-1e4, 1e4),
    "signs of 1e4": 1e4 * gaussian(4, 4).sign(),
    "the initialisation": -8 * (1 - torch.eye(4, dtype=torch.float64)),
}


# -- Sinkhorn-Knopp --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 1, 3, 10])
@pytest.mark.parametrize("n", STREAMS)
def test_sinkhorn_is_the_direct_iteration(n: int, scale: float) -> None:
    logits = gaussian(2, 5, n, n, scale=scale)
    want = direct_sinkhorn(logits)
    torch.testing.assert_close(sinkhorn_knopp(logits), want, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(sinkhorn_knopp(logits.float()).double(), want, rtol=0, atol=2e-6 * max(1, scale))


@pytest.mark.parametrize("iterations", [1, 2, 5, 19, 20, 21])
def test_sinkhorn_counts_its_iterations(iterations: int) -> None:
    logits = gaussian(6, 4, 4, scale=10)  # far from converged: one more or less is seen
    got = sinkhorn_knopp(logits, iterations)
    torch.testing.assert_close(got, direct_sinkhorn(logits, iterations), rtol=1e-10, atol=1e-13)
    assert (got - direct_sinkhorn(logits, iterations + 1)).abs().max() > 1e-4


def test_sinkhorn_takes_20_iterations_and_ends_with_rows() -> None:
    logits = gaussian(6, 4, 4, scale=10)
    assert torch.equal(sinkhorn_knopp(logits), sinkhorn_knopp(logits, 20))
    columns_last = sinkhorn_knopp(logits.mT).mT
    assert (sinkhorn_knopp(logits) - columns_last).abs().max() > 1e-3


@pytest.mark.parametrize("name", EXTREMES)
def test_sinkhorn_of_extremes(name: str) -> None:
    """Right, and not finite alone, where the direct iteration gives 0/0."""
    logits = EXTREMES[name]
    torch.testing.assert_close(sinkhorn_knopp(logits), decimal_sinkhorn(logits), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", EXTREMES)
def test_sinkhorn_has_finite_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    logits = EXTREMES[name].to(dtype).requires_grad_()
    got = sinkhorn_knopp(logits)
    assert got.dtype == dtype and got.isfinite().all() and (got >= 0).all()
    assert (got.sum(-1) - 1).abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)
    for row, column in itertools.product(range(4), repeat=2):
        (grad,) = torch.autograd.grad(got[row, column], logits, retain_graph=True)
        assert grad.isfinite().all(), (row, column)


def test_the_direct_iteration_fails_there() -> None:
    """What the tests above guard against does happen."""
    assert direct_sinkhorn(EXTREMES["a column that underflows"]).isnan().any()
    assert direct_sinkhorn(EXTREMES["N(0, 3000)"]).isnan().any()


@pytest.mark.parametrize("dtype,rounding", [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scale", [0.1, 1, 3, 10, 30])
def test_sinkhorn_rows_sum_to_one(dtype: torch.dtype, rounding: float, scale: float) -> None:
    got = sinkhorn_knopp(gaussian(200, 4, 4, scale=scale).to(dtype))
    assert (got.sum(-1) - 1).abs().max() < rounding


@pytest.mark.parametrize("scale,converged", [(0.1, 1e-12), (1, 1e-2), (3, 0.5)])
def test_sinkhorn_columns_converge(scale: float, converged: float) -> None:
    columns = (sinkhorn_knopp(gaussian(200, 4, 4, scale=scale)).sum(-2) - 1).abs().max()
    assert columns < converged
    assert scale < 1 or columns > 1e-6  # not to rounding: it is an iteration


@pytest.mark.parametrize("dtype,rounding", [(torch.float64, 1e-11), (torch.float32, 1e-2)])
def test_sinkhorn_does_not_see_what_a_whole_column_has_more(dtype: torch.dtype, rounding: float) -> None:
    logits = gaussian(50, 4, 4)
    shifted = logits + torch.tensor([1e4, -1e4, 0, 123], dtype=torch.float64)
    got = sinkhorn_knopp(shifted.to(dtype)).double()
    torch.testing.assert_close(got, sinkhorn_knopp(logits), rtol=0, atol=rounding)


@pytest.mark.parametrize("n", (1, 2, 4))
@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_sinkhorn_gradient(n: int, scale: float) -> None:
    logits = gaussian(2, n, n, scale=scale).requires_grad_()
    assert torch.autograd.gradcheck(sinkhorn_knopp, logits, atol=1e-7)


def test_sinkhorn_gradient_is_that_of_the_iterations() -> None:
    """Not of the limit: with so few the two differ."""
    logits, weight = gaussian(3, 4, 4, scale=3), gaussian(3, 4, 4, seed=1)
    grads = []
    for function in (sinkhorn_knopp, direct_sinkhorn):
        leaf = logits.clone().requires_grad_()
        (function(leaf, 3) * weight).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


# -- projection ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("n", STREAMS)
def test_project(n: int, leading: tuple[int, ...]) -> None:
    width, k, eps = 6, n * n + 2 * n, 0.25
    streams, phi = gaussian(*leading, n, width), gaussian(n * width, k, seed=1)
    normed = (
        streams / torch.sqrt(torch.einsum("...jc,...jc->...", streams, streams) / (n * width) + eps)[..., None, None]
    )
    want = torch.einsum("...jc,jck->...k", normed, phi.reshape(n, width, k))  # row-major: stream 0 first
    raw, norm = project(streams, phi, "mhc", eps)
    torch.testing.assert_close(raw, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm[..., None] * normed, streams, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_streams_may_be_given_once(kind: str) -> None:
    one, phi = gaussian(5, 1, 6), gaussian(24, 24, seed=1)
    for once, all_of_them in zip(project(one, phi, kind, 0.25), project(one.expand(5, 4, 6), phi, kind, 0.25)):
        torch.testing.assert_close(once, all_of_them, rtol=1e-14, atol=0)


def test_project_gradient() -> None:
    streams, phi = gaussian(3, 2, 4).requires_grad_(), gaussian(8, 8, seed=1).requires_grad_()
    for kind in KINDS:
        assert torch.autograd.gradcheck(lambda x, p: project(x, p, kind, 1e-6), (streams, phi))  # noqa: B023


def test_project_does_not_see_the_scale() -> None:
    streams, phi = gaussian(3, 4, 8), gaussian(32, 24, seed=1)
    for kind in KINDS:
        near, far = (project(scale * streams, phi, kind, 1e-20)[0] for scale in (1, 1e5))
        torch.testing.assert_close(far, near, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps_norm,finite", [(1e-6, True), (1e-20, False)])
def test_gradient_of_a_zero_token_in_fp16(eps_norm: float, finite: bool) -> None:
    """phi / sqrt(eps) has to fit into fp16: with the paper's epsilon it does not."""
    tokens = torch.stack([torch.zeros(4, 8), torch.ones(4, 8)]).half().requires_grad_()
    phi = gaussian(32, 24).float().requires_grad_()
    project(tokens.float(), phi, "mhc", eps_norm)[0].sum().backward()
    assert tokens.grad is not None and phi.grad is not None
    assert bool(tokens.grad[0].isfinite().all()) is finite
    assert tokens.grad[1].isfinite().all() and phi.grad.isfinite().all()
    assert not finite or tokens.grad[0].abs().max() > 100


# -- mixes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("n", STREAMS)
def test_mixes(n: int, leading: tuple[int, ...]) -> None:
    width = 6
    streams, branch = gaussian(*leading, n, width), gaussian(*leading, width, seed=1)
    pre, post, res = gaussian(*leading, n, seed=2), gaussian(*leading, n, seed=3), gaussian(*leading, n, n, seed=4)
    want = torch.einsum("...j,...jc->...c", pre, streams)
    torch.testing.assert_close(mix_in(streams, pre), want, rtol=1e-12, atol=1e-12)
    want = torch.einsum("...ij,...jc->...ic", res, streams) + torch.einsum("...i,...c->...ic", post, branch)
    torch.testing.assert_close(mix_out(streams, branch, post, res), want, rtol=1e-12, atol=1e-12)


def test_mix_gradients() -> None:
    streams, branch, pre, post, res = (
        gaussian(*shape, seed=seed).requires_grad_()
        for seed, shape in enumerate([(2, 3, 4), (2, 4), (2, 3), (2, 3), (2, 3, 3)])
    )
    assert torch.autograd.gradcheck(mix_in, (streams, pre))
    assert torch.autograd.gradcheck(mix_out, (streams, branch, post, res))


def test_rows_write_and_columns_read() -> None:
    """H_res[out, in]: with one entry, stream `in` goes to stream `out`."""
    streams, branch = gaussian(3, 4), torch.zeros(4, dtype=torch.float64)
    res = torch.zeros(3, 3, dtype=torch.float64)
    res[2, 0] = 1
    got = mix_out(streams, branch, torch.ones(3, dtype=torch.float64), res)
    assert torch.equal(got, torch.stack([torch.zeros(4), torch.zeros(4), streams[0]]))


def test_decimal_oracle_is_the_direct_one() -> None:
    """Where both can be had."""
    logits = gaussian(4, 4, scale=3)
    torch.testing.assert_close(decimal_sinkhorn(logits), direct_sinkhorn(logits), rtol=1e-12, atol=1e-14)
    assert math.isclose(float(decimal_sinkhorn(logits).sum()), 4, rel_tol=1e-15)

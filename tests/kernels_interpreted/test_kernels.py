"""The Triton kernels against the reference in fp64, by Triton's interpreter.

Run by tests/test_kernels_interpreted.py, in a process of its own.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mhc_rewrite.kernels import reference, triton_boundary, triton_post
from mhc_rewrite.kernels.kinds import KINDS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {F32: 1e-5, BF16: 2e-2, F16: 2e-2}
# (rows or n, columns or streams given): square, just expanded, and together with the collapse
FORMS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (16, 16), (4, 1), (1, 4)]
WIDTHS, TOKENS = (1, 7, 64, 100, 129, 768), (1, 13, 33, 257)
# Each width with each number of tokens would take an hour: every width and every number is there, in turn.
SIZES = [(width, TOKENS[k % 3]) for k, width in enumerate(WIDTHS)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty buffers hold NaN: what a kernel does not write shows."""
    new_empty = Tensor.new_empty
    monkeypatch.setattr(Tensor, "new_empty", lambda t, *args, **kw: new_empty(t, *args, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda t: torch.full_like(t, torch.nan))


def gaussian(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], close: float) -> None:
    for place, (mine, truth) in enumerate(zip(got, want)):
        assert mine.shape == truth.shape and mine.isfinite().all(), place
        assert (mine.double() - truth).norm() <= close * truth.norm(), place


def branch(tokens: int, rows: int, columns: int, width: int, dtype: torch.dtype, y_dtype: torch.dtype) -> list[Tensor]:
    sizes = ((tokens, columns, width), (tokens, width), (tokens, rows), (tokens, rows, columns))
    return [gaussian(*s, seed=k, dtype=d) for k, (s, d) in enumerate(zip(sizes, (dtype, y_dtype, F32, F32)))]


@pytest.mark.parametrize("dtype,y_dtype", [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)])
@pytest.mark.parametrize("width,tokens", SIZES)
@pytest.mark.parametrize("rows,columns", FORMS)
def test_post(rows: int, columns: int, width: int, tokens: int, dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    if max(rows, columns) > 5 and width * tokens > 3000:
        tokens = 1
    given = branch(tokens, rows, columns, width, dtype, y_dtype)
    wide = [g.double().requires_grad_() for g in given]
    want = reference.mix_out(*wide)
    g = gaussian(*want.shape, seed=9, dtype=torch.promote_types(dtype, y_dtype))
    close = max(CLOSE[dtype], CLOSE[y_dtype])
    out = triton_post.post(*given)
    assert out.dtype == g.dtype
    assert_close((out,), (want.detach(),), close)
    gradients = triton_post.post_backward(g, *given)
    assert [t.dtype for t in gradients] == [t.dtype for t in given]
    assert_close(gradients, torch.autograd.grad(want, wide, g.double()), close)


def parameters(n: int, streams: int, width: int) -> list[Tensor]:
    columns = n * n + 2 * n
    phi = gaussian(streams * width, columns, seed=5) / (streams * width) ** 0.5
    return [phi, torch.tensor([0.7, -0.4, 1.3]), gaussian(columns, seed=6)]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("width,tokens", SIZES)
@pytest.mark.parametrize(
    "n,given,kind",
    [*((*form, "mhc") for form in FORMS[:-1]), *((*form, kind) for form in ((3, 3), (4, 1)) for kind in KINDS)],
)
def test_pre(n: int, given: int, kind: str, width: int, tokens: int, dtype: torch.dtype) -> None:
    if n > 5 and width * tokens > 3000:
        tokens = 1
    X = gaussian(tokens, given, width, seed=1, dtype=dtype)
    phi, alpha, bias = parameters(n, given, width)
    got = triton_boundary.pre(X, phi, alpha, bias, kind, 20, 1e-6)
    # Equal streams: the sum of phi's rows was given, so one stream holds all of it and the others nothing.
    whole = phi.double() if given == n else torch.cat([phi.double(), torch.zeros((n - 1) * width, phi.shape[1])])
    options = (whole, alpha.double(), bias.double(), kind, 20, 1e-6)
    assert_close(got[:3], reference.pre(X.double(), *options), CLOSE[dtype])
    assert_close(got[3:], reference.project(X.double(), whole, kind, 1e-6), CLOSE[F32])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("width,tokens", SIZES)
@pytest.mark.parametrize("n,given", [(2, 2), (4, 4), (5, 5), (8, 8), (4, 1)])
def test_boundary(n: int, given: int, width: int, tokens: int, dtype: torch.dtype) -> None:
    X, y, h_post, _ = branch(tokens, n, given, width, dtype, dtype)
    h_res = gaussian(tokens, n, given, seed=4)
    phi, alpha, bias = parameters(n, n, width)
    state, *rest = triton_boundary.boundary(X, y, h_post, h_res, phi, alpha, bias, "mhc", 20, 1e-6)
    wide = [t.double() for t in (X, y, h_post, h_res, phi, alpha, bias)]
    assert_close((state,), (reference.mix_out(*wide[:4]),), CLOSE[dtype])
    # The next site reads the state as it was stored.
    assert_close(rest[:3], reference.pre(state.double(), *wide[4:], "mhc", 20, 1e-6), CLOSE[dtype])


LOGITS = {
    "equal": torch.full((4, 4), 3.0),
    "of size 1e4": 1e4 * gaussian(4, 4, seed=7).sign(),
    "one huge entry": gaussian(4, 4, seed=7).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e4)),
    "a column that underflows": torch.cat([gaussian(4, 3, seed=7), torch.full((4, 1), -1e4)], dim=1),
    "a row that underflows": torch.cat([gaussian(3, 4, seed=7), torch.full((1, 4), -1e4)], dim=0),
}


@pytest.mark.parametrize("name,kind", list(itertools.product(LOGITS, ["mhc", "deepseek_v4"])))
def test_sinkhorn_of_any_logits(name: str, kind: str) -> None:
    phi, alpha, bias = parameters(4, 4, 8)
    bias[8:] = LOGITS[name].flatten()
    X = torch.zeros(3, 4, 8)  # nothing is projected: the logits are the bias
    _, _, h_res, _, r = triton_boundary.pre(X, phi, alpha, bias, kind, 20, 1e-6)
    _, _, want = reference.pre(X.double(), phi.double(), alpha.double(), bias.double(), kind, 20, 1e-6)
    # An fp32 number of size 1e4 is known to 5e-4, and so is a difference of logits: the reference in fp32 errs by 1e-4.
    assert_close((h_res,), (want,), 1e-3)
    assert r.isfinite().all()


def test_same_inputs_same_bits() -> None:
    X = gaussian(33, 4, 100, seed=1)
    runs = [triton_boundary.pre(X, *parameters(4, 4, 100), "mhc", 20, 1e-6) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))

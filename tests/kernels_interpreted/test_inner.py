"""The operators that are given their coefficients, in Triton, by its interpreter: values and gradients against autograd
in fp64, and shapes and dtypes against aten.py, which is what they stand for.

MHC_WHOLE_GRID=1 runs every combination of sizes and dtypes; without it each number of columns meets each form.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from truth import BF16, CLOSE, F16, F32, assert_close, branch, gaussian, leaves

from mhc_rewrite.kernels import aten, gpu, reference
from mhc_rewrite.kernels.triton_configs import Config, using

pytestmark = pytest.mark.usefixtures("poisoned")
EPS = 1e-6
FORMS = [(2, 2), (3, 3), (4, 4), (8, 8), (4, 1)]  # (n, streams given)
COLUMNS = (0, 1, 7, 24, 130)
SIZES = list(itertools.product((1, 5, 37), (33, 64)))  # tokens, C
DTYPES = [(F32, F32), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, F16), (F16, BF16)]  # of X and y


class Case(NamedTuple):
    n: int
    given: int
    columns: int
    tokens: int
    width: int
    dtype: torch.dtype
    y_dtype: torch.dtype

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.y_dtype))
        return f"{self.tokens}x{self.given}of{self.n}x{self.width}-{self.columns}-{dtypes}"


def cases() -> list[Case]:
    if os.environ.get("MHC_WHOLE_GRID") == "1":
        return [
            Case(*form, columns, *size, *pair)
            for form, columns, size, pair in itertools.product(FORMS, COLUMNS, SIZES, DTYPES)
        ]
    pairs, chosen = itertools.cycle(DTYPES[:4]), []
    for f, form in enumerate(FORMS):
        for k, columns in enumerate(COLUMNS):
            tokens, width = SIZES[(5 * f + k) % 6]
            # Many columns of many streams take the interpreter long.
            chosen.append(Case(*form, columns, tokens if max(columns, 40) * form[0] < 300 else 5, width, *next(pairs)))
    return chosen


def phi_of(streams: int, width: int, columns: int) -> Tensor:
    return gaussian(streams * width, columns, seed=5) / (streams * width) ** 0.5


def raw_and_norm(state: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    flat = state.flatten(1)
    r = ((flat * flat).mean(-1, keepdim=True) + EPS).sqrt()
    return flat @ phi / r, r


def same_as_aten(name: str, got: tuple[Tensor, ...], *arguments: object) -> tuple[Tensor, ...]:
    want = getattr(aten, name)(*arguments)
    want = (want,) if isinstance(want, Tensor) else want
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want], name
    assert all(t.is_contiguous() for t in got), name
    return got


@pytest.mark.parametrize("case", cases(), ids=str)
def test_of_a_given_state(case: Case) -> None:
    check_state(gaussian(case.tokens, case.given, case.width, seed=1, dtype=case.dtype), case.columns)


def check_state(X: Tensor, columns: int) -> None:
    tokens, streams, width = X.shape
    close = CLOSE[X.dtype]
    phi, h_pre = phi_of(streams, width, columns), gaussian(tokens, streams, seed=3)
    raw, r = same_as_aten("project", gpu.project(X, phi, EPS), X, phi, EPS)
    (u,) = same_as_aten("read", (gpu.read(X, h_pre),), X, h_pre)
    state, wide_phi, wide_pre = wide = leaves(X, phi, h_pre)
    want_raw, want_r = raw_and_norm(state, wide_phi)
    want_u = (wide_pre.unsqueeze(-1) * state).sum(1)
    assert_close((raw,), (want_raw,), CLOSE[F32])
    assert_close((r,), (want_r if columns else torch.ones_like(want_r),), CLOSE[F32])
    assert_close((u,), (want_u,), close)
    g_u, g_raw = gaussian(*u.shape, seed=20, dtype=u.dtype), gaussian(*raw.shape, seed=21)
    given = (g_u, h_pre, g_raw, X, phi, raw, r)
    g_X, g_phi = same_as_aten("project_backward", gpu.project_backward(*given), *given)
    (g_pre,) = same_as_aten("read_products", (gpu.read_products(g_u, X),), g_u, X)
    truth = torch.autograd.grad((want_u, want_raw), wide, (g_u.double(), g_raw.double()))
    assert_close((g_X,), truth[:1], close)
    assert_close((g_phi, g_pre), truth[1:], CLOSE[F32])


@pytest.mark.parametrize("case", cases(), ids=str)
def test_of_a_state_that_is_made(case: Case) -> None:
    check_made(branch(case.tokens, case.n, case.given, case.width, case.dtype, case.y_dtype), case.columns)


def check_made(given: list[Tensor], columns: int) -> None:
    X, y, h_post, _ = given
    (tokens, n), width = h_post.shape, X.shape[2]
    close = max(CLOSE[X.dtype], CLOSE[y.dtype])
    phi, h_pre = phi_of(n, width, columns), gaussian(tokens, n, seed=4)
    made = same_as_aten("post_project", gpu.post_project(*given, phi, EPS), *given, phi, EPS)
    state, raw, r = made
    wide = leaves(*given, phi, h_pre)
    exact = reference.mix_out(*wide[:4])
    # The projection reads the state as it was stored; its gradient passes through the rounding.
    want_state = exact + (state.double() - exact).detach()
    want_raw, want_r = raw_and_norm(want_state, wide[4])
    want_u = (wide[5].unsqueeze(-1) * want_state).sum(1)
    assert_close((state,), (exact,), close)
    assert_close((raw,), (want_raw,), CLOSE[F32])
    assert_close((r,), (want_r if columns else torch.ones_like(want_r),), CLOSE[F32])
    g_state, g_u = gaussian(*state.shape, seed=20, dtype=state.dtype), gaussian(tokens, width, seed=21, dtype=X.dtype)
    g_raw = gaussian(*raw.shape, seed=22)
    back = (g_state, g_u, h_pre, g_raw, *given, phi, raw, r)
    got = same_as_aten("post_project_backward", gpu.post_project_backward(*back), *back)
    (g_pre,) = same_as_aten("post_read_products", (gpu.post_read_products(g_u, *given),), g_u, *given)
    weights = [g.double() for g in (g_state, g_u, g_raw)]
    truth = torch.autograd.grad((want_state, want_u, want_raw), wide, weights)
    assert_close((*got, g_pre), truth, close)


# Cut into parts: each kernel as few tokens, long rows or many tokens have it.
CUT = {
    "pre": Config("cut", 16, 16, 4, parts=4),
    "dots": Config("cut", 2, 32, 4, parts=4),
    "state": Config("cut", 16, 16, 4, parts=3),
    "pre_parameters": Config("cut", 16, 16, 4, parts=64),
    "boundary_parameters": Config("cut", 16, 16, 4, parts=64),
}


@pytest.mark.parametrize("n,given,columns", [(3, 3, 40), (3, 3, 0), (4, 1, 7)])
def test_cut_into_parts(n: int, given: int, columns: int) -> None:
    with contextlib.ExitStack() as stack:
        for kernel, config in CUT.items():
            stack.enter_context(using(kernel, config))
        check_state(gaussian(37, given, 53, seed=1), columns)
        check_made(branch(37, n, given, 53, F32, F32), columns)


def test_as_many_columns_as_sixteen_streams_have() -> None:
    check_state(gaussian(2, 16, 18, seed=1), 288)
    check_made(branch(2, 16, 16, 18, F32, F32), 288)


def test_without_columns_nothing_is_projected() -> None:
    from mhc_rewrite.kernels.triton_given import given_backward_launches, project_launches

    X, h_pre = gaussian(5, 3, 20, seed=1), gaussian(5, 3, seed=2)
    phi, raw, r = torch.zeros(60, 0), torch.zeros(5, 0), torch.ones(5, 1)
    assert project_launches(X, phi, EPS, raw, r) == []
    launches = given_backward_launches(None, X[:, 0], h_pre, raw, X, None, phi, raw, r, (X,), phi)
    assert [launch.kernel.__name__ for launch in launches] == ["_state_kernel"]


def test_same_inputs_same_bits() -> None:
    X, h_pre, g_u = gaussian(70, 2, 40, seed=1), gaussian(70, 2, seed=2), gaussian(70, 40, seed=3)
    phi, g_raw = phi_of(2, 40, 9), gaussian(70, 9, seed=4)

    def run() -> tuple[Tensor, ...]:
        raw, r = gpu.project(X, phi, EPS)
        return raw, r, *gpu.project_backward(g_u, h_pre, g_raw, X, phi, raw, r)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))

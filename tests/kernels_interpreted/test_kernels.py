"""The Triton kernels, forward and backward, against the reference in fp64 and its autograd, by Triton's interpreter.

Run by tests/test_kernels_interpreted.py, in a process of its own. MHC_WHOLE_GRID=1 runs every combination of sizes and
dtypes, the kinds in turn, which takes hours; without it a sample in which each size meets each form.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch import Tensor
from truth import BF16, CLOSE, F16, F32, assert_close, branch, gaussian, gradients, leaves

from mhc_rewrite.kernels import reference, triton_boundary, triton_configs, triton_post
from mhc_rewrite.kernels.kinds import KINDS
from mhc_rewrite.kernels.triton_boundary_backward import boundary_backward, pre_backward

pytestmark = pytest.mark.usefixtures("poisoned")
WHOLE_GRID = os.environ.get("MHC_WHOLE_GRID") == "1"
# (rows or n, columns or streams given): square, just expanded, and together with the collapse
FORMS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (16, 16), (4, 1), (1, 4)]
WIDTHS = (1, 7, 64, 100, 129, 768)
# More than 64 are many (triton_configs), and 67 are several blocks of the kernels that take the tokens in turn.
TOKENS = (1, 13, 33, 67, 257) if WHOLE_GRID else (1, 13, 33, 67)
SAME, PAIRS = [(F32, F32), (BF16, BF16), (F16, F16)], [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32)]
OPTIONS = (20, 1e-6)

Case = tuple[int, int, int, int, torch.dtype, torch.dtype, str]


def grid(forms: list[tuple[int, int]], dtypes: list[tuple[torch.dtype, torch.dtype]]) -> list[Case]:
    """(rows or n, columns or streams given, C, tokens, dtype of X, dtype of y, kind)."""
    kinds = itertools.cycle(KINDS)
    if WHOLE_GRID:
        sizes = itertools.product(forms, WIDTHS, TOKENS, dtypes)
        return [(*form, width, tokens, *pair, next(kinds)) for form, width, tokens, pair in sizes]
    cases = []
    for f, form in enumerate(forms):
        for w, width in enumerate(WIDTHS):
            kind = next(kinds)
            # The interpreter takes its time for every block: many streams meet few tokens, or wait for the whole grid.
            blocks = -(-width // 16) * max(form) ** 2
            tokens = TOKENS[(f + w) % 4] if blocks * TOKENS[(f + w) % 4] < 4000 else 1
            if blocks < 2000:
                cases.append((*form, width, tokens, *dtypes[(f + w) % len(dtypes)], kind))
        next(kinds)  # or a width would meet the same kind with every form
    return cases


def parameters(n: int, streams: int, width: int) -> list[Tensor]:
    columns = n * n + 2 * n
    phi = gaussian(streams * width, columns, seed=5) / (streams * width) ** 0.5
    return [phi, torch.tensor([0.7, -0.4, 1.3]), gaussian(columns, seed=6)]


@pytest.mark.parametrize("rows,columns,width,tokens,dtype,y_dtype,kind", grid(FORMS, PAIRS))
def test_post(
    rows: int, columns: int, width: int, tokens: int, dtype: torch.dtype, y_dtype: torch.dtype, kind: str
) -> None:
    given = branch(tokens, rows, columns, width, dtype, y_dtype)
    wide = leaves(*given)
    want = reference.mix_out(*wide)
    close = max(CLOSE[dtype], CLOSE[y_dtype])
    out = triton_post.post(*given)
    assert out.dtype == torch.promote_types(dtype, y_dtype)
    assert_close((out,), (want.detach(),), close)
    (g,) = gradients(out)
    got = triton_post.post_backward(g, *given)
    assert [t.dtype for t in got] == [t.dtype for t in given]
    assert_close(got, torch.autograd.grad(want, wide, g.double()), close)


@pytest.mark.parametrize("n,given,width,tokens,dtype,_,kind", grid(FORMS[:-1], SAME))
def test_pre(n: int, given: int, width: int, tokens: int, dtype: torch.dtype, _: torch.dtype, kind: str) -> None:
    check_pre(gaussian(tokens, given, width, seed=1, dtype=dtype), parameters(n, given, width), kind)


def check_pre(X: Tensor, of_site: list[Tensor], kind: str, atomic: bool = False) -> None:
    (_, given, width), columns = X.shape, len(of_site[2])
    n = reference.streams_of(columns)
    *got, raw, r = triton_boundary.pre(X, *of_site, kind, *OPTIONS)
    state, phi, alpha, bias = wide = leaves(X, *of_site)
    # Equal streams: the sum of phi's rows was given, so one stream holds all of it and the others nothing.
    whole = phi if given == n else torch.cat([phi, torch.zeros((n - 1) * width, columns, dtype=phi.dtype)])
    want = reference.pre(state, whole, alpha, bias, kind, *OPTIONS)
    assert got[0].dtype == X.dtype
    assert_close(got[:1], want[:1], CLOSE[X.dtype])
    assert_close(got[1:], want[1:], CLOSE[F32])
    assert_close((raw, r), reference.project(state, whole, kind, OPTIONS[1]), CLOSE[F32])
    g = gradients(*got)
    back = pre_backward(*g, X, *of_site, raw, r, kind, OPTIONS[0], atomic=atomic)
    assert back[0].dtype == X.dtype
    truth = torch.autograd.grad(want, wide, [t.double() for t in g])
    assert_close(back[:1], truth[:1], CLOSE[X.dtype])
    assert_close(back[1:], truth[1:], CLOSE[F32])


@pytest.mark.parametrize("n,given,width,tokens,dtype,y_dtype,kind", grid(FORMS[:-1], PAIRS))
def test_boundary(
    n: int, given: int, width: int, tokens: int, dtype: torch.dtype, y_dtype: torch.dtype, kind: str
) -> None:
    check_boundary(branch(tokens, n, given, width, dtype, y_dtype), parameters(n, n, width), kind)


def check_boundary(of_branch: list[Tensor], of_site: list[Tensor], kind: str, atomic: bool = False) -> None:
    close = max(CLOSE[of_branch[0].dtype], CLOSE[of_branch[1].dtype])
    *got, raw, r = triton_boundary.boundary(*of_branch, *of_site, kind, *OPTIONS)
    wide = leaves(*of_branch, *of_site)
    exact = reference.mix_out(*wide[:4])
    # The next site reads the state as it was stored; its gradient passes through the rounding.
    state = exact + (got[0].double() - exact).detach()
    want = (state, *reference.pre(state, *wide[4:], kind, *OPTIONS))
    assert got[0].dtype == got[1].dtype == torch.promote_types(of_branch[0].dtype, of_branch[1].dtype)
    assert_close(got[:1], (exact,), close)
    assert_close(got[1:2], want[1:2], CLOSE[got[1].dtype])
    assert_close(got[2:], want[2:], CLOSE[F32])
    g = gradients(*got)
    back = boundary_backward(*g, *of_branch, *of_site, raw, r, kind, OPTIONS[0], atomic=atomic)
    assert [t.dtype for t in back] == [t.dtype for t in (*of_branch, *of_site)]
    assert_close(back, torch.autograd.grad(want, wide, [t.double() for t in g]), close)


# The sample leaves out the defaults, which the cases above run.
CONFIGURATIONS = [
    (kernel, config.name)
    for kernel in triton_configs.KERNELS
    for config in triton_configs.configurations(kernel, 3, 130, 20)[0 if WHOLE_GRID else 1 :]
]


@pytest.mark.parametrize("kernel,name", CONFIGURATIONS)
def test_every_configuration(kernel: str, name: str) -> None:
    given = branch(20, 3, 3, 130, F32, F32)
    with triton_configs.using(kernel, name):
        if kernel.startswith("post"):
            (g,) = gradients(given[0])
            want = reference.mix_out(*(wide := leaves(*given)))
            assert_close((triton_post.post(*given),), (want.detach(),), CLOSE[F32])
            assert_close(triton_post.post_backward(g, *given), torch.autograd.grad(want, wide, g.double()), CLOSE[F32])
        if not kernel.startswith(("post", "boundary")):
            check_pre(given[0], parameters(3, 3, 130), "mhc")
        if not kernel.startswith(("post", "pre")):
            check_boundary(given, parameters(3, 3, 130), "mhc")


def test_the_fastest_configuration_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_configs, "_overrides", {})
    times = {"whole": 2.0, "split": 1.0, "default": 3.0, "few": 5.0}
    taken = []

    def do_bench(run: object) -> float:
        taken.append(triton_configs.choose("pre", 4, 768, 33).name)
        return times[taken[-1]]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert triton_configs.tune("pre", lambda: []) == "split"
    assert sorted(taken) == sorted(times)
    assert triton_configs.choose("pre", 4, 768, 33).name == "split"
    with pytest.raises(KeyError, match="has no configuration 'none'; it has default"):
        triton_configs.using("pre", "none").__enter__()


LOGITS = {
    "equal": torch.full((4, 4), 3.0),
    "of size 1e4": 1e4 * gaussian(4, 4, seed=7).sign(),
    "from -1e4 to 1e4": 1e4 * gaussian(4, 4, seed=7) / gaussian(4, 4, seed=7).abs().max(),
    "one huge entry": gaussian(4, 4, seed=7).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e4)),
    "a column that underflows": torch.cat([gaussian(4, 3, seed=7), torch.full((4, 1), -1e4)], dim=1),
    "a row that underflows": torch.cat([gaussian(3, 4, seed=7), torch.full((1, 4), -1e4)], dim=0),
}


@pytest.mark.parametrize("name,kind", list(itertools.product(LOGITS, ["mhc", "deepseek_v4"])))
def test_sinkhorn_of_any_logits(name: str, kind: str) -> None:
    phi, alpha, bias = parameters(4, 4, 8)
    bias[8:] = LOGITS[name].flatten()
    X = torch.zeros(3, 4, 8)  # nothing is projected: the logits are the bias
    u, h_post, h_res, raw, r = triton_boundary.pre(X, phi, alpha, bias, kind, *OPTIONS)
    wide = leaves(X, phi, alpha, bias)
    want = reference.pre(*wide, kind, *OPTIONS)
    # An fp32 number of size 1e4 is known to 5e-4, and so is a difference of logits: the reference in fp32 errs by 1e-4.
    assert_close((h_res,), want[2:], 1e-3)
    assert r.isfinite().all()
    g = gradients(u, h_post, h_res)
    back = pre_backward(*g, X, phi, alpha, bias, raw, r, kind, OPTIONS[0])
    assert all(t.isfinite().all() for t in back)
    assert_close(back[3:], torch.autograd.grad(want, wide, [t.double() for t in g])[3:], 1e-3)


def test_same_inputs_same_bits() -> None:
    given, of_site = branch(70, 2, 2, 40, F32, F32), parameters(2, 2, 40)

    def run() -> tuple[Tensor, ...]:
        *outputs, raw, r = triton_boundary.boundary(*given, *of_site, "mhc", *OPTIONS)
        return *outputs, *boundary_backward(*gradients(*outputs), *given, *of_site, raw, r, "mhc", OPTIONS[0])

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.parametrize("kind", KINDS)
def test_parameter_gradients_by_atomic_additions(kind: str) -> None:
    check_pre(gaussian(33, 3, 40, seed=1), parameters(3, 3, 40), kind, atomic=True)
    check_boundary(branch(33, 3, 3, 40, F32, F32), parameters(3, 3, 40), kind, atomic=True)

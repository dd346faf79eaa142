"""The CPU kernels (kernels/cpp) against the reference in fp64, called as ops.py calls them; and life without them."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mhc_rewrite.kernels import aten, cpu, ops, reference
from mhc_rewrite.kernels.kinds import KINDS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {F32: 1e-5, BF16: 2e-2, F16: 2e-2}
OPTIONS = ("mhc", 20, 1e-6)

pytestmark = pytest.mark.skipif(not cpu.available(), reason="no C++ compiler or ninja on this machine")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Empty buffers hold NaN, those of C++ too: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gaussian(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def operands(
    tokens: int, n: int, given: int, width: int, dtype: torch.dtype = F32, y_dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """X, y, H_post, H_res; and for a state of n streams phi, alpha, bias."""
    columns = n * n + 2 * n
    branch = [
        gaussian(tokens, given, width, seed=1, dtype=dtype),
        gaussian(tokens, width, seed=2, dtype=y_dtype or dtype),
        gaussian(tokens, n, seed=3),
        gaussian(tokens, n, given, seed=4),
    ]
    phi = gaussian(n * width, columns, seed=5) / (n * width) ** 0.5
    return branch, [phi, torch.tensor([0.7, -0.4, 1.3]), gaussian(columns, seed=6)]


def wide(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors]


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], close: float) -> None:
    assert len(got) == len(want)
    for place, (mine, truth) in enumerate(zip(got, want)):
        assert mine.shape == truth.shape and mine.isfinite().all(), place
        # A single number may be a difference of large ones: it is held against the size of what it is made of.
        size = truth.norm() if truth.numel() > 3 else truth.norm() + 1e-2
        assert (mine.double() - truth).norm() <= close * size, place


SIZES = list(itertools.product((1, 7, 64, 100, 129, 768), (1, 13, 33, 257)))
FORMS = [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (8, 8), (16, 16), (4, 1)]
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (BF16, F32), (F32, F16)]
# Every form meets every type and some sizes, and the usual form all of them.
CASES = [
    (*form, *size, *types)
    for k, (form, types) in enumerate(itertools.product(FORMS, TYPES))
    for m, size in enumerate(SIZES)
    if (form == (4, 4) and types in TYPES[:2]) or (m + k) % 6 == 0
    if max(form) < 8 or size[0] * size[1] < 5000
]


@pytest.mark.parametrize("n,given,width,tokens,dtype,y_dtype", CASES)
def test_post(n: int, given: int, width: int, tokens: int, dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    branch, _ = operands(tokens, n, given, width, dtype, y_dtype)
    truth = wide(branch)
    want = reference.mix_out(*truth)
    close, out_dtype = max(CLOSE[dtype], CLOSE[y_dtype]), torch.promote_types(dtype, y_dtype)
    out = cpu.post(*branch)
    assert out.dtype == out_dtype
    assert_close((out,), (want.detach(),), close)
    g = gaussian(*want.shape, seed=9, dtype=out_dtype)
    made = cpu.post_backward(g, *branch)
    assert [t.dtype for t in made] == [t.dtype for t in branch]
    assert_close(made, torch.autograd.grad(want, truth, g.double()), close)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n,given,width,tokens,dtype,y_dtype", [case for case in CASES if case[4] == case[5]])
def test_pre(n: int, given: int, width: int, tokens: int, dtype: torch.dtype, y_dtype: torch.dtype, kind: str) -> None:
    (X, *_), parameters = operands(tokens, n, given, width, dtype)
    if given == 1 < n:  # the rows of phi were summed: one stream holds all of it and the others nothing
        parameters[0] = parameters[0][:width]
    truth = wide([X, *parameters])
    whole = torch.cat([truth[1], torch.zeros(n * width - len(truth[1]), truth[1].shape[1])])
    want = reference.pre(truth[0], whole, *truth[2:], kind, *OPTIONS[1:])
    u, h_post, h_res, raw, r = cpu.pre(X, *parameters, kind, *OPTIONS[1:])
    assert u.dtype == dtype
    assert_close((u, h_post, h_res), tuple(w.detach() for w in want), CLOSE[dtype])
    g = [gaussian(*w.shape, seed=10 + k) for k, w in enumerate(want)]
    g[0] = g[0].to(dtype)
    made = cpu.pre_backward(*g, X, *parameters, raw, r, kind, 20)
    assert_close(made, torch.autograd.grad(want, truth, [t.double() for t in g]), CLOSE[dtype])


@pytest.mark.parametrize("n,given,width,tokens,dtype,y_dtype", [case for case in CASES if case[0] > 1])
def test_boundary(n: int, given: int, width: int, tokens: int, dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    branch, parameters = operands(tokens, n, given, width, dtype, y_dtype)
    close, state_dtype = max(CLOSE[dtype], CLOSE[y_dtype]), torch.promote_types(dtype, y_dtype)
    truth = wide([*branch, *parameters])
    state, u, h_post, h_res, raw, r = cpu.boundary(*branch, *parameters, *OPTIONS)
    mixed = reference.post(*truth[:4])
    stored = mixed + (state.double() - mixed).detach()  # the next site reads the state as it was rounded
    want = mixed, *reference.pre(stored, *truth[4:], *OPTIONS)
    assert state.dtype == u.dtype == state_dtype
    assert_close((state, u, h_post, h_res), tuple(w.detach() for w in want), close)
    g = [gaussian(*w.shape, seed=10 + k) for k, w in enumerate(want)]
    g[0], g[1] = g[0].to(state_dtype), g[1].to(state_dtype)
    made = cpu.boundary_backward(*g, *branch, *parameters, raw, r, "mhc", 20)
    assert [t.dtype for t in made] == [t.dtype for t in (*branch, *parameters)]
    assert_close(made, torch.autograd.grad(want, truth, [t.double() for t in g]), close)


@pytest.mark.parametrize("dtype,y_dtype", [(F32, F32), (F32, BF16), (F16, F16)])
@pytest.mark.parametrize("n,given", [(3, 3), (4, 1)])
def test_declared_as_they_are(n: int, given: int, dtype: torch.dtype, y_dtype: torch.dtype) -> None:
    """Compiled graphs are built on the shapes, dtypes and strides that cpu.py declares for operators.cpp."""
    branch, parameters = operands(9, n, given, 16, dtype, y_dtype)
    for kind in KINDS.values():
        rules = kind.constrained, kind.transposed, kind.eps, 20
        of = torch.ops.mhc_rewrite_cpu
        site = of.pre(branch[0], branch[0].new_ones(given * 16, n * n + 2 * n).float(), *parameters[1:], *rules, 1e-6)
        calls = [
            (of.pre, (branch[0], parameters[0][: given * 16], *parameters[1:], *rules, 1e-6)),
            (of.pre_backward, (*site[:3], branch[0], parameters[0][: given * 16], *parameters[1:], *site[3:], *rules)),
            (of.post, branch),
            (of.post_backward, (of.post(*branch), *branch)),
            (of.boundary, (*branch, *parameters, *rules, 1e-6)),
        ]
        state, u, h_post, h_res, *kept = of.boundary(*branch, *parameters, *rules, 1e-6)
        calls.append((of.boundary_backward, (state, u, h_post, h_res, *branch, *parameters, *kept, *rules)))
        for operator, args in calls:
            torch.library.opcheck(operator.default, args, test_utils=("test_schema", "test_faketensor"))


def test_results_around_the_cache(two_threads: None) -> None:
    """Streams of more than 4 MiB are written past the cache, in whole vectors."""
    for dtype, width in ((F32, 768), (F32, 769), (BF16, 1536)):
        branch, parameters = operands(700, 4, 4, width, dtype)
        given = [*branch, *parameters]
        state, u, *_ = made = cpu.boundary(*given, *OPTIONS)
        assert_close((state, u), tuple(aten.boundary(*map(Tensor.double, given), *OPTIONS)[:2]), CLOSE[dtype])
        g = gaussian(*state.shape, seed=9, dtype=dtype)
        rest = torch.zeros_like(u), *(torch.ones_like(t) for t in made[2:4])
        got = cpu.boundary_backward(g, *rest, *given, *made[4:], "mhc", 20)
        want = aten.boundary_backward(*map(Tensor.double, (g, *rest, *given, *made[4:])), "mhc", 20)
        assert_close(got, want, CLOSE[dtype])
        g_X, g_y, *_ = cpu.post_backward(g, *branch)
        assert_close((g_X, g_y), aten.post_backward(*map(Tensor.double, (g, *branch)))[:2], CLOSE[dtype])


def far(name: str) -> Tensor:
    logits = gaussian(4, 4, seed=7)
    return {
        "equal": torch.full((4, 4), 3.0),
        "just near": logits.clamp(-0.5, 0.5).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(39.4)),
        "just far": logits.clamp(-0.5, 0.5).index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(40.6)),
        "of size 1e4": 1e4 * logits.sign(),
        "one huge entry": logits.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(1e4)),
        "a column that underflows": torch.cat([logits[:, :3], torch.full((4, 1), -1e4)], dim=1),
        "a row that underflows": torch.cat([logits[:3], torch.full((1, 4), -1e4)]),
        "an uneven row that underflows": torch.cat([logits[:3], torch.tensor([[0.0, 1.0, 2.0, 3.0]]) - 1e3]),
    }[name]


FAR = ["equal", "just near", "just far", "of size 1e4", "one huge entry", "a column that underflows",
       "a row that underflows", "an uneven row that underflows"]  # fmt: skip


@pytest.mark.parametrize("kind", ["mhc", "deepseek_v4"])
@pytest.mark.parametrize("name", FAR)
def test_any_logits(name: str, kind: str) -> None:
    """Nine tokens, of which the last has ordinary logits beside eight with these."""
    _, parameters = operands(1, 4, 4, 8)
    parameters[2][8:] = far(name).flatten()
    X = gaussian(9, 4, 8, seed=1)
    truth = wide([X, *parameters])
    want = reference.pre(*truth, kind, 20, 1e-6)
    u, h_post, h_res, raw, r = cpu.pre(X, *parameters, kind, 20, 1e-6)
    # An fp32 number of size 1e4 is known to 5e-4, and so is a difference of logits.
    assert_close((u, h_post, h_res), tuple(w.detach() for w in want), 1e-3)
    g = [gaussian(*w.shape, seed=10 + k) for k, w in enumerate(want)]
    made = cpu.pre_backward(*g, X, *parameters, raw, r, kind, 20)
    assert_close(made[:1], torch.autograd.grad(want, truth, [t.double() for t in g])[:1], 1e-3)
    assert all(t.isfinite().all() for t in made)


@pytest.mark.parametrize("iterations", [1, 2, 7, 40])
def test_other_iterations(iterations: int) -> None:
    (X, *_), parameters = operands(9, 4, 4, 8)
    truth = wide([X, *parameters])
    want = reference.pre(*truth, "mhc", iterations, 1e-6)
    u, h_post, h_res, raw, r = cpu.pre(X, *parameters, "mhc", iterations, 1e-6)
    assert_close((u, h_post, h_res), tuple(w.detach() for w in want), 1e-5)
    g = [gaussian(*w.shape, seed=10 + k) for k, w in enumerate(want)]
    made = cpu.pre_backward(*g, X, *parameters, raw, r, "mhc", iterations)
    assert_close(made, torch.autograd.grad(want, truth, [t.double() for t in g]), 1e-5)


def test_bf16_is_rounded_as_torch_does() -> None:
    """To nearest, ties to even, infinities and NaN kept: through `post` with H_res = 1 and no branch."""
    values = torch.cat([gaussian(4096, seed=1) * 10 ** gaussian(4096, seed=2), torch.tensor([torch.inf, -torch.inf])])
    bits = values.view(torch.int32)[:1024] & ~0xFFFF | 0x8000  # ties
    X = torch.cat([values, bits.view(F32), torch.tensor([torch.nan])]).view(1, 1, -1)
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    for dtype in (BF16, F16):
        y = torch.zeros(X.shape[-1])[None].to(dtype)
        g_X = cpu.post_backward(X, X, y, zero, one)[1]  # g_y = 0 in the branch's type
        assert g_X.dtype == dtype
        g_y = cpu.post_backward(X, X, y, torch.ones(1, 1), one)[1]
        assert torch.equal(g_y.nan_to_num(7.0), X.view(1, -1).to(dtype).nan_to_num(7.0))


def test_same_inputs_same_bits(two_threads: None) -> None:
    branch, parameters = operands(133, 4, 4, 100)
    leaves = [t.requires_grad_() for t in (*branch, *parameters)]
    runs = []
    for _ in range(2):
        out = ops.boundary(*leaves, *OPTIONS)[:4]
        runs.append([*out, *torch.autograd.grad(out, leaves, [torch.ones_like(o) for o in out])])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_the_number_of_threads_matters_to_rounding_alone(two_threads: None) -> None:
    (X, *_), parameters = operands(133, 4, 4, 100)
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        u, h_post, h_res, raw, r = cpu.pre(X, *parameters, *OPTIONS)
        g = torch.ones_like(u), torch.ones_like(h_post), gaussian(*h_res.shape, seed=1)
        made.append((u, h_post, h_res, *cpu.pre_backward(*g, X, *parameters, raw, r, "mhc", 20)))
    assert_close(made[0], tuple(t.double() for t in made[1]), 1e-6)


def test_ops_call_them(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("pre", "post", "boundary", "pre_backward", "post_backward", "boundary_backward"):
        run = getattr(cpu, name)
        monkeypatch.setattr(cpu, name, lambda *args, run=run, name=name: called.append(name) or run(*args))
    branch, parameters = operands(3, 4, 4, 8)
    leaves = [t.requires_grad_() for t in (*branch, *parameters)]
    ops.pre(leaves[0], *leaves[4:], *OPTIONS)[0].sum().backward()
    ops.post(*leaves[:4]).sum().backward()
    ops.boundary(*leaves, *OPTIONS)[1].sum().backward()
    assert called == ["pre", "pre_backward", "post", "post_backward", "boundary", "boundary_backward"]


WITHOUT = """
import os, warnings
os.environ.update(CXX="no-such-compiler", MHC_REWRITE_CACHE={folder!r})
import torch
import mhc_rewrite.errors
from mhc_rewrite.kernels import aten, ops
X, phi = torch.randn(5, 2, 8), torch.randn(16, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        got = ops.pre(X, phi, torch.ones(3), torch.zeros(8), "mhc", 20, 1e-6)
(warning,) = [str(w.message) for w in caught if "CPU kernels" in str(w.message)]
assert "no-such-compiler" in warning and "g++" in warning and "ninja" in warning, warning
want = aten.pre(X, phi, torch.ones(3), torch.zeros(8), "mhc", 20, 1e-6)
assert all(torch.equal(a, b) for a, b in zip(got, want))
assert not any(name.endswith(".so") for name in os.listdir({folder!r}))
try:
    torch.ops.mhc_rewrite_cpu.post(X, X[:, 0], X[..., 0], X[..., :2])
except mhc_rewrite.errors.KernelError as error:
    assert "made for the CPU kernels" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_without_a_compiler(tmp_path: object) -> None:
    """aten.py runs, and one warning says why and what would help."""
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(folder=str(tmp_path))], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-3000:]


ELSEWHERE = """
import sys
import torch, mhc_rewrite
program, (given, want) = torch.export.load(sys.argv[1] + ".pt2"), torch.load(sys.argv[1])
got = program.module()(*given)
assert all(torch.equal(a, b) for a, b in zip(got, want))
assert "torch.utils.cpp_extension" not in sys.modules  # a library that is there is found without it
"""


@pytest.mark.slow
def test_graphs_of_another_process(tmp_path: Path) -> None:
    """A program that holds the kernels, loaded where nothing has called them yet."""

    class Site(torch.nn.Module):
        def forward(self, X: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
            return ops.pre(X, *parameters, *OPTIONS)[:3]

    (X, *_), parameters = operands(9, 4, 4, 8)
    given = (X, *parameters)
    program = torch.export.export(Site(), given, strict=False).run_decompositions()
    assert any(node.target is torch.ops.mhc_rewrite_cpu.pre.default for node in program.graph.nodes)
    path = str(tmp_path / "site")
    torch.export.save(program, f"{path}.pt2")
    torch.save((given, Site()(*given)), path)
    run = subprocess.run([sys.executable, "-c", ELSEWHERE, path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]

"""The operators: registered as PyTorch wants them, equal to the reference with gradients, and in graphs as they
should be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_rewrite.errors import KernelError
from mhc_rewrite.kernels import cpu, ops, reference
from mhc_rewrite.kernels.kinds import KINDS

WIDTH = 6
OPTIONS = ("mhc", 20, 1e-6)
IN_OPERATORS = (20, "mhc")
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype)


def operands(
    leading: tuple[int, ...] = (2, 3), n: int = 4, given: int | None = None, dtype: torch.dtype = F64,
    wide: torch.dtype | None = None, width: int = WIDTH,
) -> dict[str, Tensor]:  # fmt: skip
    """Random leaves by name; `given`: streams that the state holds; `wide`: dtype of parameters and coefficients."""
    wide = wide or dtype
    columns = n * n + 2 * n
    leaves = {
        "X": gaussian(*leading, given or n, width, seed=1, dtype=dtype),
        "y": gaussian(*leading, width, seed=2, dtype=dtype),
        "h_post": gaussian(*leading, n, seed=3, dtype=wide),
        "h_res": gaussian(*leading, n, n, seed=4, dtype=wide),
        "phi": (gaussian(n * width, columns, seed=5) / (n * width) ** 0.5).to(wide),
        "alpha": torch.tensor([0.7, -0.4, 1.3], dtype=wide),
        "bias": gaussian(columns, seed=6, dtype=wide),
    }
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a compiler."""
    monkeypatch.setattr(cpu, "available", lambda: False)


STATE, BRANCH = ("X", "phi", "alpha", "bias"), ("X", "y", "h_post", "h_res")
BOTH = (*BRANCH, "phi", "alpha", "bias")
# name: (operator, its reference, the operands, how many outputs have gradients)
OPERATORS: dict[str, tuple[Any, Callable[..., Any], tuple[str, ...], int]] = {
    "pre": (ops.pre, reference.pre, STATE, 3),
    "post": (ops.post, reference.post, BRANCH, 1),
    "post_collapse": (ops.post_collapse, lambda *args: reference.post(*args).mean(-2), BRANCH, 1),
    "boundary": (ops.boundary, reference.boundary, BOTH, 4),
}


def call(name: str, leaves: dict[str, Tensor], use_reference: bool = False, kind: str = "mhc") -> tuple[Tensor, ...]:
    operator, truth, wanted, outputs = OPERATORS[name]
    options = (kind, *OPTIONS[1:]) if "phi" in wanted else ()
    out = (truth if use_reference else operator)(*(leaves[leaf] for leaf in wanted), *options)
    return (out,) if isinstance(out, Tensor) else tuple(out[:outputs])


def with_gradients(name: str, leaves: dict[str, Tensor], use_reference: bool, kind: str = "mhc") -> list[Tensor]:
    out = call(name, leaves, use_reference, kind)
    weights = [gaussian(*o.shape, seed=10 + k).to(o.dtype) for k, o in enumerate(out)]
    wanted = [leaves[leaf] for leaf in OPERATORS[name][2]]
    return [*out, *torch.autograd.grad(out, wanted, weights)]


def relative(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.double() - want.double()).detach().norm() / want.double().detach().norm())


# -- against the reference -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n,given", [(1, 1), (2, 2), (4, 4), (4, 1), (5, 5), (16, 16)])
@pytest.mark.parametrize("name", OPERATORS)
def test_against_the_reference(name: str, n: int, given: int, kind: str) -> None:
    leaves = operands(n=n, given=given)
    for got, want in zip(with_gradients(name, leaves, False, kind), with_gradients(name, leaves, True, kind)):
        assert relative(got, want) < 1e-12


@pytest.mark.parametrize("leading", [(), (1,), (7,), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_leading_axes_are_tokens(name: str, leading: tuple[int, ...]) -> None:
    leaves = operands(leading)
    for got, want in zip(with_gradients(name, leaves, False), with_gradients(name, leaves, True)):
        assert relative(got, want) < 1e-12


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("name", OPERATORS)
def test_no_tokens(name: str, dtype: torch.dtype) -> None:
    wide = F64 if dtype == F64 else F32
    leaves = operands((0, 3), dtype=dtype, wide=wide)
    got, want = with_gradients(name, leaves, False), with_gradients(name, leaves, True)
    assert [(g.shape, g.dtype) for g in got] == [(w.shape, w.dtype) for w in want]
    assert all(not g.any() for g in got)


@pytest.mark.parametrize("name", OPERATORS)
def test_any_strides(name: str) -> None:
    """Transposed, expanded and sliced inputs."""
    plain = operands((3, 4))
    for change in (
        {"X": plain["X"].detach().permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)},
        {"y": torch.cat([plain["y"].detach()] * 2, -1)[..., :WIDTH], "h_res": plain["h_res"].detach().mT.clone().mT},
        {"phi": plain["phi"].detach().T.clone().T},
    ):
        leaves = {**plain, **{leaf: value.requires_grad_() for leaf, value in change.items()}}
        for got, want in zip(with_gradients(name, leaves, False), with_gradients(name, plain, False)):
            assert relative(got, want) < 1e-14
    expanded = {**plain, "X": plain["X"].detach()[..., :1, :].expand(3, 4, 4, WIDTH).requires_grad_()}
    for got, want in zip(with_gradients(name, expanded, False), with_gradients(name, expanded, True)):
        assert relative(got, want) < 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck(name: str) -> None:
    wanted = OPERATORS[name][2]
    leaves = operands((2,), n=2, width=3)
    assert torch.autograd.gradcheck(
        lambda *values: call(name, dict(zip(wanted, values))), [leaves[leaf] for leaf in wanted]
    )


@pytest.mark.usefixtures("no_kernels")  # which have tests of their own
@pytest.mark.parametrize("name", ["pre", "boundary"])
@pytest.mark.parametrize("dtype,close", [(F32, 1e-5), (BF16, 2e-2)])
def test_other_dtypes(name: str, dtype: torch.dtype, close: float) -> None:
    leaves = operands((33,), dtype=dtype, wide=F32, width=100)
    wide = {leaf: value.detach().double().requires_grad_() for leaf, value in leaves.items()}
    for got, want in zip(with_gradients(name, leaves, False), with_gradients(name, wide, True)):
        assert relative(got, want) < close


def test_autocast_changes_nothing() -> None:
    leaves = operands((5,), dtype=BF16, wide=F32)
    want = with_gradients("boundary", leaves, False)
    with torch.autocast("cpu", BF16):
        got = with_gradients("boundary", leaves, False)
    assert all(torch.equal(g, w) and g.dtype == w.dtype for g, w in zip(got, want))


# -- Sinkhorn-Knopp ---------------------------------------------------------------------------------------------------


def logits(name: str) -> Tensor:
    a = 2 * gaussian(3, 4, 4, seed=7)
    at = {
        "one huge entry": (1, 2, 1e4),
        "one tiny entry": (1, 2, -1e4),
        "a huge column": (slice(None), 2, 1e4),
        "a column that underflows": (slice(None), 2, -1e4),
        "a row that underflows": (2, slice(None), -1e4),
    }
    if name in at:
        row, column, value = at[name]
        a[1, row, column] = value
    return {"equal": torch.full_like(a, 3.0), "of size 1e4": 1e4 * a.sign(), "up to 1e4": 1e4 * torch.tanh(a)}.get(
        name, a
    )


LOGITS = ["random", "equal", "one huge entry", "one tiny entry", "a huge column", "a column that underflows",
          "a row that underflows", "of size 1e4", "up to 1e4"]  # fmt: skip


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("name", LOGITS)
def test_sinkhorn(name: str, eps: float) -> None:
    """Value and gradient are those of autograd through the 20 iterations, and finite in fp32 too."""
    a, weight = logits(name).requires_grad_(), gaussian(3, 4, 4, seed=8)
    want = reference.sinkhorn_knopp(a, 20, eps)
    (want_gradient,) = torch.autograd.grad(want, a, weight)
    torch.testing.assert_close(ops.sinkhorn(a.detach(), 20, eps), want, rtol=1e-10, atol=1e-14)
    gradient = ops.sinkhorn_backward(weight, a.detach(), 20, eps)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-8, atol=1e-12)
    single = a.detach().float()
    m = ops.sinkhorn(single, 20, eps)
    assert m.isfinite().all() and (m.sum(-1) - 1).abs().max() < (1e-4 if eps < 1e-2 else 0.05)
    assert ops.sinkhorn_backward(weight.float(), single, 20, eps).isfinite().all()


@pytest.mark.parametrize("name", LOGITS)
def test_a_site_is_finite_whatever_its_logits(name: str) -> None:
    """In fp32, by the kernels of this machine: alpha, bias and state give these logits, values and gradients finite."""
    leaves = operands((3,), dtype=F32)
    with torch.no_grad():
        leaves["bias"][8:] = logits(name)[1].flatten().float()
    assert all(value.isfinite().all() for value in with_gradients("boundary", leaves, False))


# -- what PyTorch wants of an operator --------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [4, 1])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str, dtype: torch.dtype, given: int) -> None:
    operator, wanted = getattr(ops, f"{name}_operator"), OPERATORS[name][2]
    leaves = operands(given=given, dtype=dtype, wide=F64 if dtype == F64 else F32)
    options = (*IN_OPERATORS, 1e-6, "") if "phi" in wanted else ("",)
    # In bf16 a compiled graph and the eager kernel round differently at the last place.
    close = {"rtol": 0.05, "atol": 0.05} if dtype == BF16 else {}
    torch.library.opcheck(operator, (*(leaves[leaf] for leaf in wanted), *options), **close)


@pytest.mark.parametrize("name", ["pre_backward", "post_backward", "post_collapse_backward", "boundary_backward"])
def test_opcheck_of_gradients(name: str) -> None:
    leaves = {leaf: value.detach() for leaf, value in operands(dtype=F32).items()}
    forward = name.removesuffix("_backward")
    operator, _, wanted, outputs = OPERATORS[forward]
    given = [leaves[leaf] for leaf in wanted]
    if "phi" not in wanted:
        out = operator(*given)
        torch.library.opcheck(getattr(ops, name), (torch.ones_like(out), *given))
    else:
        out = operator(*given, *OPTIONS)
        gradients = [torch.ones_like(o) for o in out[:outputs]]
        torch.library.opcheck(getattr(ops, name), (*gradients, *given, *out[outputs:], *IN_OPERATORS))


def test_opcheck_of_sinkhorn() -> None:
    a = gaussian(3, 4, 4)
    torch.library.opcheck(ops.sinkhorn, (a, 20, 0.0))
    torch.library.opcheck(ops.sinkhorn_backward, (a, a, 20, 0.0))


@pytest.mark.parametrize("name", OPERATORS)
def test_only_inputs_raw_and_r_are_kept(name: str) -> None:
    """n^2 + 2n + 1 numbers a token besides the inputs."""
    leaves = operands((11,), dtype=F32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call(name, leaves)
    own = {leaf.data_ptr() for leaf in leaves.values()}
    beside = sum(t.numel() for t in kept if t.data_ptr() not in own)
    assert beside == (11 * (4 * 4 + 2 * 4 + 1) if "phi" in OPERATORS[name][2] else 0)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["real", "meta"])
@pytest.mark.parametrize(
    "name,change,said",
    [
        ("pre", {"X": (2, 3, 3, WIDTH)}, r"\(2, 3, 3, 6\).*4 streams"),
        ("pre", {"X": (2, 3, 4, 5)}, "phi"),
        ("pre", {"phi": (24, 23)}, r"both have a column"),
        ("post", {"y": (2, 3, 5)}, r"\(2, 3, 5\)"),
        ("post", {"h_post": (2, 3, 3)}, "H_post"),
        ("post_collapse", {"h_res": (2, 4, 4)}, "H_res"),
        ("boundary", {"X": (2, 3, 2, WIDTH)}, r"\(2, 3, 2, 6\)"),
    ],
)
def test_wrong_shapes(name: str, change: dict[str, tuple[int, ...]], said: str, form: str) -> None:
    leaves = {**operands(), **{leaf: gaussian(*shape) for leaf, shape in change.items()}}
    leaves = {leaf: value.to("meta") for leaf, value in leaves.items()} if form == "meta" else leaves
    with pytest.raises(KernelError, match=said):
        call(name, leaves)


def test_unknown_kind() -> None:
    with pytest.raises(KernelError, match=r"kind must be one of 'mhc', .*, not 'mhc2'"):
        call("pre", operands(), kind="mhc2")


# -- in graphs --------------------------------------------------------------------------------------------------------


def graphs_of(function: Callable[..., Any], *args: Tensor) -> tuple[list[str], list[str]]:
    """The operators that a backend sees, and those that are left after AOTAutograd, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    seen: list[str] = []
    left: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        left.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return aot_autograd(fw_compiler=compiler)(graph, example)

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*args).sum().backward()
    return seen, left


def two_sites(X: Tensor, y: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor) -> Tensor:
    for _ in range(2):
        u, h_post, h_res, _, _ = ops.pre(X, phi, alpha, bias, *OPTIONS)
        X = ops.post(X, torch.tanh(u) * y, h_post, h_res)
    return X


def ours(targets: list[str], namespace: str = "mhc_rewrite") -> set[str]:
    return {target.split(".")[1] for target in targets if target.startswith(f"{namespace}.")}


@pytest.mark.usefixtures("no_kernels")
def test_compiled_graphs_hold_aten() -> None:
    """Passes find the operators by name; what Inductor gets is aten but for Sinkhorn-Knopp."""
    leaves = operands((6,), dtype=F32)
    seen, left = graphs_of(two_sites, *(leaves[leaf] for leaf in ("X", "y", "phi", "alpha", "bias")))
    assert ours(seen) == {"pre", "post"}
    assert ours(left) == {"sinkhorn", "sinkhorn_backward"}


@pytest.mark.skipif(not cpu.available(), reason="no C++ compiler or ninja on this machine")
def test_compiled_graphs_hold_the_cpu_kernels() -> None:
    """Kernels called directly in fp32, which they take, and aten in fp64, which they don't."""
    kernels = {"pre", "post", "pre_backward", "post_backward"}
    for dtype, of_cpu, others in ((F32, kernels, set()), (F64, set(), {"sinkhorn", "sinkhorn_backward"})):
        leaves = operands((6,), dtype=dtype)
        _, left = graphs_of(two_sites, *(leaves[leaf] for leaf in ("X", "y", "phi", "alpha", "bias")))
        assert ours(left, "mhc_rewrite_cpu") == of_cpu and ours(left) == others


def compiled_and_eager(dtype: torch.dtype, backend: str, close: float) -> None:
    torch._dynamo.reset()
    leaves = [operands((6,), dtype=dtype)[leaf] for leaf in ("X", "y", "phi", "alpha", "bias")]
    want = two_sites(*leaves)
    got = torch.compile(two_sites, backend=backend, fullgraph=True)(*leaves)
    weight = gaussian(*want.shape, seed=20, dtype=dtype)
    assert relative(got, want) < close
    for mine, other in zip(torch.autograd.grad(got, leaves, weight), torch.autograd.grad(want, leaves, weight)):
        assert relative(mine, other) < close


def test_compiled_equals_eager() -> None:
    """By AOTAutograd's graphs, in which the operators are decomposed."""
    compiled_and_eager(F64, "aot_eager", 1e-13)


@pytest.mark.slow
def test_inductor_with_kernels() -> None:
    compiled_and_eager(F32, "inductor", 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("no_kernels")
def test_inductor_without_kernels() -> None:
    compiled_and_eager(F32, "inductor", 1e-5)


CACHED = """
import torch
from mhc_rewrite.kernels import aten, cpu, ops
from torch._dynamo.utils import counters
step = torch.compile(lambda *given: ops.post(*given).sum())
def hits():
    counters.clear(); torch._dynamo.reset()
    given = [torch.ones(s).requires_grad_() for s in ((5, 2, 8), (5, 8), (5, 2), (5, 2, 2))]
    step(*given).backward()
    return counters["aot_autograd"]["autograd_cache_hit"]
hits()
assert hits() == 1, "the same code: from the cache"
cpu.available = lambda: not {available}
assert hits() == 0, "another way to run the operator: compiled anew"
ops.inspect.getsource = lambda module: "as in another version"
assert hits() == 0, "another source: compiled anew"
"""


@pytest.mark.slow
def test_cached_graphs_are_of_the_code_that_runs(tmp_path: Path) -> None:
    """Compiled graphs on disk are found by the calls in them: those tell what the operators became."""
    script = CACHED.format(available=cpu.available())
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]

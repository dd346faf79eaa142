"""The operators on the cases that published test suites of this field use: wide projections, odd widths, large alpha, a
state of zeros, a state of size 100, many tokens, many sites in a row; and more elements than 32 bits can address.

On the CPU here, on a GPU too where there is one. Truth is the reference in fp64, with its gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_rewrite.kernels import ops, reference
from mhc_rewrite.kernels.kinds import KINDS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {F32: 1e-5, BF16: 2e-2, F16: 2e-2}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ITERATIONS, EPS = 20, 1e-6

# operator: (itself, its reference, its operands, outputs that have gradients)
OPERATORS: dict[str, tuple[Any, Callable[..., Any], str, int]] = {
    "pre": (ops.pre, reference.pre, "X phi alpha bias", 3),
    "post": (ops.post, reference.post, "X y h_post h_res", 1),
    "post_collapse": (ops.post_collapse, lambda *args: reference.post(*args).mean(-2), "X y h_post h_res", 1),
    "boundary": (ops.boundary, reference.boundary, "X y h_post h_res phi alpha bias", 4),
}


@dataclass(frozen=True)
class Case:
    """One setting. `alpha` for all three; `scale` of X and y; `given` streams in memory."""

    tokens: tuple[int, ...] = (5,)
    width: int = 40
    n: int = 4
    dtype: torch.dtype = F32
    kind: str = "mhc"
    alpha: float = 1.0
    scale: float = 1.0
    given: int | None = None

    def __str__(self) -> str:
        name = f"{self.kind} n={self.n} C={self.width} tokens={self.tokens} {str(self.dtype).removeprefix('torch.')}"
        return name + f" alpha={self.alpha:g} scale={self.scale:g}" + (f" given={self.given}" if self.given else "")


CASES = [
    # The projection: up to nC = 65536 products a sum, odd widths, and a width that no block divides.
    *(Case(width=width, dtype=dtype) for width in (5129, 7168, 16384) for dtype in (F32, BF16)),
    Case(width=16384, kind="hc", tokens=(3,)),
    Case(width=5129, kind="deepseek_v4", tokens=(3,)),
    Case(width=7168, given=1),
    Case(width=2561, n=16, tokens=(2,)),
    # Token shapes.
    *(Case(tokens=(13, 1), width=width, dtype=dtype) for width in (100, 1280) for dtype in (F32, BF16, F16)),
    Case(tokens=(2, 4096), width=24),
    Case(tokens=(2, 4096), width=24, dtype=BF16),
    Case(tokens=(1,), width=7168),
    # Size of alpha: logits of size 40.
    *(Case(tokens=(33,), alpha=alpha, kind=kind) for alpha in (0.01, 3.0, 10.0) for kind in KINDS),
    Case(tokens=(33,), alpha=10.0, dtype=BF16),
    # Size of the state; at 0 the norm is sqrt(eps).
    *(Case(scale=scale, kind=kind) for scale in (0.0, 100.0) for kind in KINDS),
    *(Case(scale=scale, dtype=dtype) for scale in (0.0, 100.0) for dtype in (BF16, F16)),
]  # fmt: skip


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def operands(case: Case, device: str) -> dict[str, Tensor]:
    """Random leaves by name: streams in the case's dtype, coefficients and parameters in fp32."""
    n, width, columns = case.n, case.width, case.n**2 + 2 * case.n
    leaves = {
        "X": (case.scale * gaussian(*case.tokens, case.given or n, width, seed=1)).to(case.dtype),
        "y": (case.scale * gaussian(*case.tokens, width, seed=2)).to(case.dtype),
        "h_post": 2 * gaussian(*case.tokens, n, seed=3, dtype=F32).sigmoid(),
        "h_res": gaussian(*case.tokens, n, n, seed=4, dtype=F32).softmax(-1),
        "phi": (gaussian(n * width, columns, seed=5) / (n * width) ** 0.5).to(F32),
        "alpha": torch.full((3,), case.alpha),
        "bias": gaussian(columns, seed=6, dtype=F32),
    }
    return {name: leaf.to(device).requires_grad_() for name, leaf in leaves.items()}


def doubled(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}


def run(function: Callable[..., Any], leaves: dict[str, Tensor], wanted: str, options: tuple[Any, ...], count: int,
        ) -> dict[str, Tensor]:  # fmt: skip
    """Outputs and gradients by name."""
    given = [leaves[name] for name in wanted.split()]
    out = function(*given, *options)
    out = (out,) if isinstance(out, Tensor) else tuple(out[:count])
    weights = [gaussian(*o.shape, seed=10 + k).to(o.dtype).to(o.device) for k, o in enumerate(out)]
    gradients = torch.autograd.grad(out, given, weights)
    return {f"output {k}": o.detach() for k, o in enumerate(out)} | dict(zip(wanted.split(), gradients))


def terms_of_alpha(name: str, leaves: dict[str, Tensor], kind: str) -> float:
    """The norm of what alpha's gradient sums up over tokens and columns, d/ds * raw: three sums that cancel, so that
    this, and not what is left of them, says how well fp32 can know them."""
    _, truth, wanted, count = OPERATORS[name]
    if "phi" not in wanted:
        return 0.0
    wide = doubled(leaves)
    tokens = wide["X"].shape[:-2]
    wide["bias"] = wide["bias"].detach().expand(*tokens, -1).clone().requires_grad_()  # one for each token
    gradient = run(truth, wide, wanted, (kind, ITERATIONS, EPS), count)["bias"]
    with torch.no_grad():
        state = wide["X"] if name == "pre" else reference.post(*(wide[leaf] for leaf in ("X", "y", "h_post", "h_res")))
        raw, _ = reference.project(state, wide["phi"], kind, EPS)
    return float((gradient * (raw if KINDS[kind].constrained else raw.tanh())).norm())


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], close: float, terms: float = 0.0) -> None:
    """Relative to the norm of the truth, alpha's gradient to that of its terms where it is larger."""
    wrong = {}
    for name, truth in want.items():
        mine, norm = got[name], float(truth.norm())
        assert mine.shape == truth.shape and mine.isfinite().all(), name
        norm = max(norm, terms) if name == "alpha" else norm
        error = float((mine.double() - truth).norm())
        if error > close * norm:
            wrong[name] = error / norm if norm else error
    assert not wrong, f"relative errors above {close:g}: {wrong}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(case: Case, name: str, device: str) -> None:
    operator, truth, wanted, count = OPERATORS[name]
    options = (case.kind, ITERATIONS, EPS) if "phi" in wanted else ()
    leaves = operands(case, device)
    want = run(truth, doubled(leaves), wanted, options, count)
    got = run(operator, leaves, wanted, options, count)
    assert_close(got, want, CLOSE[case.dtype], terms_of_alpha(name, leaves, case.kind))


# -- ten sites --------------------------------------------------------------------------------------------------------

SITES = 10


def ten_sites(
    x: Tensor, gains: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, fused: bool, truth: bool
) -> Tensor:
    """From one stream to one stream, with a normalising block at each site; `fused` by boundaries."""
    pre, post, boundary = (getattr(reference if truth else ops, name) for name in ("pre", "post", "boundary"))
    options = (kind, ITERATIONS, EPS)
    X = x.unsqueeze(-2)
    u, h_post, h_res, *_ = pre(X, phi[0], alpha[0], bias[0], *options)
    if truth:
        X = X.expand(*X.shape[:-2], h_post.shape[-1], X.shape[-1])
    for site in range(1, SITES):
        y = block(u, gains[site - 1])
        if fused:
            X, u, h_post, h_res, *_ = boundary(X, y, h_post, h_res, phi[site], alpha[site], bias[site], *options)
        else:
            X = post(X, y, h_post, h_res)
            u, h_post, h_res, *_ = pre(X, phi[site], alpha[site], bias[site], *options)
    last = (X, block(u, gains[-1]), h_post, h_res)
    return reference.post(*last).mean(-2) if truth else ops.post_collapse(*last)


def block(u: Tensor, gain: Tensor) -> Tensor:
    """What a site wraps, tame, so that ten of them do not blow rounding up."""
    return gain * F.rms_norm(u, u.shape[-1:], eps=EPS)


def chain_of_operands(dtype: torch.dtype, device: str, n: int = 4, width: int = 100) -> dict[str, Tensor]:
    columns = n * n + 2 * n
    leaves = {
        "x": gaussian(3, 11, width, seed=1, dtype=dtype),
        "gains": gaussian(SITES, width, seed=2, dtype=dtype),
        "phi": (gaussian(SITES, n * width, columns, seed=5) / (n * width) ** 0.5).to(F32),
        "alpha": gaussian(SITES, 3, seed=6, dtype=F32),
        "bias": gaussian(SITES, columns, seed=7, dtype=F32),
    }
    return {name: leaf.to(device).requires_grad_() for name, leaf in leaves.items()}


def run_chain(leaves: dict[str, Tensor], kind: str, fused: bool, truth: bool) -> dict[str, Tensor]:
    out = ten_sites(*leaves.values(), kind, fused, truth)
    weight = gaussian(*out.shape, seed=10).to(out.dtype).to(out.device)
    gradients = torch.autograd.grad(out, list(leaves.values()), weight)
    return {"output": out.detach(), **dict(zip(leaves, gradients))}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [True, False], ids=["boundaries", "pre and post"])
@pytest.mark.parametrize("kind,dtype", [("mhc", F32), ("deepseek_v4", F32), ("hc", F32), ("mhc", BF16)])
def test_ten_sites(kind: str, dtype: torch.dtype, fused: bool, device: str) -> None:
    leaves = chain_of_operands(dtype, device)
    want = run_chain(doubled(leaves), kind, fused, truth=True)
    got = run_chain(leaves, kind, fused, truth=False)
    assert_close(got, want, CLOSE[dtype])


# -- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "case",
    [Case((2, 4096), 24), Case((2, 4096), 24, dtype=BF16), Case((13, 1), 7168), Case((33,), 129, n=5, dtype=F16)],
    ids=str,
)
def test_twice_the_same_bits(case: Case, name: str, device: str) -> None:
    """Forward and gradients, the parameters' among them."""
    operator, _, wanted, count = OPERATORS[name]
    options = (case.kind, ITERATIONS, EPS) if "phi" in wanted else ()
    leaves = operands(case, device)
    first, second = (run(operator, leaves, wanted, options, count) for _ in range(2))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_ten_sites_twice_the_same_bits(dtype: torch.dtype, device: str) -> None:
    leaves = chain_of_operands(dtype, device)
    first, second = (run_chain(leaves, "mhc", fused=True, truth=False) for _ in range(2))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


# -- more elements than 32 bits can address ---------------------------------------------------------------------------

HUGE = Case(tokens=(2**31 // (4 * 4096) + 64,), width=4096, dtype=BF16)  # 2^31 elements and a million in X
ENDS = 3


@pytest.mark.parametrize(
    "case,device",
    [(Case(tokens=(100,), width=64, dtype=BF16), "cpu"), pytest.param(HUGE, "cuda", marks=pytest.mark.slow)],
    ids=["small", "2^31"],
)
@pytest.mark.parametrize("name", OPERATORS)
def test_first_and_last_tokens(name: str, case: Case, device: str) -> None:
    """All tokens but the first and last three are zero and get no gradient: the reference needs to see only those six,
    also for the parameters' gradients. The small size tests the test. The huge one has not run on a GPU yet."""
    if device == "cuda" and not (torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 70e9):
        pytest.skip("more than 2^31 elements with their gradients need a GPU with 70 GB of free memory")
    operator, truth, wanted, count = OPERATORS[name]
    options = (case.kind, ITERATIONS, EPS) if "phi" in wanted else ()
    (tokens,) = case.tokens
    few = operands(Case((2 * ENDS,), case.width, dtype=case.dtype), device)
    many = {
        leaf: spread(value, tokens) if len(value) == 2 * ENDS else value.detach().requires_grad_()
        for leaf, value in few.items()
    }
    given = [many[leaf] for leaf in wanted.split()]
    out = operator(*given, *options)
    out = (out,) if isinstance(out, Tensor) else tuple(out[:count])
    weights = [gaussian(2 * ENDS, *o.shape[1:], seed=10 + k).to(o.dtype).to(device) for k, o in enumerate(out)]
    gradients = torch.autograd.grad(out, given, [spread(weight, tokens).detach() for weight in weights])
    got = {f"output {k}": ends(o.detach()) for k, o in enumerate(out)}
    got |= {leaf: ends(g) if len(g) == tokens else g for leaf, g in zip(wanted.split(), gradients)}
    want = run(truth, doubled(few), wanted, options, count)
    assert_close(got, want, CLOSE[case.dtype], terms_of_alpha(name, few, case.kind))


def spread(six: Tensor, tokens: int) -> Tensor:
    """The first three at the start, the last three at the end of `tokens`, zeros between them; a leaf."""
    many = six.new_zeros((tokens, *six.shape[1:]))
    many[:ENDS], many[-ENDS:] = six.detach()[:ENDS], six.detach()[-ENDS:]
    return many.requires_grad_()


def ends(many: Tensor) -> Tensor:
    return torch.cat([many[:ENDS], many[-ENDS:]])

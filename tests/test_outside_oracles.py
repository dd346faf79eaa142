"""One site against implementations that other projects publish: transformers' DeepSeek-V4 and Liger's mHC.

Both normalise rows first and columns last, DeepSeek-V4 contracts the first index of what comes out, and each has
epsilons of its own. The connection `deepseek_v4` has DeepSeek's. And since (row, column) passes on A are (column, row)
passes on its transpose, the `mhc` connection is compared as it is, too: with the columns of phi and bias that make
H_res transposed.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_rewrite import HyperConnection, MHCConfig
from mhc_rewrite.kernels.kinds import KINDS
from mhc_rewrite.kernels.reference import split

WIDTH, TOKENS = 24, (2, 5)
EPS_NORM = 1e-5
CLOSE = 1e-6


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, want: Tensor) -> float:
    """The error of `got` by norm."""
    assert got.shape == want.shape
    return float((got - want).detach().norm() / want.detach().norm())


def new_site(connection: str, n: int, iterations: int, phi: Tensor, alpha: Tensor, bias: Tensor) -> HyperConnection:
    """A site with these parameters, [pre | post | res], as leaves of its own."""
    config = MHCConfig(n_streams=n, connection=connection, sinkhorn_iterations=iterations, eps_norm=EPS_NORM)
    site = HyperConnection(WIDTH, config)
    with torch.no_grad():
        for name, value in (("phi", phi), ("alpha", alpha), ("bias", bias)):
            site.get_parameter(name).copy_(value)
    return site


def res_transposed(columns: Tensor, n: int) -> Tensor:
    """(..., n^2 + 2n) with the columns of H_res[out, in] where those of H_res[in, out] were."""
    pre, post, res = split(columns, n)
    return torch.cat([pre, post, res.mT.flatten(-2)], dim=-1)


# -- transformers ----------------------------------------------------------------------------------------------------


def deepseek(n: int, iterations: int, eps: float) -> tuple[torch.nn.Module, torch.nn.Module, type]:
    """Two of transformers' sites, as one of its layers has, with random parameters; and the layer's class."""
    modeling = pytest.importorskip(
        "transformers.models.deepseek_v4.modeling_deepseek_v4", reason="this transformers has no DeepSeek-V4"
    )
    config = modeling.DeepseekV4Config(
        hidden_size=WIDTH, hc_mult=n, hc_sinkhorn_iters=iterations, hc_eps=eps, rms_norm_eps=EPS_NORM
    )
    sites = [modeling.DeepseekV4HyperConnection(config) for _ in range(2)]
    with torch.no_grad():
        for seed, site in enumerate(sites):
            site.fn.copy_(0.3 * gaussian(*site.fn.shape, seed=10 * seed))
            site.base.copy_(gaussian(*site.base.shape, seed=10 * seed + 1))
            site.scale.copy_(torch.tensor([0.7, -0.4, 1.3]))
    return *sites, modeling.DeepseekV4DecoderLayer


def blocks() -> tuple[Tensor, Tensor]:
    """The weights of two blocks."""
    return gaussian(WIDTH, WIDTH, seed=5) / WIDTH**0.5, gaussian(WIDTH, WIDTH, seed=6) / WIDTH**0.5


def two_site_layer(layer_class: type, first: torch.nn.Module, second: torch.nn.Module) -> torch.nn.Module:
    """transformers' decoder layer with plain blocks in it: its forward says how the streams are written."""
    attention, mlp = blocks()

    class Layer(layer_class):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.attn_hc, self.ffn_hc = first, second
            self.input_layernorm, self.post_attention_layernorm = torch.tanh, torch.sigmoid
            self.self_attn = lambda x, **kwargs: (F.linear(x, attention), None)
            self.mlp = lambda x, input_ids: F.linear(x, mlp)

    return Layer()


@pytest.mark.parametrize(
    "connection,eps",
    [("deepseek_v4", 1e-6), ("deepseek_v4", 1e-2), ("mhc", 0.0)],
    ids=["its order", "its order, and an epsilon that counts", "mhc transposed"],
)
@pytest.mark.parametrize("n,iterations", [(4, 20), (4, 1), (3, 5), (2, 20)])
def test_deepseek_v4(monkeypatch: pytest.MonkeyPatch, connection: str, eps: float, n: int, iterations: int) -> None:
    """A layer of two sites, in transformers' own forward, values and gradients."""
    monkeypatch.setitem(KINDS, "deepseek_v4", dataclasses.replace(KINDS["deepseek_v4"], eps=eps))
    first, second, layer_class = deepseek(n, iterations, eps)
    theirs = gaussian(*TOKENS, n, WIDTH, seed=7).requires_grad_()
    want = two_site_layer(layer_class, first, second)(theirs)

    mine = theirs.detach().clone().requires_grad_()
    arrange = (lambda columns: columns) if connection == "deepseek_v4" else (lambda columns: res_transposed(columns, n))
    sites = [new_site(connection, n, iterations, arrange(s.fn.T), s.scale, arrange(s.base)) for s in (first, second)]
    X = mine
    for site, norm, weight in zip(sites, (torch.tanh, torch.sigmoid), blocks()):
        u, mix = site.pre(X)
        X = site.post(X, F.linear(norm(u), weight), mix)
    assert relative(X, want) < CLOSE

    weight = gaussian(*want.shape, seed=8)
    (weight * want).sum().backward()
    (weight * X).sum().backward()
    assert relative(mine.grad, theirs.grad) < 2 * CLOSE
    for site, other in zip(sites, (first, second)):
        assert relative(site.phi.grad, arrange(other.fn.grad.T)) < 10 * CLOSE
        assert relative(site.alpha.grad, other.scale.grad) < 10 * CLOSE
        assert relative(site.bias.grad, arrange(other.base.grad)) < 10 * CLOSE


@pytest.mark.parametrize("change", ["order", "contraction", "epsilon", "iterations"])
def test_deepseek_v4_differs_otherwise(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """The comparison sees each thing that distinguishes the two."""
    eps = {"order": 0.0, "epsilon": 1e-2}.get(change, 1e-6)
    theirs = deepseek(4, 3 if change == "iterations" else 20, eps)[0]
    with torch.no_grad():
        theirs.base.mul_(3)  # far from converged
    monkeypatch.setitem(
        KINDS, "deepseek_v4", dataclasses.replace(KINDS["deepseek_v4"], transposed=change != "contraction")
    )
    connection = "mhc" if change == "order" else "deepseek_v4"
    site = new_site(connection, 4, 20, theirs.fn.T, theirs.scale, theirs.base)
    X = gaussian(*TOKENS, 4, WIDTH, seed=7)
    post, comb, _ = theirs(X)
    assert relative(site.coefficients(X).post, post) < CLOSE
    assert relative(site.coefficients(X).res, comb.mT) > 1e-4


# -- Liger -----------------------------------------------------------------------------------------------------------

# Its kernels are Triton's: in a process of their own they run interpreted, on any machine, in true fp32.
LIGER = """
import sys, torch
from liger_kernel.transformers import LigerMHC
results = []
for case in torch.load(sys.argv[1]):
    X, n = case["X"].requires_grad_(), case["X"].shape[-2]
    block = torch.nn.Linear(X.shape[-1], X.shape[-1], bias=False)
    site = LigerMHC(block, hc=n, c=X.shape[-1], tmax=20, rms_eps=case["eps_norm"], sinkhorn_eps=0.0,
                    phi_dtype=torch.float32, allow_fp32=True)
    alphas = site.alpha_pre, site.alpha_post, site.alpha_res
    with torch.no_grad():
        block.weight.copy_(case["weight"]), site.phi.copy_(case["phi"]), site.b.copy_(case["bias"])
        for alpha, value in zip(alphas, case["alpha"]):
            alpha.copy_(value)
    new = site(X)
    (case["loss"] * new).sum().backward()
    results.append({"new": new.detach(), "X": X.grad, "phi": site.phi.grad, "bias": site.b.grad,
                    "alpha": torch.stack([alpha.grad for alpha in alphas])})
torch.save(results, sys.argv[2])
"""


def liger_case(spread: float) -> dict[str, Any]:
    """Parameters, state and loss; logits of H_res with about this standard deviation."""
    n, k = 4, 24
    return {
        "X": gaussian(*TOKENS, n, WIDTH, seed=1), "weight": blocks()[0], "loss": gaussian(*TOKENS, n, WIDTH, seed=2),
        "phi": 0.3 * spread * gaussian(n * WIDTH, k, seed=3), "alpha": torch.tensor([0.7, -0.4, 0.3]),
        "bias": spread * gaussian(k, seed=4), "eps_norm": EPS_NORM,
    }  # fmt: skip


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """What Liger makes of a case whose logits are small, and of one where 20 iterations are far from converged."""
    pytest.importorskip("liger_kernel", reason="liger-kernel, of the extra `peers`, needs Triton")
    folder: Path = tmp_path_factory.mktemp("liger")
    cases = {"small": liger_case(0.3), "large": liger_case(2.0)}
    torch.save(list(cases.values()), folder / "cases.pt")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIGER, str(folder / "cases.pt"), str(folder / "results.pt")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}, check=True, timeout=300,
    )  # fmt: skip
    return dict(zip(cases, zip(cases.values(), torch.load(folder / "results.pt"))))


def site_of(case: dict[str, Any], connection: str, transposed: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The gradients of a case, and the new state, by a site of the package.

    `transposed`: theirs is SK(A^T)^T, so the mhc site gets A^T, and its H_res is transposed.
    """
    n = case["X"].shape[-2]
    arrange = (lambda columns: res_transposed(columns, n)) if transposed else (lambda columns: columns)
    site = new_site(connection, n, 20, arrange(case["phi"]), case["alpha"], arrange(case["bias"]))
    X = case["X"].detach().clone().requires_grad_()
    u, mix = site.pre(X)
    mix = mix._replace(res=mix.res.mT) if transposed else mix
    new = site.post(X, F.linear(u, case["weight"]), mix)
    (case["loss"] * new).sum().backward()
    grads = {"X": X.grad, "phi": arrange(site.phi.grad), "bias": arrange(site.bias.grad), "alpha": site.alpha.grad}
    return grads, new


@pytest.mark.parametrize(
    "connection,name,gradients",
    [
        ("mhc", "small", 1e-4),  # where both orders have converged; 20 iterations' gradients have a little less
        ("mhc transposed", "large", 10 * CLOSE),
    ],
    ids=["mhc, converged", "mhc transposed"],
)
def test_liger(liger: Any, connection: str, name: str, gradients: float) -> None:
    case, want = liger[name]
    grads, new = site_of(case, connection.split()[0], transposed="transposed" in connection)
    assert relative(new, want["new"]) < CLOSE
    for leaf, grad in grads.items():
        assert relative(grad, want[leaf]) < (2 * CLOSE if leaf == "X" else gradients), leaf


def test_liger_differs_in_order(liger: Any) -> None:
    """Where 20 iterations have not converged, rows first and columns first are not the same."""
    case, want = liger["large"]
    assert relative(site_of(case, "mhc", transposed=False)[1], want["new"]) > 1e-4

"""One site against implementations that other projects publish: transformers' DeepSeek-V4 and Liger's mHC.

Both normalise rows first and columns last, DeepSeek-V4 contracts the first index of what comes out, and each has
epsilons of its own. A `Connection` says all that in a few lines, from the package's own parts. And since
(row, column) passes on A are (column, row) passes on its transpose, the `mhc` connection is compared as it is, too:
with the columns of phi and bias that make H_res transposed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mhc_rewrite import HyperConnection, MHCConfig
from mhc_rewrite.connections import CONNECTIONS, Coefficients, Connection
from mhc_rewrite.connections.base import split
from mhc_rewrite.connections.mhc import MHC
from mhc_rewrite.kernels import reference

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


def columns_last(eps: float, transposed: bool) -> Connection:
    """Rows first, columns last, each sum with an epsilon; `transposed`: contracts the first index.

    Args:
        eps: added to H_pre, after the first softmax, and to every sum that follows.
    """

    def coefficients(
        streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, sinkhorn_iterations: int, eps_norm: float
    ) -> Coefficients:
        n = streams.shape[-2]
        raw, shift = split(reference.project(streams, phi, eps_norm), n), split(bias, n)
        res = torch.softmax(alpha[2] * raw.res + shift.res, dim=-1) + eps
        res = res / (res.sum(dim=-2, keepdim=True) + eps)
        for _ in range(sinkhorn_iterations - 1):
            res = res / (res.sum(dim=-1, keepdim=True) + eps)
            res = res / (res.sum(dim=-2, keepdim=True) + eps)
        return Coefficients(
            pre=torch.sigmoid(alpha[0] * raw.pre + shift.pre) + eps,
            post=2 * torch.sigmoid(alpha[1] * raw.post + shift.post),
            res=res.mT if transposed else res,
        )

    return Connection(MHC.phi_shape, MHC.preserve, MHC.paper, coefficients, "defined in this test")


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


@pytest.mark.parametrize(
    "connection,eps",
    [("deepseek_v4", 1e-6), ("deepseek_v4", 1e-2), ("mhc", 0.0)],
    ids=["its order", "its order, and an epsilon that counts", "mhc transposed"],
)
@pytest.mark.parametrize("n,iterations", [(4, 20), (4, 1), (3, 5), (2, 20)])
def test_deepseek_v4(monkeypatch: pytest.MonkeyPatch, connection: str, eps: float, n: int, iterations: int) -> None:
    """A layer of two sites, in transformers' own forward, values and gradients."""
    monkeypatch.setitem(CONNECTIONS, "deepseek_v4", columns_last(eps, transposed=True))
    first, second, layer_class = deepseek(n, iterations, eps)
    attention, mlp = blocks()
    theirs = gaussian(*TOKENS, n, WIDTH, seed=7).requires_grad_()
    layer = SimpleNamespace(
        attn_hc=first, ffn_hc=second,
        input_layernorm=torch.tanh, self_attn=lambda x, **kwargs: (F.linear(x, attention), None),
        post_attention_layernorm=torch.sigmoid, mlp=lambda x, input_ids: F.linear(x, mlp),
    )  # fmt: skip
    want = layer_class.forward(layer, theirs)

    mine = theirs.detach().clone().requires_grad_()
    arrange = (lambda columns: columns) if connection == "deepseek_v4" else (lambda columns: res_transposed(columns, n))
    sites = [new_site(connection, n, iterations, arrange(s.fn.T), s.scale, arrange(s.base)) for s in (first, second)]
    X = mine
    for site, norm, weight in zip(sites, (torch.tanh, torch.sigmoid), (attention, mlp)):
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
    n, iterations = 4, 3 if change == "iterations" else 20
    eps = 1e-2 if change == "epsilon" else 1e-6
    used = columns_last(1e-6, transposed=change != "contraction")
    monkeypatch.setitem(CONNECTIONS, "deepseek_v4", used)
    theirs = deepseek(n, iterations, eps)[0]
    with torch.no_grad():
        theirs.base.mul_(3)  # far from converged
    connection = "mhc" if change == "order" else "deepseek_v4"
    arrange = (lambda c: res_transposed(c, n)) if change == "order" else (lambda c: c)
    site = new_site(connection, n, 20, theirs.fn.T, theirs.scale, theirs.base)
    X = gaussian(*TOKENS, n, WIDTH, seed=7)
    post, comb, _ = theirs(X)
    assert relative(site.coefficients(X).res, comb.mT) > 1e-4
    if change == "order":  # and only because of the order
        site = new_site(connection, n, 20, arrange(theirs.fn.T), theirs.scale, arrange(theirs.base))
        assert relative(site.coefficients(X).res, comb.mT) < 1e-4
        assert relative(site.coefficients(X).post, post) < CLOSE


# -- Liger -----------------------------------------------------------------------------------------------------------

# Its kernels are Triton's: in a process of their own they run interpreted, on any machine, in true fp32.
LIGER = """
import sys, torch
from liger_kernel.transformers import LigerMHC
case = torch.load(sys.argv[1])
block = torch.nn.Linear(*case["weight"].shape[::-1], bias=False)
n = case["X"].shape[-2]
site = LigerMHC(block, hc=n, c=case["X"].shape[-1], tmax=case["iterations"], rms_eps=case["eps_norm"],
                sinkhorn_eps=0.0, phi_dtype=torch.float32, allow_fp32=True)
with torch.no_grad():
    block.weight.copy_(case["weight"]), site.phi.copy_(case["phi"]), site.b.copy_(case["bias"])
    for alpha, value in zip((site.alpha_pre, site.alpha_post, site.alpha_res), case["alpha"]):
        alpha.copy_(value)
X = case["X"].requires_grad_()
new = site(X)
(case["loss"] * new).sum().backward()
alpha = torch.stack([site.alpha_pre.grad, site.alpha_post.grad, site.alpha_res.grad])
torch.save({"new": new.detach(), "X": X.grad, "phi": site.phi.grad, "bias": site.b.grad, "alpha": alpha}, sys.argv[2])
"""


@pytest.mark.parametrize(
    "connection,spread",
    [("mhc", 0.3), ("columns_last", 1.0), ("mhc transposed", 1.0)],
    ids=["where both orders have converged", "its order", "mhc transposed"],
)
def test_liger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, connection: str, spread: float) -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed: pip install --no-deps liger-kernel")
    n, iterations = 4, 20
    k = n * n + 2 * n
    case = {
        "X": gaussian(*TOKENS, n, WIDTH, seed=1), "weight": blocks()[0], "loss": gaussian(*TOKENS, n, WIDTH, seed=2),
        "phi": 0.3 * spread * gaussian(n * WIDTH, k, seed=3), "alpha": torch.tensor([0.7, -0.4, 0.3]),
        "bias": spread * gaussian(k, seed=4), "iterations": iterations, "eps_norm": EPS_NORM,
    }  # fmt: skip
    torch.save(case, tmp_path / "case.pt")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIGER, str(tmp_path / "case.pt"), str(tmp_path / "result.pt")],
        env=environment, check=True, timeout=300,
    )  # fmt: skip
    want = torch.load(tmp_path / "result.pt")

    if connection == "mhc transposed":
        # H_res = SK(A): theirs is SK(A^T)^T, so the transposed parameters give the transposed matrix.
        site = new_site("mhc", n, iterations, res_transposed(case["phi"], n), case["alpha"], res_transposed(case["bias"], n))
    else:
        monkeypatch.setitem(CONNECTIONS, "columns_last", columns_last(0.0, transposed=False))
        site = new_site(connection, n, iterations, case["phi"], case["alpha"], case["bias"])
    X = case["X"].clone().requires_grad_()
    u, mix = site.pre(X)
    mix = mix._replace(res=mix.res.mT) if connection == "mhc transposed" else mix
    new = site.post(X, F.linear(u, case["weight"]), mix)
    (case["loss"] * new).sum().backward()
    back = (lambda columns: res_transposed(columns, n)) if connection == "mhc transposed" else (lambda columns: columns)
    assert relative(new, want["new"]) < CLOSE
    assert relative(X.grad, want["X"]) < 2 * CLOSE
    for name in ("phi", "alpha", "bias"):
        # Where both have converged, the gradients of 20 iterations still differ by a little more than rounding.
        assert relative(back(site.get_parameter(name).grad), want[name]) < (1e-4 if connection == "mhc" else 10 * CLOSE)

"""What is measured is what was asked for; the seconds themselves are no test's business."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import HyperConnection, MHCConfig, mhcify, plan
from mhc_rewrite.cost import cost
from mhc_rewrite.errors import PeerError
from mhc_rewrite.insight.bench import FRESH_MEMORY, Workload, bench, in_a_fresh_process, perturb, ways
from mhc_rewrite.insight.peers import PEERS, HyperConnections, Liger, PeerSite, convert_sites
from mhc_rewrite.kernels import reference

linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the memory of a process is read as Linux gives it"
)


class Layer(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


def load(rows: int = 3, width: int = 8) -> tuple[nn.Module, dict[str, Any]]:
    return Layer(width), {"x": torch.randn(rows, width)}


def test_rows() -> None:
    told: list[str] = []
    measured = bench(Workload(load), backends=["eager", "aot_eager"], rounds=1, fresh=False, progress=told.append)
    rows = [(one.model, one.backend) for one in measured]
    assert rows == [(m, b) for m in ("original", "converted") for b in ("eager", "aot_eager")]
    assert all(one.seconds > 0 and one.ratio > 0 for one in measured)
    assert [one.ratio for one in measured[:2]] == [1.0, 1.0]
    assert all((one.launches, one.compilation, one.kept, one.peak) == (None,) * 4 for one in measured)
    assert told[0] == "original, eager: first step" and told[-1] == "round 3 of 3"


def test_ways() -> None:
    assert ways(["eager", "mhc", "inductor"], ["peer"]) == [
        ("original", "eager"), ("original", "inductor"),
        ("converted", "eager"), ("converted", "mhc"), ("converted", "inductor"),
        ("peer", "eager"), ("peer", "inductor"),
    ]  # fmt: skip


def test_the_loaded_model_stays_as_it_is() -> None:
    model, inputs = load()
    before = copy.deepcopy(model.state_dict())
    bench(Workload(lambda: (model, inputs)), backends=["eager"], rounds=1, fresh=False)
    assert type(model) is Layer and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_mode_and_autocast_reach_the_forward(
    training: bool, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[torch.dtype, bool]] = set()

    def convert(*args: Any, **kwargs: Any) -> nn.Module:
        model = mhcify(*args, **kwargs)
        seen.clear()  # what the conversion ran
        return model

    monkeypatch.setattr("mhc_rewrite.insight.bench.mhcify", convert)

    class Watching(Layer):
        def forward(self, x: Tensor) -> Tensor:
            x = x + self.a(x)
            out = self.b(x)
            seen.add((out.dtype, torch.is_grad_enabled()))
            return x + out

    workload = Workload(lambda: (Watching(), load()[1]), training=training, autocast=autocast)
    bench(workload, backends=["eager"], rounds=1, fresh=False)
    assert ((autocast or torch.float32, True) in seen) == training
    assert ((autocast or torch.float32, False) in seen) != training


def test_perturb_moves_every_site_parameter_and_no_other() -> None:
    model = mhcify(*load(), config=MHCConfig(n_streams=2))
    before = copy.deepcopy(model.state_dict())
    perturb(model)
    own = {f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, HyperConnection) for p in m._parameters}
    assert {key for key, value in model.state_dict().items() if not torch.equal(before[key], value)} == own
    assert len(own) == 6


# Fresh processes ------------------------------------------------------------------------------------------------------


@linux
@pytest.mark.slow
def test_memory_of_a_step() -> None:
    """Two sums of 32 MB are kept: what the second linear reads, and the output y, which the loss's square reads.

    At most there are four more, in the square's gradient g * (2 * y ** 1): g, y ** 1, its double, and the product.
    """
    rows, width = 2**13, 2**10
    before = dict(os.environ)
    figures = in_a_fresh_process(Workload(functools.partial(load, rows, width)), "original", "eager")
    assert dict(os.environ) == before and not set(FRESH_MEMORY) & set(before)
    size = 4 * rows * width
    assert figures["compilation"] is None and figures["kept"] == pytest.approx(2 * size, rel=0.05)
    assert figures["peak"] == pytest.approx(6 * size, rel=0.02)


def load_with_cold_caches() -> tuple[nn.Module, dict[str, Any]]:
    assert os.listdir(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == []
    return load()


@pytest.mark.slow
@pytest.mark.long
def test_compilation_starts_without_caches() -> None:
    workload = Workload(load_with_cold_caches, training=False)
    for _ in range(2):
        assert in_a_fresh_process(workload, "converted", "mhc")["compilation"] > 0


def test_an_error_in_a_fresh_process_is_the_caller_s() -> None:
    with pytest.raises(PeerError, match="There is no peer 'other'"):
        in_a_fresh_process(Workload(load), "other", "eager")


@linux
@pytest.mark.slow
@pytest.mark.long
def test_peak_memory_is_the_cost_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak over the original's, 24 sites, with and without recomputation: within 10 %."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "demos"))
    gpt = functools.partial(importlib.import_module("compile_and_bench").load, 12, 384, 512)
    of, tokens = cost(plan(*gpt())), 2 * 512
    original = in_a_fresh_process(Workload(gpt), "original", "eager")["peak"]
    for recompute, formula in ((None, of.peak), ("auto", of.peak_in_segments)):
        workload = Workload(gpt, MHCConfig(recompute=recompute))
        ratio = in_a_fresh_process(workload, "converted", "eager")["peak"] / original
        expected = 1 + of.evaluate(formula, tokens=tokens) / original
        assert ratio == pytest.approx(expected, rel=0.1) and expected > 1.2, recompute


# Peers ----------------------------------------------------------------------------------------------------------------


def test_peers_sites_take_over() -> None:
    pytest.importorskip("hyper_connections", reason="hyper-connections needs the extra `peers`")
    model, inputs = load()
    mhcify(model, inputs)
    convert_sites(model, "hyper-connections")
    assert not any(isinstance(m, HyperConnection) for m in model.modules())
    sites = [m for m in model.modules() if isinstance(m, HyperConnections)]
    out = model(**inputs)
    out.sum().backward()
    assert len(sites) == 2 and out.shape == (3, 8)
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for s in sites for p in (s.inner.static_alpha,))


def test_a_peer_runs_pre_and_post_at_a_boundary() -> None:
    calls: list[str] = []

    class Plain(PeerSite):
        module, package = "torch", "torch"

        def pre(self, streams: Tensor) -> tuple[Tensor, Any]:
            calls.append("pre")
            return self._all(streams).mean(-2), None

        def post(self, streams: Tensor, branch: Tensor, mix: Any) -> Tensor:
            calls.append("post")
            return self._all(streams) + branch.unsqueeze(-2)

    model, inputs = load()
    want = model(**inputs)
    mhcify(model, inputs)
    PEERS["plain"] = Plain
    try:
        convert_sites(model, "plain")
    finally:
        del PEERS["plain"]
    torch.testing.assert_close(model(**inputs), want)
    assert calls == ["pre", "post", "pre", "post"]


def test_liger_is_called_as_its_kernels_are_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of its functions on the reference: what is converted computes the same."""

    def coefficients(X: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor, tmax: int, rms_eps: float, **_: Any) -> Any:
        raw, _ = reference.project(X, phi, "mhc", rms_eps)
        return reference.coefficients(raw, torch.stack(alphas), bias, "mhc", tmax)

    functional = types.ModuleType(Liger.module)
    functional.liger_mhc_coeffs = coefficients  # type: ignore[attr-defined]
    functional.liger_mhc_pre = lambda X, h: (h.unsqueeze(-1) * X).sum(-2)  # type: ignore[attr-defined]
    functional.liger_mhc_post_res = (  # type: ignore[attr-defined]
        lambda X, y, h_post, h_res: h_res @ X + h_post.unsqueeze(-1) * y.unsqueeze(-2)
    )
    for module in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, Liger.module, functional)
    monkeypatch.setattr(Liger, "devices", ("cpu",))
    model, inputs = load()
    mhcify(model, inputs)
    perturb(model, 0.3)
    want = model(**inputs)
    convert_sites(model, "liger-kernel")
    torch.testing.assert_close(model(**inputs), want)


def test_a_peer_that_can_t_run_says_why() -> None:
    model, inputs = load()
    mhcify(model, inputs)
    with pytest.raises(PeerError, match="liger-kernel: it runs on cuda only"):
        convert_sites(model, "liger-kernel")
    assert sum(isinstance(m, HyperConnection) for m in model.modules()) == 2

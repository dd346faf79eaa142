"""The backend "mhc": what reaches AOTAutograd, and that what comes out computes what the model does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_rewrite
from family import relative
from handmade.common import PreNorm, Stack, features
from mhc_rewrite import lowering, mhcify
from mhc_rewrite.errors import ConfigError
from oracle import perturb


def converted(layers: int = 2, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    """Pre-norm layers on four streams, two sites a layer, parameters of the sites drawn anew."""
    torch.manual_seed(0)
    model = Stack([PreNorm(dropout=dropout) for _ in range(layers)]).to(dtype)
    mhcify(model, (features(2, 5, 16).to(dtype),))
    perturb(model)
    return model


def inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(batch)
    return features(batch, 5, 16).to(dtype)


def step(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = run(x)
    torch.manual_seed(0)
    (out * torch.randn_like(out)).sum().backward()
    return [out.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]  # type: ignore[list-item]


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    """Largest error, relative to the tensor's largest element or a thousandth of the largest of all."""
    floor = 1e-3 * max(float(t.abs().max()) for t in want)
    return max(float((a - b).abs().max()) / max(float(b.abs().max()), floor) for a, b in zip(got, want))


@pytest.fixture
def reached(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Inductor would have got, in its place: (mode, options, graph)."""
    found: list[Any] = []

    def inductor(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
        def run(graph_module: torch.fx.GraphModule, _: Any) -> Any:
            found.append((mode, options, graph_module))
            return graph_module.forward

        return run

    monkeypatch.setattr(lowering, "inductor", inductor)
    torch._dynamo.reset()
    return found


def operators(graph_module: torch.fx.GraphModule) -> list[str]:
    return [str(n.target).split(".")[1] for n in graph_module.graph.nodes if "mhc_rewrite." in str(n.target)]


# -- what reaches AOTAutograd ----------------------------------------------------------------------------------------


def test_boundaries_reach_aotautograd(reached: list[Any]) -> None:
    model = converted(layers=3)
    mhc_rewrite.compile(model, fullgraph=True)(inputs())
    ((_, _, graph_module),) = reached
    assert operators(graph_module) == ["pre", *["boundary"] * 5, "post_collapse"]


def test_one_graph_for_every_batch(reached: list[Any]) -> None:
    model = converted()
    compiled = mhc_rewrite.compile(model, dynamic=True)
    for batch in (2, 3, 5):
        assert relative(compiled(inputs(batch)), model(inputs(batch))) <= 1e-5
    assert len(reached) == 1 and operators(reached[0][2]).count("boundary") == 3


def test_options_reach_inductor(reached: list[Any]) -> None:
    model = converted()
    mhc_rewrite.compile(model, mode="reduce-overhead")(inputs())
    mhc_rewrite.compile(model, options={"epilogue_fusion": False, "recompute": None})(inputs())
    assert [(mode, options) for mode, options, _ in reached] == [
        ("reduce-overhead", {}),
        (None, {"epilogue_fusion": False}),
    ]


def test_unknown_options_are_inductors_error() -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="Unexpected optimization option no_such_option"):
        mhc_rewrite.compile(converted(), options={"no_such_option": 1})(inputs())


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "some"])
def test_wrong_recompute(value: Any) -> None:
    with pytest.raises(ConfigError, match=r'a number of sites from 1 on, "auto" or None, not'):
        mhc_rewrite.compile(converted(), options={"recompute": value})


def test_the_name_works_without_an_import() -> None:
    """Needs an installation that is as new as the entry point."""
    code = "import torch, sys; torch._dynamo.lookup_backend('mhc'); assert 'mhc_rewrite.lowering' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dtype,layers,close", [(torch.float32, 2, 1e-3), (torch.float64, 1, 1e-11)], ids=str)
def test_equals_eager(dtype: torch.dtype, layers: int, close: float, training: bool) -> None:
    model = converted(layers, dtype, dropout=0.0 if training else 0.3).train(training)
    torch._dynamo.reset()
    compiled = mhc_rewrite.compile(model, fullgraph=True)
    want = step(model, model, inputs(dtype=dtype))
    assert worst(step(model, compiled, inputs(dtype=dtype)), want) <= close


@pytest.mark.slow
def test_free_batch_equals_eager() -> None:
    model = converted()
    torch._dynamo.reset()
    compiled = mhc_rewrite.compile(model, dynamic=True)
    for batch in (2, 3):
        assert worst(step(model, compiled, inputs(batch)), step(model, model, inputs(batch))) <= 1e-3


@pytest.mark.slow
def test_without_gradients_equals_eager() -> None:
    model = converted().eval()
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative(mhc_rewrite.compile(model)(inputs()), model(inputs())) <= 1e-5

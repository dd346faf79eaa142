"""Kinds of calls that no eager call has shown, compiled: layers one by one, sizes that decide, numbers that change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from mhc_rewrite import mhcify
from mhc_rewrite.sites.state import is_state

WIDTH = 16


class Layer(nn.Module):
    """What it does depends on what it is asked for, on how long the trunk is, and on a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.factor = 1.0

    def forward(self, x: Tensor, gain: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = self.mixer(self.norm(x)).tanh() * scale * self.factor
        y = y.flip(1) if x.shape[1] > 6 else y
        x = x + (y if gain is None else y * gain)
        return x + self.mlp(self.norm(x)).tanh()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **options)
        return x


CALLS: dict[str, dict[str, Any]] = {
    "number": {"scale": 0.5},
    "tensor": {"gain": torch.linspace(0.5, 2.0, WIDTH)},
    "both": {"scale": 0.25, "gain": torch.linspace(0.5, 2.0, WIDTH)},
}


def build(training: bool = False) -> tuple[nn.Module, nn.Module]:
    """A converted model with perturbed sites that has seen plain calls alone, and a copy that stays eager."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mhcify(Net(), (torch.randn(2, 5, WIDTH),)).train(training)
    oracle.perturb(model)
    return model, copy.deepcopy(model)


def check(run: Any, model: nn.Module, eager: nn.Module, length: int = 5, **options: Any) -> None:
    """Values and gradients of the compiled call are the eager model's."""
    x = torch.randn(2, length, WIDTH)
    seen = []
    for call, owner in ((run, model), (eager, eager)):
        owner.zero_grad()
        given = x.clone().requires_grad_()
        result = call(given, **options)
        assert not is_state(result)
        result.square().sum().backward()
        seen.append((result.detach(), given.grad, [p.grad for p in owner.parameters()]))
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", (False, True))
@pytest.mark.parametrize("name", CALLS)
def test_layers_compiled_one_by_one(name: str, training: bool) -> None:
    """Streams come into each frame from outside it."""
    model, eager = build(training)
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for length in (5, 4):
        check(model, model, eager, length, **CALLS[name])
    assert not torch.allclose(eager(x := torch.randn(2, 5, WIDTH)), eager(x, **CALLS[name]), atol=1e-3)


@pytest.mark.parametrize("dynamic", (None, True))
@pytest.mark.parametrize("name", CALLS)
def test_sizes_that_decide_are_guarded(name: str, dynamic: bool | None) -> None:
    model, eager = build()
    run = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 6, 8, 4, 9):
        check(run, model, eager, length, **CALLS[name])


def test_a_number_that_changes_is_seen() -> None:
    model, eager = build()
    run = torch.compile(model, backend="eager", fullgraph=True)
    for factor in (1.0, 0.5, 1.0, 2.0):
        for each in (model, eager):
            each.layers[1].factor = factor
        check(run, model, eager, scale=0.5)


def test_another_precision() -> None:
    model, eager = build()
    run = torch.compile(model, backend="eager", fullgraph=True)
    check(run, model, eager, scale=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 5, WIDTH)
        torch.testing.assert_close(run(x, scale=0.5), eager(x, scale=0.5), rtol=2e-2, atol=2e-2)
    for each in (model, eager):
        each.bfloat16()
    x = torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)
    torch.testing.assert_close(run(x, scale=0.5), eager(x, scale=0.5), rtol=2e-2, atol=2e-2)


def test_state_of_the_model_stays() -> None:
    """A capture while Dynamo traces leaves random state, modes and hooks as they were."""
    model, _ = build(training=True)
    calls: list[int] = []
    model.layers[0].mixer.register_forward_hook(lambda *_: calls.append(1))
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    torch.compile(model, backend="eager")(torch.ones(2, 5, WIDTH), scale=0.5)
    assert torch.equal(before, torch.get_rng_state()) and modes == [module.training for module in model.modules()]
    assert calls == [1], "the call itself, and no capture"
    assert all(p.grad is None for p in model.parameters())

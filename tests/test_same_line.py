"""An add that a conditional expression leads to by two ways is one site, whichever way the example went."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from handmade.common import WIDTH, features
from mhc_rewrite import mhcify
from mhc_rewrite.errors import StreamError
from test_perturbed import relative


def add(x: Tensor, branch: Tensor) -> Tensor:
    return x + branch


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.g = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def first(self, x: Tensor) -> Tensor:
        return self.f(self.norm(x)).tanh()


class Inside(Layer):
    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        return x + (self.g(self.first(x)) if more else self.first(x))


class Turned(Layer):
    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        return (self.g(self.first(x)) if more else self.first(x)) + x


class Called(Layer):
    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        return add(x, self.g(self.first(x)) if more else self.first(x))


class Apart(Layer):
    """Two adds, one for each way."""

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        return x + self.g(self.first(x)) if more else x + self.first(x)


class Stack(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        for layer in self.layers:
            x = layer(x, more)
        return x


def build(kind: Any, example: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    original = Stack(kind).double()
    model = Stack(kind).double()
    model.load_state_dict(original.state_dict())
    x = features(2, 5, WIDTH)
    model = mhcify(model, (x, example))
    oracle.perturb(model)
    return original, model, x


@pytest.mark.skipif(
    not hasattr(types.CodeType, "co_positions"),
    reason="Python 3.10 makes an add of each way through its line, and nothing tells that they are one",
)
@pytest.mark.parametrize("example", (False, True))
@pytest.mark.parametrize("kind", (Inside, Turned, Called))
def test_the_way_that_the_example_did_not_go(kind: Any, example: bool) -> None:
    original, model, x = build(kind, example)
    hand = oracle.Streams(dict(model.named_parameters()), 4)
    for more in (example, not example):
        X = hand.expand(x)
        for i, layer in enumerate(original.layers):
            branch = (lambda u, layer=layer: layer.g(layer.first(u))) if more else layer.first
            X = hand.site(f"layers.{i}.mhc_0", X, branch)
        assert relative(model(x, more), hand.collapse(X)) < 1e-9
        model.zero_grad()
        model(x, more).square().sum().backward()
        own = {name: p.grad for name, p in model.named_parameters() if "mhc" in name}
        model.zero_grad()
        hand.collapse(X).square().sum().backward()
        for name, parameter in model.named_parameters():
            if "mhc" in name:
                torch.testing.assert_close(own[name], parameter.grad)


@pytest.mark.parametrize("example", (False, True))
def test_adds_of_one_line_are_told_apart(example: bool) -> None:
    _, model, x = build(Apart, example)
    model(x, example)
    with pytest.raises(StreamError, match="runs residual adds that the example inputs did not"):
        model(x, not example)

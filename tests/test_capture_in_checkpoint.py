"""A call that is new to a converted model, in a checkpoint: its capture is no part of what the checkpoint counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import oracle
from mhc_rewrite import mhcify

WIDTH = 16


def asks_nothing(y: Tensor) -> Tensor:
    return y


def asks(y: Tensor) -> Tensor:
    return y * 2 if torch.is_grad_enabled() else y * 3


def asks_in_a_child(y: Tensor) -> Tensor:
    return Asking()(y)


class Asking(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return asks(y)


class Layer(nn.Module):
    def __init__(self, question: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.question = question

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = x + self.question(self.mixer(self.norm(x)).tanh() * scale)
        return x + self.mlp(self.norm(x)).tanh()


class Net(nn.Module):
    def __init__(self, question: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(question) for _ in range(3)])
        self.around: Callable[..., Any] = lambda layer, *args: layer(*args)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = self.around(layer, x, scale)
        return x


def build(question: Callable[[Tensor], Tensor], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = mhcify(Net(question), (torch.randn(2, 5, WIDTH),), **options).train()
    oracle.perturb(model)
    return model


def gradients(model: nn.Module, scale: float) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(torch.randn(2, 5, WIDTH), scale).square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("recompute", [None, 2])
@pytest.mark.parametrize("question", [asks_nothing, asks, asks_in_a_child])
def test_gradients(question: Callable[[Tensor], Tensor], recompute: int | None) -> None:
    model = build(question, recompute=recompute)
    plain = copy.deepcopy(model)
    model.around = lambda layer, *args: checkpoint(layer, *args, use_reentrant=False)
    for scale in (0.5, 0.5, 0.25):
        torch.testing.assert_close(gradients(model, scale), gradients(plain, scale))


@pytest.mark.parametrize("question", [asks_nothing, asks, asks_in_a_child])
def test_hooks_for_saved_tensors_see_the_call_alone(question: Callable[[Tensor], Tensor]) -> None:
    model = build(question)
    counts = []
    for _ in range(2):
        seen: list[tuple[int, ...]] = []
        with saved_tensors_hooks(lambda tensor, seen=seen: (seen.append(tuple(tensor.shape)), tensor)[1], lambda t: t):
            model(torch.randn(2, 5, WIDTH), 0.5)
        counts.append(seen)
    assert counts[0] == counts[1] and counts[0]

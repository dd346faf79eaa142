"""What code outside of compiled graphs does to streams between two of them: FSDP's hooks, and those of users."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handmade.common import WIDTH, PreNorm, Stack
from mhc_rewrite import mhcify
from oracle import perturb


class HandsOn(torch.autograd.Function):
    """Returns what it got, as what FSDP puts around a layer's arguments."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(2 * gradient for gradient in gradients)


@torch.compiler.disable
def handed_on(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return HandsOn.apply(*args)


@torch.compiler.disable
@torch.no_grad()
def hooked(layer: nn.Module, args: Any, result: Tensor) -> None:
    result.register_hook(lambda gradient: 3 * gradient)


WAYS: dict[str, Callable[[Any], Any]] = {
    "a function of autograd": lambda layer: layer.register_forward_pre_hook(handed_on),
    "a hook on what comes out": lambda layer: layer.register_forward_hook(hooked),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compiled", ("model", "layers"))
def test_gradients_pass_what_runs_between_graphs(compiled: str, way: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH)
    model: Any = mhcify(Stack([PreNorm() for _ in range(3)]), (x,))
    perturb(model)
    for layer in model.layers:
        WAYS[way](layer)

    def gradients(one: Any, run: Any) -> dict[str, Tensor]:
        (run(x).exp() * torch.arange(WIDTH).cos()).mean().backward()
        return {name: p.grad for name, p in one.named_parameters()}

    other = copy.deepcopy(model)
    want = gradients(model, model)
    torch._dynamo.reset()
    if compiled == "layers":
        for layer in other.layers:
            layer.compile(backend="eager")
    got = gradients(other, torch.compile(other, backend="eager") if compiled == "model" else other)
    for name, its in want.items():
        torch.testing.assert_close(got[name], its, rtol=1e-5, atol=1e-7, msg=name)

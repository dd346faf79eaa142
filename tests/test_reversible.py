"""Layers that run inside an autograd.Function with a backward of its own: refused, with that as the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_rewrite import mhcify, plan
from mhc_rewrite.errors import CaptureError

WIDTH = 8


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + self.f(b)
        return a, b + self.g(a)


class Quiet(Layer):
    """As Reformer's, whose forward runs without gradients by itself."""

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return super().forward(a, b)


def undone(block: nn.Module, inner: Tensor, outer: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What came in of `outer + block(inner)`, and the gradient of `inner`."""
    with torch.enable_grad():
        inner = inner.detach().requires_grad_()
        result = block(inner)
        result.backward(gradient)
    assert inner.grad is not None
    return outer - result.detach(), inner.grad


class Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: Any) -> Tensor:  # type: ignore[override]
        a, b = x.chunk(2, -1)
        for layer in layers:
            a, b = layer(a, b)
        ctx.layers = layers
        ctx.save_for_backward(a.detach(), b.detach())
        return torch.cat([a, b], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        a, b = ctx.saved_tensors
        of_a, of_b = gradient.chunk(2, -1)
        for layer in reversed(ctx.layers):
            b, more = undone(layer.g, a, b, of_b)
            of_a = of_a + more
            a, more = undone(layer.f, b, a, of_a)
            of_b = of_b + more
        return torch.cat([of_a, of_b], -1), None


class Model(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return Reversible.apply(x, self.layers)  # type: ignore[no-any-return, no-untyped-call]


class Ordinary(Model):
    """Of the same layers, each in a checkpoint, which is torch's own autograd.Function."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for layer in self.layers:
            a, b = checkpoint(layer, a, b, use_reentrant=True)
        return torch.cat([a, b], -1)


@pytest.mark.parametrize("run", [plan, mhcify])
@pytest.mark.parametrize("kind", [Layer, Quiet])
def test_reversible_layers(kind: type[Layer], run: Any) -> None:
    with pytest.raises(CaptureError, match=r"'layers.0' \((Layer|Quiet)\) is called inside Reversible.*reversible"):
        run(Model(kind), (torch.randn(2, 3, 2 * WIDTH),))


def test_a_checkpoint_is_none() -> None:
    assert plan(Ordinary(Layer), (torch.randn(2, 3, 2 * WIDTH),)).sites

"""Modules that get another class after the conversion, as FSDP and parametrizations give them one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from handmade.common import WIDTH, PreNorm, Stack
from mhc_rewrite import mhcify, unmhcify
from oracle import perturb


class Scaled(PreNorm):
    """A layer with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.scale)


def parametrized(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "scale", nn.Tanh())


def timed(layer: Any) -> None:
    class Timed(type(layer)):  # type: ignore[misc]
        calls = 0

        def forward(self, x: Tensor) -> Any:
            Timed.calls += 1
            return super().forward(x)

    layer.__class__ = Timed


@pytest.mark.parametrize("change", [parametrized, timed])
def test_a_later_class_stays(change: Any) -> None:
    torch.manual_seed(0)
    model, x = Stack([Scaled() for _ in range(2)]), torch.randn(2, 3, WIDTH)
    own = type(model.layers[1])
    mhcify(model, (x,))
    for layer in model.layers[:1]:
        change(layer)
    kind, want = type(model.layers[0]), model(x)
    perturb(model)
    changed = model(x)
    assert not torch.allclose(changed, want, atol=1e-3)
    with pytest.warns(UserWarning, match="have learned"):
        unmhcify(model)
    assert type(model.layers[0]) is kind and type(model.layers[1]) is own
    torch.testing.assert_close(model(x), want)

    mhcify(model, (x,))
    torch.testing.assert_close(model(x), want)
    perturb(model)
    torch.testing.assert_close(model(x), changed)
    with pytest.warns(UserWarning, match="have learned"):
        unmhcify(model)
    assert type(model.layers[0]) is kind
    torch.testing.assert_close(model(x), want)

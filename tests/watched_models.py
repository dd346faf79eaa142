"""The models of the tests of watching, and what a step of theirs is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import oracle
from handmade.common import WIDTH, PreNorm, Stack, features
from mhc_rewrite import mhcify, watch


class Checkpointed(Stack):
    """Every layer in a checkpoint, of either kind, or in none."""

    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.norm(x)


def model(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **options: Any) -> Any:
    """In training, its sites perturbed."""
    torch.manual_seed(0)
    stack = Checkpointed([PreNorm(dropout=dropout) for _ in range(3)]).to(dtype)
    converted = mhcify(stack, (features(2, 5, WIDTH).to(dtype),), **options)
    oracle.perturb(converted)
    return converted.train()


X = torch.randn(4, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def loss_of(out: Tensor) -> Tensor:
    """Of what a norm returns neither the mean nor the mean square has gradients to speak of."""
    return (out.float() * torch.arange(out.shape[-1]).cos()).sin().mean()


def line_of(
    converted: Any,
    x: Tensor = X,
    forward: Callable[[Tensor], Tensor] | None = None,
    watched: Any = None,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(2)
    with watch(converted if watched is None else watched, **{"tokens": 1000, **options}) as seen:
        loss = loss_of((converted if forward is None else forward)(x.clone().requires_grad_()))
        loss.backward()
        seen.step(loss)
    assert seen.line is not None
    return seen.line


def agree(line: Any, expected: Any, rel: float = 1e-9, floor: float = 1e-12, where: str = "") -> None:
    """Samples are the same but for numbers, which are nearly."""
    if isinstance(expected, dict):
        assert set(line) == set(expected), where
        for name, value in expected.items():
            agree(line[name], value, rel, floor, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(line) == len(expected), where
        for number, (one, other) in enumerate(zip(line, expected)):
            agree(one, other, rel, floor, f"{where}[{number}]")
    elif isinstance(expected, float) and isinstance(line, float):
        assert line == pytest.approx(expected, rel=rel, abs=floor), where
    else:
        assert line == expected, where

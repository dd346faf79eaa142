"""Statements that only check a tensor's content: a capture goes past them, and past nothing else that asks for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import mhcify, report
from oracle import Streams, perturb, site_names

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class Asserts(Block):
    def forward(self, x: Tensor) -> Tensor:
        assert x.isnan().sum() == 0 and x.abs().max().item() <= 1e9, "not a number"
        return x + self.f(x)


class Raises(Block):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        return x + self.f(x)


def check_finite(cond: Tensor) -> None:
    if not cond.all():
        raise ValueError("not finite")


class CallsACheck(Block):
    def forward(self, x: Tensor) -> Tensor:
        check_finite(torch.isfinite(x))
        return x + self.f(x)


def stack(kind: type[Block]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(3))).double()


X = torch.linspace(-1, 1, 2 * 5 * WIDTH, dtype=torch.float64).view(2, 5, WIDTH).sin()


@pytest.mark.parametrize("kind", [Asserts, Raises, CallsACheck], ids=lambda kind: kind.__name__)
def test_a_check_is_no_branch(kind: type[Block]) -> None:
    model = stack(kind)
    original: Any = copy.deepcopy(model)
    mhcify(model, (X,))
    assert len(report(model).plan.sites) == 3
    perturb(model)
    streams = Streams(dict(model.named_parameters()), 4)
    state = streams.expand(X)
    for name, block in zip(site_names(dict(model.named_parameters())), original, strict=True):
        state = streams.site(name, state, block.f)
    torch.testing.assert_close(model(X), streams.collapse(state), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.train()(X[:1, :3]), model.eval()(X[:1, :3]))

"""A forward that can't be captured, around carriers that can: its own adds are left alone, and theirs are not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import oracle
from handmade.common import WIDTH, PreNorm, features, prenorm_by_hand
from handmade.found import block
from mhc_rewrite import mhcify, plan
from mhc_rewrite.errors import CaptureError


class Gated(nn.Module):
    """Adds something of its own between its layers, and computes a part of it without gradients."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first, self.f = nn.ModuleList(PreNorm() for _ in range(layers)), block()
        self.last = nn.ModuleList(PreNorm() for _ in range(layers))

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.square().mean(-1, keepdim=True)
        return x + scale * self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.first:
            x = layer(x)
        x = self.between(x)
        for layer in self.last:
            x = layer(x)
        return x


class Whole(nn.Module):
    """The same as a part of a model."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.gated = Gated(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.gated(x).tanh()


def by_hand(model: Gated, hand: oracle.Streams, x: Tensor, prefix: str) -> Tensor:
    for name, layers in (("first", model.first), ("last", model.last)):
        X = hand.expand(x)
        for i, layer in enumerate(layers):
            X = prenorm_by_hand(layer, hand, f"{prefix}{name}.{i}", X)
        x = hand.collapse(X)
        x = model.between(x) if name == "first" else x
    return x


@pytest.mark.parametrize("part", (False, True), ids=("the model", "a part of it"))
def test_the_inner_carriers_are_converted(part: bool) -> None:
    torch.manual_seed(0)
    model, x = (Whole(2) if part else Gated(2)).double().eval(), features(2, 5, WIDTH)
    found = plan(model, (x,))
    assert [len(stream.sites) for stream in found.streams] == [4, 4]
    reasons = [r.reason for r in found.rejections if r.rule == "block-not-captured"]
    assert len(reasons) == 1 and "gradients on or off" in reasons[0]
    converted = mhcify(copy.deepcopy(model), (x,))
    torch.testing.assert_close(converted(x), model(x))
    oracle.perturb(converted)
    hand = oracle.Streams(dict(oracle.site_parameters(converted)), 4)
    want = by_hand(model.gated, hand, x, "gated.").tanh() if part else by_hand(model, hand, x, "")
    torch.testing.assert_close(converted(x), want)


def test_without_carriers_inside_it_is_refused() -> None:
    with pytest.raises(CaptureError, match="gradients on or off"):
        mhcify(OnlyOwn().double(), (features(2, 5, WIDTH),))


class OnlyOwn(Gated):
    def __init__(self) -> None:
        super().__init__(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.between(self.between(x))

"""Residuals that were missed once, and what was taken for one: rewritten as by hand, or refused with a reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from golden import WIDTH, Layer, features
from handmade import layouts, missed
from handmade.common import Kind
from mhc_rewrite import mhcify, plan
from mhc_rewrite.errors import NoResidualError
from test_perturbed import check_by_hand


@pytest.mark.parametrize("kind", (*missed.KINDS, *layouts.KINDS), ids=str)
def test_equals_hand_written(kind: Kind) -> None:
    found = plan(kind.model(), kind.arguments())
    assert tuple(tuple(site.name for site in stream.sites) for stream in found.streams) == kind.streams
    assert {site.channel_dim for site in found.sites} == {kind.channel_dim}
    check_by_hand(kind, 4)


@pytest.mark.parametrize("form", ("an image, tokens inside", "channels last"))
def test_a_layout_found_on_one_size_holds_for_others(form: str) -> None:
    """The example is one square image."""
    torch.manual_seed(0)
    model = layouts.Turned(form).double()
    square = torch.randn(1, layouts.WIDTH, 2, 2, dtype=torch.float64)
    converted = mhcify(copy.deepcopy(model), (square,))
    oracle.perturb(converted)
    hand = oracle.Streams(dict(oracle.site_parameters(converted)), 4, channel_dim=1)
    for size in ((2, 2), (2, 5)):
        x = torch.randn(3, layouts.WIDTH, *size, dtype=torch.float64)
        torch.testing.assert_close(converted(x), layouts.by_hand(model, hand, x))


def test_another_size_at_the_end_stays_one() -> None:
    """Height and width are exchanged on the way back, which a square image does not show."""

    def forward(self: Any, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer.conv(x)
            t = x.flatten(2).transpose(1, 2)
            t = t + layer.mlp(layer.norm(t))
            x = t.transpose(1, 2).view(x.shape[0], x.shape[1], x.shape[3], x.shape[2])
        return x

    torch.manual_seed(0)
    model = layouts.Turned("an image, tokens inside").double()
    model.__class__ = type("Exchanging", (layouts.Turned,), {"forward": forward})
    converted = mhcify(copy.deepcopy(model), (torch.randn(2, layouts.WIDTH, 2, 2, dtype=torch.float64),))
    x = torch.randn(2, layouts.WIDTH, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(converted(x), model(x))


def written_elsewhere(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    x[:, :2] = x[:, 1:3] + self.a(x[:, 1:3])  # this: read from other places than it writes to
    return x + self.a(x)


def written_from_another(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    y = x * 2
    x[:, :2] = y[:, :2] + self.a(y[:, :2])  # this: read from another tensor
    return x + self.a(x)


def coded(self: Any, x: Tensor) -> Tensor:
    x = x + self.b(x)
    x = x + self.a(x)
    return x - self.a.weight[(x @ self.a.weight.mT).argmax(-1)]  # this: by a code


NONE = {written_elsewhere: ("one-part", 1), written_from_another: ("one-part", 1), coded: ("discrete", 2)}


@pytest.mark.parametrize("forward", NONE, ids=lambda forward: forward.__name__)
def test_what_is_none(forward: Any) -> None:
    rule, sites = NONE[forward]
    if sites < 2:
        with pytest.raises(NoResidualError, match="single-site"):
            plan(Layer(forward), (features(),))
        return
    found = plan(Layer(forward), (features(),))
    assert len(found.sites) == sites
    assert rule in {r.rule for r in found.rejections if r.source is not None and "# this" in r.source.text}
    model, x = Layer(forward).double(), features().double()
    want = model(x)
    torch.testing.assert_close(mhcify(model, (x,))(x), want)


class Normed(nn.Module):
    """RepVGG's skip: BatchNorm on the trunk, which in training has statistics over everything."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.skip = nn.Conv2d(8, 8, 3, padding=1), norm

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.conv(x)


@pytest.mark.parametrize("size", (4, 64))
def test_statistics_over_everything_end_a_stream(size: int) -> None:
    """Also where so many values take part that those of two streams of one distribution would come out alike."""
    x = (torch.randn(4, 8, size, size),)
    with pytest.raises(NoResidualError):
        plan(nn.Sequential(*(Normed(nn.BatchNorm2d(8)) for _ in range(3))), x)
    assert len(plan(nn.Sequential(*(Normed(nn.GroupNorm(2, 8)) for _ in range(3))), x).sites) == 3


def test_the_nearest_misses_come_first() -> None:
    """What has nothing of a residual, positions and rotations say, is told last."""

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.lin = nn.Parameter(torch.randn(8, 5, WIDTH)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            a = x + self.positions[0]
            b = x + self.positions[1]
            c = a + torch.tanh(a)
            d = b + torch.tanh(b)
            e = c * 2 + self.positions[3]
            f = d * 2 + self.positions[4]
            x = e * f + self.positions[5]
            return x + self.lin(x)

    with pytest.raises(NoResidualError) as refusal:
        plan(Far(), (features(),))
    first = str(refusal.value).splitlines()[1]
    assert "single-site" in first and "return x + self.lin(x)" in first

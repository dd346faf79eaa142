"""Which adds are sites, where their features are, and which add of one call is which of another.

Models of `handmade/found.py`, each against its n-stream counterpart by hand, with every site parameter drawn anew; what
is no residual stream, with the rule; calls that the example did not show.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
from handmade import found, pairs
from handmade.common import WIDTH, Kind, features
from handmade.found import Adds, Layers, Recurrent, ThenRecurrent, block, linear
from mhc_rewrite import mhcify, plan, report
from mhc_rewrite.errors import CaptureError, NoResidualError
from test_perturbed import Compared, check_by_hand, relative

KINDS: tuple[Kind, ...] = (*found.KINDS, *pairs.KINDS)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sites_and_streams(kind: Kind) -> None:
    found = plan(kind.model(), kind.arguments(), **kind.options)
    assert tuple(tuple(site.name for site in stream.sites) for stream in found.streams) == kind.streams
    assert {site.channel_dim for site in found.sites} == {kind.channel_dim}
    assert {site.width for site in found.sites} == {kind.arguments()[0].shape[kind.channel_dim]}
    assert len({(site.holder, site.name) for site in found.sites}) == len(kind.sites())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_hand_written(kind: Kind) -> None:
    check_by_hand(kind, 3)


# -- what is no stream -----------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """`h = step(h, x_t)` over time, with the slices taken in different ways."""

    def __init__(self, cut: Callable[[Any, Tensor], Any], inside: bool = False) -> None:
        super().__init__()
        self.cut, self.inside, self.pre, self.cell = cut, inside, linear(), Cell()

    def forward(self, x: Tensor) -> Tensor:
        h, out = x.new_zeros(x.shape[0], WIDTH), []
        for x_t in self.cut(self, x):
            h = h + torch.tanh(self.cell.f(torch.cat([h, x_t], -1))) if self.inside else self.cell(h, x_t)
            out.append(h)
        return torch.stack(out, 1)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return h + torch.tanh(self.f(torch.cat([h, x], -1)))


CUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "index": lambda self, x: (x[:, t] for t in range(x.shape[1])),
    "unbind": lambda self, x: x.unbind(1),
    "iteration": lambda self, x: iter(x.transpose(0, 1)),
    "select": lambda self, x: (x.select(1, t) for t in range(x.shape[1])),
    "split": lambda self, x: [part.squeeze(1) for part in x.split(1, 1)],
    "prepared": lambda self, x: [self.pre(x_t) for x_t in x.unbind(1)],
    "prepared whole": lambda self, x: self.pre(x).unbind(1),
    "backwards": lambda self, x: (x[:, -1 - t] for t in range(x.shape[1])),
}


@pytest.mark.parametrize("inside", (False, True))
@pytest.mark.parametrize("cut", CUTS)
def test_a_recurrence_is_no_stream(cut: str, inside: bool) -> None:
    with pytest.raises(NoResidualError) as caught:
        plan(Loop(CUTS[cut], inside), (torch.randn(2, 5, WIDTH),))
    assert "recurrence over time" in str(caught.value) and "torch.tanh(self" in str(caught.value)


class Whole(Adds):
    """Mixes all that a sample has."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(5 * WIDTH, 5 * WIDTH)

    def first(self, x: Tensor) -> Tensor:
        return self.f(x.flatten(1)).view_as(x)


class Transform(Adds):
    def first(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


class Coordinates(Adds):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, width))

    def first(self, x: Tensor) -> Tensor:
        return self.f(x)


class Flow(nn.Module):
    """A field of two channels, refined."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Conv2d(2 + WIDTH, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        flow = torch.zeros_like(x[:, :2])
        for _ in range(3):
            flow = flow + self.f(torch.cat([flow, x], 1))
        return torch.cat([flow, x[:, 2:]], 1)


class Undecided(Adds):
    """Two convolutions: one takes axis 1 for channels, the other the last."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Conv1d(5, 5, 1), nn.Linear(WIDTH, WIDTH)

    def first(self, x: Tensor) -> Tensor:
        return self.f(x)

    def second(self, x: Tensor) -> Tensor:
        return self.g(x)


REJECTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str]] = {
    # build, shape of the input, rule, what the reason says
    "all of a sample": (Whole, (2, 5, WIDTH), "axis", "no parameter"),
    "a transform alone": (Transform, (2, 5, WIDTH), "axis", "no parameter"),
    "points": (lambda: Coordinates(3), (2, 5, 3), "width", "size 3"),
    "numbers": (lambda: Coordinates(1), (2, 5, 1), "axis", "no parameter"),
    "a flow": (Flow, (2, WIDTH, 6, 6), "width", "size 2"),
    "undecided": (Undecided, (2, 5, WIDTH), "axis", "as much"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unclear_axes_are_rejected(name: str) -> None:
    build, shape, rule, reason = REJECTED[name]
    with pytest.raises(NoResidualError) as caught:
        plan(Layers(build(), build()), (torch.randn(shape),))
    assert f" {rule}: " in str(caught.value) and reason in str(caught.value)
    # Beside a stream they are left alone, and the plan says why.
    if shape[-1] == WIDTH:
        found = plan(Beside(build(), build()), (torch.randn(shape),))
        assert [site.name for site in found.sites] == ["trunk.0.mhc_0", "trunk.1.mhc_0"]
        assert {r.rule for r in found.rejections} == {rule}


class Beside(nn.Module):
    """Layers beside a stream."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.side, self.trunk = Layers(*layers), nn.ModuleList(Simple() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.side(x.cos())
        for layer in self.trunk:
            x = layer(x)
        return torch.cat([x, y], -1)


class Simple(Adds):
    def __init__(self) -> None:
        super().__init__()
        self.first = block()


# -- calls that the example did not show -----------------------------------------------------------------------------


def perturbed(model: nn.Module, *inputs: Tensor, **options: Any) -> nn.Module:
    model = mhcify(model.double().eval(), inputs, n_streams=3, **options)
    oracle.perturb(model, seed=1)
    return model


@pytest.mark.parametrize("length", (1, 2, 8))
@pytest.mark.parametrize("name", ("recurrence in a branch", "recurrence after layers", "layers at every step"))
def test_another_number_of_steps(name: str, length: int) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    compared = Compared(kind, 3).perturb()
    x = features(2, length, WIDTH)
    hand = oracle.Streams(compared.state, 3)
    assert relative(compared.converted(x), kind.by_hand(compared.original, hand, x)) < 1e-9


def test_an_excluded_recurrence_needs_no_mention() -> None:
    """Whether excluded or not, its steps are not the example's."""
    model = Layers(Recurrent(), Recurrent(), ThenRecurrent())
    model = perturbed(model, features(2, 5, WIDTH), exclude=("layers.2",))
    assert model(features(2, 7, WIDTH)).shape == (2, WIDTH)


class Scaled(nn.Module):
    """Other lines where arguments are given."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.extra = block(), block(), linear()

    def forward(self, x: Tensor, scale: Tensor | None = None, extra: bool = False) -> Tensor:
        if scale is None:
            x = x + self.f(x)
        else:
            x = x + scale * self.f(x)
        return x + (self.extra(self.g(x)) if extra else self.g(x))


class ScaledStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scaled() for _ in range(2))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **options)
        return x


@pytest.mark.skipif(
    not hasattr(types.CodeType, "co_positions"),
    reason="Python 3.10 makes an add of each way through its line, and nothing tells that they are one",
)
@pytest.mark.parametrize("train", (False, True))
def test_arguments_that_choose_another_line(train: bool) -> None:
    original = ScaledStack().double()
    model = ScaledStack().double()
    model.load_state_dict(original.state_dict())
    x, scale = features(2, 5, WIDTH), features(WIDTH)
    model = perturbed(model, x).train(train)
    hand = oracle.Streams(dict(model.named_parameters()), 3)
    for options in ({"scale": scale}, {"extra": True}, {"scale": scale, "extra": True}, {}):
        X = hand.expand(x)
        for i, layer in enumerate(original.layers):
            second = nn.Sequential(layer.g, layer.extra) if "extra" in options else layer.g
            X = hand.site(f"layers.{i}.mhc_0", X, lambda u, f=layer.f, by=options.get("scale", 1.0): by * f(u))
            X = hand.site(f"layers.{i}.mhc_1", X, second)
        assert relative(model(x, **options), hand.collapse(X)) < 1e-9


class Skipping(nn.Module):
    """Leaves the first of its layers out."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(block() for _ in range(4))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        for f in self.fs[first:]:
            x = x + f(x)
        return x


def test_turns_that_are_left_out_keep_the_others_parameters() -> None:
    """By the line and the number of the turn the second layer would get the first one's site."""
    model = perturbed(Skipping(), features(2, 5, WIDTH))
    x, hand = features(2, 5, WIDTH), oracle.Streams(dict(model.named_parameters()), 3)
    for first in (0, 1, 2):
        X = hand.expand(x)
        for k in range(first, 4):
            X = hand.site(f"mhc_{k}", X, model.fs[k])
        assert relative(model(x, first), hand.collapse(X)) < 1e-9


class SharedTwice(nn.Module):
    """Adds one branch twice, by a helper, or the second time alone."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = block(), block()

    def add(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def forward(self, x: Tensor, once: bool = False) -> Tensor:
        if not once:
            x = self.add(x)
        x = self.add(x)
        return x + self.g(x)


def test_one_branch_added_twice_is_told_by_the_way_to_the_add() -> None:
    model = perturbed(SharedTwice(), features(2, 5, WIDTH))
    x, hand = features(2, 5, WIDTH), oracle.Streams(dict(model.named_parameters()), 3)
    for once in (False, True):
        X = hand.expand(x)
        X = X if once else hand.site("mhc_0", X, model.f)
        X = hand.site("mhc_2", hand.site("mhc_1", X, model.f), model.g)
        assert relative(model(x, once), hand.collapse(X)) < 1e-9


# -- advice ----------------------------------------------------------------------------------------------------------


class Branching(Simple):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.amax()) * self.first(x)


@pytest.mark.parametrize(
    "layers,advice",
    [
        ((Simple, Simple, Branching, Branching), "exclude=('layers.2', 'layers.3')"),
        ((Simple, Branching, Simple, Simple), "exclude=('layers.1',)"),
        ((Simple, Branching, Simple), None),
        ((Branching, Branching), None),
    ],
)
def test_exclude_is_proposed_where_it_leaves_sites(layers: tuple[type, ...], advice: str | None) -> None:
    model = Layers(*(layer() for layer in layers))
    with pytest.raises(CaptureError) as caught:
        mhcify(model, (torch.randn(2, 5, WIDTH),))
    said = str(caught.value)
    assert (advice or "Change that line.") in said and ("exclude" in said) is (advice is not None)
    if advice is not None:
        exclude = eval(f"dict({advice})")["exclude"]
        assert report(mhcify(model, (torch.randn(2, 5, WIDTH),), exclude=exclude)).plan.sites


def test_pooling_alone_is_told_by_its_axis() -> None:
    """An average over tokens mixes no features, but its neighbours do."""

    class Pool(Adds):
        def first(self, x: Tensor) -> Tensor:
            return F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)

    found = plan(Layers(Simple(), Pool(), Simple()), (torch.randn(2, 5, WIDTH),))
    assert [(site.name, site.width) for site in found.sites] == [(f"layers.{i}.mhc_0", WIDTH) for i in range(3)]

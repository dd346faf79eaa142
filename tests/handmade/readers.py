"""Whoever else reads the trunk: collected hidden states, an auxiliary head, another stream, a long skip."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from handmade.common import WIDTH, Attention, Kind, PreNorm, Stack, features, names, prenorm_by_hand
from oracle import Streams


class Towers(nn.Module):
    """CLIP's plan: two streams that never meet before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (Stack([PreNorm() for _ in range(2)]) for _ in range(2))
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(a).mean(1), self.right(b).mean(1)], -1))


def towers_by_hand(model: Towers, hand: Streams, a: Tensor, b: Tensor) -> Tensor:
    pooled = []
    for name, x in (("left", a), ("right", b)):
        tower, X = getattr(model, name), hand.expand(x)
        for number, layer in enumerate(tower.layers):
            X = prenorm_by_hand(layer, hand, f"{name}.layers.{number}", X)
        pooled.append(tower.norm(hand.collapse(X)).mean(1))
    return model.head(torch.cat(pooled, -1))


class Interleaved(nn.Module):
    """Two streams in one loop."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.ModuleList([PreNorm() for _ in range(2)]) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for left, right in zip(self.left, self.right):
            a, b = left(a), right(b)
        return torch.cat([a, b], 1)


def interleaved_by_hand(model: Interleaved, hand: Streams, a: Tensor, b: Tensor) -> Tensor:
    ends = []
    for name, x in (("left", a), ("right", b)):
        X = hand.expand(x)
        for number, layer in enumerate(getattr(model, name)):
            X = prenorm_by_hand(layer, hand, f"{name}.{number}", X)
        ends.append(hand.collapse(X))
    return torch.cat(ends, 1)


class CrossReading(nn.Module):
    """A layer that reads another stream in its middle: it reads the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(WIDTH), Attention()

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.attn(self.norm(x), other)


class CrossTowers(nn.Module):
    """The left tower reads the right one's trunk after each of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList([CrossReading() for _ in range(2)])
        self.right = nn.ModuleList([PreNorm() for _ in range(2)])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for left, right in zip(self.left, self.right):
            b = right(b)
            a = left(a, b)
        return torch.cat([a, b], 1)


def cross_towers_by_hand(model: CrossTowers, hand: Streams, a: Tensor, b: Tensor) -> Tensor:
    A, B = hand.expand(a), hand.expand(b)
    for number, (left, right) in enumerate(zip(model.left, model.right)):
        B = prenorm_by_hand(right, hand, f"right.{number}", B)
        other = hand.collapse(B)
        A = hand.site(f"left.{number}.mhc_0", A, lambda u, at=left, other=other: at.attn(at.norm(u), other))
    return torch.cat([hand.collapse(A), hand.collapse(B)], 1)


class Collecting(nn.Module):
    """Returns what every layer made, and a head's reading of the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PreNorm() for _ in range(3)])
        self.norm, self.aside = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> dict[str, object]:
        states: tuple[Tensor, ...] = ()
        aside = None
        for number, layer in enumerate(self.layers):
            states += (x,)
            x = layer(x)
            if number == 1:
                aside = self.aside(x.mean(1))
        x = self.norm(x)
        return {"last": x, "aside": aside, "states": states + (x,)}


def collecting_by_hand(model: Collecting, hand: Streams, x: Tensor) -> dict[str, object]:
    X, states = hand.expand(x), []
    for number, layer in enumerate(model.layers):
        states.append(hand.collapse(X))
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
        if number == 1:
            aside = model.aside(hand.collapse(X).mean(1))
    x = model.norm(hand.collapse(X))
    return {"last": x, "aside": aside, "states": (*states, x)}


class FlatCollecting(nn.Module):
    """The same in one forward that holds the adds as well."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(3)])
        self.aside = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        states = []
        for block in self.blocks:
            x = x + block(x).tanh()
            states.append(x)
        return x.sin(), self.aside(states[1]), states


def flat_collecting_by_hand(model: FlatCollecting, hand: Streams, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    X, states = hand.expand(x), []
    for number, block in enumerate(model.blocks):
        X = hand.site(f"mhc_{number}", X, lambda u, at=block: at(u).tanh())
        states.append(hand.collapse(X))
    return states[-1].sin(), model.aside(states[1]), states


class LongSkip(nn.Module):
    """A skip that closes over all layers is no site: it stays an add of two ordinary tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList([PreNorm() for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skip = x
        for layer in self.layers:
            x = layer(x)
        return self.norm(x + skip)


def long_skip_by_hand(model: LongSkip, hand: Streams, x: Tensor) -> Tensor:
    x = model.stem(x)
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
    return model.norm(hand.collapse(X) + x)


def pair() -> tuple[Tensor, Tensor]:
    return features(2, 5, WIDTH), features(2, 7, WIDTH)


def one() -> tuple[Tensor]:
    return (features(2, 5, WIDTH),)


KINDS = (
    Kind("two towers", Towers, pair, towers_by_hand, (names("left.layers.{}", 2, 2), names("right.layers.{}", 2, 2))),
    Kind(
        "two streams in turn", Interleaved, pair, interleaved_by_hand, (names("left.{}", 2, 2), names("right.{}", 2, 2))
    ),
    Kind(
        "a stream reads another",
        CrossTowers,
        pair,
        cross_towers_by_hand,
        (names("right.{}", 2, 2), names("left.{}", 2, 1)),
    ),
    Kind("hidden states", Collecting, one, collecting_by_hand, (names("layers.{}", 3, 2),)),
    Kind("hidden states, flat", FlatCollecting, one, flat_collecting_by_hand, (("mhc_0", "mhc_1", "mhc_2"),)),
    Kind("long skip", LongSkip, one, long_skip_by_hand, (names("layers.{}", 2, 2),)),
)

"""Trunks inside a block, beside one another, and on a part of another: what reads a trunk as its block, and what as
anybody does. And children that are called in other ways than `child(x)` on the trunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Attention, Kind, Stack, features, names, stack_by_hand, stack_of
from handmade.found import block
from oracle import Streams

HALF = WIDTH // 2


class Reading(nn.Module):
    """A layer of another width that also reads what its stage was made from, in both of its blocks or not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f, self.g = block(width), block(width)
        self.context = nn.Linear(WIDTH, width)

    def first(self, h: Tensor, memory: Tensor) -> Tensor:
        return self.f(h + self.context(memory).mean(1, keepdim=True))

    def forward(self, h: Tensor, memory: Tensor) -> Tensor:
        h = h + self.first(h, memory)
        return h + self.g(h)


class Hourglass(nn.Module):
    """A whole stage of residual layers within one block. With `shorter` on half of the tokens as well."""

    def __init__(self, shorter: bool, depth: int) -> None:
        super().__init__()
        self.mlp, self.down, self.up = block(), nn.Linear(WIDTH, HALF), nn.Linear(HALF, WIDTH)
        self.stage = nn.ModuleList(Reading(HALF) for _ in range(depth))
        self.shorter = shorter

    def begin(self, x: Tensor) -> Tensor:
        h = self.down(x)
        return h.unflatten(1, (-1, 2)).mean(2) if self.shorter else h

    def end(self, h: Tensor) -> Tensor:
        return self.up(h.repeat_interleave(2, 1) if self.shorter else h)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        h = self.begin(x)
        for layer in self.stage:
            h = layer(h, x)
        return x + self.end(h)


def hourglass_by_hand(layer: Hourglass, hand: Streams, name: str, X: Tensor) -> Tensor:
    """All of the outer block reads its u, the inner blocks too."""
    X = hand.site(f"{name}.mhc_0", X, layer.mlp)
    u, write = hand.read(f"{name}.mhc_1", X)
    H = hand.expand(layer.begin(u))
    for i, inner in enumerate(layer.stage):
        H = hand.site(f"{name}.stage.{i}.mhc_0", H, lambda h, at=inner: at.first(h, u))
        H = hand.site(f"{name}.stage.{i}.mhc_1", H, inner.g)
    return write(layer.end(hand.collapse(H)))


class TwoWays(nn.Module):
    """Two trunks, of which each block reads the other: queries and keys of a mask decoder, say."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.to_left, self.to_right = Attention(), Attention()
        self.twice = twice
        if twice:
            self.again = Attention()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + self.to_left(a, b)
        if self.twice:
            a = a + self.again(a, b)
        b = b + self.to_right(b, a)
        return a, b


class TwoWayStack(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWays(twice) for _ in range(3))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            a, b = layer(a, b)
        return a, b


def two_ways_by_hand(model: TwoWayStack, hand: Streams, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Neither trunk lies within a block of the other, so each reads the other's mean."""
    A, B = hand.expand(a), hand.expand(b)
    for i, layer in enumerate(model.layers):
        of = (f"layers.{i}.mhc_{k}" for k in range(3))
        A = hand.site(next(of), A, lambda u, at=layer, b=hand.collapse(B): at.to_left(u, b))
        if layer.twice:
            A = hand.site(next(of), A, lambda u, at=layer, b=hand.collapse(B): at.again(u, b))
        B = hand.site(next(of), B, lambda u, at=layer, a=hand.collapse(A): at.to_right(u, a))
    return hand.collapse(A), hand.collapse(B)


class Across(nn.Module):
    """Adds what one trunk reads of another."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return x + self.attn(x, memory)


class Exchange(nn.Module):
    """One module adds to both trunks, and each has blocks of its own behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.across, self.f, self.g, self.h, self.k = Across(), block(), block(), block(), block()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.across(a, b), self.across(b, a)
        a, b = a + self.f(a), b + self.g(b)
        return a + self.h(a), b + self.k(b)


class ExchangeStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Exchange() for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            a, b = layer(a, b)
        return a, b


def exchange_by_hand(model: ExchangeStack, hand: Streams, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The module that both share is a site of neither."""
    for i, layer in enumerate(model.layers):
        a, b = layer.across(a, b), layer.across(b, a)
        A = hand.site(f"layers.{i}.mhc_0", hand.expand(a), layer.f)
        B = hand.site(f"layers.{i}.mhc_1", hand.expand(b), layer.g)
        a = hand.collapse(hand.site(f"layers.{i}.mhc_2", A, layer.h))
        b = hand.collapse(hand.site(f"layers.{i}.mhc_3", B, layer.k))
    return a, b


class NormedSkip(nn.Module):
    """A skip inside of a block, from behind its norm; alone, or beside attention as in LAuReL."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.norm1, self.low, self.norm2, self.mlp = nn.LayerNorm(WIDTH), block(), nn.LayerNorm(WIDTH), MLP()
        self.beside = beside
        if beside:
            self.attn = Attention()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        inner = h + self.low(h)
        x = (x + self.attn(h)) + inner if self.beside else x + inner
        return x + self.mlp(self.norm2(x))


def normed_skip_by_hand(layer: NormedSkip, hand: Streams, name: str, X: Tensor) -> Tensor:
    def first(u: Tensor) -> Tensor:
        h = layer.norm1(u)
        inner = h + layer.low(h)
        return layer.attn(h) + inner if layer.beside else inner

    X = hand.site(f"{name}.mhc_1", X, first)
    return hand.site(f"{name}.mhc_2", X, lambda u: layer.mlp(layer.norm2(u)))


class Alternating(nn.Module):
    """Several copies of a trunk, of which one goes through the layer: alternating updates."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.norm, self.attn, self.mlp = nn.Linear(WIDTH, 9), nn.LayerNorm(WIDTH), Attention(), block()
        self.correction = nn.Linear(WIDTH, 3)

    def mixed(self, state: Tensor) -> Tensor:
        coefficients = self.router(state[0]).tanh().unflatten(-1, (3, 3))
        return torch.matmul(state.permute(1, 2, 3, 0), coefficients).permute(3, 0, 1, 2)

    def innovation(self, guess: Tensor, out: Tensor) -> Tensor:
        return (out - guess[0]).repeat(3, 1, 1, 1) * self.correction(out).permute(2, 0, 1).unsqueeze(-1)

    def forward(self, state: Tensor) -> Tensor:
        guess = state + self.mixed(state)
        active = guess[0]
        active = active + self.attn(self.norm(active))
        active = active + self.mlp(active)
        return self.innovation(guess, active) + guess


class AlternatingStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Alternating() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        state = torch.stack([x, 2 * x, x.flip(-1)])
        for layer in self.layers:
            state = layer(state)
        return state.mean(0)


def alternating_by_hand(model: AlternatingStack, hand: Streams, x: Tensor) -> Tensor:
    """The copies together are the trunk; what goes through the layer is a trunk within the block that corrects them."""
    X = hand.expand(torch.stack([x, 2 * x, x.flip(-1)]))
    for i, layer in enumerate(model.layers):
        X = hand.site(f"layers.{i}.mhc_0", X, layer.mixed)
        u, write = hand.read(f"layers.{i}.mhc_3", X)
        A = hand.site(f"layers.{i}.mhc_1", hand.expand(u[0]), lambda u, at=layer: at.attn(at.norm(u)))
        A = hand.site(f"layers.{i}.mhc_2", A, layer.mlp)
        X = write(layer.innovation(u, hand.collapse(A)))
    return hand.collapse(X).mean(0)


class Parted(nn.Module):
    """Post-norm; the first tokens, and the others, have blocks of their own behind it, and are put together again."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1 = Attention(), nn.LayerNorm(WIDTH)
        self.cross, self.mlp, self.other = Attention(), block(), block()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        first, rest = x[:, :3], x[:, 3:]
        first = first + self.cross(first, memory)
        first = first + self.mlp(first)
        return torch.cat([first, rest + self.other(rest)], 1)


def parted_by_hand(layer: Parted, hand: Streams, name: str, X: Tensor, memory: Tensor) -> Tensor:
    X = hand.expand(hand.collapse(X))  # each layer puts its parts together
    X = hand.each(layer.norm1, hand.site(f"{name}.mhc_0", X, layer.attn))
    rest = hand.collapse(X)[:, 3:]
    F = hand.each(lambda x: x[:, :3], X)
    F = hand.site(f"{name}.mhc_1", F, lambda u: layer.cross(u, memory))
    F = hand.site(f"{name}.mhc_2", F, layer.mlp)
    return hand.expand(torch.cat([hand.collapse(F), rest + layer.other(rest)], 1))


# -- children on the trunk ---------------------------------------------------------------------------------------------


class Over(nn.Module):
    """A norm over one axis: its default says nothing of how it is called."""

    def forward(self, value: Tensor, axis: int = -1, scale: float = 1.0) -> Tensor:
        return scale * F.normalize(value, dim=axis)


class Called(nn.Module):
    """Post-norm by a child that is called by keywords, or with more than the trunk."""

    def __init__(self, image: bool, *given: object, **how: object) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Tanh()) if image else block()
        self.norm = nn.SiLU() if image else Over()
        self.given, self.how = given, how
        self.keyword = "input" if image else "value"

    def on_trunk(self, x: Tensor) -> Tensor:
        return self.norm(x, *self.given) if self.given else self.norm(**{self.keyword: x}, **self.how)

    def forward(self, x: Tensor) -> Tensor:
        return self.on_trunk(x + self.f(x))


class CalledStack(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def called_by_hand(model: CalledStack, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for i, layer in enumerate(model.layers):
        X = hand.site(f"layers.{i}.mhc_0", X, layer.f)
        if i < 2:
            X = hand.each(layer.on_trunk, X)
    return model.layers[-1].on_trunk(hand.collapse(X))


class Adapter(nn.Module):
    """Has nothing to do to its first argument while it is off, and gives it back."""

    def __init__(self, into: nn.Module) -> None:
        super().__init__()
        self.into, self.on = into, False

    def forward(self, x: Tensor, mask: Tensor | None = None, *, context: Tensor | None = None) -> Tensor:
        if not self.on:
            return x
        return self.into(x) if mask is None else self.into(x) * mask


class Adapted(nn.Module):
    def __init__(self, masked: bool, image: bool) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.Tanh()) if image else block()
        self.adapter, self.masked = Adapter(self.f[0] if image else self.f[1]), masked

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return self.adapter(x, torch.ones_like(x[:1]), context=None) if self.masked else self.adapter(x=x)


def adapted_by_hand(model: CalledStack, hand: Streams, x: Tensor) -> Tensor:
    """Where an adapter is on, what it makes of the mean begins the streams anew."""
    X = hand.expand(x)
    for i, layer in enumerate(model.layers):
        X = hand.site(f"layers.{i}.mhc_0", X, layer.f)
        if layer.adapter.on:
            mean = hand.collapse(X)
            X = hand.expand(layer.adapter(mean, torch.ones_like(mean[:1]) if layer.masked else None))
    return hand.collapse(X)


def tokens() -> tuple[Tensor, ...]:
    return (features(2, 6, WIDTH),)


def told() -> tuple[Tensor, ...]:
    return features(2, 6, WIDTH), features(2, 4, WIDTH)


def both() -> tuple[Tensor, ...]:
    return features(2, 5, WIDTH), features(2, 7, WIDTH)


def hourglass(name: str, shorter: bool, depth: int) -> Kind:
    inner = tuple(tuple(f"layers.{i}.stage.{k}.mhc_{s}" for k in range(depth) for s in range(2)) for i in range(2))
    kind = stack_of(name, lambda: Hourglass(shorter, depth), hourglass_by_hand, 2, inputs=tokens)
    return replace(kind, streams=(*kind.streams, *inner))


def two_ways(name: str, twice: bool) -> Kind:
    left = tuple(f"layers.{i}.mhc_{k}" for i in range(3) for k in range(1 + twice))
    right = tuple(f"layers.{i}.mhc_{1 + twice}" for i in range(3))
    return Kind(name, lambda: TwoWayStack(twice), both, two_ways_by_hand, (left, right))


def normed_skip(name: str, beside: bool) -> Kind:
    kind = stack_of(name, lambda: NormedSkip(beside), normed_skip_by_hand, 2, 3)
    return replace(kind, streams=(tuple(f"layers.{i}.mhc_{k}" for i in range(3) for k in (1, 2)),))


def called(name: str, image: bool, *given: object, channel_dim: int = -1, **how: object) -> Kind:
    inputs = (lambda: (features(2, WIDTH, 3, 4),)) if image else tokens
    build = partial(CalledStack, lambda: Called(image, *given, **how))
    return Kind(name, build, inputs, called_by_hand, (names("layers.{}", 3, 1),), channel_dim)


def adapted(name: str, masked: bool, image: bool = False) -> Kind:
    inputs = (lambda: (features(2, WIDTH, 3, 4),)) if image else tokens
    build = partial(CalledStack, lambda: Adapted(masked, image))
    return Kind(name, build, inputs, adapted_by_hand, (names("layers.{}", 3, 1),), 1 if image else -1)


ADAPTED = (
    adapted("a child that gives its argument back", False),
    adapted("a child that gives its first argument back", True),
    adapted("a child that gives an image back", True, True),
)
LAYER_BY_LAYER = tuple(names(f"layers.{i}", 1, 3) for i in range(2))
ALTERNATING = (
    tuple(f"layers.{i}.mhc_{k}" for i in range(2) for k in (0, 3)),
    *(tuple(f"layers.{i}.mhc_{k}" for k in (1, 2)) for i in range(2)),
)
EXCHANGE = tuple((f"layers.{i}.mhc_{k}", f"layers.{i}.mhc_{k + 2}") for i in range(2) for k in range(2))
KINDS: tuple[Kind, ...] = (
    hourglass("a stage within a block", False, 1),
    hourglass("a deeper stage on fewer tokens within a block", True, 2),
    two_ways("two trunks that read each other", False),
    two_ways("two trunks that read each other, one twice", True),
    Kind("a module that adds to two trunks", ExchangeStack, both, exchange_by_hand, EXCHANGE),
    normed_skip("a skip behind a block's norm", False),
    normed_skip("a skip behind a block's norm, beside attention", True),
    Kind("alternating updates", AlternatingStack, tokens, alternating_by_hand, ALTERNATING),
    Kind("parts of the tokens apart", lambda: Stack([Parted(), Parted()]), told, stack_by_hand(parted_by_hand),
         LAYER_BY_LAYER),
    called("a norm called by keyword", False),
    called("a norm called by keyword, with more", False, scale=0.5),
    called("a norm told more", False, -1, 2.0),
    called("an activation of an image called by keyword", True, channel_dim=1),
)  # fmt: skip

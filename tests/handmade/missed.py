"""Residuals that were missed: sums written to some of a tensor's places, beside what only looks like a residual."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Attention, Kind, features, stack_of
from oracle import Streams

MASK = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])


class Written(nn.Module):
    """Attention on all tokens, and then blocks on some of them, in one of the forms of `FORMS`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), MLP()
        if form in ("two kinds of tokens", "one after another"):
            self.norm3, self.other = nn.LayerNorm(WIDTH), MLP()
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return FORMS[self.form][0](self, x, MASK.to(x.device))


def masked(layer: Written, x: Tensor, mask: Tensor) -> Tensor:
    x[mask] += layer.mlp(layer.norm2(x[mask]))
    return x


def two_kinds(layer: Written, x: Tensor, mask: Tensor) -> Tensor:
    """Both read what was there before either wrote: one site with two branches."""
    text, sound = layer.norm2(x[~mask]), layer.norm3(x[mask])
    x[~mask] += layer.mlp(text)
    x[mask] += layer.other(sound)
    return x


def one_after_another(layer: Written, x: Tensor, mask: Tensor) -> Tensor:
    x[~mask] += layer.mlp(layer.norm2(x[~mask]))
    x[:, 1:] = x[:, 1:] + layer.other(layer.norm3(x[:, 1:]))
    return x


def mask_spelled_twice(layer: Written, x: Tensor, mask: Tensor) -> Tensor:
    x = x.clone()
    x[~mask] = layer.mlp(layer.norm2(x))[~mask] + x[~mask]
    return x


def first_token(layer: Written, x: Tensor, mask: Tensor) -> Tensor:
    x[:, 0] += layer.mlp(layer.norm2(x[:, 0]))
    return x


def rows(layer: Written, x: Tensor, mask: Tensor) -> Tensor:
    part = x[:, mask[0]]
    x[:, mask[0]] = part + layer.mlp(layer.norm2(part))
    return x


def at(index: object, y: Tensor, like: Tensor) -> Tensor:
    whole = torch.zeros_like(like)
    whole[index] = y
    return whole


Branch = Callable[[Written, Tensor, Tensor], Tensor]

# The form, and its branches by hand: of (layer, u, mask), a tensor of u's form.
FORMS: dict[str, tuple[Branch, tuple[Branch, ...]]] = {
    "x[mask] +=": (masked, (lambda layer, u, m: at(m, layer.mlp(layer.norm2(u[m])), u),)),
    "two kinds of tokens": (
        two_kinds,
        (lambda layer, u, m: at(~m, layer.mlp(layer.norm2(u[~m])), u) + at(m, layer.other(layer.norm3(u[m])), u),),
    ),
    "one after another": (
        one_after_another,
        (
            lambda layer, u, m: at(~m, layer.mlp(layer.norm2(u[~m])), u),
            lambda layer, u, m: at((slice(None), slice(1, None)), layer.other(layer.norm3(u[:, 1:])), u),
        ),
    ),
    "a mask spelled twice": (mask_spelled_twice, (lambda layer, u, m: at(~m, layer.mlp(layer.norm2(u))[~m], u),)),
    "x[:, 0] +=": (first_token, (lambda layer, u, m: at((slice(None), 0), layer.mlp(layer.norm2(u[:, 0])), u),)),
    "one name": (
        rows,
        (lambda layer, u, m: at((slice(None), m[0]), layer.mlp(layer.norm2(u[:, m[0]])), u),),
    ),
}  # fmt: skip


def by_hand(layer: Written, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.attn(layer.norm1(u)))
    for k, branch in enumerate(FORMS[layer.form][1], 1):
        X = hand.site(f"{name}.mhc_{k}", X, lambda u, branch=branch: branch(layer, u, MASK))
    return X


WRITTEN = tuple(
    stack_of(form, lambda form=form: Written(form), by_hand, 1 + len(branches)) for form, (_, branches) in FORMS.items()
)


class Quantizer(nn.Module):
    """What is left of x after its nearest entries, one book after the other: not a stream, for all its differences."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.books = nn.ParameterList(torch.randn(12, WIDTH) for _ in range(3))
        if not straight:
            self.out = nn.Linear(WIDTH, WIDTH)
        self.straight = straight

    def entry(self, book: Tensor, x: Tensor) -> Tensor:
        return book[torch.cdist(x, book[None]).argmin(-1)]

    def forward(self, x: Tensor) -> Tensor:
        left, total = x, torch.zeros_like(x)
        for book in self.books:
            entry = self.entry(book, left)
            left = left - entry
            total = total + entry
        return x + (total - x).detach() + total.mean() if self.straight else self.out(left) * total.sigmoid()


class Codec(nn.Module):
    """Layers, a quantizer, layers. The parent's code calls methods, so that it is itself the home of their adds."""

    def __init__(self, straight: bool) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(Block() for _ in range(2))
        self.quantizer = Quantizer(straight)
        self.decoder = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = layer(x)
        x = self.quantizer(x)
        for layer in self.decoder:
            x = layer(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def codec_by_hand(model: Codec, hand: Streams, x: Tensor) -> Tensor:
    def layers(part: str, x: Tensor) -> Tensor:
        X = hand.expand(x)
        for i, layer in enumerate(getattr(model, part)):
            X = hand.site(f"{part}.{i}.mhc_0", X, lambda u, layer=layer: layer.mlp(layer.norm(u)))
        return hand.collapse(X)

    return layers("decoder", model.quantizer(layers("encoder", x)))


CODECS = tuple(
    Kind(
        name, lambda straight=straight: Codec(straight), lambda: (features(2, 5, WIDTH),), codec_by_hand,
        tuple(tuple(f"{part}.{i}.mhc_0" for i in range(2)) for part in ("encoder", "decoder")),
    )
    for name, straight in (("entries by code", False), ("straight through", True))
)  # fmt: skip

KINDS = (*WRITTEN, *CODECS)

"""Trunks that change between images (B, C, H, W) and tokens (B, N, C), or turn their axes, and change back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Attention, Kind, features, names
from oracle import Streams

HEIGHT, LENGTH = 2, 6


class Turning(nn.Module):
    """A layer in one of the forms of `FORMS`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.norm, self.form = nn.LayerNorm(WIDTH), form
        for name in FORMS[form].parts:
            part = {
                "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH), "mlp": MLP, "attn": Attention,
                "tokens": lambda: nn.Linear(LENGTH, LENGTH),
            }[name]  # fmt: skip
            setattr(self, name, part())

    def forward(self, x: Tensor) -> Tensor:
        return FORMS[self.form].forward(self, x)


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def to_image(t: Tensor) -> Tensor:
    return t.transpose(1, 2).unflatten(2, (HEIGHT, -1))


def image_first(layer: Any, x: Tensor) -> Tensor:
    x = layer.conv(x) + x
    batch, channels, height, width = x.shape
    t = x.flatten(2).transpose(1, 2)
    t = t + layer.mlp(layer.norm(t))
    return t.transpose(1, 2).view(batch, channels, height, width)


def tokens_first(layer: Any, t: Tensor) -> Tensor:
    t = t + layer.mlp(layer.norm(t))
    x = t.transpose(1, 2).view(t.shape[0], t.shape[2], HEIGHT, t.shape[1] // HEIGHT)
    x = x + layer.conv(x)
    return x.flatten(2).transpose(1, 2)


def image_outside(layer: Any, x: Tensor) -> Tensor:
    t = x.flatten(2).transpose(1, 2)
    t = t + layer.attn(layer.norm(t))
    t = layer.mlp(t) + t
    return t.transpose(1, 2).reshape(x.shape)


def channels_last(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.conv(x)
    t = torch.permute(x, (0, 2, 3, 1)).contiguous()
    t = t + layer.mlp(layer.norm(t))
    return t.movedim(-1, 1)


def mixer(layer: Any, x: Tensor) -> Tensor:
    x = x + layer.mlp(layer.norm(x))
    t = x.swapaxes(1, 2)
    t = t + torch.tanh(layer.tokens(t))
    return t.transpose(-1, -2)


class Form:
    """`forward`, the layer's parts, the trunk's layout, and its branches by hand, of u in that layout."""

    def __init__(
        self, forward: Callable[[Any, Tensor], Tensor], parts: tuple[str, ...], image: bool,
        *branches: Callable[[Any, Tensor], Tensor],
    ) -> None:  # fmt: skip
        self.forward, self.parts, self.image, self.branches = forward, parts, image, branches


FORMS = {
    "an image, tokens inside": Form(
        image_first, ("conv", "mlp"), True,
        lambda layer, u: layer.conv(u), lambda layer, u: to_image(layer.mlp(layer.norm(to_tokens(u))))),
    "tokens, an image inside": Form(
        tokens_first, ("mlp", "conv"), False,
        lambda layer, u: layer.mlp(layer.norm(u)), lambda layer, u: to_tokens(layer.conv(to_image(u)))),
    "an image outside alone": Form(
        image_outside, ("attn", "mlp"), True,
        lambda layer, u: to_image(layer.attn(layer.norm(to_tokens(u)))),
        lambda layer, u: to_image(layer.mlp(to_tokens(u)))),
    "channels last": Form(
        channels_last, ("conv", "mlp"), True,
        lambda layer, u: layer.conv(u),
        lambda layer, u: layer.mlp(layer.norm(u.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)),
    "a mixer": Form(
        mixer, ("mlp", "tokens"), False,
        lambda layer, u: layer.mlp(layer.norm(u)), lambda layer, u: torch.tanh(layer.tokens(u.mT)).mT),
}  # fmt: skip


class Turned(nn.Module):
    """Layers of one form in a row."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Turning(form) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def by_hand(model: Any, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for i, layer in enumerate(model.layers):
        for k, branch in enumerate(FORMS[layer.form].branches):
            X = hand.site(f"layers.{i}.mhc_{k}", X, lambda u, layer=layer, branch=branch: branch(layer, u))
    return hand.collapse(X)


KINDS = tuple(
    Kind(
        name, lambda name=name: Turned(name),
        lambda form=form: (features(2, WIDTH, HEIGHT, 3) if form.image else features(2, LENGTH, WIDTH),),
        by_hand, (names("layers.{}", 2, 2),), channel_dim=1 if form.image else -1,
    )
    for name, form in FORMS.items()
)  # fmt: skip

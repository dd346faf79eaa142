"""Operations on the trunk between two sites: those that act on every stream alone, and those that end the stream."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Kind, Stack, features, names
from oracle import Streams

LAST, FIRST = (2, 4, 4, WIDTH), (2, WIDTH, 4, 4)
Operation = Callable[["Layer", Tensor], Tensor]


class Layer(nn.Module):
    """`t(x + f(x))`, with C last or first."""

    def __init__(self, operation: Operation, first: bool) -> None:
        super().__init__()
        self.operation, self.first = operation, first
        self.norm, self.mlp = nn.LayerNorm(WIDTH), MLP(0.1)
        mask = torch.rand(2, 1, 4, 4) < 0.3
        self.register_buffer("mask", mask if first else mask.movedim(1, -1))
        self.register_buffer("kept", torch.tensor([0, 3, 1]))
        self.register_buffer("offset", torch.randn(4, 4 if first else 1))

    def f(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x.movedim(1, -1))).movedim(-1, 1) if self.first else self.mlp(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self, x + self.f(x))


class Unnormed(Stack):
    """A stack whose trunk may change its shape."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(layers)
        self.norm = nn.Identity()


def masked_in_place(layer: Layer, x: Tensor) -> Tensor:
    x = x * 1
    x.masked_fill_(layer.mask, 0.5)
    return x


def written_to(*index: object) -> Operation:
    """`x[index] = 0.5`; the layer's mask where it says "mask"."""

    def run(layer: Layer, x: Tensor) -> Tensor:
        mask = layer.mask[:, 0] if layer.first else layer.mask[..., 0]
        x[tuple(mask if entry == "mask" else entry for entry in index)] = 0.5
        return x

    return run


def clamped_in_place(layer: Layer, x: Tensor) -> Tensor:
    x.clamp_(-1, 1.5)
    return x


CHANNELS_LAST: dict[str, Operation] = {
    "transpose, negative": lambda m, x: x.transpose(-2, -3),
    "torch.transpose": lambda m, x: torch.transpose(x, 1, -2),
    "swapaxes": lambda m, x: x.swapaxes(-3, 2),
    "permute": lambda m, x: x.permute(0, -2, 1, -1),
    "permute, a tuple": lambda m, x: torch.permute(x, (1, 0, 2, 3)).permute(dims=(1, 2, 0, 3)),
    "movedim": lambda m, x: x.movedim(-2, -3),
    "movedim of two": lambda m, x: torch.movedim(x, (1, 2), (-2, 1)),
    "flatten and back": lambda m, x: x.flatten(-3, -2).unflatten(-2, (x.shape[2], -1)).transpose(1, 2),
    "flatten from the front": lambda m, x: torch.flatten(x, 0, -2).unflatten(0, (2, 4, -1)) * 2,
    "unsqueeze": lambda m, x: x.unsqueeze(-2),
    "unsqueeze and squeeze": lambda m, x: x.unsqueeze(-3).squeeze(-3).unsqueeze(0).squeeze(0),
    "select": lambda m, x: x.select(-2, 1),
    "x[:, k]": lambda m, x: x[:, 1],
    "x[:, :k]": lambda m, x: x[:, : x.shape[1] - 1],
    "x[:, :, -2:]": lambda m, x: x[:, :, -2:, :],
    "x[..., 1:, :]": lambda m, x: x[..., 1:, :],
    "x[:, None]": lambda m, x: x[:, None],
    "x[:, kept]": lambda m, x: x[:, m.kept % x.shape[1]],
    "x[mask]": lambda m, x: x[m.mask[..., 0]][None, :, None].expand(1, -1, 1, -1) if x.shape[0] > 2 else 2 * x,
    "narrow": lambda m, x: x.narrow(-2, 0, x.shape[2] - 1),
    "index_select": lambda m, x: x.index_select(-2, m.kept % x.shape[2]),
    "roll": lambda m, x: x.roll(1, -2),
    "roll of two": lambda m, x: torch.roll(x, shifts=(-1, 1), dims=(1, -2)),
    "flip": lambda m, x: x.flip(-2),
    "pad": lambda m, x: F.pad(x, (0, 0, 1, 0)),
    "repeat_interleave": lambda m, x: x.repeat_interleave(2, dim=-2),
    "masked_fill": lambda m, x: x.masked_fill(m.mask, 0.0),
    "masked_fill_": masked_in_place,
    "x[mask] = 0.5": written_to("mask"),
    "x[:, 1:, 2] = 0.5": written_to(slice(None), slice(1, None), 2),
    "where": lambda m, x: torch.where(~m.mask, x, 0.0),
    "where, the other": lambda m, x: torch.where(m.mask, torch.zeros_like(x), x),
    "x.where": lambda m, x: x.where(~m.mask, m.offset),
    "x * mask": lambda m, x: x * ~m.mask,
    "clamp": lambda m, x: x.clamp(-1, 1.5),
    "clamp_": clamped_in_place,
    "clamp to a tensor": lambda m, x: torch.clamp(x, min=-m.offset.abs()),
    "minus an offset": lambda m, x: x - m.offset,
    "an offset minus": lambda m, x: m.offset - x,
    "view": lambda m, x: x.view(2, -1, x.shape[-1]).reshape(x.shape).sin(),
    "view_as": lambda m, x: x.flatten(1, 2).view_as(x).flatten(0, 1).reshape_as(x),
    "layer_norm": lambda m, x: F.layer_norm(x, (WIDTH,), m.norm.weight, m.norm.bias),
    "torch.layer_norm": lambda m, x: torch.layer_norm(x, [x.shape[-1]], m.norm.weight),
    "rms_norm": lambda m, x: F.rms_norm(x, x.shape[-1:], weight=m.norm.weight, eps=1e-3),
    "normalize": lambda m, x: F.normalize(x, dim=-1),
    "normalize, by place": lambda m, x: F.normalize(x, 1.5, 3, eps=1e-3),
}

CHANNELS_FIRST: dict[str, Operation] = {
    "transpose": lambda m, x: x.transpose(-1, -2),
    "mT": lambda m, x: x.mT,
    "permute": lambda m, x: x.permute(0, 1, -1, -2),
    "flatten and back": lambda m, x: x.flatten(2).unflatten(-1, (x.shape[3], x.shape[2])),
    "flatten": lambda m, x: x.flatten(-2) if x.dim() > 3 else x.relu(),
    "view": lambda m, x: x.view(*x.shape[:2], -1, 2),
    "x[..., :-1]": lambda m, x: x[..., :-1],
    "x[:, :, 1:, None]": lambda m, x: x[:, :, 1:, None].squeeze(3),
    "narrow": lambda m, x: x.narrow(2, 1, x.shape[2] - 1),
    "select": lambda m, x: x.unsqueeze(-1).select(-1, 0) * 3,
    "roll": lambda m, x: torch.roll(x, (1, -1), (2, -1)),
    "flip": lambda m, x: x.flip((2, 3)),
    "pad": lambda m, x: F.pad(x, (0, 1, 1, 0), value=0.5),
    "index_select": lambda m, x: torch.index_select(x, -1, m.kept % x.shape[-1]),
    "masked_fill": lambda m, x: x.masked_fill(m.mask, 1.0),
    "masked_fill_": masked_in_place,
    "x[..., 1] = 0.5": written_to(..., 1),
    "where": lambda m, x: torch.where(~m.mask[0, 0], x, m.offset),
    "x * mask": lambda m, x: ~m.mask * x,
    "clamp_": clamped_in_place,
    "minus an offset": lambda m, x: x - m.offset,
    "normalize": lambda m, x: F.normalize(x),
    "normalize, negative": lambda m, x: F.normalize(x, p=3.0, dim=-3),
}


def by_hand(model: Unnormed, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        X = hand.site(f"layers.{number}.mhc_0", X, layer.f)
        if number + 1 < len(model.layers):
            X = hand.each(lambda x, layer=layer: layer.operation(layer, x.clone()), X)
    return layer.operation(layer, hand.collapse(X))


def kind(name: str, operation: Operation, first: bool) -> Kind:
    return Kind(
        f"{name}, channels {'first' if first else 'last'}",
        lambda: Unnormed([Layer(operation, first) for _ in range(3)]),
        lambda: (features(*(FIRST if first else LAST)),),
        by_hand,
        (names("layers.{}", 3, 1),),
        channel_dim=1 if first else -1,
    )


KINDS = (
    *(kind(name, operation, False) for name, operation in CHANNELS_LAST.items()),
    *(kind(name, operation, True) for name, operation in CHANNELS_FIRST.items()),
)

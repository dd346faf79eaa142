"""How the parent calls its layers: twice, in a tuple, in segments, with something of its own between two of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from handmade.common import MLP, WIDTH, Kind, PreNorm, Stack, features, names, prenorm_by_hand
from oracle import Streams


def one() -> tuple[Tensor]:
    return (features(2, 5, WIDTH),)


class Siamese(nn.Module):
    """One encoder for two inputs: two streams through the same sites."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack([PreNorm() for _ in range(2)])

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(a), self.encoder(b)


def siamese_by_hand(model: Siamese, hand: Streams, *inputs: Tensor) -> list[Tensor]:
    outputs = []
    for x in inputs:
        X = hand.expand(x)
        for number, layer in enumerate(model.encoder.layers):
            X = prenorm_by_hand(layer, hand, f"encoder.layers.{number}", X)
        outputs.append(model.encoder.norm(hand.collapse(X)))
    return outputs


class TupleLayer(PreNorm):
    """Takes and returns a tuple, so that nn.Sequential can pass more than the trunk."""

    def forward(self, both: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, mask = both
        x = x + self.attn(self.norm1(x)) * mask
        return x + self.mlp(self.norm2(x)), mask


class TupleArgument(nn.Module):
    """The trunk inside a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.norm = nn.Sequential(TupleLayer(), TupleLayer()), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.layers((x, mask))[0])


def tuple_by_hand(model: TupleArgument, hand: Streams, x: Tensor, mask: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        X = hand.site(f"layers.{number}.mhc_0", X, lambda u, at=layer: at.attn(at.norm1(u)) * mask)
        X = hand.site(f"layers.{number}.mhc_1", X, lambda u, at=layer: at.mlp(at.norm2(u)))
    return model.norm(hand.collapse(X))


class Between(nn.Module):
    """The parent has an operation of its own behind each layer: it is on the trunk."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PreNorm() for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3)] if operation == "norm" else [])
        self.operation = operation

    def between(self, number: int, x: Tensor) -> Tensor:
        """What follows layer `number`."""
        if self.operation == "norm":
            return self.norms[number](x)
        if self.operation == "relu":
            return F.relu(x)
        return x.transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = self.between(number, layer(x))
        return x


def between_by_hand(model: Between, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
        if number < 2:
            X = hand.each(lambda x, number=number: model.between(number, x), X)
    return model.between(2, hand.collapse(X))


class Segments(Stack):
    """Layers recomputed two by two."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(checkpoint_sequential(nn.Sequential(*self.layers), 2, x, use_reentrant=False))


def segments_by_hand(model: Segments, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
    return model.norm(hand.collapse(X))


class Heads(nn.Module):
    """A classifier behind every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PreNorm() for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(self.head(self.norm(x)))
        return outputs


def heads_by_hand(model: Heads, hand: Streams, x: Tensor) -> list[Tensor]:
    X, outputs = hand.expand(x), []
    for number, layer in enumerate(model.layers):
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
        outputs.append(model.head(model.norm(hand.collapse(X))))
    return outputs


class Forms(nn.Module):
    """Every spelling of the add, and a factor on the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), MLP()) for _ in range(6)])

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.blocks
        x = x.add(blocks[0](x))
        x = torch.add(input=x, other=blocks[1](x))
        x = (x + blocks[2](x)) * 0.7
        x = x.add(blocks[3](x), alpha=2.0)
        x = sum([x, blocks[4](x)])
        return torch.add(blocks[5](x), x) / 1.4


def forms_by_hand(model: Forms, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, block in enumerate(model.blocks):
        X = hand.site(f"mhc_{number}", X, lambda u, at=block, k=number: at(u) * (2 if k == 3 else 1))
        if number == 2:
            X = hand.each(lambda x: 0.7 * x, X)
    return hand.collapse(X) / 1.4


class WrittenOut(nn.Module):
    """Attention written out in the layer's own forward, its mask made from the sizes at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        causal = torch.tril(torch.ones(x.size(1), x.size(1), dtype=torch.bool))
        scores = (q @ k.mT / WIDTH**0.5).masked_fill(~causal, float("-inf"))
        x = x + scores.softmax(-1) @ v
        return x + self.mlp(self.norm2(x))


def written_out_by_hand(model: Stack, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):

        def attend(u: Tensor, at: WrittenOut = layer) -> Tensor:
            q, k, v = at.qkv(at.norm1(u)).chunk(3, dim=-1)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        X = hand.site(f"layers.{number}.mhc_0", X, attend)
        X = hand.site(f"layers.{number}.mhc_1", X, lambda u, at=layer: at.mlp(at.norm2(u)))
    return model.norm(hand.collapse(X))


KINDS = (
    Kind(
        "attention written out",
        lambda: Stack([WrittenOut() for _ in range(2)]),
        one,
        written_out_by_hand,
        (names("layers.{}", 2, 2),),
    ),
    Kind(
        "siamese",
        Siamese,
        lambda: (features(2, 5, WIDTH), features(3, 7, WIDTH)),
        siamese_by_hand,
        (names("encoder.layers.{}", 2, 2),),
    ),
    Kind(
        "tuple argument",
        TupleArgument,
        lambda: (features(2, 5, WIDTH), features(2, 5, 1)),
        tuple_by_hand,
        (names("layers.{}", 2, 2),),
    ),
    *(
        Kind(
            f"{operation} in the parent",
            lambda operation=operation: Between(operation),
            one,
            between_by_hand,
            (names("layers.{}", 3, 2),),
        )
        for operation in ("norm", "relu", "transposition")
    ),
    Kind(
        "segments", lambda: Segments([PreNorm() for _ in range(4)]), one, segments_by_hand, (names("layers.{}", 4, 2),)
    ),
    Kind("a head behind every layer", Heads, one, heads_by_hand, (names("layers.{}", 3, 2),)),
    Kind("spellings of the add", Forms, one, forms_by_hand, (tuple(f"mhc_{k}" for k in range(6)),)),
)

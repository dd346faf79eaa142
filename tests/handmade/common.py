"""What a kind of model is for the tests, and the small blocks that the models are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oracle import Streams

WIDTH = 16
VOCABULARY = 40


@dataclass(frozen=True)
class Kind:
    """An ordinary residual model and the n-stream model of the same kind, written by hand.

    Attributes:
        name: of the kind.
        build: () -> the ordinary model; called under a fixed seed.
        inputs: () -> positional arguments; called under a fixed seed.
        by_hand: (original model, Streams, *inputs) -> what the n-stream model returns. It uses the model's modules and
            calls none that holds an add.
        streams: the expected site names, stream by stream, in execution order, each site once.
        channel_dim: the trunk's channels.
        options: further options of the conversion.
        excluded: the sites among `streams` that have no parameters.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    by_hand: Callable[..., Any]
    streams: tuple[tuple[str, ...], ...]
    channel_dim: int = -1
    options: Mapping[str, Any] = field(default_factory=dict)
    excluded: frozenset[str] = frozenset()

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """The ordinary model in fp64, in eval mode, no parameter or statistic at a value that hides a mistake."""
        torch.manual_seed(0)
        model = self.build().double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.25 * torch.randn_like(p))
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(0, 0.2)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return model

    def arguments(self) -> tuple[Tensor, ...]:
        """The same inputs at every call, as leaves that take a gradient where they are floating."""
        torch.manual_seed(1)
        return tuple(t.requires_grad_() if t.is_floating_point() else t for t in self.inputs())

    def sites(self) -> list[str]:
        """The names of the sites with parameters."""
        return [name for stream in self.streams for name in stream if name not in self.excluded]


def features(*shape: int) -> Tensor:
    """Random inputs in fp64."""
    return torch.randn(*shape, dtype=torch.float64)


def tokens(batch: int = 2, length: int = 5) -> Tensor:
    """Random token numbers (batch, length)."""
    return torch.randint(VOCABULARY, (batch, length))


def names(holders: str, count: int, sites: int) -> tuple[str, ...]:
    """Site names of `count` layers with `sites` sites each; `holders` has a {} for the layer's number."""
    return tuple(f"{holders.format(layer)}.mhc_{k}" for layer in range(count) for k in range(sites))


class Attention(nn.Module):
    """Self-attention, or cross-attention where a memory is given. (B, T, C) -> (B, T, C)"""

    def __init__(self, causal: bool = False, dropout: float = 0.0, heads: int = 2) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.causal, self.heads = causal, heads

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        k, v = self.kv(x if memory is None else memory).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in (self.q(x), k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.dropout(self.out(mixed.transpose(-2, -3).flatten(-2)))


class MLP(nn.Module):
    """(..., C) -> (..., C)"""

    def __init__(self, dropout: float = 0.0, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x))))


class PreNorm(nn.Module):
    """The layer of GPT-2: two sites."""

    def __init__(self, causal: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention(causal, dropout)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), MLP(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


def prenorm_by_hand(layer: PreNorm, hand: Streams, name: str, X: Tensor) -> Tensor:
    """A `PreNorm` layer on the state X."""
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.attn(layer.norm1(u)))
    return hand.site(f"{name}.mhc_1", X, lambda u: layer.mlp(layer.norm2(u)))


class Stack(nn.Module):
    """Layers in a row, called by a parent that holds no add, a norm after the last."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *context)
        return self.norm(x)


def stack_by_hand(by_hand: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """From (layer, Streams, name, X, *context) -> X of a layer, the same of a `Stack` of such layers."""

    def run(model: Stack, hand: Streams, x: Tensor, *context: Tensor) -> Tensor:
        X = hand.expand(x)
        for number, layer in enumerate(model.layers):
            X = by_hand(layer, hand, f"layers.{number}", X, *context)
        return model.norm(hand.collapse(X))

    return run


def stack_of(
    name: str,
    layer: Callable[[], nn.Module],
    by_hand: Callable[..., Tensor],
    sites: int,
    count: int = 2,
    inputs: Callable[[], tuple[Tensor, ...]] = lambda: (features(2, 5, WIDTH),),
    **further: Any,
) -> Kind:
    """A kind whose model is a `Stack` of `count` equal layers with `sites` sites each."""
    return Kind(
        name,
        lambda: Stack([layer() for _ in range(count)]),
        inputs,
        stack_by_hand(by_hand),
        (names("layers.{}", count, sites),),
        **further,
    )

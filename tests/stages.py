"""Stages of pipelines, run one after another in one process; and models that are cut into stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import MLP, VOCABULARY, WIDTH, Attention
from mhc_rewrite.distributed import pipeline_stage

Parts = Sequence[Sequence[str]]


def cut(model: nn.Module, parts: Parts, example: Any) -> list[nn.Module]:
    return [pipeline_stage(model, parts, index, example) for index in range(len(parts))]


def in_stages(
    stages: Sequence[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[[Any], Tensor]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """Loss of the last stage after backward through all, as schedules run them: what passes is cut out of the graph.

    Returns what passed, too.
    """
    passed: list[tuple[Tensor, ...]] = []
    made: list[Any] = []
    came = args
    for stage in stages:
        out = stage(*came, **kwargs)
        made.append(out)
        if stage is not stages[-1]:
            sent = out if isinstance(out, tuple) else (out,)
            assert all(type(x) is Tensor and x.is_contiguous() and not x._is_view() for x in sent)
            came = tuple(x.detach().requires_grad_(x.requires_grad) for x in sent)
            passed.append(came)
    value = loss(made[-1])
    value.backward()
    for out, leaves in zip(reversed(made[:-1]), reversed(passed), strict=True):
        sent = out if isinstance(out, tuple) else (out,)
        pairs = [(x, leaf.grad) for x, leaf in zip(sent, leaves, strict=True) if leaf.grad is not None]
        torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
    return value.detach(), passed


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Rotated(nn.Module):
    """A layer of a decoder; takes its tables by position."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention(True, dropout)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), MLP(dropout)

    def forward(self, x: Tensor, freqs: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.norm1(x) * freqs
        x = x + self.attn(h if mask is None else h * mask.unsqueeze(-1))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """As in torchtitan: layers by name, a table as a buffer, and parts that another stage may have."""

    freqs: Tensor

    def __init__(self, layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.register_buffer("freqs", torch.linspace(0.5, 1.5, 32).unsqueeze(-1) + torch.zeros(WIDTH), persistent=False)
        self.layers = nn.ModuleDict({str(k): Rotated(dropout) for k in range(layers)})
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.tok_embeddings(tokens) if self.tok_embeddings is not None else tokens
        for layer in self.layers.values():
            h = layer(h, self.freqs[: h.shape[1]], mask)
        h = self.norm(h) if self.norm is not None else h
        return self.output(h) if self.output is not None else h


class Embedded(nn.Module):
    """Parameters of the root itself: positions at the start, a bias that all layers read, a scale at the end; dropout
    between its modules."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.randn(16, WIDTH))
        self.gain = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.layers = nn.ModuleList(Rotated(dropout) for _ in range(4))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tok(tokens) + self.positions[: tokens.shape[1]]
        h = F.dropout(h, self.dropout, self.training)
        keep = F.dropout(
            torch.ones(tokens.shape, dtype=h.dtype), self.dropout, self.training
        )  # the same for all layers
        for layer in self.layers:
            h = layer(h, self.gain, keep)
        return self.head(F.dropout(h * self.scale, self.dropout, self.training))


class WithBalance(nn.Module):
    """Layers that return a loss beside the trunk, as routers do."""

    class Layer(Rotated):
        def forward(self, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            x = x + self.attn(self.norm1(x) + first)
            y = self.mlp(self.norm2(x))
            return x + y, y.square().mean()

    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(self.Layer() for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = first = self.tok(tokens)
        total = h.new_zeros(())
        for layer in self.layers:
            h, loss = layer(h, first)
            total = total + loss
        return self.head(h), total, h


class Images(nn.Module):
    """Channels first."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
            self.second = nn.Conv2d(WIDTH, WIDTH, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.conv(self.norm(x))
            return x + self.second(F.gelu(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.blocks = nn.Sequential(*(self.Block() for _ in range(4)))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class Crossed(nn.Module):
    """Two streams: queries read a memory in every layer, both go through all cuts."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), MLP()

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            x = x + self.attn(self.norm(x), memory)
            return x + self.mlp(x)

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ours = nn.ModuleList(Rotated() for _ in range(3))
        self.theirs = nn.ModuleList(self.Layer() for _ in range(3))
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self.left(x), self.right(y)
        ones = x.new_ones(WIDTH)
        for one, other in zip(self.ours, self.theirs, strict=True):
            x = one(x, ones)
            y = other(y, x)
        return self.head(torch.cat([x.mean(1), y.mean(1)], -1))

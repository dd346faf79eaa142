"""Residual adds that do not look like one: differences, fused operators, stacks, `out=`, sums over some tokens."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Kind, features, stack_of
from oracle import Streams

SHAPE = (2, 5, WIDTH)
ROWS = (0, 2, 3)


class Layer(nn.Module):
    """A layer whose forward is one of the functions below."""

    def __init__(self, forward: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.run = forward
        self.norm, self.mlp, self.linear = nn.LayerNorm(WIDTH), MLP(0.1), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Parameter(2 + 4 * torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def f(self, x: Tensor) -> Tensor:
        return self.linear(self.gate * self.mlp(self.norm(x)))

    def factor(self, x: Tensor) -> Tensor:
        """What a fused product multiplies with `linear.weight`."""
        return self.gate * self.mlp(self.norm(x)) + self.linear.bias


@dataclass(frozen=True)
class Spelling:
    """`run(layer, x)` is `trunk(x) + branch(x)`."""

    run: Callable[[Layer, Tensor], Tensor]
    branch: Callable[[Layer, Tensor], Tensor]
    trunk: Callable[[Layer, Tensor], Tensor] = lambda layer, x: x


def rows(x: Tensor) -> Tensor:
    return torch.tensor(ROWS, device=x.device)


def tokens(x: Tensor) -> Tensor:
    """The rows of every channel, for `scatter_add`."""
    return rows(x)[None, :, None].expand(x.shape[0], len(ROWS), x.shape[-1])


def f_of_rows(layer: Layer, x: Tensor) -> Tensor:
    """f of some tokens, zero for all others."""
    inside = torch.zeros(x.shape[1], dtype=x.dtype)
    inside[list(ROWS)] = 1
    picked = layer.f(x[:, list(ROWS)])
    return torch.stack([picked[:, ROWS.index(t)] if t in ROWS else 0 * x[:, t] for t in range(x.shape[1])], 1)


def out_of_nowhere(layer: Layer, x: Tensor) -> Tensor:
    """`x.copy_(x + f(x))` on memory that is the layer's own."""
    x = x.clone()
    x.copy_(x + layer.f(x))
    return x


def written_over(layer: Layer, x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    y[:] = x + layer.f(x)
    return y


def isub(layer: Layer, x: Tensor) -> Tensor:
    x = 1 * x
    x -= layer.f(x)
    return x


def addmm(layer: Layer, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    return torch.addmm(flat, layer.factor(flat), layer.linear.weight).view(x.shape)


def addmm_(layer: Layer, x: Tensor) -> Tensor:
    flat = x.flatten(0, 1).clone()
    return flat.addmm_(layer.factor(flat), layer.linear.weight, beta=0.5, alpha=0.3).view(x.shape)


def baddbmm(layer: Layer, x: Tensor) -> Tensor:
    weight = torch.stack([layer.linear.weight] * 2)
    return torch.baddbmm(x, layer.factor(x), weight, beta=0.9)


def index_add_(layer: Layer, x: Tensor) -> Tensor:
    x = x.clone()
    return x.index_add_(1, rows(x), layer.f(x[:, rows(x)]), alpha=0.5)


def cat_and_view(layer: Layer, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    return torch.cat([x, layer.f(x)], dim=-1).view(batch, length, 2, width).sum(2)


def product(layer: Layer, x: Tensor) -> Tensor:
    return layer.factor(x) @ layer.linear.weight


@torch.jit.script
def dropped_and_added(x: Tensor, branch: Tensor, bias: Tensor, p: float, training: bool) -> Tensor:
    return x + F.dropout(branch + bias, p=p, training=training)


SPELLINGS: dict[str, Spelling] = {
    "x - f": Spelling(lambda m, x: x - m.f(x), lambda m, u: -m.f(u)),
    "x.sub(f, alpha)": Spelling(lambda m, x: x.sub(m.f(x), alpha=0.5), lambda m, u: -0.5 * m.f(u)),
    "subtract": Spelling(lambda m, x: torch.subtract(x, m.f(x)), lambda m, u: -m.f(u)),
    "rsub": Spelling(lambda m, x: torch.rsub(m.f(x), x, alpha=2), lambda m, u: -2 * m.f(u)),
    "-f + x": Spelling(lambda m, x: -m.f(x) + x, lambda m, u: -m.f(u)),
    "f - x": Spelling(lambda m, x: m.f(x) - x, lambda m, u: m.f(u), lambda m, x: -x),
    "x -= f": Spelling(isub, lambda m, u: -m.f(u)),
    "x + a - b": Spelling(lambda m, x: x + m.f(x) - m.linear(x), lambda m, u: m.f(u) - m.linear(u)),
    "addmm": Spelling(addmm, product),
    "addmm_": Spelling(addmm_, lambda m, u: 0.3 * product(m, u), lambda m, x: 0.5 * x),
    "baddbmm": Spelling(baddbmm, product, lambda m, x: 0.9 * x),
    "addcmul": Spelling(
        lambda m, x: torch.addcmul(x, m.gate, m.f(x), value=0.5), lambda m, u: 0.5 * m.gate * m.f(u)
    ),
    "x.addcdiv": Spelling(
        lambda m, x: x.addcdiv(m.f(x), 1 + m.gate.cos()), lambda m, u: m.f(u) / (1 + m.gate.cos())
    ),
    "lerp by a number": Spelling(
        lambda m, x: torch.lerp(x, m.f(x), 0.3), lambda m, u: 0.3 * m.f(u), lambda m, x: 0.7 * x
    ),
    "lerp by a gate": Spelling(
        lambda m, x: x.lerp(m.f(x), m.gate.sin()),
        lambda m, u: m.gate.sin() * m.f(u),
        lambda m, x: (1 - m.gate.sin()) * x,
    ),
    "lerp from the branch": Spelling(
        lambda m, x: torch.lerp(m.f(x), x, 0.7), lambda m, u: 0.3 * m.f(u), lambda m, x: 0.7 * x
    ),
    "stack, sum": Spelling(lambda m, x: torch.stack([x, m.f(x)]).sum(0), lambda m, u: m.f(u)),
    "stack, sum of three": Spelling(
        lambda m, x: torch.stack((m.f(x), x, m.linear(x)), -1).sum(dim=(-1,)), lambda m, u: m.f(u) + m.linear(u)
    ),
    "stack, mean": Spelling(
        lambda m, x: 2 * torch.mean(torch.stack([x, m.f(x)], dim=1), dim=1), lambda m, u: m.f(u)
    ),
    "stack, numpy's names": Spelling(
        lambda m, x: torch.stack((x, m.f(x)), 2).sum(axis=2, keepdims=True).squeeze(2), lambda m, u: m.f(u)
    ),
    "cat, sum": Spelling(lambda m, x: torch.cat([x[None], m.f(x)[None]]).sum(0), lambda m, u: m.f(u)),
    "cat, view, sum": Spelling(cat_and_view, lambda m, u: m.f(u)),
    "sum of a list": Spelling(lambda m, x: sum([x, m.f(x)]), lambda m, u: m.f(u)),
    "sum of three": Spelling(lambda m, x: sum((m.f(x), x, m.linear(x))), lambda m, u: m.f(u) + m.linear(u)),
    "reduce": Spelling(
        lambda m, x: functools.reduce(operator.add, [x, m.f(x), m.linear(x)]), lambda m, u: m.f(u) + m.linear(u)
    ),
    "onto zeros": Spelling(lambda m, x: torch.zeros_like(x) + x + m.f(x), lambda m, u: m.f(u)),
    "scripted": Spelling(
        lambda m, x: dropped_and_added(x, m.f(x), m.gate, 0.0, m.training), lambda m, u: m.f(u) + m.gate
    ),
    "copy_": Spelling(out_of_nowhere, lambda m, u: m.f(u)),
    "written over": Spelling(written_over, lambda m, u: m.f(u)),
    "index_add": Spelling(lambda m, x: x.index_add(1, rows(x), m.f(x[:, rows(x)])), f_of_rows),
    "index_add_": Spelling(index_add_, lambda m, u: 0.5 * f_of_rows(m, u)),
    "scatter_add": Spelling(lambda m, x: x.scatter_add(1, tokens(x), m.f(x[:, rows(x)])), f_of_rows),
    "index_put": Spelling(
        lambda m, x: torch.index_put(
            x, (torch.arange(2)[:, None], rows(x)[None]), m.f(x[:, rows(x)]), accumulate=True
        ),
        f_of_rows,
    ),
}  # fmt: skip


def by_hand(spelling: Spelling) -> Callable[[Layer, Streams, str, Tensor], Tensor]:
    def run(layer: Layer, hand: Streams, name: str, X: Tensor) -> Tensor:
        return hand.site(f"{name}.mhc_0", X, lambda u: spelling.branch(layer, u), lambda x: spelling.trunk(layer, x))

    return run


def kind(name: str, spelling: Spelling) -> Kind:
    return stack_of(
        name, lambda: Layer(spelling.run), by_hand(spelling), 1, count=3, inputs=lambda: (features(*SHAPE),)
    )


KINDS = tuple(kind(name, spelling) for name, spelling in SPELLINGS.items())

"""Calls new to a converted model, compiled, with arguments of many kinds: what a capture is given in the trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from mhc_rewrite import mhcify
from mhc_rewrite.torch_private import MadeWhileTracing, while_tracing

WIDTH = 16


def of_dict(y: Tensor, given: Any) -> Tensor:
    return y * given["factor"] if type(given) is dict else y


def of_tuple(y: Tensor, given: Any) -> Tensor:
    return y * sum(given) if isinstance(given, tuple) else y * max(given)


def of_range(y: Tensor, given: Any) -> Tensor:
    return y * len(given) * given[0]


def of_slice(y: Tensor, given: Any) -> Tensor:
    return torch.cat([y[:, given] * 2, y[:, given.stop :]], dim=1)


KINDS: dict[str, tuple[Any, Any]] = {
    "dict": (of_dict, {"factor": 0.5}),
    "dict of tensors": (of_dict, {"factor": torch.linspace(0.5, 2.0, WIDTH)}),
    "dict by number": (lambda y, given: y * given[3], {3: 0.5}),
    "tuple": (of_tuple, (0.5, 2.0)),
    "list": (of_tuple, [0.5, 2.0]),
    "range": (of_range, range(2, 5)),
    "slice": (of_slice, slice(0, 2)),
    "dtype": (lambda y, given: y.to(given).float() * 2, torch.bfloat16),
    "flag": (lambda y, given: y if given is True else y * 2, True),
    "number": (lambda y, given: y * given, 3),
}


class Layer(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.use = use

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        y = self.mixer(self.norm(x)).tanh()
        x = x + (y if given is None else self.use(y, given))
        return x + self.mlp(self.norm(x)).tanh()


class Net(nn.Module):
    def __init__(self, use: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(use) for _ in range(3)])

    def forward(self, x: Tensor, given: Any = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, given)
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_seen_as_in_an_eager_call(kind: str) -> None:
    use, given = KINDS[kind]
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = mhcify(Net(use), (torch.randn(2, 5, WIDTH),))
    oracle.perturb(model)
    eager, x, seen = copy.deepcopy(model), torch.randn(2, 5, WIDTH), []
    for call, owner in ((torch.compile(model, backend="aot_eager"), model), (eager, eager)):
        call(x, given).square().sum().backward()
        seen.append([p.grad for p in owner.parameters()])
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-4, atol=1e-5)


def as_given(value: Any) -> list[Any]:
    return [value]


CONTAINERS = {
    "set": {"a", "b"},
    "frozenset": frozenset({1}),
    "set in a dict": {"a": {2}},
    "sets in others": ({"a"}, [{3}]),
    "dict": {1: "a"},
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_stay_what_they_are(kind: str) -> None:
    holder, container = MadeWhileTracing(), CONTAINERS[kind]

    def call(x: Tensor, given: Any) -> Tensor:
        return x + len(while_tracing(holder, as_given, given))

    torch._dynamo.reset()
    torch.compile(call, backend="eager")(torch.zeros(2), container)
    assert list(vars(holder).values()) == [[container]]

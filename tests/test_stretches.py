"""`n_streams` by stretches of a model: streams contract and expand between sites, held against models written by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from handmade import BY_NAME, KINDS, Kind
from handmade.common import features, names
from mhc_rewrite import mhcify
from mhc_rewrite.sites import streams
from oracle import Streams
from test_perturbed import MOVED, PERTURBED, PRESERVED, backward, compare_gradients, leaves, relative, run

PAIRS = [(old, new) for old in range(2, 17) for new in range(2, 17) if old != new]


def resizing(old: int, new: int) -> Tensor:
    """The (new, old) matrix by which streams change their number, by cells of mass: a cell a row and column.

    Two groups of streams, the first ceil(n/2) and the rest. As much of a group's mass as fits stays in its group.
    """
    groups = [[range((n + 1) // 2), range((n + 1) // 2, n)] for n in (old, new)]
    mass = [len(groups[0][0]) / old, len(groups[1][0]) / new]  # of the first group, before and behind
    kept = min(mass), min(1 - mass[0], 1 - mass[1])
    moved = max(mass[0] - mass[1], 0), max(mass[1] - mass[0], 0)
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for g, h, whole in ((0, 0, kept[0]), (1, 1, kept[1]), (0, 1, moved[0]), (1, 0, moved[1])):
        from_, to = groups[0][g], groups[1][h]
        cells = len(from_) * len(to)
        for cell in range(cells):
            matrix[to[cell // len(from_)], from_[cell // len(to)]] += whole / cells * new
    return matrix


def resized(X: Tensor, new: int, dim: int) -> Tensor:
    """The streams X, n on axis `dim`, as another number of them."""
    old = X.shape[dim]
    return X if old == new else torch.tensordot(X.movedim(dim, -1), resizing(old, new).mT, 1).movedim(-1, dim)


def n_of(params: oracle.Params) -> int:
    """The bias has n^2 + 2n numbers."""
    return math.isqrt(len(params.bias) + 1) - 1


class Stretched(Streams):
    """Where a site reads them, streams become as many as it has parameters for, and stay so."""

    def read(self, name: str, X: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        return super().read(name, resized(X, n_of(self.params(name)), self.dim))


# -- the matrix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel_dim", (-1, 1))
def test_resized_streams(channel_dim: int) -> None:
    dim = streams.stream_dim(channel_dim)
    for old, new in PAIRS:
        matrix = resizing(old, new)
        one = torch.ones
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(1), one(new).double())
        torch.testing.assert_close(matrix.sum(0), one(old).double() * new / old)
        X = torch.randn(3, old, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(old))
        X = X if channel_dim == -1 else X.unsqueeze(-1)
        got = streams.resized(X, new, channel_dim)
        torch.testing.assert_close(got, resized(X, new, dim))
        torch.testing.assert_close(got.mean(dim), X.mean(dim))
        # What each of the two groups of "preserve" has in common, it has in common behind.
        first, halves = (old + 1) // 2, X.narrow(dim, 0, 2)
        parted = torch.cat([halves.narrow(dim, k, 1).expand_as(X).narrow(dim, 0, size)
                            for k, size in ((0, first), (1, old - first))], dim)  # fmt: skip
        behind = streams.resized(parted, new, channel_dim)
        for part in behind.split([(new + 1) // 2, new // 2], dim):
            torch.testing.assert_close(part, part.narrow(dim, 0, 1).expand_as(part))


def numbered(kind: Kind) -> dict[str, int]:
    """Another n at most sites."""
    cycle = (4, 2, 2, 3, 5)
    sites = dict.fromkeys(name for stream in kind.streams for name in stream)
    return {name: cycle[k % len(cycle)] for k, name in enumerate(sites) if name not in kind.excluded}


def slices(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients, those of a site split by what they make: pre, post, res."""
    grads = {}
    for name, p in parameters.items():
        assert p.grad is not None, f"{name} has no gradient"
        match = oracle.SITE_PARAMETER.search(name)
        if match is None:
            grads[name] = p.grad
            continue
        n = math.isqrt(p.shape[-1] + 1) - 1
        widths = [1, 1, 1] if match[1] == "alpha" else [n, n, n * n]
        for part, grad in zip(("pre", "post", "res"), p.grad.split(widths, dim=-1)):
            grads[f"{name}[{part}]"] = grad
    return grads


class Compared:
    """A converted model beside the original and the model written by hand."""

    def __init__(self, kind: Kind, n_streams: Any, **options: Any) -> None:
        self.kind = kind
        self.original = kind.model()
        self.converted = mhcify(kind.model(), kind.arguments(), n_streams=n_streams, **{**kind.options, **options})

    def check(self) -> None:
        """It starts as the original, and perturbed it is the model written by hand; in both modes."""
        self.check_preserved()
        oracle.perturb(self.converted, seed=1)
        for train in (False, True):
            self.original.train(train), self.converted.train(train)
            self.check_perturbed()

    def check_preserved(self) -> None:
        """The converted model computes the original function."""
        for train in (False, True):
            with torch.no_grad():
                models = self.original.train(train), self.converted.train(train)
                want, got = (run(model, *self.kind.arguments()) for model in models)
            for mine, its in zip(got, want, strict=True):
                assert relative(mine, its) <= PRESERVED, f"at initialisation: {relative(mine, its):.1e}"

    def check_perturbed(self, hand: type[Streams] = Stretched) -> None:
        """Outputs and gradients of the two are equal, and outputs far from those of the original."""
        with torch.no_grad():
            unperturbed = run(copy.deepcopy(self.original), *self.kind.arguments())
        state = {name: p.detach().clone().requires_grad_() for name, p in oracle.site_parameters(self.converted)}
        by_hand = hand(state, 1, self.kind.channel_dim)
        inputs, inputs_by_hand = self.kind.arguments(), self.kind.arguments()
        got = run(self.converted, *inputs)
        want = run(self.kind.by_hand, self.original, by_hand, *inputs_by_hand)
        for mine, its in zip(got, want, strict=True):
            assert relative(mine, its) <= PERTURBED, f"output: {relative(mine, its):.1e}"
        assert set(by_hand.seen) == set(self.kind.sites())
        assert max(relative(its, before) for its, before in zip(want, unperturbed)) >= MOVED
        mine = dict(self.converted.named_parameters()) | leaves(inputs)
        its = dict(self.original.named_parameters()) | state | leaves(inputs_by_hand)
        for p in (*mine.values(), *its.values()):
            p.grad = None
        backward(got)
        backward(want)
        ends = {end for stream in self.kind.streams for end in (stream[0], stream[-1])}
        compare_gradients(slices(mine), slices(its), ends)


def chain() -> list[int]:
    """Numbers of streams in which every pair follows one another once: an Euler tour."""
    left = {old: [new for new in range(16, 1, -1) if new != old] for old in range(2, 17)}
    tour, path = [], [2]
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            tour.append(path.pop())
    return tour[::-1]


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.tanh(self.mlp(x))


class Steps(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def steps_by_hand(model: Steps, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, step in enumerate(model.steps):
        X = hand.site(f"steps.{number}.mhc_0", X, lambda u, step=step: 0.1 * torch.tanh(step.mlp(u)))
    return hand.collapse(X)


def test_every_pair() -> None:
    numbers = chain()
    assert sorted(zip(numbers, numbers[1:])) == PAIRS
    count = len(numbers)
    sites = names("steps.{}", count, 1)
    kind = Kind("steps", lambda: Steps(count), lambda: (features(2, 3, 4),), steps_by_hand, (sites,))
    compared = Compared(kind, {f"steps.{number}": n for number, n in enumerate(numbers)})
    compared.check_preserved()
    # Gradients of so many sites would show what rounding comes to.
    oracle.perturb(compared.converted, seed=1)
    state = dict(compared.converted.named_parameters())
    with torch.no_grad():
        (got,), (x,) = run(compared.converted, *kind.arguments()), kind.arguments()
        assert relative(got, steps_by_hand(compared.original, Stretched(state, 1), x)) <= PERTURBED


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_equals_hand_written(kind: Kind) -> None:
    numbers = numbered(kind)
    assert len(set(numbers.values())) > 1
    compared = Compared(kind, numbers)
    state = compared.converted.state_dict()
    assert {name: n_of(oracle.site_params(state, name)) for name in kind.sites()} == numbers
    compared.check()

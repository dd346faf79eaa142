"""`n_streams` by stretches: streams contract and expand between sites; held against models written by hand."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_rewrite
import oracle
import streams_text
from families_text import BY_NAME as TEXT
from family import Family, perturbed_errors, preserve_error
from handmade import BY_NAME, Kind
from handmade.common import WIDTH, PreNorm, Stack, features, names, prenorm_by_hand
from mhc_rewrite import HyperConnection, graphs, mhcify, plan
from mhc_rewrite.conversion.install import role_of
from mhc_rewrite.cost import best_segment, cost
from mhc_rewrite.sites import streams
from oracle import Streams
from test_perturbed import MOVED, PERTURBED, PRESERVED, backward, compare_gradients, leaves, relative, run
from test_recompute import annotated
from test_recompute_eager import TOKENS, alive, close, converted, gradients, inputs, stack

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
    assert sorted(itertools.pairwise(numbers)) == PAIRS
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


# One of each sort.
SAMPLE = (
    "nanogpt", "post-norm, add in a child", "encoder-decoder", "torch decoder, norm last", "shared layer",
    "excluded, pre-norm", "post-norm without layers.0.mhc_1", "parallel, two norms", "in place, alias", "DeepNorm",
    "dropout on the trunk", "reshape on the trunk", "flat", "ResNet", "BatchNorm on the trunk", "two streams in turn",
    "hidden states", "Conformer", "joint block", "U-ViT", "checkpoints", "pre-activation, 2d", "relu in the parent",
)  # fmt: skip


@pytest.mark.parametrize("kind", [BY_NAME[name] for name in SAMPLE], ids=str)
def test_equals_hand_written(kind: Kind) -> None:
    numbers = numbered(kind)
    assert len(set(numbers.values())) > 1
    compared = Compared(kind, numbers)
    state = compared.converted.state_dict()
    assert {name: n_of(oracle.site_params(state, name)) for name in kind.sites()} == numbers
    compared.check()


class Uniform(Streams):
    """Streams become their mean where their number changes: keeps the function, and is another model."""

    def read(self, name: str, X: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        n = n_of(self.params(name))
        changes = X.shape[self.dim] not in (1, n)
        X = torch.stack([self.collapse(X)] * n, self.dim) if changes or X.shape[self.dim] == 1 else X
        return super().read(name, X)


@pytest.mark.parametrize("name", ("nanogpt", "post-norm", "ResNet"))
def test_a_change_that_forgets_the_streams_is_seen(name: str) -> None:
    compared = Compared(BY_NAME[name], numbered(BY_NAME[name]))
    oracle.perturb(compared.converted)
    compared.check_perturbed()
    with pytest.raises(AssertionError, match="output: "):
        compared.check_perturbed(Uniform)


@pytest.mark.parametrize(
    "connection,init",
    [
        *((name, "preserve") for name in ("hc", "deepseek_v4", "identity", "mhc_lite", "tbp", "cayley")),
        ("mhc", "equal"), ("mhc", "near_identity"), ("kromhc", "equal"),
    ],
)  # fmt: skip
def test_other_connections_and_starts(connection: str, init: str) -> None:
    kind = BY_NAME["nanogpt"]
    compared = Compared(kind, {"*.0": 4, "*": 2 if connection == "kromhc" else 3}, connection=connection, init=init)
    with torch.no_grad():
        want, got = (run(model, *kind.arguments()) for model in (compared.original, compared.converted))
    assert relative(got[0], want[0]) <= (1e-5 if connection == "deepseek_v4" else PRESERVED)


@pytest.mark.parametrize("family", [TEXT[name] for name in ("Llama", "T5")], ids=str)
def test_families_equal_hand_written(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = (2, 2, 4, 3)
    numbers = {name: cycle[k % 4] for stream in family.streams for k, name in enumerate(stream)}
    monkeypatch.setattr(mhc_rewrite, "mhcify", functools.partial(mhcify, n_streams=numbers))

    def by_hand(params: dict[str, oracle.Params]) -> Streams:
        assert {name: n_of(site) for name, site in params.items()} == numbers
        state = {f"{name}.{field}": value for name, site in params.items() for field, value in site._asdict().items()}
        return Stretched(state, 1)

    monkeypatch.setattr(streams_text, "streams_of", by_hand)
    assert preserve_error(family, torch.float64) <= PRESERVED
    errors = perturbed_errors(family)
    assert errors.output <= PERTURBED and errors.gradient <= PERTURBED and errors.moved >= MOVED


# -- what a state meets on its way -------------------------------------------------------------------------------------


class Chosen(Stack):
    """A stack of which a call says the layers."""

    def forward(self, x: Tensor, layers: tuple[int, ...] = (0, 1, 2, 3)) -> Tensor:
        for number in layers:
            x = self.layers[number](x)
        return self.norm(x)


def chosen() -> nn.Module:
    torch.manual_seed(0)
    return Chosen([PreNorm() for _ in range(4)]).double()


def test_layers_in_any_order() -> None:
    """A carrier gets as many streams as the one before had, whichever that was; an excluded one changes nothing."""
    original, x = chosen(), features(2, 5, WIDTH)
    model = mhcify(chosen(), (x,), n_streams={"layers.0": 4, "layers.1": 2, "layers.2-3": 3}, exclude="layers.2")
    oracle.perturb(model)

    def by_hand(layers: tuple[int, ...]) -> Tensor:
        hand = Stretched(dict(model.named_parameters()), 1)
        X = hand.expand(x)
        for number in layers:
            layer = original.layers[number]
            if number == 2:
                X = hand.plain(X, lambda u, layer=layer: layer.attn(layer.norm1(u)))
                X = hand.plain(X, lambda u, layer=layer: layer.mlp(layer.norm2(u)))
            else:
                X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
        return original.norm(hand.collapse(X))

    for layers in ((0, 1, 2, 3), (1, 3), (2, 3), (2,), (3, 0), (2, 2, 0, 2, 1), (3, 2, 1, 0), ()):
        assert relative(model(x, layers), by_hand(layers)) <= PERTURBED, layers
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(x, (3, 0)), model(x, (3, 0)))


def test_layers_share_a_graph_where_they_have_the_same_n() -> None:
    x = features(2, 5, WIDTH)
    model = mhcify(chosen(), (x,), n_streams={"layers.0": 4, "layers.1": 2, "*": 4})
    functions = [
        {variant.function for variants in role_of(layer).carrier.variants.values() for variant in variants}
        for layer in model.layers
    ]
    assert functions[2] & functions[3] and not functions[1] & (functions[0] | functions[2])


def test_streams_of_half_precision_keep_their_mean() -> None:
    """Weights of 1/3 in bf16 would not sum to 1."""
    for old, new in PAIRS:
        x = torch.randn(4, 1, 8).to(torch.bfloat16)
        got = streams.resized(x.repeat(1, old, 1), new, -1)
        assert got.dtype == torch.bfloat16 and torch.equal(got, x.repeat(1, new, 1)), (old, new)


def test_a_plain_number_makes_no_other_graphs() -> None:
    """And stretches with the same n compute the same."""
    x = features(2, 5, WIDTH)
    model, stretched = mhcify(chosen(), (x,), n_streams=3), mhcify(chosen(), (x,), n_streams={"*": 3})
    assert not any("resized" in node.target for graph in graphs(model) for node in graph.rewritten)
    for one in (model, stretched):
        oracle.perturb(one)
    torch.testing.assert_close(model(x), stretched(x), rtol=1e-12, atol=1e-12)


# -- recomputation, compilation ----------------------------------------------------------------------------------------

HALVES = {"layers.0-2": 4, "layers.3-5": 2}


@pytest.mark.parametrize("length", (1, 2, 3, 6, "auto", None))
def test_recompute_keeps_what_the_cost_model_says(length: int | str | None) -> None:
    """Less than the same sites on four streams do, by so much."""
    found, expected = [], []
    for n_streams in (HALVES, 4):
        found.append(alive(converted(stack(12), length, n_streams=n_streams)))
        of = cost(plan(stack(12)(), (inputs(),), n_streams=n_streams))
        kept = of.kept if length is None else of.kept_in_segments
        numbers = kept.states + kept.outputs + kept.coefficients + kept.mixes
        expected.append(of.evaluate(numbers, tokens=TOKENS, segment=length if isinstance(length, int) else None))
    assert found[1] - found[0] == expected[1] - expected[0] > 0


@pytest.mark.parametrize("trunk", (None, nn.LayerNorm(16)), ids=("plain", "norm on the trunk"))
def test_recompute_changes_nothing_else(trunk: nn.Module | None) -> None:
    models = [converted(stack(12, trunk=trunk), length, n_streams=HALVES) for length in (None, 1, 2, "auto")]
    lengths = [site.config.recompute for site in models[-1].modules() if isinstance(site, HyperConnection)]
    assert lengths == [best_segment(4, 6)] * 6 + [best_segment(2, 6)] * 6
    want, *others = map(gradients, models)
    for got in others:
        close(got, want)


def compiled_model() -> Any:
    """Four sites on four streams, two on three."""
    return converted(stack(6), None, n_streams={"layers.0-1": 4, "layers.2": 3})


@pytest.mark.slow
def test_compiled_by_the_backend() -> None:
    model = compiled_model()
    want = gradients(model)
    torch._dynamo.reset()
    compiled = mhc_rewrite.compile(model, fullgraph=True, options={"recompute": "auto"})
    close(gradients(model, lambda x: compiled(x)), want, 1e-4)


def test_layers_compiled_one_by_one() -> None:
    """They are of one class, so that Dynamo sees other numbers of streams come into the same code."""
    model = compiled_model()
    want = gradients(model)
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    close(gradients(model), want)


def test_segments_of_compiled_graphs_end_where_n_changes() -> None:
    model, x = compiled_model(), inputs()
    for recompute, lengths in ((3, [[3, 1], [2]]), ("auto", [[2, 2], [1, 1]])):
        assert annotated(lambda: model(x), recompute)[0].lengths == lengths

"""`n_streams` by stretches: streams contract and expand between sites; held against models written by hand."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
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
from mhc_rewrite import HyperConnection, MHCConfig, graphs, load_sites, mhcify, plan, report, save_sites
from mhc_rewrite.conversion.install import role_of
from mhc_rewrite.cost import FUSIONS, Stream, best_segment, cost, with_streams
from mhc_rewrite.errors import ConfigError, SitesError
from mhc_rewrite.sites import streams
from oracle import Streams
from test_cli import folder as _folder
from test_cli import run as cli
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


folder = _folder


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
    "connection,init", [("hc", "preserve"), ("deepseek_v4", "preserve"), ("mhc", "equal"), ("mhc", "near_identity")]
)
def test_other_connections_and_starts(connection: str, init: str) -> None:
    kind = BY_NAME["nanogpt"]
    compared = Compared(kind, {"*.0": 4, "*": 3}, connection=connection, init=init)
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


def test_compiled_equals_eager() -> None:
    model = compiled_model()
    want = gradients(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    close(gradients(model, lambda x: compiled(x)), want)
    torch._dynamo.reset()
    for layer in model.layers:  # of one class, so that Dynamo sees other numbers of streams come into the same code
        layer.compile(backend="aot_eager", fullgraph=True)
    close(gradients(model), want)


def test_segments_of_compiled_graphs_end_where_n_changes() -> None:
    model, x = compiled_model(), inputs()
    for recompute, lengths in ((3, [[3, 1], [2]]), ("auto", [[2, 2], [1, 1]])):
        assert annotated(lambda: model(x), recompute)[0].lengths == lengths


# -- options, plans, files ---------------------------------------------------------------------------------------------


def test_options_round_trip(tmp_path: Path) -> None:
    given = {"layers.0-11": 4, "a*": 2, "*": 3}
    config = MHCConfig(n_streams=given)
    assert config.n_streams == tuple(given.items()) == config.stretches and MHCConfig().stretches == ()
    config.save(tmp_path / "options.json")
    sorted_keys = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    for other in (
        MHCConfig.load(tmp_path / "options.json"), MHCConfig.from_dict(sorted_keys),
        MHCConfig(n_streams=config.n_streams), pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config, min_sites=2),
    ):  # fmt: skip
        assert other == config and hash(other) == hash(config)
    assert config != MHCConfig(n_streams=dict(reversed(given.items())))  # the first one that matches decides
    with pytest.raises(ConfigError, match=r"One site has one number of streams"):
        HyperConnection(8, config)


@pytest.mark.parametrize(
    "n_streams,said",
    [
        ({}, "n_streams takes an int, or pairs of a pattern and an int"),
        ([4, 2], "n_streams takes an int, or pairs"),
        ({3: 4}, 'takes name patterns, as in {"layers.0-11": 4, "layers.12-23": 2}, not 3'),
        ({"": 4}, "takes name patterns"),
        ((("a", 4), ("a", 2)), "has 'a' twice"),
        ({"a": 17}, "ints from 2 to 16, not 17 for 'a'"),
        ({"a": 0}, "ints from 2 to 16, not 0"),
        ({"a": True}, "ints from 2 to 16, not True"),
        ({"a": "4"}, "ints from 2 to 16, not '4'"),
        ({"a": 1, "*": 2}, r"one stream is a plain residual. .*exclude=\('a',\)"),
        ({"a": 2, "*": 1}, r"one stream is a plain residual. .*include=\('a',\)"),
        ({"*": 1}, "n_streams=1 leaves the whole model as it is"),
    ],
    ids=str,
)
def test_what_options_refuse(n_streams: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MHCConfig(n_streams=n_streams)


def test_a_sum_is_not_kept() -> None:
    with pytest.raises(ConfigError, match="collapse='sum' contradicts n_streams by stretches"):
        MHCConfig(n_streams={"*": 2}, collapse="sum", init="paper")


def stretched(n_streams: Any, **options: Any) -> list[int | None]:
    """n of the sites of `chosen`, in order."""
    return [site.n_streams for site in plan(chosen(), (features(2, 5, WIDTH),), n_streams=n_streams, **options).sites]


def test_patterns() -> None:
    assert stretched({"layers.0-2": 4, "layers.3": 2}) == [4] * 6 + [2] * 2
    assert stretched({"layers.1-2": 4, "*": 2}) == [2] * 2 + [4] * 4 + [2] * 2
    assert stretched({"*.mhc_0": 3, "layers.0-3": 2}) == [3, 2] * 4
    assert stretched({"layers.2-9.mhc_*": 3, "layers": 2}) == [2] * 4 + [3] * 4
    assert stretched({"layers.[02]": 3, "*": 2}) == [3, 3, 2, 2] * 2
    assert stretched({"layers": 3, "*": 2}) == [3] * 8
    assert stretched({"layers.0": 3}, include="layers.0") == [3] * 2
    assert stretched({"layers.0-3": 3}, exclude=("layers.1-2",)) == [3, 3, None, None, None, None, 3, 3]
    assert stretched(3) == [None] * 8


@pytest.mark.parametrize(
    "n_streams,said",
    [
        ({"layers.0-2": 4}, r"n_streams says nothing of site 'layers.3.mhc_0' .*Add '\*': 4, as the last one"),
        ({"layers.0-2": 4, "layer.3": 2}, "n_streams='layer.3' matches no site. Near: 'layers.3'"),
        ({"layers.4-7": 4, "*": 2}, "n_streams='layers.4-7' matches no site"),
        ({"*": 4, "layers.3": 2}, r"n_streams='layers.3' is of no effect: .* \('\*'\).* Put it before them"),
    ],
    ids=str,
)
def test_what_a_model_refuses(n_streams: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stretched(n_streams)


def test_the_advice_works() -> None:
    assert stretched({"layers.0-2": 4, "*": 4}) == [4] * 8
    assert stretched({"layers.3": 2, "*": 4}) == [4] * 6 + [2] * 2
    assert stretched({"layers.0-1": 2, "*": 4}, exclude=("layers.2",))[4:] == [None, None, 4, 4]


def test_plans_and_reports_say_it() -> None:
    x = (features(2, 5, WIDTH),)
    made = plan(chosen(), x, n_streams={"layers.0-1": 4, "*": 2}, exclude="layers.2.mhc_0")
    said = str(made)
    assert "(n = 4 at layers.0-1, 2 at *, mhc, init preserve)" in said
    assert "streams along it: 4 (4 sites), 2 (3 sites)" in said
    rows = [line.split() for line in said.splitlines() if "mhc_" in line]
    assert [(row[0], row[-3]) for row in rows if row[-3].isdigit()] == [
        ("layers.{0,1}.mhc_0", "4"), ("layers.{0,1}.mhc_1", "4"),
        ("layers.{2,3}.mhc_1", "2"), ("layers.3.mhc_0", "2"),
    ]  # fmt: skip
    model = mhcify(chosen(), x, n_streams={"layers.0-1": 4, "*": 2})
    added = sum(p.numel() for name, p in oracle.site_parameters(model))
    assert report(model).parameters_added == (added,) and cost(report(model).plan).parameters is not None
    shapes = {node.shape for graph in graphs(model) for node in graph.rewritten if node.role == "resize"}
    assert shapes == {(2, 5, 4, WIDTH), (2, 5, 2, WIDTH)}


def test_costs() -> None:
    """By hand: sites of each n, and what it takes to resize 4 streams to 2: 4C read and 2C written, and back."""
    made = plan(chosen(), (features(2, 5, WIDTH),), n_streams={"layers.0": 4, "*": 2})
    of = cost(made)
    assert of.streams == (Stream(WIDTH, 2, 2, 8, 4), Stream(WIDTH, 6, 6, 8, 2, 4))
    model = mhcify(chosen(), (features(2, 5, WIDTH),), n_streams={"layers.0": 4, "*": 2})
    assert of.evaluate(of.parameters) == sum(p.numel() for _, p in oracle.site_parameters(model))
    apart = [cost(plan(chosen(), (features(2, 5, WIDTH),), n_streams=n)) for n in (4, 2)]
    for fusion in FUSIONS:
        both = zip(of.moved(fusion, 10), *(alone.moved(fusion, 10) for alone in apart))
        for got, four, two in both:
            assert got == four * 2 // 8 + two * 6 // 8 + 10 * 8 * (4 + 2) * WIDTH
    assert (of.best_segment(0), of.best_segment(1)) == (best_segment(4, 2), best_segment(2, 6))
    assert cost(with_streams(made, 3)) == cost(plan(chosen(), (features(2, 5, WIDTH),), n_streams=3))
    assert of.evaluate(of.kept.states) == WIDTH * (4 + 1 + 2 * 6)


def test_saved_sites(tmp_path: Path) -> None:
    x, n_streams = features(2, 5, WIDTH), {"layers.2": 3, "layers.0-1": 4, "*": 2}
    model = mhcify(chosen(), (x,), n_streams=n_streams)
    oracle.perturb(model)
    save_sites(model, tmp_path)
    for example in (None, (x,)):
        loaded = load_sites(chosen(), tmp_path, example)
        assert torch.equal(loaded(x), model(x)) and torch.equal(loaded(x, (3, 0, 2)), model(x, (3, 0, 2)))
        assert report(loaded).plan.streams[0].stretches == report(model).plan.streams[0].stretches
        save_sites(loaded, tmp_path)
    assert torch.equal(load_sites(mhcify(chosen(), (x,), n_streams=n_streams), tmp_path)(x), model(x))
    with pytest.raises(SitesError, match=r"'layers.0.mhc_0' was saved with n_streams=4 and has n_streams=2 here"):
        load_sites(mhcify(chosen(), (x,), n_streams=2), tmp_path)
    with pytest.raises((SitesError, RuntimeError)):
        mhcify(chosen(), (x,), n_streams=2).load_state_dict(model.state_dict())


def test_saved_with_transformers(tmp_path: Path) -> None:
    family = TEXT["Llama"]
    model = mhcify(family.model(torch.float32), n_streams={"model.layers.1": 2, "*": 4})
    oracle.perturb(model)
    model.save_pretrained(tmp_path)
    ids = family.example()
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)
    base = type(model.model).from_pretrained(tmp_path)  # its modules have other names
    assert torch.equal(base(**ids).last_hidden_state, model.model(**ids).last_hidden_state)


def test_the_command_line(folder: Path) -> None:
    result = cli("sites", "nets.py:make", "--format", "json", "--n-streams", "layers.0-1=4,layers.2=2")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [site["n_streams"] for site in data["streams"][0]["sites"]] == [4, 4, 2]
    assert data["config"]["n_streams"] == [["layers.0-1", 4], ["layers.2", 2]]
    shown = cli("print", "nets.py:make", "--n", "layers.0=4, *=2", "--format", "text").stdout
    assert "resized(post, 2, -1)" in shown or "resized(x, 2, -1)" in shown
    assert cli("print", "nets.py:make", "--n", "layers.0=4,*=2", "--format", "json").exit_code == 0
    costs = cli("cost", "nets.py:make", "--n-streams", "layers.0-1=4,layers.2=2")
    assert costs.exit_code == 0 and "2 sites, n = 4, C = 8" in costs.stdout and "n_0 = streams before" in costs.stdout
    assert "4 at layers.0-1, 2 at layers.2" in costs.stdout
    for text in ("layers.0-1=four", "=4", "4,2", "*=4,*=2", "17", "*=", ""):
        assert cli("sites", "nets.py:make", "--n", text).exit_code == 2, text
    refused = cli("sites", "nets.py:make", "--n", "layers.0=4")
    assert refused.exit_code == 1 and "n_streams says nothing of site 'layers.1.mhc_0'" in refused.stderr

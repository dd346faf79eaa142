"""Converted models against n-stream models written by hand, with every site parameter drawn anew, in fp64.

Equality at initialisation can't see a site that ignores its coefficients or reads the wrong stream. These tests can:
the last ones show it, by breaking the hand-written side on purpose.
"""

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
from handmade.common import PreNorm, Stack, names, prenorm_by_hand
from mhc_rewrite import mhcify, plan
from mhc_rewrite.sites.state import streams_of
from oracle import Streams

PRESERVED = 1e-10
PERTURBED = 1e-9
MOVED = 0.1

STREAMS = [
    *((kind, n) for kind in KINDS for n in (2, 4)),
    *((BY_NAME[name], 3) for name in ("nanogpt", "post-norm", "ResNet", "hidden states")),
]


def tensors(result: Any) -> Iterator[Tensor]:
    """Every tensor of what a model returned, in a fixed order."""
    if isinstance(result, Tensor):
        yield result
    elif result is not None:
        for value in result.values() if hasattr(result, "values") else result:
            yield from tensors(value)


def run(call: Callable[..., Any], *args: Any) -> list[Tensor]:
    """The tensors that a call returns, always from the same random state."""
    torch.manual_seed(2)
    return list(tensors(call(*args)))


def relative(got: Tensor, want: Tensor) -> float:
    """The error of `got` by norm."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    got, want = got.detach(), want.detach()
    return float((got - want).norm() / want.norm())


def backward(outputs: list[Tensor]) -> None:
    """Backward from a fixed random projection of all outputs."""
    torch.manual_seed(3)
    sum((torch.randn_like(t) * t).sum() for t in outputs).backward()


def slices(parameters: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The gradients, those of a site split by what they make: pre, post, res."""
    grads = {}
    for name, p in parameters.items():
        assert p.grad is not None, f"{name} has no gradient"
        match = oracle.SITE_PARAMETER.search(name)
        if match is None or (match[1] == "phi" and p.shape[1] == n + 2):
            grads[name] = p.grad
            continue
        widths = [1, 1, 1] if match[1] == "alpha" else [n, n, p.shape[-1] - 2 * n]
        for part, grad in zip(("pre", "post", "res"), p.grad.split(widths, dim=-1)):
            grads[f"{name}[{part}]"] = grad
    return grads


def compare_gradients(got: dict[str, Tensor], want: dict[str, Tensor], ends: set[str]) -> None:
    """Every gradient by norm; those of a stream's first and last site, where they nearly vanish, absolutely.

    The first site's streams are equal, so that the rows of H_res sum to 1 whatever is in it, and that H_pre is a mere
    gain, which a norm takes away. After the last one comes the mean, which the columns' sums of 1 leave as it is.
    """
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    scale = math.sqrt(sum(float(grad.norm()) ** 2 for grad in want.values()))
    for name, grad in want.items():
        error, size = float((got[name] - grad).norm()), float(grad.norm())
        vanishes = name.endswith(("[pre]", "[res]")) and name.rpartition(".")[0] in ends and size < 1e-6 * scale
        allowed = 1e-14 * scale if vanishes else PERTURBED * size
        assert error <= allowed, f"gradient of {name}: {error:.1e} where {size:.1e} is expected"


class Compared:
    """A converted model, the original, and what the model written by hand needs to match the former."""

    def __init__(self, kind: Kind, n: int, **options: Any) -> None:
        self.kind, self.n, self.connection = kind, n, options.get("connection", "mhc")
        self.original = kind.model()
        self.converted = mhcify(kind.model(), kind.arguments(), n_streams=n, **kind.options, **options)
        self.state: dict[str, Tensor] = {}

    def train(self, mode: bool) -> Compared:
        """Both models in one mode."""
        self.original.train(mode)
        self.converted.train(mode)
        return self

    def perturb(self) -> Compared:
        """New site parameters, the same for both models."""
        oracle.perturb(self.converted, seed=1, strength=0.2 if self.connection == "hc" else 1.0)
        self.state = {name: p.detach().clone().requires_grad_() for name, p in oracle.site_parameters(self.converted)}
        return self

    def check_preserved(self) -> None:
        """The converted model computes the original function."""
        with torch.no_grad():
            want, got = (run(model, *self.kind.arguments()) for model in (self.original, self.converted))
        assert len(got) == len(want)
        for mine, other in zip(got, want):
            assert relative(mine, other) <= PRESERVED, f"at initialisation: {relative(mine, other):.1e}"

    def check_perturbed(self, hand: type[Streams] = Streams) -> None:
        """Outputs, gradients and buffers of the two are equal, and outputs far from those of the original."""
        with torch.no_grad():
            unperturbed = run(copy.deepcopy(self.original), *self.kind.arguments())
        streams = hand(self.state, self.n, self.kind.channel_dim, self.connection)
        inputs, inputs_by_hand = self.kind.arguments(), self.kind.arguments()
        got = run(self.converted, *inputs)
        want = run(self.kind.by_hand, self.original, streams, *inputs_by_hand)
        assert len(got) == len(want) == len(unperturbed)
        for mine, other in zip(got, want):
            assert relative(mine, other) <= PERTURBED, f"output: {relative(mine, other):.1e}"
        assert set(streams.seen) == set(self.kind.sites())
        moved = max(relative(other, before) for other, before in zip(want, unperturbed))
        assert moved >= MOVED, f"moved by {moved:.1e} only"

        parameters = dict(self.converted.named_parameters()) | leaves(inputs)
        by_hand = dict(self.original.named_parameters()) | self.state | leaves(inputs_by_hand)
        for p in (*parameters.values(), *by_hand.values()):
            p.grad = None
        backward(got)
        backward(want)
        ends = {end for stream in self.kind.streams for end in (stream[0], stream[-1])}
        compare_gradients(slices(parameters, self.n), slices(by_hand, self.n), ends)
        buffers = dict(self.converted.named_buffers())
        for name, buffer in self.original.named_buffers():
            torch.testing.assert_close(buffers[name], buffer, rtol=PERTURBED, atol=PERTURBED, msg=name)


def leaves(inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The inputs that take a gradient, by name."""
    return {f"input {k}": t for k, t in enumerate(inputs) if t.requires_grad}


def check_by_hand(kind: Kind, n: int) -> None:
    """The converted model has the kind's sites, starts as the original, and perturbed is the one written by hand."""
    compared = Compared(kind, n)
    assert sorted(oracle.site_names(compared.converted.state_dict())) == sorted(kind.sites())
    for train in (False, True):
        compared.train(train).check_preserved()
    compared.perturb()
    for train in (False, True):
        compared.train(train).check_perturbed()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sites_and_streams(kind: Kind) -> None:
    model = kind.model()
    found = plan(model, kind.arguments(), **kind.options)
    streams = tuple(tuple(dict.fromkeys(site.name for site in stream.sites)) for stream in found.streams)
    assert streams == kind.streams
    assert {site.name for site in found.sites if site.excluded} == kind.excluded
    assert {site.channel_dim for site in found.sites} == {kind.channel_dim}
    assert not oracle.site_names(model.state_dict()), "plan() changed the model"


@pytest.mark.parametrize("kind,n", STREAMS, ids=str)
def test_equals_hand_written(kind: Kind, n: int) -> None:
    check_by_hand(kind, n)


@pytest.mark.parametrize("n", (2, 4))
@pytest.mark.parametrize("name", ("nanogpt", "post-norm", "ResNet", "encoder-decoder"))
def test_hyper_connections_equal_hand_written(name: str, n: int) -> None:
    compared = Compared(BY_NAME[name], n, connection="hc")
    compared.check_preserved()
    compared.perturb().check_perturbed()


class Fresh(Streams):
    """Sites as they are at initialisation, whatever the state."""

    def read(self, name: str, X: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        n, width = self.n, X.shape[-1 if self.channel_dim == -1 else self.channel_dim + 1]
        pre = torch.full((n,), 0.1 / (n - 1), dtype=torch.float64)
        pre[len(self.seen) % n] = 0.9
        self.state = {
            f"{name}.phi": torch.zeros(n * width, n * n + 2 * n).double(),
            f"{name}.alpha": torch.full((3,), 0.01).double(),
            f"{name}.bias": torch.cat([pre.logit(), torch.zeros(n), (8 * (torch.eye(n) - 1)).flatten()]),
        }
        return super().read(name, X)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("train", (False, True), ids=("eval", "train"))
def test_hand_written_is_the_original_at_initialisation(kind: Kind, train: bool) -> None:
    model, hand = kind.model().train(train), Fresh({}, 4, kind.channel_dim)
    with torch.no_grad():
        got = run(kind.by_hand, copy.deepcopy(model), hand, *kind.arguments())
        want = run(model, *kind.arguments())
    assert set(hand.seen) == set(kind.sites())
    assert max(relative(mine, other) for mine, other in zip(got, want)) <= PRESERVED


class Transposed(Streams):
    """H_res[in, out]."""

    def read(self, name: str, X: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        u, H_post, H_res = oracle.site(self.params(name), X, self.channel_dim)
        return u, lambda y, trunk: oracle.apply(X, y, H_post, H_res.mT, self.channel_dim)


class WithoutPost(Streams):
    """Every stream receives the branch with weight 1."""

    def read(self, name: str, X: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        u, H_post, H_res = oracle.site(self.params(name), X, self.channel_dim)
        return u, lambda y, trunk: oracle.apply(X, y, torch.ones_like(H_post), H_res, self.channel_dim)


class Swapped(Streams):
    """Each site of a layer with the other one's parameters."""

    def params(self, name: str) -> oracle.Params:
        return super().params(name[:-1] + "10"[int(name[-1])])


class Averaging(Streams):
    """The streams collapse and expand again between two sites: looks right, and is not mHC."""

    def read(self, name: str, X: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        return super().read(name, self.expand(self.collapse(X)))


class AverageLifted(Streams):
    """What is on the trunk between two sites acts on the mean, not on every stream."""

    def each(self, operation: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        return self.expand(operation(self.collapse(X)))


class FirstStream(Streams):
    """The exit takes one stream instead of the mean of all."""

    def collapse(self, X: Tensor) -> Tensor:
        return X.select(self.dim, 0)


@pytest.mark.parametrize(
    "name,broken",
    [
        ("nanogpt", Transposed),
        ("nanogpt", Swapped),
        ("nanogpt", Averaging),
        ("nanogpt", FirstStream),
        ("nanogpt", WithoutPost),
        ("post-norm", AverageLifted),
        ("ResNet", AverageLifted),
        ("ResNet", Transposed),
        ("DeepNorm", Swapped),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_miswired_stream_is_seen(name: str, broken: type[Streams]) -> None:
    compared = Compared(BY_NAME[name], 4).perturb()
    compared.check_perturbed()
    with pytest.raises(AssertionError, match="output: "):
        compared.check_perturbed(broken)


class Mixed(nn.Module):
    """Mamba's layer: the trunk in fp32, the block in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x.to(torch.bfloat16)))))

    def forward(self, x: Tensor) -> Tensor:
        trunk = x
        x = self.down(torch.tanh(self.up(self.norm(x.to(torch.bfloat16)))))
        return trunk.to(torch.float32) + x


def test_trunk_and_branch_of_different_dtypes() -> None:
    torch.manual_seed(0)
    model = Stack([Mixed() for _ in range(3)]).to(torch.bfloat16)
    model.norm.float()
    x = torch.randn(2, 5, 16)
    original = copy.deepcopy(model)
    mhcify(model, (x,))
    oracle.perturb(model)
    state = dict(oracle.site_parameters(model))
    assert {p.dtype for p in state.values()} == {torch.float32}
    dtypes = []
    model.layers[1].register_forward_hook(lambda *given: dtypes.append((given[2].dtype, streams_of(given[2]).dim())))
    hand = Streams(state, 4)
    with torch.no_grad():
        got, before = model(x), original(x)
        X = hand.expand(x)
        for number, layer in enumerate(original.layers):
            X = hand.site(f"layers.{number}.mhc_0", X, layer.branch)
        want = original.norm(hand.collapse(X))
    assert dtypes == [(torch.float32, 4)], "between two layers the streams are (B, T, n, C) in the trunk's dtype"
    assert got.dtype == want.dtype == before.dtype
    # An fp32 difference in the last place can tip a rounding to bf16.
    assert relative(got, want) <= 1e-3 < MOVED <= relative(want, before)


def test_other_batch_and_length() -> None:
    kind = BY_NAME["nanogpt"]
    compared = Compared(kind, 4).perturb()
    for batch, length in ((1, 1), (3, 8)):
        ids = torch.randint(40, (batch, length))
        got = compared.converted(ids)
        want = kind.by_hand(compared.original, Streams(compared.state, 4), ids)
        assert relative(got, want) <= PERTURBED


class LayerDrop(Stack):
    """Layers can be left out of a call."""

    kept: tuple[int, ...] = (0, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        for number in self.kept:
            x = self.layers[number](x)
        return self.norm(x)


def test_layers_that_are_left_out() -> None:
    """They take no expansion or collapse with them: the first one does not, and the last one does not."""
    (x,), streams = (torch.randn(2, 5, 16, dtype=torch.float64),), (names("layers.{}", 3, 2),)
    kind = Kind("LayerDrop", lambda: LayerDrop([PreNorm() for _ in range(3)]), lambda: (x,), lambda: None, streams)
    compared = Compared(kind, 4).perturb()
    for kept in ((0, 1, 2), (1, 2), (0, 2), (2,), (0, 1), (0,), (0, 1, 2)):
        compared.converted.kept = kept
        hand = Streams(compared.state, 4)
        X = hand.expand(x)
        for number in kept:
            X = prenorm_by_hand(compared.original.layers[number], hand, f"layers.{number}", X)
        assert relative(compared.converted(x), compared.original.norm(hand.collapse(X))) <= PERTURBED, kept


class InTraining(Stack):
    """LayerDrop as it is: a layer is left out while training, whichever the dice say."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and torch.rand([]) < 0.5:
                continue
            x = layer(x)
        return self.norm(x)


@pytest.mark.parametrize("seed", range(4))
def test_the_plan_does_not_depend_on_dice(seed: int) -> None:
    """A layer that the example run in training mode happened to leave out has its place in the stream."""
    torch.manual_seed(0)
    model = InTraining([PreNorm() for _ in range(3)]).double()
    torch.manual_seed(seed)
    found = plan(model, (torch.randn(2, 5, 16, dtype=torch.float64),))
    assert [[site.name for site in stream.sites] for stream in found.streams] == [list(names("layers.{}", 3, 2))]

"""Whole layers that are skipped at random in training: against n streams by hand, whichever layers run."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import mhcify, report
from oracle import Streams, perturb, site_names

WIDTH, LAYERS, N = 8, 4, 4


class PreNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return self.f(self.norm(x))

    def after(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class PostNorm(PreNorm):
    def branch(self, x: Tensor) -> Tensor:
        return self.f(x)

    def after(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.f(x))


class Tupled(PreNorm):
    """Gives a tuple, as many layers of transformers do, for which a skipped one has another."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return (x + self.branch(x),)


class Dropping(nn.Module):
    """An encoder with layerdrop: `skips` says which layers a training step leaves out, for want of luck."""

    def __init__(self, kind: type[PreNorm], head: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(encoder_layerdrop=0.1, layerdrop=0.1)
        self.layerdrop = 0.1
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, 3) if head else None

    def forward(self, x: Tensor, skips: tuple[int, ...] = ()) -> Tensor:
        for number, layer in enumerate(self.layers):
            if self.training and number in skips:
                continue
            result = layer(x)
            x = result[0] if isinstance(result, tuple) else result
        return x if self.head is None else self.head(x)


def by_hand(model: Dropping, state: dict[str, Tensor], x: Tensor, skips: tuple[int, ...]) -> Tensor:
    """What comes after the last add of all acts on the mean, after any other on every stream."""
    names = site_names(state)
    streams = Streams(state, N)
    X: Tensor | None = None
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, PreNorm)
        if number in skips:
            continue
        X = streams.site(names[number], streams.expand(x) if X is None else X, layer.branch)
        if number == LAYERS - 1:
            x, X = layer.after(streams.collapse(X)), None
        else:
            X = streams.each(layer.after, X)
    x = x if X is None else streams.collapse(X)
    return x if model.head is None else model.head(x)


SKIPS = [(), (0,), (LAYERS - 1,), (1, 2), (0, LAYERS - 1), (0, 1, 2), (1, 2, 3), (0, 1, 2, 3)]


@pytest.mark.parametrize("head", [False, True], ids=["bare", "head"])
@pytest.mark.parametrize("kind", [PreNorm, PostNorm, Tupled], ids=lambda kind: kind.__name__)
def test_layers_may_be_skipped(kind: type[PreNorm], head: bool) -> None:
    """Any of them, in training, in any order of calls; values and gradients."""
    torch.manual_seed(0)
    model = Dropping(kind, head).double()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    original = copy.deepcopy(model)
    mhcify(model, (x,))
    assert len(report(model).plan.sites) == LAYERS and len(report(model).plan.streams) == 1
    perturb(model)
    state = dict(model.named_parameters())
    model.train()
    for skips in (*SKIPS, *SKIPS[::-1]):
        got, want = model(x, skips), by_hand(original, state, x, skips)
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        if set(skips) == set(range(LAYERS)):
            continue
        names = [name for name in state if ".mhc_" in name]
        weight = torch.randn_like(want)
        found = [
            torch.autograd.grad((result * weight).sum(), [state[name] for name in names], allow_unused=True)
            for result in (got, want)
        ]
        for name, mine, theirs in zip(names, *found, strict=True):
            if theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10, msg=f"{name} with {skips} skipped")


class Lucky(PreNorm):
    """A layer that leaves itself out."""

    def forward(self, x: Tensor) -> Any:
        if self.training and torch.rand(1).item() < 0.4:
            return x
        return x + self.branch(x)


class LuckyTuple(Tupled):
    """One that hands something on beside its trunk, asked in another way."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        if self.training:
            if torch.rand(()) >= 0.4:
                return (x + self.branch(x), 1)
            return x, 0
        return (x + self.branch(x), 1)


class TwoAdds(PreNorm):
    """The first of two adds comes or not, by what the trunk holds."""

    def forward(self, x: Tensor) -> Tensor:
        if x.detach().sum() > 0 or not self.training:
            x = x + self.branch(x)
        return x + self.f(x).sin()


@pytest.mark.parametrize("kind", [Lucky, LuckyTuple, TwoAdds], ids=lambda kind: kind.__name__)
def test_layers_may_skip_themselves(kind: type[PreNorm]) -> None:
    """By chance or by content, in the captured forward: what such a call hands on stays n streams."""
    torch.manual_seed(0)
    model = Dropping(kind, True).double()
    original = copy.deepcopy(model).train()
    mhcify(model, (torch.randn(2, 5, WIDTH, dtype=torch.float64),))
    perturb(model)
    model.train()
    ways = set()
    for seed in range(12):
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        torch.manual_seed(seed)
        got = model(x)
        torch.manual_seed(seed)
        hand = Streams(dict(model.named_parameters()), N)
        X, ran = hand.expand(x), []
        for number, layer in enumerate(original.layers):
            if kind is TwoAdds:
                ran.append(bool(hand.collapse(X).sum() > 0))
                X = hand.site(f"layers.{number}.mhc_0", X, layer.branch) if ran[-1] else X
                X = hand.site(f"layers.{number}.mhc_1", X, lambda u, layer=layer: layer.f(u).sin())
            else:
                ran.append(bool(torch.rand(1).item() >= 0.4))
                X = hand.site(f"layers.{number}.mhc_0", X, layer.branch) if ran[-1] else X
        want = original.head(hand.collapse(X))
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        own = [p for name, p in model.named_parameters() if ".mhc_" in name]
        for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), own, allow_unused=True) for y in (got, want))):
            torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)
        ways.add(tuple(ran))
    assert len(ways) > 4


@pytest.mark.slow
def test_a_model_with_layerdrop_by_default_converts() -> None:
    """NLLB-MoE's encoder drops a layer in twenty."""
    from mhc_rewrite.cli.small import build

    model = build("nllb-moe", {})
    assert model.config.encoder_layerdrop > 0
    mhcify(model)
    model.config.encoder_layerdrop = model.model.encoder.layerdrop = 0.5
    model.train()
    for seed in range(4):
        torch.manual_seed(seed)
        ids = torch.randint(3, 64, (2, 8))
        model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits.sum().backward()

"""Branches on the content of tensors: asked again at each call, which begins again where the answer is another.

Each case is a layer of a small model. The converted model, its site parameters perturbed, is held against a model of n
streams that takes the branch by itself, values and gradients, in both modes, on inputs that go either way.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_rewrite import mhcify, report
from mhc_rewrite.errors import CaptureError
from oracle import Streams, perturb, site_parameters

WIDTH, N, LAYERS = 8, 3, 2
State = Any


class Block(nn.Module):
    """A branch of its own kind; `ways` keeps what each of its branches on content came to."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)
        self.batch = nn.BatchNorm1d(WIDTH)

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        raise NotImplementedError


class Overflow(Block):
    """What DETR does: a guard at the end of a post-norm layer."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(x + self.drop(self.a(x)))
        if self.training:
            if not (x.abs() < 2).all():
                x = torch.clamp(x, min=-1.5, max=1.5)
        return x

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        X = run.site(f"{name}.mhc_0", X, lambda u: self.drop(self.a(u)))
        if name == f"layers.{LAYERS - 1}":  # what lies behind the last site acts on the mean
            X = run.expand(run.collapse(X))
        X = run.each(self.norm, X)
        if self.training and not (run.collapse(X).abs() < 2).all():
            X = X.clamp(-1.5, 1.5)
        return X


class InBranch(Block):
    """Behind what draws numbers and what changes buffers."""

    def f(self, u: Tensor) -> Tensor:
        h = self.drop(self.a(u))
        g = self.batch(h.flatten(0, 1)).view_as(h)
        if h.abs().max() > 2:
            g = g / 3
        return self.b(self.drop(g))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.drop(self.a(x))
        g = self.batch(h.flatten(0, 1)).view_as(h)
        if h.abs().max() > 2:
            g = g / 3
        return x + self.b(self.drop(g))

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        return run.site(f"{name}.mhc_0", X, self.f)


class Mask(Block):
    """What makers of masks do: none where nothing is masked."""

    def f(self, u: Tensor, mask: Tensor) -> Tensor:
        return self.a(u) if mask.all() else self.a(u * mask[..., None]) * 2

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scale = None if mask.all() else 2
        h = self.a(x if scale is None else x * mask[..., None])
        return x + (h if scale is None else h * scale)

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        return run.site(f"{name}.mhc_0", X, lambda u: self.f(u, mask))


class Number(Block):
    """By a number that comes out of a tensor, and two sites of which one is behind the branch."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.a(self.norm(x))
        scale = 2.0 if x.abs().amax().item() > 2.5 else 0.5
        return x + scale * self.b(x)

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        X = run.site(f"{name}.mhc_0", X, lambda u: self.a(self.norm(u)))
        scale = 2.0 if run.collapse(X).abs().amax().item() > 2.5 else 0.5
        return run.site(f"{name}.mhc_1", X, lambda u: scale * self.b(u))


class Counted(Block):
    """By how many elements have been chosen."""

    def f(self, u: Tensor, mask: Tensor) -> Tensor:
        left_out = (~mask).nonzero()
        h = self.a(u)
        return h if left_out.shape[0] < 3 else -2 * h

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        left_out = (~mask).nonzero()
        h = self.a(x)
        return x + (h if left_out.shape[0] < 3 else -2 * h)

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        return run.site(f"{name}.mhc_0", X, lambda u: self.f(u, mask))


class Chosen(Block):
    """The same by a mask as an index, and by whether two tensors are equal."""

    def f(self, u: Tensor, mask: Tensor) -> Tensor:
        h = self.a(u)
        if len(mask[~mask]) > 0:
            h = h * 3
        if torch.equal(mask[0], mask[1]):
            h = -h
        return h

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.a(x)
        if mask[~mask].numel() > 0:
            h = h * 3
        if torch.equal(mask[0], mask[1]):
            h = -h
        return x + h

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        return run.site(f"{name}.mhc_0", X, lambda u: self.f(u, mask))


class Twice(Block):
    """Two branches, the second of which depends on the first."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.abs().max() > 3:
            x = x / 2
        x = x + self.drop(self.a(x))
        if (x.mean() > 0) and not mask.all():
            x = x * 0.5
        return x

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        if run.collapse(X).abs().max() > 3:
            X = X / 2
        X = run.site(f"{name}.mhc_0", X, lambda u: self.drop(self.a(u)))
        if run.collapse(X).mean() > 0 and not mask.all():
            X = X * 0.5
        return X


class Loop(Block):
    """Until something has come about."""

    def f(self, u: Tensor) -> Tensor:
        h = self.a(u)
        while h.abs().max() > 1:
            h = h / 2
        return h

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.a(x)
        while h.abs().max() > 1:
            h = h / 2
        return x + h

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        return run.site(f"{name}.mhc_0", X, self.f)


class Reports(Block):
    """What only raises is no other way, though a helper does it."""

    def look(self, x: Tensor) -> bool:
        if x.abs().max() > 1e6:
            bad = x.abs().max()
            raise ValueError(f"too much: {bad}")
        return True

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + self.a(x) if self.look(x) else x

    def by_hand(self, run: Streams, name: str, X: State, mask: Tensor) -> State:
        return run.site(f"{name}.mhc_0", X, self.a)


KINDS = (Overflow, InBranch, Mask, Number, Counted, Chosen, Twice, Loop, Reports)


class Model(nn.Module):
    def __init__(self, kind: type[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


def small(kind: type[Block]) -> Any:
    torch.manual_seed(0)
    return Model(kind).double().eval()


def inputs(scale: float, masked: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`masked`: so many are left out in each of the two rows."""
    x = scale * torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 5, dtype=torch.bool)
    for row, count in enumerate(masked):
        mask[row, :count] = False
    return x.requires_grad_(), mask


CALLS = [inputs(0.3, (0, 0)), inputs(8.0, (1, 1)), inputs(0.5, (1, 3)), inputs(2.0, (0, 0)), inputs(0.3, (0, 0))]


def streams(original: Model, state: dict[str, Tensor], x: Tensor, mask: Tensor) -> Tensor:
    run = Streams(state, N)
    X = run.expand(x)
    for index, layer in enumerate(original.layers):
        X = layer.by_hand(run, f"layers.{index}", X, mask)
    return run.collapse(X)


def agree(original: Model, model: Model, args: tuple[Tensor, Tensor], statistics: bool = True) -> None:
    leaves = [args[0], *(p for _, p in site_parameters(model))]
    found = []
    for run in (lambda: streams(original, dict(model.named_parameters()), *args), lambda: model(*args)):
        torch.manual_seed(2)
        result = run()
        for leaf in leaves:
            leaf.grad = None
        result.square().sum().backward()
        found.append((result, *(leaf.grad for leaf in leaves if leaf.grad is not None)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    for (name, mine), (_, its) in zip(original.named_buffers(), model.named_buffers(), strict=True):
        assert not statistics or torch.isclose(its, mine).all(), name


@pytest.mark.parametrize("example", range(3))
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_way_is_the_n_stream_model(kind: type[Block], example: int) -> None:
    model = small(kind)
    original = copy.deepcopy(model)
    mhcify(model, tuple(t.detach() for t in CALLS[example]), n_streams=N)
    assert len(report(model).plan.sites) == LAYERS * (2 if kind is Number else 1)
    perturb(model)
    for training in (False, True, False):
        for one in (original, model):
            one.train(training)
        for args in CALLS:
            agree(original, model, args)


# -- in other surroundings ---------------------------------------------------------------------------------------------


class Checkpointed(Model):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=False)
        return x


class Reentrant(Model):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, mask, use_reentrant=True)
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("surroundings", ["checkpointed", "reentrant", "recomputed", "compiled"])
@pytest.mark.parametrize("kind", [Overflow, InBranch, Number], ids=lambda kind: kind.__name__)
def test_either_way(kind: type[Block], surroundings: str) -> None:
    torch._dynamo.reset()
    model = small(kind)
    model.__class__ = {"checkpointed": Checkpointed, "reentrant": Reentrant}.get(surroundings, Model)
    original = copy.deepcopy(model)
    options: dict[str, Any] = {"recompute": 2} if surroundings == "recomputed" else {}
    mhcify(model, tuple(t.detach() for t in CALLS[0]), n_streams=N, **options)
    perturb(model)
    if surroundings == "compiled":
        model.compile(backend="aot_eager")
    for one in (original, model):
        one.train()
    for args in CALLS[:2]:
        agree(original, model, args, statistics=surroundings == "recomputed")  # a checkpoint counts a batch twice


def test_a_model_of_one_forward_and_its_kinds_of_call() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            x = x + self.a(x)
            if scale is not None and scale.item() > 1:
                x = x * scale
            return x + self.b(x)

    torch.manual_seed(0)
    model: Any = Flat().double()
    original = copy.deepcopy(model)
    x = CALLS[0][0]
    mhcify(model, (x.detach(),), n_streams=N)
    perturb(model)
    run = Streams(dict(model.named_parameters()), N)
    for scale in (None, torch.tensor(0.5), torch.tensor(3.0), torch.tensor(0.5)):
        X = run.site("mhc_0", run.expand(x), original.a)
        X = X if scale is None or scale <= 1 else X * scale
        expected = run.collapse(run.site("mhc_1", X, original.b))
        torch.testing.assert_close(model(x, scale), expected, rtol=1e-9, atol=1e-9)


# -- refused -----------------------------------------------------------------------------------------------------------


class Cache:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(x)


def chooses_a_block(self: Any, x: Tensor, cache: Cache) -> Tensor:
    if x.sum().item() > 0:  # this
        return x + self.a(x)
    return x + self.b(self.norm(x)) + self.a(x)


def writes_before(self: Any, x: Tensor, cache: Cache) -> Tensor:
    x.mul_(2)  # this
    h = self.a(x)
    return x + (h if h.sum() > 0 else -h)


def caches_before(self: Any, x: Tensor, cache: Cache) -> Tensor:
    cache.update(x)  # this
    h = self.a(x)
    return x + (h if h.sum() > 0 else -h)


def counts(self: Any, x: Tensor, cache: Cache) -> Tensor:
    for _ in range(int(x.abs().sum())):  # this
        x = x + self.a(x)
    return x


def counts_elements(self: Any, x: Tensor, cache: Cache) -> Tensor:
    chosen = x[x > 0]
    for _ in range(chosen.shape[0]):  # this
        x = x + self.a(x)
    return x


def scales(self: Any, x: Tensor, cache: Cache) -> Tensor:
    return x + float(x.amax()) * self.a(x)  # this


def never_ends(self: Any, x: Tensor, cache: Cache) -> Tensor:
    h = self.a(x)
    while h.abs().max() > 1e-30:  # this
        h = h / 2
    return x + h


REFUSED: dict[Any, str] = {
    chooses_a_block: "its residual adds depend on it",
    writes_before: "after it has changed what lives longer",
    caches_before: "after it has changed what lives longer",
    counts: "takes a number from the content",
    counts_elements: "takes a number from the content",
    scales: "takes a number from the content",
    never_ends: "more than 32 times",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda forward: forward.__name__)
def test_refused(forward: Any) -> None:
    class Refused(Block):
        pass

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Refused() for _ in range(LAYERS))

        def forward(self, x: Tensor) -> Tensor:
            cache = Cache()
            for layer in self.layers:
                x = layer(x.clone(), cache)
            return x

    Refused.forward = forward  # type: ignore[assignment]
    torch.manual_seed(0)
    model = Holder().double()
    with pytest.raises(CaptureError, match="content of") as caught:
        mhcify(model, (CALLS[0][0].detach(),), n_streams=N)
    assert REFUSED[forward] in str(caught.value) and "# this" in str(caught.value)
    assert f"{forward.__code__.co_filename}:" in str(caught.value)


def test_a_buffer_that_is_written_only_now_is_put_back_too() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.on = nn.Linear(WIDTH, WIDTH), False
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.on:
                self.count += 1
            return self.linear(x)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Late()

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(x)
            return x + (h if x.abs().max() < 3 else -h)

    torch.manual_seed(0)
    model: Any = nn.Sequential(Layer(), Layer())
    x = torch.linspace(-1, 1, 2 * WIDTH).view(2, WIDTH)
    mhcify(model, (x,))
    model[0].f.on = True
    for index, scale in enumerate((1, 100, 100, 1)):
        model(scale * x)
        assert model[0].f.count == index + 1

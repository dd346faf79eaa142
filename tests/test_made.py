"""What a captured forward makes at each call, and what it leaves behind: objects that it hands on, buffers it replaces.

Each case is called several times, its site parameters perturbed, and held against an n-stream model written by hand.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import mhcify, report
from mhc_rewrite.capture.held import copy_of, items_of, put_back
from mhc_rewrite.errors import CaptureError
from oracle import Streams, perturb, site_parameters

WIDTH, N = 8, 3


class Store:
    def __init__(self, *, factor: float = 1.0) -> None:
        self.seen: list[Tensor] = []
        self.factor = factor


class Cache:
    """Keeps what blocks put into it."""

    def __init__(self, store: Store, scale: Any = 1.0) -> None:
        self.store, self.scale = store, scale

    def update(self, x: Tensor) -> Tensor:
        self.store.seen.append(x)
        return torch.cat(self.store.seen, -1).mean(-1, keepdim=True) * self.scale * self.store.factor

    def length(self) -> int:
        return len(self.store.seen)


class Longer(Cache):
    def __init__(self, store: Store) -> None:
        super().__init__(store, scale=0.5)


class Slotted:
    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: Any = None

    def update(self, x: Tensor) -> Tensor:
        self.last = x if self.last is None else self.last * x
        return self.last  # type: ignore[no-any-return]


class Uses(nn.Module):
    """A block that reads and changes what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return self.a(x) * cache.update(x).tanh()  # type: ignore[no-any-return]


class Fixed(Cache):
    """Keeps nothing."""

    def update(self, x: Tensor) -> Tensor:
        return x * self.scale


SHARED = Fixed(Store())


class Model(nn.Module):
    """`make(model, x)` makes the object, at the beginning or at each block."""

    def __init__(self, make: Callable[[Any, Tensor], Any], each: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Uses() for _ in range(3))
        self.make, self.each, self.factor = make, each, 2.0
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.own = Fixed(Store())

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        cache = self.make(self, x)
        for block in self.blocks:
            x = x + block(x, cache)
            if self.each:
                cache = self.make(self, x)
        return x, cache

    def by_hand(self, run: Streams, x: Tensor) -> tuple[Tensor, Any]:
        cache = self.make(self, x)
        X = run.expand(x)
        for index, block in enumerate(self.blocks):
            X = run.site(f"mhc_{index}", X, lambda u, block=block, cache=cache: block(u, cache))
            if self.each:
                cache = self.make(self, run.collapse(X))
        return run.collapse(X), cache


MADE: dict[str, Callable[[Any, Tensor], Any]] = {
    "nested": lambda s, x: Cache(Store(), 0.5),
    "by keywords": lambda s, x: Cache(scale=0.25, store=Store(factor=s.factor)),
    "of a tensor": lambda s, x: Cache(Store(), 2 * s.gain),
    "of a size": lambda s, x: Cache(Store(), 1.0 / x.shape[1]),
    "derived": lambda s, x: Longer(Store()),
    "slots": lambda s, x: Slotted(),
    "read before": lambda s, x: (lambda c: c if c.length() == 0 else None)(Cache(Store())),
}


@pytest.mark.parametrize("each", [False, True], ids=["once", "at each block"])
@pytest.mark.parametrize("name", MADE)
def test_an_object_is_made_at_each_call(name: str, each: bool) -> None:
    torch.manual_seed(0)
    model = Model(MADE[name], each).double()
    original = copy.deepcopy(model)
    mhcify(model, (torch.randn(2, 4, WIDTH, dtype=torch.float64),), n_streams=N)
    assert len(report(model).plan.sites) == 3
    perturb(model)
    parameters = [p for _, p in site_parameters(model)]
    for training in (False, True):
        model.train(training)
        for length in (4, 4, 6):
            x = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
            run = Streams(dict(model.named_parameters()), N)
            results = [original.by_hand(run, x), model(x)]
            for one, other in zip(*([r[0], *torch.autograd.grad(r[0].square().sum(), [x, *parameters])]
                                    for r in results), strict=True):  # fmt: skip
                torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)
            mine, its = (vars(r[1]) if hasattr(r[1], "__dict__") else {} for r in results)
            if "store" in mine:
                for one, other in zip(mine["store"].seen, its["store"].seen, strict=True):
                    torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [lambda s, x: s.own, lambda s, x: SHARED], ids=["its own", "a global"])
def test_an_object_from_elsewhere_is_not(make: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(0)
    model = Model(make, False).double()
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    mhcify(model, (x,), n_streams=N)
    for _ in range(2):
        assert model(x)[1] is make(model, x)


def changes(self: Any, x: Tensor) -> Any:
    cache = Cache(Store())
    cache.scale = 3.0
    return cache


def fills(self: Any, x: Tensor) -> Any:
    cache = Cache(Store())
    cache.update(x)
    return cache


class Asks(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        cache = Cache(Store())
        for block in self.blocks:
            x = x + block(x, cache) / cache.length()
        return x, cache


@pytest.mark.parametrize(("kind", "make", "said"), [
    (Model, changes, "changes a Cache that it has made"),
    (Model, fills, "changes a Store that it has made"),
    (Asks, changes, "asks a Cache that it has made and handed on"),
])  # fmt: skip
def test_what_a_graph_would_not_repeat_is_refused(kind: type[Model], make: Any, said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(CaptureError, match=said):
        mhcify(kind(make, False).double(), (torch.randn(2, 4, WIDTH, dtype=torch.float64),), n_streams=N)


# -- buffers -----------------------------------------------------------------------------------------------------------


class Counts(nn.Module):
    """Puts another tensor in the place of a buffer, and reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))
        self.calls: Tensor
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 1))
        return x + self.a(x * self.mean.cos()) * self.calls

    def f(self, u: Tensor) -> Tensor:
        self.calls = self.calls + 1
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * u.detach().mean((0, 1))
        return self.a(u * self.mean.cos()) * self.calls

    def by_hand(self, run: Streams, name: str, X: Tensor) -> Tensor:
        return run.site(f"{name}.mhc_0", X, self.f)


class Inside(nn.Module):
    """The same in a module that is captured with what calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.b = Counts(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 0.5 if self.training else self.inner(x)

    def by_hand(self, run: Streams, name: str, X: Tensor) -> Tensor:
        X = self.inner.by_hand(run, f"{name}.inner", X)
        return X * 0.5 if self.training else X


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", [Counts, Inside])
def test_a_buffer_that_is_replaced(kind: Any, compiled: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model: Any = nn.Sequential(kind(), kind()).double()
    original = copy.deepcopy(model)
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    mhcify(model, (x,), n_streams=N)
    assert float((model[0] if kind is Counts else model[0].inner).calls) == 0
    perturb(model)
    if compiled:
        model.compile(backend="aot_eager")
    run = Streams(dict(model.named_parameters()), N)
    for training in (False, True, True, False):
        for one in (original, model):
            one.train(training)
        X = run.expand(x)
        for index, layer in enumerate(original):
            X = layer.by_hand(run, str(index), X)
        torch.testing.assert_close(model(x), run.collapse(X), rtol=1e-9, atol=1e-9)
        for (name, mine), (_, its) in zip(original.named_buffers(), model.named_buffers(), strict=True):
            assert torch.isclose(its, mine).all(), name


class Table(OrderedDict[str, Any]):
    """Makes what it gives out, as transformers' table of activations does."""

    def __getitem__(self, name: str) -> nn.Module:
        made: nn.Module = super().__getitem__(name)()
        return made


TABLE = Table(gelu=nn.GELU, tanh=nn.Tanh)


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return TABLE["gelu"](self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def test_a_table_that_makes_its_items() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Activated(), Activated()).double(), torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mhcify(model, (x,), n_streams=N)
    perturb(model)

    def by_hand() -> Tensor:
        hand = Streams(dict(site_parameters(model)), N)
        X = hand.expand(x)
        for number, layer in enumerate(model):
            X = hand.site(f"{number}.mhc_0", X, layer.branch)
        return hand.collapse(X)

    torch.testing.assert_close(model(x), by_hand(), rtol=1e-10, atol=1e-10)
    TABLE["gelu"], kept = nn.Tanh, OrderedDict.__getitem__(TABLE, "gelu")
    try:  # what the table holds is asked anew
        torch.testing.assert_close(model(x), by_hand(), rtol=1e-10, atol=1e-10)
    finally:
        TABLE["gelu"] = kept


class Lowered(dict[str, int]):
    """Stores under another key than it is given, as a registry of transformers does."""

    def __setitem__(self, name: str, value: int) -> None:
        super().__setitem__(name.lower() + "!", value)


class MadeAnew(OrderedDict[str, int]):
    def __getitem__(self, name: str) -> int:
        return 2 * super().__getitem__(name)


@pytest.mark.parametrize("kind", (Lowered, MadeAnew, OrderedDict, dict), ids=lambda kind: kind.__name__)
def test_what_a_dict_held_is_put_back_as_it_held_it(kind: type[dict[str, int]]) -> None:
    held = kind()
    for name, value in (("A", 1), ("B", 2), ("C", 3)):
        held[name] = value
    if isinstance(held, OrderedDict):
        held.move_to_end("A")
    before = items_of(held)
    copied = copy_of(held)
    assert type(copied) is dict and list(copied.items()) == before
    put_back(held, copied)
    assert items_of(held) == before
    held["D"] = 4
    put_back(held, copied)
    assert items_of(held) == before

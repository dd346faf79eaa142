"""Captures: what becomes a variant of its own, what stays as in life, and what is refused."""

from __future__ import annotations

import copy
import cProfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from golden import WIDTH, Layer, capture, features, text
from mhc_rewrite import mhcify, report
from mhc_rewrite.capture.call import CallShape, describe, flatten
from mhc_rewrite.conversion.install import role_of
from mhc_rewrite.errors import CaptureError


def variants(model: nn.Module, training: bool = False) -> list[Any]:
    """All variants of the model's own forward in one mode."""
    carrier = role_of(model).carrier
    return [v for (mode, *_), found in carrier.variants.items() if mode is training for v in found]


def converted(model: nn.Module, *inputs: Any, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The original in fp64, and its conversion."""
    original = model.double()
    return original, mhcify(copy.deepcopy(original), inputs or (features().double(),), **options)


def same(original: nn.Module, model: nn.Module, *args: Any, rounding: float = 1e-10, **kwargs: Any) -> None:
    """Both return the same under the same random state."""
    results = []
    for one in (original, model):
        torch.manual_seed(5)
        results.append(one(*args, **kwargs))
    torch.testing.assert_close(results[1], results[0], rtol=rounding, atol=rounding)


# -- sizes -----------------------------------------------------------------------------------------------------------


def by_length(self: Any, x: Tensor) -> Tensor:
    x = x + self.a(x)
    y = self.b(x) if x.shape[1] > 4 else 2 * self.b(x)
    return x + y


def by_input_sizes(self: Any, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    x = x + self.a(x)
    y = self.b(x) if length > 4 and batch == 2 else 2 * self.b(x)
    return x + y


def reshaping(self: Any, x: Tensor) -> Tensor:
    batch, length, width = x.shape
    heads = self.a(x).view(batch, length, 2, width // 2).transpose(1, 2)
    x = x + heads.transpose(1, 2).reshape(batch, length, -1)
    return x + self.b(x) * torch.ones(length, 1, dtype=x.dtype)


def test_sizes_stay_open() -> None:
    captured, _ = capture(Layer(reshaping))
    assert captured.guards == [] and not captured.pinned
    original, model = converted(Layer(reshaping))
    for shape in ((2, 5), (1, 1), (3, 9)):
        same(original, model, features(*shape, WIDTH).double())
    assert len(variants(model)) == 1


def test_a_branch_on_an_input_size_is_a_guard() -> None:
    captured, _ = capture(Layer(by_input_sizes))
    assert [guard.expected for guard in captured.guards] == [True, True] and not captured.pinned
    original, model = converted(Layer(by_input_sizes))
    seen = []
    for shape in ((2, 5), (2, 7), (2, 4), (2, 3), (1, 5), (1, 2), (2, 9)):
        same(original, model, features(*shape, WIDTH).double())
        seen.append(len(variants(model)))
    # (2, 4): another variant; (1, 5): the second condition fails; everything else is known.
    assert seen == [1, 1, 2, 2, 3, 3, 3]


def test_a_branch_on_a_results_size_pins_the_capture() -> None:
    captured, _ = capture(Layer(by_length))
    assert captured.guards == [] and captured.pinned
    original, model = converted(Layer(by_length))
    seen = []
    for shape in ((2, 5), (2, 7), (2, 3), (2, 5), (2, 3)):
        same(original, model, features(*shape, WIDTH).double())
        seen.append(len(variants(model)))
    assert seen == [1, 2, 3, 3, 3]


@pytest.mark.parametrize(
    "combine",
    [
        lambda x: torch.stack([x[:, i] * (i + 1) for i in range(x.shape[1])], 1),
        lambda x: torch.cat([part * 2 for part in x.chunk(2, dim=-1)], -1),
        pytest.param(
            lambda x: x * sum(x.unbind(1)).unsqueeze(1),
        ),
        pytest.param(
            lambda x: torch.cat([part * 2 for part in x.split(2, dim=1)], 1),
        ),
    ],
    ids=["range", "chunk", "unbind", "split"],
)
def test_loops_over_a_size(combine: Callable[[Tensor], Tensor]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.a(combine(x))
        return x + self.b(x)

    original, model = converted(Layer(forward))
    for length in (5, 7, 3, 5):
        same(original, model, features(2, length, WIDTH).double())


# -- other variants --------------------------------------------------------------------------------------------------


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.factor, self.norms = 1.0, None

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *extra: Tensor, scale: float = 1.0, kind: str = "sum", **more: Any
    ) -> Tensor:
        x = x + self.a(x) * self.factor
        y = self.b(x)
        if mask is not None:
            y = y * mask
        for tensor in (*extra, *more.values()):
            y = y + tensor
        return x + y * scale if kind == "sum" else x - y


def test_arguments_choose_variants() -> None:
    x = features().double()
    mask, one = features(5, 1).double(), features(WIDTH).double()
    original, model = converted(Optional().eval(), x)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], int]] = [
        ((x,), {}, 1),
        ((x, None), {}, 1),  # a default, given
        ((), {"x": x}, 1),
        ((x, mask), {}, 2),
        ((x,), {"mask": mask}, 2),
        ((x, mask.tanh()), {}, 2),  # a tensor's content is none
        ((x,), {"scale": 2.0}, 3),
        ((x,), {"scale": 3.0}, 4),
        ((x,), {"kind": "difference"}, 5),
        ((x, None, one, one), {}, 6),
        ((x, None, one), {}, 7),
        ((x,), {"named": one}, 8),
        ((x, mask), {"scale": 2.0, "kind": "sum"}, 9),
        ((x,), {}, 9),
    ]
    for args, kwargs, count in calls:
        same(original, model, *args, **kwargs)
        assert len(variants(model)) == count, (args, kwargs)
    texts = report(model).calls[""]
    assert texts[0].startswith("eval(") and any("scale=2.0" in text and "mask" in text for text in texts)


def test_training_and_evaluation_are_variants() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.a(x) * (0.5 if self.training else 1.0)
        return x + self.dropout(self.b(x))

    original, model = converted(Layer(forward))
    for mode in (True, False, True):
        same(original.train(mode), model.train(mode), features().double())
    assert len(variants(model, True)) == len(variants(model, False)) == 1


def test_plain_attributes_are_variants() -> None:
    x = features().double()
    original, model = converted(Optional(), x)
    for factor in (1.0, 2.0, 1.0, 3.0):
        original.factor = model.factor = factor
        same(original, model, x)


def test_a_forward_that_asks_for_the_dtype() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.a(x.to(self.a.weight.dtype)).to(x.dtype)
        return x + self.b(x.double()) if x.dtype == torch.float64 else x + 2 * self.b(x.double()).float()

    captured, _ = capture(Layer(forward).double(), features().double())
    assert captured.asks_dtype
    original, model = converted(Layer(forward))
    for dtype, rounding in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.float64, 1e-10)):
        same(original, model, features().to(dtype), rounding=rounding)


def test_keys_and_leaves() -> None:
    def forward(self: Any, x: Any, y: int = 3, *rest: Any, flag: bool = False, **more: Any) -> None: ...

    shape = CallShape.of(forward)
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    bound = shape.bind((a, 4, b), {"flag": True, "extra": {"c": [c, None, 2]}})
    assert bound == {"x": a, "y": 4, "*0": b, "flag": True, "extra": {"c": [c, None, 2]}}
    args, kwargs = shape.unbind(bound)
    assert args == (a, 4, b) and kwargs == {"flag": True, "extra": {"c": [c, None, 2]}}
    key, leaves = flatten(bound)
    assert leaves == {"x": a, "*0": b, "extra.c.0": c}
    assert flatten(shape.bind((b, 4, a), {"flag": True, "extra": {"c": [a, None, 2]}}))[0] == key
    others = [
        shape.bind((a, 5, b), {"flag": True, "extra": {"c": [c, None, 2]}}),
        shape.bind((a, 4, b), {"flag": False, "extra": {"c": [c, None, 2]}}),
        shape.bind((a, 4, b), {"flag": True, "extra": {"c": [c, 2, None]}}),
        shape.bind((a, 4, b), {"flag": True, "extra": {"c": (c, None, 2)}}),
        shape.bind((a, 4, b), {"flag": True, "extra": {"d": [c, None, 2]}}),
        shape.bind((a, 4, b, b), {"flag": True, "extra": {"c": [c, None, 2]}}),
        shape.bind((a, 4, None), {"flag": True, "extra": {"c": [c, None, 2]}}),
        shape.bind((a, 4.0, b), {"flag": True, "extra": {"c": [c, None, 2]}}),
    ]
    keys = [flatten(other)[0] for other in others]
    assert key not in keys and len(set(keys)) == len(keys)
    assert describe(key, True).startswith("train(") and "flag=True" in describe(key, True)


# -- as in life ------------------------------------------------------------------------------------------------------


def test_random_calls_stay_random() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.a(x) * torch.rand(x.shape[0], 1, 1, dtype=x.dtype)
        return x + self.b(x) * torch.empty_like(x).bernoulli_(0.5)

    original, model = converted(Layer(forward))
    x = features().double()
    same(original, model, x)
    assert (model(x) - model(x)).abs().max() > 1e-3


def test_in_place_writes_reach_every_name() -> None:
    """`same` means the sum after `x += ...`; a slice that was written is read as written."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x.clone()
        same = x
        x += self.a(x)
        x = x + self.b(same)
        y = torch.zeros_like(x)
        y[:, 0] = self.a(x)[:, 0]
        y[:, 1:].fill_(0.5)
        return x + self.b(x) * y + same * 0

    original, model = converted(Layer(forward))
    assert len(variants(model)[0].sites) == 3
    same(original, model, features().double())


def test_capturing_changes_no_argument() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        x += self.a(x)
        return x

    x = features()
    before = x.clone()
    captured, _ = capture(Layer(forward), x)
    assert torch.equal(x, before)
    assert "mul_ = x.mul_(2)" in text(captured.graph)


class Cache:
    """An object that a forward changes, as a KV cache."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return torch.cat(self.seen, dim=1)


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = x + self.a(x)
        past = cache.update(x) if cache is not None else x
        return x + (self.b(past).sum(1, keepdim=True) + self.b(x))


def test_objects_are_called_once_a_call() -> None:
    x = features().double()
    original, model = converted(Caching(), x)
    caches = Cache(), Cache()
    for _ in range(3):
        results = [one(x, cache) for one, cache in zip((original, model), caches)]
        torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    assert [seen.shape[1] for seen in caches[1].seen] == [5, 5, 5]


def test_a_cache_among_the_example_inputs_stays_as_it_was() -> None:
    x, cache = features().double(), Cache()
    original, model = converted(Caching(), x, cache)
    assert cache.seen == []
    same(original, model, x, None)


class Collecting(nn.Module):
    """Its own forward writes into a list that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        x = x + self.a(x)
        seen.append(x)
        return x + self.b(x)


def test_writes_into_an_argument_are_refused() -> None:
    with pytest.raises(CaptureError, match="changes a list or dict that it was given"):
        converted(Collecting(), features().double(), [])


def test_a_profiler_stays_on() -> None:
    """cProfile's, under which a script may run whole: a capture has a hook of its own there for a while."""

    def afterwards() -> None:
        pass

    profiler = cProfile.Profile()
    profiler.enable()
    try:
        mhcify(nn.Sequential(Layer(reshaping), Layer(reshaping)), features())
        afterwards()
    finally:
        profiler.disable()
    assert afterwards.__code__ in {entry.code for entry in profiler.getstats()}

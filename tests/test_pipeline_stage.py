"""Stages of pipelines against the whole converted model, in one process: values, gradients, what passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from handmade.common import VOCABULARY, WIDTH, PreNorm, Stack
from mhc_rewrite import mhcify
from oracle import perturb
from stages import Crossed, Decoder, Embedded, Images, Parts, WithBalance, cut, grads, in_stages

N = 4


def tokens(*size: int) -> Tensor:
    return torch.randint(VOCABULARY, size or (2, 5), generator=torch.Generator().manual_seed(3))


def features(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def loss(out: Any) -> Tensor:
    outs = out if isinstance(out, tuple) else (out,)
    return sum(((x.double() * torch.arange(x.numel()).view(x.shape).cos()).tanh().sum() for x in outs), torch.zeros(()))


@dataclass(frozen=True)
class Cut:
    """A model, how it is cut, and the shapes that pass at each cut."""

    build: Callable[[], nn.Module]
    args: Callable[[], tuple[Any, ...]]
    parts: Parts
    shapes: list[list[tuple[int, ...]]]
    options: dict[str, Any] = field(default_factory=dict)
    kwargs: Callable[[], dict[str, Any]] = dict
    tolerance: float = 1e-12
    dtype: torch.dtype = torch.float64


WIDE, NARROW = (2, 5, N, WIDTH), (2, 5, WIDTH)
LAYERS = [["tok_embeddings", "layers.0"], ["layers.1", "layers.2"], ["layers.3", "norm", "output"]]
CUTS: dict[str, Cut] = {
    "decoder": Cut(Decoder, lambda: (tokens(),), LAYERS, [[WIDE], [WIDE]]),
    "a mask by name": Cut(
        Decoder, lambda: (tokens(),), LAYERS, [[WIDE], [WIDE]],
        kwargs=lambda: {"mask": torch.tensor([[1.0, 1, 0, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.float64)}),
    "stages without a site": Cut(
        Decoder, lambda: (tokens(),), [["tok_embeddings"], ["layers"], ["norm"], ["output"]],
        [[NARROW], [WIDE], [NARROW]]),
    "recompute": Cut(Decoder, lambda: (tokens(),), LAYERS, [[WIDE], [WIDE]], {"recompute": 3}),
    "one site excluded, one layer": Cut(
        Decoder, lambda: (tokens(),), LAYERS, [[WIDE], [WIDE]], {"exclude": ("layers.0.mhc_1", "layers.2")}),
    "a stage of excluded layers": Cut(
        Decoder, lambda: (tokens(),), LAYERS, [[WIDE], [WIDE]], {"exclude": ("layers.1", "layers.2")}),
    "streams of stretches": Cut(
        Decoder, lambda: (tokens(),), LAYERS, [[WIDE], [(2, 5, 2, WIDTH)]],
        {"n_streams": {"layers.[12]": 2, "*": N}}),
    "bf16": Cut(
        Decoder, lambda: (tokens(),), LAYERS, [[WIDE], [WIDE]], tolerance=0.02, dtype=torch.bfloat16),
    "the root's own parameters": Cut(
        Embedded, lambda: (tokens(),), [["tok", "layers.0"], ["layers.1", "layers.2"], ["layers.3"], ["head"]],
        [[(2, 5), (WIDTH,), WIDE], [(2, 5), (WIDTH,), WIDE], [NARROW]]),
    "dropout": Cut(
        lambda: Embedded(0.3), lambda: (tokens(),),
        [["tok"], ["layers.0", "layers.1", "layers.2"], ["layers.3", "head"]],
        [[NARROW, (2, 5), (WIDTH,)], [(2, 5), (WIDTH,), WIDE]]),
    "tuples, what all read, what comes back": Cut(
        WithBalance, lambda: (tokens(),), [["tok", "layers.0"], ["layers.1"], ["layers.2", "layers.3"], ["head"]],
        [[NARROW, WIDE, ()], [NARROW, WIDE, ()], [NARROW, ()]]),
    "images": Cut(
        Images, lambda: (features(2, 3, 4, 6),), [["stem", "blocks.0"], ["blocks.1", "blocks.2"], ["blocks.3", "head"]],
        [[(2, N, WIDTH, 4, 6)]] * 2),
    "two streams": Cut(
        Crossed, lambda: (features(2, 5, WIDTH), features(2, 3, WIDTH)),
        [["left", "right", "ours.0"], ["theirs.0", "ours.1", "theirs.1"], ["ours.2"], ["theirs.2", "head"]],
        [[NARROW[:1] + (3, WIDTH), WIDE], [WIDE, (2, 3, N, WIDTH)], [(2, 3, N, WIDTH), WIDE]]),
    "a stack": Cut(
        lambda: Stack([PreNorm() for _ in range(3)]), lambda: (features(2, 5, WIDTH),),
        [["layers.0"], ["layers.1", "layers.2"], ["norm"]], [[WIDE], [WIDE]]),
    "a sequential": Cut(
        lambda: nn.Sequential(nn.Linear(3, WIDTH), *(PreNorm() for _ in range(3)), nn.LayerNorm(WIDTH)),
        lambda: (features(2, 5, 3),), [["0", "1"], ["2"], ["3", "4"]], [[WIDE], [WIDE]]),
}  # fmt: skip


def converted(case: Cut) -> nn.Module:
    torch.manual_seed(0)
    model = case.build().to(case.dtype)
    example = case.kwargs() if not case.args() else case.args() + tuple(case.kwargs().values())
    mhcify(model, example, **case.options)
    perturb(model)
    return model


@pytest.mark.parametrize(
    ("kind", "training"), [*((kind, True) for kind in CUTS), *((kind, False) for kind in ("decoder", "dropout"))]
)
def test_stages_are_the_whole(kind: str, training: bool) -> None:
    case = CUTS[kind]
    model = converted(case).train(training)
    args, kwargs = case.args(), case.kwargs()
    torch.manual_seed(5)
    want = loss(model(*args, **kwargs))
    want.backward()
    gradients = {name: g.clone() for name, g in grads(model).items()}
    model.zero_grad()

    stages = cut(model, case.parts, args + tuple(kwargs.values()))
    torch.manual_seed(5)
    value, passed = in_stages(stages, args, kwargs, loss)
    torch.testing.assert_close(value, want.detach(), rtol=case.tolerance, atol=0)
    assert [[tuple(x.shape) for x in sent] for sent in passed] == case.shapes
    found = grads(model)
    assert found.keys() == gradients.keys()
    floor = 1e-3 * max(float(g.abs().max()) for g in gradients.values())
    for name, its in gradients.items():
        error = float((found[name] - its).abs().max())
        assert error <= case.tolerance * 10 * max(float(its.abs().max()), floor), name
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert all(p is model.get_parameter(name) for stage in stages for name, p in stage.named_parameters())

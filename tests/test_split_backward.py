"""Backward in two runs, for what came in and for the parameters, as schedules of pipelines have it."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from handmade.common import MLP, WIDTH, Attention, Stack
from mhc_rewrite import HyperConnection, mhcify
from mhc_rewrite.kernels import ops
from mhc_rewrite.sites.recompute import Handle, Segment
from oracle import perturb

LAYERS, SITES = 4, 8


class Layer(nn.Module):
    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = norm(), norm(), Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(WIDTH), "RMSNorm": lambda: nn.RMSNorm(WIDTH), "none": nn.Identity
}  # fmt: skip


def model(norm: str = "LayerNorm", **options: Any) -> Any:
    torch.manual_seed(0)
    made = mhcify(Stack([Layer(NORMS[norm]) for _ in range(LAYERS)]), (torch.randn(2, 5, WIDTH),), **options)
    perturb(made)
    return made


def forward(module: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return x, (module(x * 1) * torch.arange(WIDTH).cos()).exp().mean()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    counts: Counter[str] = Counter()
    for name in ("pre", "boundary", "pre_backward", "boundary_backward"):
        operator = getattr(ops, name)

        def counted(*args: Any, operator: Any = operator, name: str = name) -> Any:
            counts["backward" if "backward" in name else "forward"] += 1
            return operator(*args)

        monkeypatch.setattr(ops, name, counted)
    return counts


@pytest.mark.parametrize("recompute", [None, 1, 3, 8])
@pytest.mark.parametrize("norm", NORMS)
def test_each_site_is_evaluated_twice_at_most(norm: str, recompute: int | None, calls: Counter[str]) -> None:
    whole, split = model(norm, recompute=recompute), model(norm, recompute=recompute)
    x, value = forward(whole)
    value.backward()
    calls.clear()
    y, value = forward(split)
    _, groups = stage_backward_input([value], None, [y], split.parameters())
    stage_backward_weight(split.parameters(), groups)
    assert calls == {"forward": SITES if recompute is None else 2 * SITES, "backward": SITES}
    torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=0)
    for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_kept_between_the_runs(norm: str) -> None:
    """u at most: no state, and nothing at all when both are done."""
    gc.collect()
    split = model(norm, recompute=4)
    x, value = forward(split)
    _, groups = stage_backward_input([value], None, [x], split.parameters())

    def kept() -> list[int]:
        live = [held for held in gc.get_objects() if isinstance(held, (Handle, Segment))]
        found = {id(held.again): held.output for held in live if isinstance(held, Handle) and held.again is not None}
        found |= {id(its): made[1] for held in live if isinstance(held, Segment) for made, its in held.made.items()}
        return list(found.values())

    assert kept() == ([] if norm == "RMSNorm" else [1] * SITES)
    stage_backward_weight(split.parameters(), groups)
    del groups, value
    gc.collect()
    assert kept() == []


def test_other_gradients_in_the_second_run(calls: Counter[str]) -> None:
    """What is kept of the first run is for the same gradients coming in, and for the parameters alone."""
    parameters = list(model().parameters())
    for recompute in (None, 3):
        module = model(recompute=recompute)
        parameters = list(module.parameters())
        x, value = forward(module)
        torch.autograd.grad(value, x, retain_graph=True)
        found = torch.autograd.grad(value, parameters, torch.tensor(2.0), retain_graph=True)
        both = torch.autograd.grad(value, [x, *parameters], torch.tensor(3.0))
        want_x, value = forward(module)
        want = torch.autograd.grad(value, [want_x, *parameters])
        for mine, threefold, its in zip(found, both[1:], want[1:], strict=True):
            torch.testing.assert_close(mine, 2 * its)
            torch.testing.assert_close(threefold, 3 * its)
        torch.testing.assert_close(both[0], 3 * want[0])


def test_a_gradient_that_was_written_to() -> None:
    site = HyperConnection(8)
    perturb(nn.ModuleDict({"mhc_0": site}))
    X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    u, mix = site.pre(X)
    outputs, parameters = (u, *mix), list(site.parameters())
    gradients = [torch.randn_like(output) for output in outputs]
    torch.autograd.grad(outputs, X, gradients, retain_graph=True)
    before = torch.autograd.grad(outputs, parameters, gradients, retain_graph=True)
    torch.autograd.grad(outputs, X, gradients, retain_graph=True)
    for gradient in gradients:
        gradient.mul_(5)
    for mine, its in zip(torch.autograd.grad(outputs, parameters, gradients), before, strict=True):
        torch.testing.assert_close(mine, 5 * its)

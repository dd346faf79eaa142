"""What a conversion compares before it is kept: outputs and gradients, in both modes, from the same random state."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import mhcify, report
from mhc_rewrite.conversion.verify import Observation, observe, verify
from mhc_rewrite.errors import UnsupportedModelError

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Its forward is `how`, given as a function of the module and x: the same parameters whatever it computes."""

    def __init__(self, how: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.linear, self.drop, self.how = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.3), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def verified(block: Block, before: Observation, x: Tensor) -> tuple[str, ...]:
    def again() -> Observation:
        return observe(block, (x,), {})

    return verify(block, before, again(), values=True, again=again)


class Fails(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        raise RuntimeError("no way back")


def plain(m: Block, x: Tensor) -> Tensor:
    return x + m.linear(m.norm(x))


def dropped(m: Block, x: Tensor) -> Tensor:
    return x + m.drop(m.linear(m.norm(x)))


def dropped_after_a_draw(m: Block, x: Tensor) -> Tensor:
    torch.rand(3)
    return dropped(m, x)


def training_only(m: Block, x: Tensor) -> Tensor:
    return plain(m, x) + (0.5 if m.training else 0.0)


def raises(m: Block, x: Tensor) -> Tensor:
    raise ValueError("not today")


def raises_in_training(m: Block, x: Tensor) -> Tensor:
    return raises(m, x) if m.training else plain(m, x)


# original, converted, what the refusal says
DIFFERENT = {
    "values": (plain, lambda m, x: plain(m, x) * 1.01, "evaluation: the result differs by"),
    "values of training": (plain, training_only, "training: the result differs by 0.5"),
    "shape": (plain, lambda m, x: plain(m, x)[:, :, None], r"is \(2, 5, 1, 8\)"),
    "dtype": (plain, lambda m, x: plain(m, x).double(), "float64 for"),
    "number": (plain, lambda m, x: (plain(m, x), x), "2 tensors for 1"),
    "not finite": (plain, lambda m, x: plain(m, x) / 0, "differs by inf"),
    "fails": (plain, raises, r"fails on the example in evaluation \(ValueError: not today\)"),
    "fails in training": (plain, raises_in_training, "fails on the example in training"),
    "backward": (plain, lambda m, x: Fails.apply(plain(m, x)), "fail at its first training step.*no way back"),
    "a gradient lost": (plain, lambda m, x: x + m.linear(m.norm(x).detach()), "'norm.*has a gradient in one of them"),
    "a gradient twice": (
        plain,
        lambda m, x: x + m.linear(m.norm(x)) + m.linear(m.norm(x)) - m.linear(m.norm(x)).detach(),
        "other gradients",
    ),
    "dropout lost": (dropped, plain, "training: the result differs"),
    "dropout of another rate": (
        dropped, lambda m, x: x + nn.functional.dropout(m.linear(m.norm(x)), 0.9, m.training), "training",
    ),
}  # fmt: skip

ALIKE = {
    "itself": (plain, plain, ["evaluation: 1 output, gradients of 4 parameters", "training: 1 output"]),
    "dropout from the same state": (dropped, dropped, ["evaluation: 1 output", "training: 1 output, gradients"]),
    "dropout in another order": (
        dropped, dropped_after_a_draw,
        ["evaluation", "training without dropout, since random numbers are drawn in another order: 1 output, grad"],
    ),
    "nothing to train": (
        lambda m, x: plain(m, x).detach(), lambda m, x: plain(m, x).detach(),
        ["1 output; no gradients (nothing to differentiate)"] * 2,
    ),
    "no way back in the original": (
        lambda m, x: Fails.apply(plain(m, x)), plain, ["1 output; no gradients (RuntimeError: no way back)"] * 2,
    ),
    "no training in the original": (
        raises_in_training, plain,
        ["evaluation: 1 output", "training: not compared, as the original can't be run so (ValueError: not today)"],
    ),
    "not a number in both": (lambda m, x: plain(m, x) / 0 * 0, lambda m, x: plain(m, x) / 0 * 0, ["1 output"] * 2),
}  # fmt: skip


def compare(original: Callable, converted: Callable) -> tuple[str, ...]:  # type: ignore[type-arg]
    torch.manual_seed(0)
    block = Block(original)
    before = observe(block, (X,), {})
    block.how = converted
    return verified(block, before, X)


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_function_is_refused(name: str) -> None:
    original, converted, said = DIFFERENT[name]
    with pytest.raises(UnsupportedModelError, match=said):
        compare(original, converted)


@pytest.mark.parametrize("name", ALIKE)
def test_the_same_function_passes_and_is_told(name: str) -> None:
    original, converted, said = ALIKE[name]
    told = compare(original, converted)
    assert len(told) == len(said)
    for text, part in zip(told, said):
        assert part in text


def test_the_report_says_what_was_compared() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(dropped) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block.drop(block.linear(block.norm(x)))
            return x

    made = report(mhcify(Model(), (X,)))
    assert made.compared == tuple(f"{m}: 1 output, gradients of 12 parameters" for m in ("evaluation", "training"))
    assert "training: 1 output, gradients of 12 parameters" in str(made)
    made = report(mhcify(Model(), (X,), init="paper", connection="hc"))
    assert made.compared[1] == "training: shapes of 1 output, and that backward runs"


def test_observing_leaves_no_trace() -> None:
    block = Block(dropped).train()
    steps: list[str] = []
    block.linear.weight.register_post_accumulate_grad_hook(lambda p: steps.append("a step of an optimizer"))
    block.norm.weight.grad = torch.ones(8)
    numpy.random.seed(3), random.seed(3), torch.manual_seed(3)
    want = numpy.random.rand(), random.random(), float(torch.rand(()))
    numpy.random.seed(3), random.seed(3), torch.manual_seed(3)
    given = X.clone()
    observe(block, (given,), {})
    assert (numpy.random.rand(), random.random(), float(torch.rand(()))) == want
    assert not steps and block.training and torch.equal(given, X)
    assert torch.equal(block.norm.weight.grad, torch.ones(8)) and block.linear.weight.grad is None


def test_bf16_is_held_to_its_own_rounding() -> None:
    block = Block(plain).bfloat16()
    x = X.bfloat16()
    before = observe(block, (x,), {})
    block.how = lambda m, x: (x.float() + m.linear(m.norm(x)).float()).bfloat16()
    assert len(verified(block, before, x)) == 2
    block.how = lambda m, x: plain(m, x) * 2
    with pytest.raises(UnsupportedModelError, match="differs by"):
        verified(block, before, x)


def steep(digits: float) -> Callable[[Block, Tensor], Tensor]:
    """A function that is as good as known, whose gradient is not: by rounding in the last digits it is another."""
    return lambda m, x: plain(m, x) + 1e-5 * torch.sin(1e5 * (m.linear(x) * (1 + digits)))


def test_a_gradient_that_rounding_changes_is_no_difference() -> None:
    told = compare(steep(0.0), steep(3e-7))
    assert all("as closely as they are determined" in text for text in told) and len(told) == 2
    with pytest.raises(UnsupportedModelError, match="other gradients"):
        compare(steep(0.0), lambda m, x: 3 * steep(0.0)(m, x) - 2 * steep(0.0)(m, x).detach())


def test_a_model_on_the_meta_device_is_held_to_its_shapes() -> None:
    block = Block(plain).to("meta")
    before = observe(block, (X.to("meta"),), {})
    block.how = lambda m, x: plain(m, x)[:1]
    with pytest.raises(UnsupportedModelError, match=r"is \(1, 5, 8\)"):
        verified(block, before, X.to("meta"))

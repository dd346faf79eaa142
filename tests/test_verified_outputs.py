"""Outputs that rounding alone changes more than it does elsewhere: many sharp layers behind a part in fp32, say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhc_rewrite.conversion.verify import observe, verify
from mhc_rewrite.errors import UnsupportedModelError
from test_verify import Block, X, plain


def compare(before: float, factor: float, digits: float, sharp: float = 3e4, loses: bool = False) -> tuple[str, ...]:
    """A sharp function of something that differs in the last digits, beside what differs by a factor."""

    def of(factor: float, digits: float, loses: bool) -> Block:
        def how(m: Block, x: Tensor) -> Tensor:
            result = factor * plain(m, x) + torch.sin(sharp * m.linear(x) * (1 + digits))
            return result / (0.0 if loses else 1.0)

        torch.manual_seed(0)
        return Block(how)

    original, other = of(before, 0.0, False), of(factor, digits, loses)

    def again() -> dict[str, object]:
        return observe(other, (X,), {})

    return verify(other, observe(original, (X,), {}), again(), values=True, again=again)


def test_what_rounding_changes_is_no_difference() -> None:
    told = compare(1.0, 1.0, 5e-7)
    assert all("as closely as they are determined" in text for text in told) and len(told) == 2


@pytest.mark.parametrize(
    "factor,digits,sharp,loses",
    [(1.1, 0.0, 3e4, False), (1.0, 5e-7, 3e7, False), (1.0, 0.0, 3e4, True)],
    ids=("more than rounding", "as good as random", "not finite"),
)
def test_more_is_one(factor: float, digits: float, sharp: float, loses: bool) -> None:
    with pytest.raises(UnsupportedModelError, match="the result differs by"):
        compare(1.0, factor, digits, sharp, loses)

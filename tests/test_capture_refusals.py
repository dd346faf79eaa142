"""Forwards that no graph could repeat are refused, each with the module, the line and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from golden import Layer, features
from mhc_rewrite.conversion.captures import capture_forward
from mhc_rewrite.errors import CaptureError


def stores(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return x + self.a(x)


def counts(self: Any, x: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return x + self.a(x)


def autocasts(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x + self.a(x)  # this


def without_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():  # this
        y = self.a(x)  # this
    return x + y


def with_gradients(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():  # this
        y = self.a(x)  # this
    return x + y


def counts_by_content(self: Any, x: Tensor) -> Tensor:
    for _ in range(int(x.abs().sum())):  # this
        x = x + self.a(x)
    return x


def fails(self: Any, x: Tensor) -> Tensor:
    raise LookupError("of its own")  # this


REFUSED: dict[Callable[..., Any], tuple[str, ...]] = {
    stores: ("stores 'last' on the module",),
    counts: ("stores 'calls' on the module",),
    autocasts: ("autocast on or off",),
    without_gradients: ("switches gradients",),
    with_gradients: ("switches gradients",),
    counts_by_content: ("content of a tensor",),
    fails: ("LookupError", "of its own"),
}


@pytest.mark.parametrize(
    "forward",
    [
        *REFUSED
    ],
    ids=lambda forward: forward.__name__,
)  # fmt: skip
def test_refused(forward: Callable[..., Any]) -> None:
    layer, x = Layer(forward), features()
    before, modes = x.clone(), dict(layer.__dict__)
    with pytest.raises(CaptureError) as caught:
        capture_forward(layer, "blocks.3", {"x": x}, [], False)
    message = str(caught.value)
    for said in ("'blocks.3' (Layer)", *REFUSED[forward], "Change that line"):
        assert said in message
    code = forward.__code__
    assert forward in (stores, counts) or (f"{code.co_filename}:" in message and "# this" in message)
    assert torch.equal(x, before) and dict(layer.__dict__) == modes


def test_the_model_itself_cannot_be_left_out() -> None:
    with pytest.raises(CaptureError) as caught:
        capture_forward(Layer(counts_by_content), "", {"x": features()}, [], False)
    assert "the model" in str(caught.value) and "Change that line." in str(caught.value)
    assert "exclude" not in str(caught.value)

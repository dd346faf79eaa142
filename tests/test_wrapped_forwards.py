"""Forwards behind decorators that look at what they are given: by position or by name, and whether at all."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
from handmade.common import WIDTH, features
from handmade.found import block
from mhc_rewrite import mhcify


def fills_in(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Gives by name what was not given by name: given by position, it would be given twice."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("scale") is None:
            kwargs["scale"] = 2.0
        return forward(self, *args, **kwargs)

    return wrapper


def tells_none_from_nothing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["scale"] = kwargs.get("scale", 2.0)
        return forward(self, *args, **kwargs)

    return wrapper


def takes_the_first(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, 1.5 * args[0], *args[1:], **kwargs)

    return wrapper


def takes_by_name(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, **kwargs: Any) -> Any:
        kwargs["x"] = 1.5 * kwargs["x"]
        return forward(self, **kwargs)

    return wrapper


def model_of(decorator: Callable[..., Any], whole: bool) -> nn.Module:
    """Two layers, or one forward with two sites, behind a decorator."""

    class Decorated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = block(), block()

        @decorator
        def forward(self, x: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
            x = x + (scale or 1.0) * self.f(x)
            return x + self.g(x)

    class Calling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Decorated() for _ in range(1 if whole else 3))

        def forward(self, x: Tensor, by_name: bool = False) -> Tensor:
            for layer in self.layers:
                x = layer(x=x) if by_name or decorator is takes_by_name else layer(x)
            return x

    torch.manual_seed(0)
    return Calling().double().eval()


def by_hand(model: Any, hand: oracle.Streams, x: Tensor, factor: float, scale: float) -> Tensor:
    X = hand.expand(x)
    for i, layer in enumerate(model.layers):
        X = hand.site(f"layers.{i}.mhc_0", hand.each(lambda x: factor * x, X), lambda u, at=layer: scale * at.f(u))
        X = hand.site(f"layers.{i}.mhc_1", X, layer.g)
    return hand.collapse(X)


@pytest.mark.parametrize("whole", (True, False), ids=("once", "in a row"))
@pytest.mark.parametrize(
    "decorator,factor,scale",
    [(fills_in, 1.0, 2.0), (tells_none_from_nothing, 1.0, 2.0), (takes_the_first, 1.5, 1.0), (takes_by_name, 1.5, 1.0)],
)
def test_is_called_as_it_was(decorator: Callable[..., Any], factor: float, scale: float, whole: bool) -> None:
    model, x = model_of(decorator, whole), features(2, 5, WIDTH)
    converted = mhcify(copy.deepcopy(model), (x,))
    torch.testing.assert_close(converted(x), model(x))
    oracle.perturb(converted)
    hand = oracle.Streams(dict(oracle.site_parameters(converted)), 4)
    torch.testing.assert_close(converted(x), by_hand(model, hand, x, factor, scale))
    if decorator is not takes_the_first:  # called the other way, it is the same stream
        torch.testing.assert_close(converted(x, by_name=True), converted(x))

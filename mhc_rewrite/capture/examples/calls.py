"""One call of a model that is to be tried, and who knows what its arguments may look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

BATCH = 2


@dataclass(frozen=True)
class Call:
    """One call to try.

    Attributes:
        names: the arguments that are given, in order.
        choices: which of its candidates an argument is, where it is not the first.
        placeholders: how many placeholder tokens each modality has.
        shapes: the shape that an argument has, where no candidate has it.
        below: the number that all whole numbers of an argument lie below, where it is lower than was thought.
        alone: only the first of the batch is given.
    """

    names: tuple[str, ...]
    choices: Mapping[str, int] = field(default_factory=dict)
    placeholders: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    below: Mapping[str, int] = field(default_factory=dict)
    alone: bool = False

    def key(self) -> Any:
        learnt = (self.choices, self.placeholders, self.shapes, self.below)
        return self.names, self.alone, *(tuple(sorted(one.items())) for one in learnt)


class Supplier(Protocol):
    """What arguments may look like."""

    known: list[str]  # the arguments that the model takes, in the order of its signature
    instead: list[str]  # those that it takes instead of others, or with them: given where a call shows that it must

    def candidates(self, name: str, call: Call) -> list[Any]:
        """What `name` may be in a call, likeliest first; empty where nobody knows."""


def chosen(supplier: Supplier, name: str, call: Call) -> Any:
    """The candidate that a call gives for an argument; there may be fewer than when it was chosen."""
    candidates = supplier.candidates(name, call)
    value = candidates[min(call.choices.get(name, 0), len(candidates) - 1)] if candidates else None
    if not isinstance(value, Tensor):
        return value
    if (shape := call.shapes.get(name)) is not None and tuple(value.shape) != shape:
        value = _in_shape(value, shape)
    if (limit := call.below.get(name)) is not None:
        value = value % limit
    if call.alone and value.dim() and len(value) == BATCH:
        value = value[:1]
    return value


def _in_shape(value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Of the same kind: noise, or the same whole numbers again and again."""
    if value.is_floating_point():
        return torch.randn(shape, generator=random_generator()).to(value.device, value.dtype)
    size = math.prod(shape)
    return value.flatten().repeat(-(-size // max(1, value.numel())))[:size].view(shape)


def random_generator() -> torch.Generator:
    """Numbers of an example's own: the user's random state stays where it is."""
    return torch.Generator().manual_seed(0)

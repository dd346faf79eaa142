"""How the operators run on DTensors: each shard of the tokens by itself.

The rules are taken up where an operator first sees a DTensor: what defines one takes long to import.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from mhc_rewrite.torch_private import constant_while_tracing

# Of each operator its arguments, as in a schema, and the number of its results.
OPERATORS: dict[str, tuple[str, int]] = {}

_PARAMETERS = ("phi", "alpha", "bias")


def is_dtensor(value: Any) -> bool:
    """Whether a tensor is distributed over devices; Dynamo knows by its class alone."""
    kind = _dtensor()
    return kind is not None and isinstance(value, kind)


@constant_while_tracing
def _dtensor() -> Any:
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)  # there is none before the import


@constant_while_tracing
def know_dtensors() -> None:
    """Tells torch, once, how the operators take DTensors."""
    _register()


@functools.cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for name, (arguments, results) in OPERATORS.items():
        register_sharding(getattr(torch.ops.mhc_rewrite, name).default)(_rule(name, arguments, results))


def _rule(name: str, arguments: str, results: int) -> Callable[..., Any]:
    """Whatever has tokens is sharded on the same of their axes, or all is whole.

    Parameters are whole; of their gradients each shard has its tokens' share of a sum. What comes otherwise, sharded on
    the axis of the streams or of C or as shares of a sum, DTensor brings into the nearest of these first.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds = [argument.split() for argument in arguments.split(", ")]
    place_of_state = [argument for _, argument in kinds].index("X")
    shares = len(_PARAMETERS) if name.endswith("_backward") and "phi" in arguments else 0

    def placements(tokens: Any, parameters: Any, sums: Any) -> tuple[list[Any], list[Any]]:
        given = [(parameters if name in _PARAMETERS else tokens) if kind == "Tensor" else None for kind, name in kinds]
        return [tokens] * (results - shares) + [sums] * shares, given

    def acceptable(*args: Any) -> list[Any]:
        axes = range(len(args[place_of_state].shape) - 2)
        sharded = [placements(Shard(axis), Replicate(), Partial()) for axis in axes]
        return [placements(Replicate(), Replicate(), Replicate()), *sharded]

    return acceptable

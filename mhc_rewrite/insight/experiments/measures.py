"""What is seen of the sites of a model: their matrices on some inputs, and what those do one after another."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mhc_rewrite.sites.hyper_connection import HyperConnection

RARE = 0.99  # the quantile that is given beside the median


def sites_of(model: nn.Module) -> list[HyperConnection]:
    return [module for module in model.modules() if isinstance(module, HyperConnection)]


@torch.no_grad()
def states(model: nn.Module, inputs: Tensor) -> list[tuple[HyperConnection, Tensor]]:
    """What each site reads, (batch, length, n, C), in the order of calls; that of the first may be (..., 1, C)."""
    seen: list[tuple[HyperConnection, Tensor]] = []
    hooks = [site.register_forward_hook(lambda site, args, result: seen.append((site, _state(args, result))))
             for site in sites_of(model)]  # fmt: skip
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _state(args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> Tensor:
    """A site's `pre` is given the state; its `boundary` returns it first."""
    return args[0] if len(args) == 1 else result[0]


@torch.no_grad()
def matrices(seen: Sequence[tuple[HyperConnection, Tensor]]) -> list[Tensor]:
    """H_res of each site for these states, (tokens, n, n), or (1, n, n) where it is the same for all; fp64."""
    found = [site.coefficients(X).res for site, X in seen]
    return [res.double().reshape(-1, *res.shape[-2:]) for res in found]


def composite(found: Sequence[Tensor]) -> Tensor:
    """The product of H_res [out, in] over sites, the last site's leftmost: what the streams at the end have of those at
    the start, (tokens, n, n)."""
    return functools.reduce(lambda before, res: res @ before, found)


def gains(product: Tensor) -> tuple[Tensor, Tensor]:
    """By token: the most that a signal can grow by going forward, the largest absolute row sum; and that a gradient can
    going backward, the largest absolute column sum (arXiv:2512.24880, section 3.1)."""
    size = product.abs()
    return size.sum(-1).amax(-1), size.sum(-2).amax(-1)


def errors(res: Tensor) -> tuple[Tensor, Tensor]:
    """By token: the largest difference of a row's sum from 1, and of a column's."""
    return (res.sum(-1) - 1).abs().amax(-1), (res.sum(-2) - 1).abs().amax(-1)


def quantiles(**values: Tensor) -> dict[str, float]:
    """The median under each name, and a rare quantile under `name 99%`."""
    found: dict[str, float] = {}
    for name, all_values in values.items():
        found[name] = short(all_values.flatten().quantile(0.5))
        found[f"{name} {RARE:.0%}"] = short(all_values.flatten().quantile(RARE))
    return found


def short(value: float | Tensor, digits: int = 3) -> float:
    """Few digits, as files are to stay small."""
    return float(f"{float(value):.{digits}g}")

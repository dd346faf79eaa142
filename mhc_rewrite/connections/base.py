"""What a connection is: how one site's parameters are shaped, started and turned into coefficients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """One site's coefficients per token: `pre` (..., n), `post` (..., n), `res` (..., n, n) as [out, in]."""

    pre: Tensor
    post: Tensor
    res: Tensor


@dataclass(frozen=True)
class Connection:
    """One row of the table of relatives: all share the site's shape, only how H_* are made differs.

    Attributes:
        phi_shape: (n, C) -> shape of the projection.
        preserve: (phi, alpha, bias, n, index) -> None; in place, so that the site computes `x + F(x)`. `index` is the
            site's place in its stream.
        paper: the same signature; the initialisation of the source.
        coefficients: (streams (..., n, C), phi, alpha (3,), bias (n^2 + 2n,), sinkhorn_iterations, eps_norm)
            -> Coefficients, all in phi's dtype.
        source: paper or model that defines it.
    """

    phi_shape: Callable[[int, int], tuple[int, int]]
    preserve: Callable[[Tensor, Tensor, Tensor, int, int], None]
    paper: Callable[[Tensor, Tensor, Tensor, int, int], None]
    coefficients: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Coefficients]
    source: str


def split(raw: Tensor, n: int) -> Coefficients:
    """Cuts the last axis (n^2 + 2n) in the column order [pre: n | post: n | res: n*n row-major]."""
    pre, post, res = raw.split([n, n, n * n], dim=-1)
    return Coefficients(pre, post, res.unflatten(-1, (n, n)))

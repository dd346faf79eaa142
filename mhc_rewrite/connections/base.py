"""What a connection is: how one site's parameters are shaped, started and brought to the operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Connection:
    """One row of the table of relatives: all share the site's shape, only how H_* are made differs.

    Attributes:
        kind: a name in `mhc_rewrite.kernels.kinds.KINDS`: what becomes of the projected state.
        phi_shape: (n, C) -> shape of the projection.
        projection: (phi, n) -> phi as the operators take it, (n C, n^2 + 2n).
        preserve: (phi, alpha, bias, n, index) -> None; in place, so that the site computes `x + F(x)`. `index` is the
            site's place in its stream.
        paper: the same signature; the initialisation of the source.
        source: paper or model that defines it.
    """

    kind: str
    phi_shape: Callable[[int, int], tuple[int, int]]
    projection: Callable[[Tensor, int], Tensor]
    preserve: Callable[[Tensor, Tensor, Tensor, int, int], None]
    paper: Callable[[Tensor, Tensor, Tensor, int, int], None]
    source: str

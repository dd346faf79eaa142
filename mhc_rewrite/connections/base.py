"""What a connection is: how one site's parameters are shaped, started and brought to the operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

# (phi, alpha, bias, n, index) -> None, in place. `index` is the site's place in its stream.
Start = Callable[[Tensor, Tensor, Tensor, int, int], None]

STARTS = {
    "preserve": "the original function, and streams that part at the first site",
    "equal": "the original function, and streams that stay equal until H_post has learned",
    "near_identity": "the original function; H_res as good as the identity, where it stays",
    "paper": "that of the connection's own source",
}


def first_group(n: int) -> int:
    """How many of n streams are in the first of the two groups that "preserve" starts with; the others follow them."""
    return (n + 1) // 2


@dataclass(frozen=True)
class Connection:
    """One row of the table of relatives: all share the site's shape, only how H_* are made differs.

    Attributes:
        kind: a name in `mhc_rewrite.kernels.kinds.KINDS`: what becomes of the projected state.
        phi_shape: (n, C) -> shape of the projection.
        projection: (phi, n) -> phi as the operators take it, (n C, n^2 + 2n).
        starts: how a site may begin, for every name in `STARTS`.
        source: paper or model that defines it.
    """

    kind: str
    phi_shape: Callable[[int, int], tuple[int, int]]
    projection: Callable[[Tensor, int], Tensor]
    starts: Mapping[str, Start]
    source: str

"""Orthogonal mixing by the Cayley transform (JPmHC, arXiv:2602.18308).

    H_res = (I - A)^-1 (I + A)      A = S - S^T, S strictly upper triangular, row by row from n (n - 1) / 2 logits

A rotation for any logits: no direction is amplified, and none is lost. Sums are not kept, nor with them the mean of the
streams, but at A = 0, where it is the identity. H_pre and H_post as mHC's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mhc_rewrite.connections.base import Connection, gates
from mhc_rewrite.connections.mhc import paper
from mhc_rewrite.connections.starts import starts
from mhc_rewrite.kernels.reference import Coefficients


def mappings(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Coefficients:
    pre, post, logits = gates(raw, alpha, bias, n)
    # In fp64: in fp32 logits of 10 leave an orthogonal matrix to 1e-5 only.
    res = _cayley(_skew(logits.double().movedim(-1, 0), n))
    res = res.movedim((0, 1), (-2, -1)).to(logits.dtype, memory_format=torch.contiguous_format)
    return Coefficients(pre, post, res)


def _skew(logits: Tensor, n: int) -> Tensor:
    """(n, n, ...)."""
    tokens = [0, 0] * (logits.dim() - 1)
    rows = logits.split([n - 1 - i for i in range(n)])
    upper = torch.stack([pad(row, (*tokens, n - row.shape[0], 0)) for row in rows])
    return upper - upper.transpose(0, 1)


def _cayley(skew: Tensor) -> Tensor:
    """(I - A)^-1 (I + A) by elimination, of all rows at once, leaving out each column that is done.

    No pivot has to be looked for: whatever has been eliminated, the symmetric part of what is left is no less than I,
    and with it every pivot than 1.
    """
    n = skew.shape[0]
    one = torch.eye(n, dtype=skew.dtype, device=skew.device).view(n, n, *[1] * (skew.dim() - 2))
    both = torch.cat([one - skew, one + skew], 1)
    for k in range(n):
        column, rest = both.split([1, both.shape[1] - 1], 1)
        both = torch.addcmul(rest, column - one[:, k : k + 1], rest[k : k + 1] / column[k], value=-1)
    return both


def _mixing(n: int, uniform: float) -> Sequence[float]:
    """The identity: what is orthogonal and keeps sums does not mix moderately. Its logits have gradients there."""
    return [0.0] * (n * (n - 1) // 2)


CAYLEY = Connection(
    function=mappings, starts=starts(_mixing, paper), source="arXiv:2602.18308", columns=lambda n: n * (n - 1) // 2
)

"""TBP: doubly stochastic entry by entry, between the bounds that the sums of rows and columns leave (arXiv:2605.21724).

Row by row, R what is left of the row's 1, c_k what is left of column k's:

    L = max(0, R - sum_(k > j) c_k)    U = min(R, c_j)    H_res[i, j] = L + (U - L) sigmoid(s_ij)      i, j < n - 1

and what is left goes to the last column and the last row. (n - 1)^2 logits, s row-major, any n; every doubly stochastic
matrix can be reached. H_pre and H_post as mHC's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from mhc_rewrite.connections.base import Connection, gates
from mhc_rewrite.connections.starts import logit, preferring_one, starts
from mhc_rewrite.kernels.reference import Coefficients


def mappings(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Coefficients:
    pre, post, logits = gates(raw, alpha, bias, n)
    if n == 1:
        return Coefficients(pre, post, pre.new_ones(*pre.shape, 1))
    inner = _inner(torch.sigmoid(logits).movedim(-1, 0).unflatten(0, (n - 1, n - 1)))
    rows = torch.cat([inner, _left(inner, 1)], 1)
    res = torch.cat([rows, _left(rows, 0)], 0)
    return Coefficients(pre, post, res.movedim((0, 1), (-2, -1)).contiguous())


def _left(entries: Tensor, axis: int) -> Tensor:
    """What is left of sums of 1, in fp64 up to here: sixteen numbers in fp32 sum to 1 within 1e-6."""
    return (1 - entries.sum(axis, keepdim=True, dtype=torch.float64)).to(entries.dtype)


def _inner(weights: Tensor) -> Tensor:
    """All but the last row and column, (m, m, ...) from sigmoids of the same shape, m = n - 1.

    Row i is worked on i steps later than the first one, so that a step makes one entry of every row: columns move on to
    the next row, in the state in which this one left them. L needs what the columns behind j have left before row i,
    which is n - i without those up to j: a number that a row can keep, at first 1 - (n - i).
    """
    m, tokens = weights.shape[0], [0, 0] * (weights.dim() - 2)
    # Row i shifted by i: in rows of 2m, of which all but the last lose their last element.
    late = pad(weights, (*tokens, 0, m)).flatten(0, 1)[: m * (2 * m - 1)].unflatten(0, (m, 2 * m - 1))
    row = torch.ones_like(late[:, 0])
    column = pad(row[:1], (*tokens, 0, m - 1))  # one that has not come yet has nothing to give
    start = torch.arange(-m, 0, dtype=row.dtype, device=row.device).view(m, *[1] * (row.dim() - 1))
    least = start + column
    steps = []
    for number, weight in enumerate(late.unbind(1), 1):
        entry = torch.lerp(least.clamp_min(0), torch.minimum(row, column), weight)
        steps.append(entry)
        row = row - entry
        # Behind the last column rows go on with nothing, and what they make is cut off below.
        column = pad((column - entry)[:-1], (*tokens, 1, 0), value=1.0 if number < m else 0.0)
        least = least - entry + column
    made = pad(torch.stack(steps, 1).flatten(0, 1), (*tokens, 0, m))
    return made.unflatten(0, (m, 2 * m))[:, :m]


def _mixing(n: int, uniform: float) -> Sequence[float]:
    """The logits of (1 - uniform) I + (uniform / n) 1 1^T, entry by entry."""
    columns, logits = [1.0] * n, []
    for i in range(n - 1):
        row, before = 1.0, list(columns)
        for j in range(n - 1):
            low, high = max(0.0, row - sum(before[j + 1 :])), min(row, columns[j])
            entry = (1 - uniform if i == j else 0.0) + uniform / n
            logits.append(logit((entry - low) / (high - low)))
            row, columns[j] = row - entry, columns[j] - entry
        columns[-1] -= row
    return logits


TBP = Connection(
    function=mappings,
    starts=starts(_mixing, preferring_one(lambda n: [0.0] * (n - 1) ** 2)),
    source="arXiv:2605.21724",
    columns=lambda n: (n - 1) ** 2,
)

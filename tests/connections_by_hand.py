"""H_res of mHC's relatives from its logits, from the equations of their sources and entry by entry. Nothing is fast.

Logits are (..., K) and matrices (..., n, n); what stands in front of them are tokens.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def matrix(entries: list[list[Tensor]]) -> Tensor:
    """From one tensor an entry."""
    return torch.stack([torch.stack(row, -1) for row in entries], -2)


def identity(s: Tensor, n: int) -> Tensor:
    """H_res = I."""
    one = s.new_ones(s.shape[:-1])
    return matrix([[one if i == j else 0 * one for j in range(n)] for i in range(n)])


def mhc_lite(s: Tensor, n: int) -> Tensor:
    """arXiv:2601.05732: sum_k softmax(s)_k P_k."""
    weights = (s - s.amax(-1, keepdim=True).detach()).exp().unbind(-1)
    total = sum(weights)
    entries = [[torch.zeros_like(weights[0]) for _ in range(n)] for _ in range(n)]
    for weight, permutation in zip(weights, itertools.permutations(range(n)), strict=True):
        for i, j in enumerate(permutation):
            entries[i][j] = entries[i][j] + weight / total
    return matrix(entries)


def kromhc(s: Tensor, n: int) -> Tensor:
    """arXiv:2601.21579: the Kronecker product of [[p, 1 - p], [1 - p, p]], the first logit's factor first."""
    made = []
    for logits in s.flatten(0, -2) if s.dim() > 1 else [s]:
        factors = [s.new_ones(1, 1)]
        for logit in logits:
            p = 1 / (1 + torch.exp(-logit))
            factors.append(matrix([[p, 1 - p], [1 - p, p]]))
        made.append(functools.reduce(torch.kron, factors))
    return torch.stack(made).reshape(*s.shape[:-1], n, n)


def tbp(s: Tensor, n: int) -> Tensor:
    """arXiv:2605.21724: each entry between what the others of its row and column could still make up for, and what is
    left of both; R of the row, c of the columns."""
    t = s.unflatten(-1, (n - 1, n - 1)) if n > 1 else s
    one = s.new_ones(s.shape[:-1])
    c, rows = [one] * n, []
    for i in range(n - 1):
        R, row = one, []
        for j in range(n - 1):
            L = torch.maximum(0 * one, R - sum(c[j + 1 :]))
            U = torch.minimum(R, c[j])
            row.append(L + (U - L) / (1 + torch.exp(-t[..., i, j])))
            R = R - row[j]
        rows.append([*row, R])
        c = [left - entry for left, entry in zip(c, rows[i], strict=True)]
    return matrix([*rows, c])


def cayley(s: Tensor, n: int) -> Tensor:
    """arXiv:2602.18308: (I - A)^-1 (I + A), A = S - S^T."""
    zero = s.new_zeros(s.shape[:-1])
    A, logits = [[zero] * n for _ in range(n)], iter(s.unbind(-1))
    for i in range(n):
        for j in range(i + 1, n):
            A[i][j] = next(logits)
            A[j][i] = -A[i][j]
    skew, eye = matrix(A), torch.eye(n, dtype=s.dtype)
    return torch.linalg.inv(eye - skew) @ (eye + skew)


H_RES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "identity": identity,
    "mhc_lite": mhc_lite,
    "kromhc": kromhc,
    "tbp": tbp,
    "cayley": cayley,
}
COLUMNS: dict[str, Callable[[int], int]] = {
    "identity": lambda n: 0,
    "mhc_lite": math.factorial,
    "kromhc": lambda n: {1: 0, 2: 1, 4: 2, 8: 3, 16: 4}[n],
    "tbp": lambda n: (n - 1) ** 2,
    "cayley": lambda n: n * (n - 1) // 2,
}
# For how many streams each is defined, of the 16 that a site may have.
STREAMS = {
    "identity": range(1, 17),
    "mhc_lite": range(1, 6),
    "kromhc": (1, 2, 4, 8, 16),
    "tbp": range(1, 17),
    "cayley": range(1, 17),
}

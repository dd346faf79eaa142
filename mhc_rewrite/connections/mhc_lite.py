"""mHC-lite: H_res as a convex combination of all n! permutation matrices (arXiv:2601.05732).

    H_res = sum_k softmax(s)_k P_k        k = 1 ... n!, P_k[i, j] = 1 where the k-th permutation takes i to j

Doubly stochastic without iterations, and every doubly stochastic matrix can be reached (Birkhoff, von Neumann).
Permutations are in lexicographic order, the identity first; n! logits, so for few streams only. H_pre and H_post as
mHC's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mhc_rewrite.connections.base import Connection, gates
from mhc_rewrite.connections.starts import OFF_DIAGONAL_LOGIT, preferring_one, starts
from mhc_rewrite.kernels.reference import Coefficients

MAX_STREAMS = 5


def mappings(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Coefficients:
    pre, post, logits = gates(raw, alpha, bias, n)
    # In fp64, since a product in fp32 may be rounded to tf32 or bf16 where the user allows that for a model's.
    weights = torch.softmax(logits.double(), -1)
    mixed = weights @ _permutation_matrices(n, raw.device).flatten(1)
    return Coefficients(pre, post, mixed.to(logits.dtype).unflatten(-1, (n, n)))


def _permutation_matrices(n: int, device: torch.device) -> Tensor:
    """(n!, n, n) in fp64, made of torch's operators alone: a constant would have to be copied to a GPU at each call."""
    table = torch.zeros(1, 1, dtype=torch.int64, device=device)  # (m!, m), from m = 1 on
    for m in range(2, n + 1):
        first = torch.arange(m, device=device).view(m, 1, 1)
        others = table + (table >= first)  # the permutations of m - 1, in what is left beside the first
        table = torch.cat([first.expand(-1, others.shape[1], -1), others], -1).flatten(0, 1)
    return (table.unsqueeze(-1) == torch.arange(n, device=device)).double()


def _mixing(n: int, uniform: float) -> Sequence[float]:
    """All permutations alike give the uniform matrix; the first one is the identity."""
    share = uniform / math.factorial(n)
    return [math.log(1 - uniform + share)] + [math.log(share)] * (math.factorial(n) - 1)


def _refuses(n: int) -> str:
    if n <= MAX_STREAMS:
        return ""
    return (
        f"mhc_lite mixes all n! permutations, which for n_streams={n} are {math.factorial(n)}; it goes up to "
        f"n_streams={MAX_STREAMS}. connection='tbp' reaches the same matrices with (n - 1)^2 logits, for any n"
    )


MHC_LITE = Connection(
    function=mappings,
    starts=starts(_mixing, preferring_one(lambda n: [0.0] + [OFF_DIAGONAL_LOGIT] * (math.factorial(n) - 1))),
    source="arXiv:2601.05732",
    columns=math.factorial,
    refuses=_refuses,
)

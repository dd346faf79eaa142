"""KromHC: H_res as a Kronecker product of doubly stochastic 2 x 2 matrices (arXiv:2601.21579).

    H_res = F_1 (x) F_2 (x) ... (x) F_k        n = 2^k
    F_j = [[p_j, 1 - p_j], [1 - p_j, p_j]]     p_j = sigmoid(s_j)

Each factor is a convex combination of the two permutations of two; the source's softmax over two logits is the sigmoid
of their difference. log2 n logits, n a power of two. Not every doubly stochastic matrix can be reached. Streams are
numbered in binary: F_j mixes those that differ in the j-th digit, the first one the halves. H_pre and H_post as mHC's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mhc_rewrite.connections.base import Connection, gates
from mhc_rewrite.connections.starts import OFF_DIAGONAL_LOGIT, logit, preferring_one, starts
from mhc_rewrite.kernels.reference import Coefficients


def mappings(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Coefficients:
    pre, post, logits = gates(raw, alpha, bias, n)
    if n == 1:
        return Coefficients(pre, post, pre.new_ones(*pre.shape, 1))
    stay = torch.sigmoid(logits.movedim(-1, 0))
    leave = 1 - stay
    res, *factors = torch.stack([stay, leave, leave, stay], 1).unflatten(1, (2, 2)).unbind()  # (2, 2, ...)
    for factor in factors:
        res = (res[:, None, :, None] * factor[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return Coefficients(pre, post, res.movedim((0, 1), (-2, -1)).contiguous())


def _factors(n: int) -> int:
    return n.bit_length() - 1


def _groups(n: int) -> Iterator[tuple[Sequence[int], float]]:
    """Streams with as many ones in their number, from 1 down to -1.

    That direction, and not the difference of two halves, since every H_res has the latter as an eigenvector: whatever
    the logits did, streams would differ in this one direction alone, which no site reads, and no logit had a gradient.
    With equal factors this one is an eigenvector too, and no more when one of them changes.
    """
    k = _factors(n)
    for ones in range(k + 1):
        yield [stream for stream in range(n) if stream.bit_count() == ones], (k - 2 * ones) / k


def _mixing(n: int, uniform: float) -> Sequence[float]:
    """What differs in one digit keeps a share of 1 - uniform, as it does with the other connections."""
    return [logit(1 - uniform / 2)] * _factors(n)


def _refuses(n: int) -> str:
    if n.bit_count() == 1:
        return ""
    low = 1 << _factors(n)
    return (
        f"kromhc is a product of 2 x 2 factors, so n_streams has to be a power of two: {low} or {2 * low}, not {n}. "
        "connection='tbp' takes any n"
    )


KROMHC = Connection(
    function=mappings,
    starts=starts(_mixing, preferring_one(lambda n: [-OFF_DIAGONAL_LOGIT] * _factors(n)), _groups),
    source="arXiv:2601.21579",
    columns=_factors,
    refuses=_refuses,
    in_halves=False,
)

"""Manifold-constrained hyper-connections: sigmoid, 2 sigmoid and Sinkhorn-Knopp (arXiv:2512.24880)."""

from __future__ import annotations

import math

from torch import Tensor

from mhc_rewrite.connections import starts
from mhc_rewrite.connections.base import Connection
from mhc_rewrite.kernels.reference import split


def preserve(
    phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int, *,
    apart: float = starts.APART, read_apart: float = starts.READ_APART, uniform: float = starts.UNIFORM,
) -> None:  # fmt: skip
    """Keeps the mean of the streams, which is the residual, and lets the streams part.

    H_res is doubly stochastic, which keeps the mean, and its logits are moderate, so that they have gradients.
    """
    starts.still(phi, alpha, n)
    pre, post, res = split(bias, n)
    starts.part_groups(pre, post, index, apart=apart, read_apart=read_apart)
    _mix_moderately(res, n, uniform)


def equal(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    starts.still(phi, alpha, n)
    pre, post, res = split(bias, n)
    starts.keep_equal(pre, post, index)
    _mix_moderately(res, n)


def near_identity(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    """As "equal", with an H_res that begins so near to the identity that its logits hardly have a gradient."""
    starts.still(phi, alpha, n)
    pre, post, res = split(bias, n)
    starts.keep_equal(pre, post, index)
    res.fill_(starts.OFF_DIAGONAL_LOGIT)
    res.fill_diagonal_(0.0)


def paper(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    phi.normal_(0.0, 0.02)
    alpha.fill_(starts.ALPHA)
    bias.zero_()


def _mix_moderately(res: Tensor, n: int, uniform: float = starts.UNIFORM) -> None:
    """The logarithm of a doubly stochastic matrix: what the iterations leave as it is."""
    res.fill_(math.log(uniform / n))
    res.fill_diagonal_(math.log(1 - uniform + uniform / n))


MHC = Connection(
    {"preserve": preserve, "equal": equal, "near_identity": near_identity, "paper": paper}, "arXiv:2512.24880"
)

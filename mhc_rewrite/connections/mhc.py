"""Manifold-constrained hyper-connections: sigmoid, 2 sigmoid and Sinkhorn-Knopp (arXiv:2512.24880)."""

from __future__ import annotations

import math

from torch import Tensor

from mhc_rewrite.connections.base import Connection
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.kernels.reference import split

ALPHA = 0.01
# Of "preserve": how far H_post is apart between the two groups of streams, and H_pre within each of them.
APART, READ_APART = 0.5, 0.8
# Of "preserve" and "equal": how much of H_res is the uniform matrix; the rest is the identity.
UNIFORM = 0.2
# Of "equal" and "near_identity": the stream that a site mostly reads rotates with the site's index, as with equal H_pre
# on all streams they would never part.
PREFERRED_SHARE = 0.9
# Of "near_identity": exp(-8) beside exp(0).
OFF_DIAGONAL_LOGIT = -8.0


def preserve(
    phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int, *,
    apart: float = APART, read_apart: float = READ_APART, uniform: float = UNIFORM,
) -> None:  # fmt: skip
    """Keeps the mean of the streams, which is the residual, and lets the streams part.

    The first half of the streams and the rest get different H_post, with mean 1. All streams of a half stay equal so,
    and a site reads the mean of all as long as its H_pre differs from 1/n within the halves alone. H_res is doubly
    stochastic, which keeps the mean, and its logits are moderate, so that they have gradients.
    """
    _start(phi, alpha, n)
    pre, post, res = split(bias, n)
    first = (n + 1) // 2
    side = (-1) ** index * apart
    for begin, size, direction in ((0, first, (n - first) / first), (first, n - first, -1.0)):
        group = slice(begin, begin + size)
        post[group] = _logit((1 + side * direction) / 2)
        pre[group] = _logit((1 - read_apart / (size - 1)) / n) if size > 1 else _logit(1 / n)
        if size > 1:
            pre[begin + index % size] = _logit((1 + read_apart) / n)
    _mix_moderately(res, n, uniform)


def equal(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    """Keeps the streams equal, so that whatever stands between two sites may be done to each of them."""
    _start(phi, alpha, n)
    pre, post, res = split(bias, n)
    _read_mostly_one(pre, n, index)
    post.zero_()
    _mix_moderately(res, n)


def near_identity(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    """As "equal", with an H_res that begins so near to the identity that its logits hardly have a gradient."""
    _start(phi, alpha, n)
    pre, post, res = split(bias, n)
    _read_mostly_one(pre, n, index)
    post.zero_()
    res.fill_(OFF_DIAGONAL_LOGIT)
    res.fill_diagonal_(0.0)


def paper(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    phi.normal_(0.0, 0.02)
    alpha.fill_(ALPHA)
    bias.zero_()


def _start(phi: Tensor, alpha: Tensor, n: int) -> None:
    if n == 1:
        raise ConfigError("n_streams=1 can't preserve: a sigmoid does not reach H_pre = 1. A plain residual does it.")
    phi.zero_()
    alpha.fill_(ALPHA)


def _read_mostly_one(pre: Tensor, n: int, index: int) -> None:
    pre.fill_(_logit((1 - PREFERRED_SHARE) / (n - 1)))
    pre[index % n] = _logit(PREFERRED_SHARE)


def _mix_moderately(res: Tensor, n: int, uniform: float = UNIFORM) -> None:
    """The logarithm of a doubly stochastic matrix: what the iterations leave as it is."""
    res.fill_(math.log(uniform / n))
    res.fill_diagonal_(math.log(1 - uniform + uniform / n))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


MHC = Connection(
    {"preserve": preserve, "equal": equal, "near_identity": near_identity, "paper": paper}, "arXiv:2512.24880"
)

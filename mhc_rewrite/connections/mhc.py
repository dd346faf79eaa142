"""Manifold-constrained hyper-connections: sigmoid, 2 sigmoid and Sinkhorn-Knopp (arXiv:2512.24880)."""

from __future__ import annotations

import math

from torch import Tensor

from mhc_rewrite.connections.base import Connection
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.kernels.reference import split

# The stream that a site mostly reads rotates with the site's index: with equal H_pre on all streams they never part.
PREFERRED_SHARE = 0.9
# exp(-8) beside exp(0): close enough to the identity to start from, far enough from zero to have gradients.
OFF_DIAGONAL_LOGIT = -8.0
ALPHA = 0.01


def phi_shape(n: int, width: int) -> tuple[int, int]:
    return (n * width, n * n + 2 * n)


def projection(phi: Tensor, n: int) -> Tensor:
    return phi


def preserve(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    if n == 1:
        raise ConfigError("n_streams=1 can't preserve: a sigmoid does not reach H_pre = 1. A plain residual does it.")
    phi.zero_()
    alpha.fill_(ALPHA)
    pre, post, res = split(bias, n)
    share = (1 - PREFERRED_SHARE) / (n - 1)
    pre.fill_(math.log(share / (1 - share)))
    pre[index % n] = math.log(PREFERRED_SHARE / (1 - PREFERRED_SHARE))
    post.zero_()
    res.fill_(OFF_DIAGONAL_LOGIT)
    res.fill_diagonal_(0.0)


def paper(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    phi.normal_(0.0, 0.02)
    alpha.fill_(ALPHA)
    bias.zero_()


MHC = Connection("mhc", phi_shape, projection, preserve, paper, "arXiv:2512.24880")

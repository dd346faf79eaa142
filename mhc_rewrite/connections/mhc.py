"""Manifold-constrained hyper-connections: sigmoid, 2 sigmoid and Sinkhorn-Knopp (arXiv:2512.24880)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mhc_rewrite.connections.base import Coefficients, Connection, split
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.kernels import reference

# The stream that a site mostly reads rotates with the site's index: with equal H_pre on all streams they never part.
PREFERRED_SHARE = 0.9
# exp(-8) beside exp(0): close enough to the identity to start from, far enough from zero to have gradients.
OFF_DIAGONAL_LOGIT = -8.0
ALPHA = 0.01


def phi_shape(n: int, width: int) -> tuple[int, int]:
    return (n * width, n * n + 2 * n)


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


def coefficients(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, sinkhorn_iterations: int, eps_norm: float
) -> Coefficients:
    """Equations [14] to [19]."""
    n = streams.shape[-2]
    raw = split(reference.project(streams, phi, eps_norm), n)
    shift = split(bias, n)
    return Coefficients(
        pre=torch.sigmoid(alpha[0] * raw.pre + shift.pre),
        post=2 * torch.sigmoid(alpha[1] * raw.post + shift.post),
        res=reference.sinkhorn_knopp(alpha[2] * raw.res + shift.res, sinkhorn_iterations),
    )


MHC = Connection(phi_shape, preserve, paper, coefficients, "arXiv:2512.24880")

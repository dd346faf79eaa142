"""Hyper-connections without constraint, dynamic form (arXiv:2409.19606)."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_rewrite.connections.base import Coefficients, Connection, split

ALPHA = 0.01


def phi_shape(n: int, width: int) -> tuple[int, int]:
    return (width, n + 2)


def start(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
    """The paper's own initialisation, which also computes the original function."""
    phi.zero_()
    alpha.fill_(ALPHA)
    pre, post, res = split(bias, n)
    pre.zero_()
    pre[index % n] = 1.0
    post.fill_(1.0)
    res.zero_()
    res.fill_diagonal_(1.0)


def coefficients(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, sinkhorn_iterations: int, eps_norm: float
) -> Coefficients:
    """static + alpha * tanh(norm(X) W), the norm per stream.

    Row i of norm(X) W holds stream i's H_post[i], H_pre[i] and H_res[:, i].
    """
    n = streams.shape[-2]
    normed = streams * torch.rsqrt((streams * streams).mean(dim=-1, keepdim=True) + eps_norm)
    post, pre, res = torch.tanh(normed @ phi).split([1, 1, n], dim=-1)
    static = split(bias, n)
    return Coefficients(
        pre=static.pre + alpha[0] * pre.squeeze(-1),
        post=static.post + alpha[1] * post.squeeze(-1),
        res=static.res + alpha[2] * res.transpose(-1, -2),
    )


HC = Connection(phi_shape, start, start, coefficients, "arXiv:2409.19606")

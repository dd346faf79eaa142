"""Hyper-connections without constraint, dynamic form (arXiv:2409.19606)."""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_rewrite.connections.base import STARTS, Connection
from mhc_rewrite.kernels.reference import split

ALPHA = 0.01


def phi_shape(n: int, width: int) -> tuple[int, int]:
    return (width, n + 2)


def projection(phi: Tensor, n: int) -> Tensor:
    """Row j of norm(X) W holds stream j's H_post[j], H_pre[j] and H_res[:, j]: W (C, n + 2) spread over the columns
    [pre | post | res] of (n C, n^2 + 2n), zero wherever a stream has no say."""
    post, pre, res = phi.split([1, 1, n], dim=-1)
    rows = torch.cat([pre, post, res], dim=-1)  # one value per row of the (n + 2, n) columns
    own = torch.diag(phi.new_ones(n))  # made of phi, which may be distributed: torch.eye would not be
    return (own[:, None, None, :] * rows[None, :, :, None]).flatten(2).flatten(0, 1)


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


HC = Connection(dict.fromkeys(STARTS, start), "arXiv:2409.19606", phi_shape=phi_shape, projection=projection)

"""The mathematics in plain PyTorch: the truth that kernels are held against. Equation numbers: arXiv:2512.24880v2.

Streams are (..., n, C), branch inputs and outputs (..., C); the leading dimensions are the tokens. A state whose
streams are still equal may be given as (..., 1, C). Arithmetic is in phi's dtype, fp32 or fp64, in `post` in that of
H_res. Gradients are autograd's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mhc_rewrite.kernels.kinds import FUNCTIONS, KINDS, is_static, name_of, norms_of, streams_of


class Coefficients(NamedTuple):
    """One site's coefficients per token: `pre` (..., n), `post` (..., n), `res` (..., n, n) as [out, in]."""

    pre: Tensor
    post: Tensor
    res: Tensor


def split(columns: Tensor, n: int) -> Coefficients:
    """Cuts the last axis (n^2 + 2n) in the column order [pre: n | post: n | res: n*n row-major]."""
    pre, post, res = columns.split([n, n, n * n], dim=-1)
    return Coefficients(pre, post, res.unflatten(-1, (n, n)))


def sinkhorn_knopp(logits: Tensor, iterations: int = 20, eps: float = 0.0) -> Tensor:
    """Doubly stochastic matrices from logits [9].

    M = exp(logits), then `iterations` times: every column divided by its sum, every row divided by its sum. Computed
    on logarithms, so that no finite logits can give 0/0; the gradient is that of the iterations as executed.

    Args:
        logits: (..., n, n), any finite values.
        iterations: number of (column, row) normalisations.
        eps: added to every entry after the first column pass, and to every sum after it (DeepSeek-V4's order).

    Returns:
        (..., n, n); rows sum to 1 to rounding, columns as far as the iteration has converged.
    """
    for k in range(iterations):
        logits = logits - _log_sum(logits, -2, eps if k else 0.0)
        if eps and k == 0:
            logits = (logits.exp() + eps).log()
        logits = logits - _log_sum(logits, -1, eps)
    return logits.exp()


def _log_sum(logits: Tensor, dim: int, eps: float) -> Tensor:
    sums = logits.logsumexp(dim=dim, keepdim=True)
    return (sums.exp() + eps).log() if eps else sums


def project(streams: Tensor, phi: Tensor, kind: str, eps_norm: float) -> tuple[Tensor, Tensor]:
    """Raw coefficients, the RMS-normalised state times phi, and the norm [14, 15, 16].

    The division by the norm comes after the product, so that one pass over the state serves both.

    Args:
        streams: (..., n, C), or (..., 1, C) where all streams are equal.
        phi: (n * C, K): n^2 + 2n columns, or as many as the kind has.
        kind: as in kinds.py.
        eps_norm: under the root.

    Returns:
        raw (..., K) and the norm r, (..., 1), or (..., n) where it is taken per stream; in phi's dtype.
    """
    n = phi.shape[0] // streams.shape[-1]
    state = streams.to(phi.dtype).expand(*streams.shape[:-2], n, streams.shape[-1])
    squares = (state * state).mean(dim=-1)
    if norms_of(kind, n) == 1:
        norm = divisor = (squares.mean(dim=-1, keepdim=True) + eps_norm).sqrt()
    else:
        norm = (squares + eps_norm).sqrt()
        divisor = norm.repeat([1] * (norm.dim() - 1) + [n + 2])  # columns pre[j], post[j] and res[i, j] by stream j
    with torch.autocast(phi.device.type, enabled=False):  # which would round the product to bf16 without a word
        product = state.flatten(-2) @ phi
    return product / divisor, norm


def coefficients(raw: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int) -> Coefficients:
    """H_pre, H_post and H_res from raw (..., K), alpha (3,) and bias (K,) [17, 18, 19]."""
    n, name = streams_of(bias.shape[-1], kind), name_of(kind)
    if is_static(kind):
        leading = raw.shape[:-1]
        made = coefficients(bias.new_zeros(bias.shape[-1]), bias.new_zeros(3), bias, name, iterations)
        return Coefficients(*(h.expand(*leading, *h.shape) for h in made))
    if name in FUNCTIONS:
        of_tokens = FUNCTIONS[name](raw.reshape(-1, bias.shape[-1]), alpha, bias, n)
        return Coefficients(*(h.reshape(*raw.shape[:-1], *h.shape[1:]) for h in of_tokens))
    rules = KINDS[kind]
    scale = torch.cat([a.expand(size) for a, size in zip(alpha.unsqueeze(-1).unbind(), (n, n, n * n))])
    if not rules.constrained:
        return split(bias + scale * torch.tanh(raw), n)
    pre, post, res = split(scale * raw + bias, n)
    res = sinkhorn_knopp(res.mT if rules.transposed else res, iterations, rules.eps)
    return Coefficients(torch.sigmoid(pre) + rules.eps, 2 * torch.sigmoid(post), res)


def mix_in(streams: Tensor, h_pre: Tensor) -> Tensor:
    """What the block reads: u = sum_j H_pre[j] X[j]. (..., n, C), (..., n) -> (..., C)."""
    return (h_pre.unsqueeze(-1) * streams).sum(dim=-2)


def mix_out(streams: Tensor, branch: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The next state: X'[i] = sum_j H_res[i, j] X[j] + H_post[i] y.

    (..., n, C), (..., C), (..., n), (..., n, n) -> (..., n, C).
    """
    mixed = (h_res.unsqueeze(-1) * streams.unsqueeze(-3)).sum(dim=-2)
    return mixed + h_post.unsqueeze(-1) * branch.unsqueeze(-2)


def pre(
    streams: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps_norm: float
) -> tuple[Tensor, Tensor, Tensor]:
    """u (..., C) in the dtype of `streams`, H_post (..., n), H_res (..., n, n) of one site."""
    raw, _ = project(streams, phi, kind, eps_norm)
    h = coefficients(raw, alpha, bias, kind, iterations)
    return mix_in(streams.to(phi.dtype), h.pre).to(streams.dtype), h.post, h.res


def post(streams: Tensor, branch: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The next state (..., n, C), in the wider of the dtypes of `streams` and `branch`."""
    mixed = mix_out(streams.to(h_res.dtype), branch.to(h_res.dtype), h_post, h_res)
    return mixed.to(torch.promote_types(streams.dtype, branch.dtype))


def boundary(
    streams: Tensor, branch: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps_norm: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`post` of one site and `pre` of the next: X', u', H_post', H_res'."""
    state = post(streams, branch, h_post, h_res)
    return state, *pre(state, phi, alpha, bias, kind, iterations, eps_norm)

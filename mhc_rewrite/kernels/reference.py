"""The mathematics in plain PyTorch: the truth that kernels are held against. Equation numbers: arXiv:2512.24880v2.

Streams are (..., n, C), branch inputs and outputs (..., C); the leading dimensions are the tokens. Coefficients are
fp32, or fp64 where their input is.
"""

from __future__ import annotations

from torch import Tensor


def sinkhorn_knopp(logits: Tensor, iterations: int = 20) -> Tensor:
    """Doubly stochastic matrices from logits [9].

    M = exp(logits), then `iterations` times: every column divided by its sum, every row divided by its sum. Computed
    on logarithms, so that no finite logits can give 0/0; the gradient is that of the iterations as executed.

    Args:
        logits: (..., n, n), any finite values.
        iterations: number of (column, row) normalisations.

    Returns:
        (..., n, n); rows sum to 1 to rounding, columns as far as the iteration has converged.
    """
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=-2, keepdim=True)
        logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    return logits.exp()


def project(streams: Tensor, phi: Tensor, eps_norm: float) -> Tensor:
    """Raw coefficients: the RMS-normalised state times phi [14, 15, 16].

    The division by the norm comes after the product, so that one pass over the state serves both.

    Args:
        streams: (..., n, C), in phi's dtype.
        phi: (n * C, k).

    Returns:
        (..., k).
    """
    state = streams.flatten(-2)
    norm = ((state * state).mean(dim=-1, keepdim=True) + eps_norm).sqrt()
    return (state @ phi) / norm


def mix_in(streams: Tensor, h_pre: Tensor) -> Tensor:
    """What the block reads: u = sum_j H_pre[j] X[j]. (..., n, C), (..., n) -> (..., C)."""
    return (h_pre.unsqueeze(-1) * streams).sum(dim=-2)


def mix_out(streams: Tensor, branch: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """The next state: X'[i] = sum_j H_res[i, j] X[j] + H_post[i] y.

    (..., n, C), (..., C), (..., n), (..., n, n) -> (..., n, C).
    """
    mixed = (h_res.unsqueeze(-1) * streams.unsqueeze(-3)).sum(dim=-2)
    return mixed + h_post.unsqueeze(-1) * branch.unsqueeze(-2)

"""From projected tokens to H_post and H_res, inside a kernel; one register tile for a block of tokens.

Sinkhorn-Knopp runs on logarithms, A' + f_i + g_j with row and column potentials f and g, so that no finite logits can
give 0/0. A' is A after its first column pass. Nothing of the iterations reaches memory.

Scaled values s = alpha * raw + bias have columns [pre: N | post: N | res: N*N]; `Kind` explains CONSTRAINED, EPS and
TRANSPOSED. NP is N rounded up to a power of two; what lies between is masked. Equations [17, 18, 19] of
arXiv:2512.24880v2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def pre_of(raw, alpha, bias, j, CONSTRAINED: tl.constexpr, EPS: tl.constexpr):
    """H_pre of stream j, a scalar, for a block of tokens; `raw` holds that column."""
    if CONSTRAINED:
        return tl.sigmoid(tl.load(alpha) * raw + tl.load(bias + j)) + EPS
    else:
        return tl.load(bias + j) + tl.load(alpha) * tanh(raw)


@triton.jit
def _log_sum(log_m, axis: tl.constexpr):
    """log sum exp over one axis; -inf where everything is."""
    top = tl.max(log_m, axis=axis, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(log_m - top), axis=axis, keep_dims=True)
    return tl.log(tl.where(total == 0.0, 1.0, total)) + top


@triton.jit
def _padded_log_sum(log_m, axis: tl.constexpr, EPS: tl.constexpr):
    """log(sum exp + EPS), without the axis."""
    if EPS > 0.0:
        return tl.log(tl.sum(tl.exp(log_m), axis=axis) + EPS)
    else:
        squeezed = _log_sum(log_m, axis)
        return tl.sum(squeezed, axis=axis)


@triton.jit
def _res_columns(t, N: tl.constexpr, NP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Columns and mask of the tile (tokens, out, in)."""
    i = tl.arange(0, NP)[None, :, None]
    j = tl.arange(0, NP)[None, None, :]
    if TRANSPOSED:
        columns = 2 * N + j * N + i
    else:
        columns = 2 * N + i * N + j
    return columns + 0 * t[:, None, None].to(tl.int32), (i < N) & (j < N)


@triton.jit
def _first_pass(logits, valid, EPS: tl.constexpr):
    """S, the softmax over columns, and A' = log(S + EPS)."""
    log_s = logits - _log_sum(logits, 1)
    if EPS > 0.0:
        softmax = tl.where(valid, tl.exp(log_s), 0.0)
        return softmax, tl.where(valid, tl.log(softmax + EPS), float("-inf"))
    else:
        log_s = tl.where(valid, log_s, float("-inf"))
        return tl.exp(log_s), log_s


@triton.jit
def _iterate(log_a, f, g, EPS: tl.constexpr):
    """One column pass and one row pass, as new potentials."""
    if EPS > 0.0:
        g = g - tl.log(tl.sum(tl.exp((log_a + g[:, None, :]) + f[:, :, None]), axis=1) + EPS)
        f = f - tl.log(tl.sum(tl.exp((log_a + g[:, None, :]) + f[:, :, None]), axis=2) + EPS)
    else:
        g = -_padded_log_sum(log_a + f[:, :, None], 1, EPS)
        f = -_padded_log_sum(log_a + g[:, None, :], 2, EPS)
    return f, g


@triton.jit
def _matrix(log_a, f, g, valid):
    return tl.where(valid, tl.exp((log_a + g[:, None, :]) + f[:, :, None]), 0.0)


@triton.jit
def store_coefficients(
    raw, alpha, bias, h_post, h_res, t, real, iterations,
    N: tl.constexpr, NP: tl.constexpr, CONSTRAINED: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """H_post and H_res of the tokens t from their raw columns in memory."""
    K: tl.constexpr = N * N + 2 * N
    j = tl.arange(0, NP)
    mask = real[:, None] & (j < N)[None, :]
    post_raw = tl.load(raw + t[:, None] * K + N + j[None, :], mask=mask, other=0.0)
    post_bias = tl.load(bias + N + j, mask=j < N, other=0.0)[None, :]
    columns, valid = _res_columns(t, N, NP, TRANSPOSED)
    there = real[:, None, None] & valid
    res_raw = tl.load(raw + t[:, None, None] * K + columns, mask=there, other=0.0)
    res_bias = tl.load(bias + columns, mask=valid, other=0.0)
    if CONSTRAINED:
        post = 2.0 * tl.sigmoid(tl.load(alpha + 1) * post_raw + post_bias)
        logits = tl.where(valid, tl.load(alpha + 2) * res_raw + res_bias, float("-inf"))
        _, log_a = _first_pass(logits, valid, EPS)
        g = tl.zeros_like(tl.sum(log_a, axis=1))
        f = -_padded_log_sum(log_a, 2, EPS)
        for _ in range(1, iterations):
            f, g = _iterate(log_a, f, g, EPS)
        res = _matrix(log_a, f, g, valid)
    else:
        post = post_bias + tl.load(alpha + 1) * tanh(post_raw)
        res = res_bias + tl.load(alpha + 2) * tanh(res_raw)
    tl.store(h_post + t[:, None] * N + j[None, :], post, mask=mask)
    i3 = tl.arange(0, NP)[None, :, None]
    j3 = tl.arange(0, NP)[None, None, :]
    tl.store(h_res + (t[:, None, None] * N + i3) * N + j3, res, mask=there)

"""From projected tokens to H_post and H_res and back, inside a kernel; register tiles for a block of tokens.

Sinkhorn-Knopp runs on logarithms, A' + f_i + g_j with row and column potentials f and g, so that no finite logits can
give 0/0. A' is A after its first column pass. Nothing of the iterations reaches memory: the gradient runs them again
and keeps the potentials of each in registers.

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


@triton.jit
def scales(alpha, k, N: tl.constexpr):
    """alpha of the columns k."""
    return tl.where(k < N, tl.load(alpha), tl.where(k < 2 * N, tl.load(alpha + 1), tl.load(alpha + 2)))


@triton.jit
def raw_gradient(g_s, raw, alpha, t, k, real, N: tl.constexpr, CONSTRAINED: tl.constexpr):
    """The gradient of the columns k of raw, (tokens, columns), from that of s, or of H where H = bias + alpha tanh."""
    K: tl.constexpr = N * N + 2 * N
    mask = real[:, None] & (k < K)[None, :]
    gradient = tl.load(g_s + t[:, None] * K + k[None, :], mask=mask, other=0.0) * scales(alpha, k, N)[None, :]
    if not CONSTRAINED:
        squashed = tanh(tl.load(raw + t[:, None] * K + k[None, :], mask=mask, other=0.0))
        gradient *= 1.0 - squashed * squashed
    return gradient


@triton.jit
def load_divisor(r, t, k, real, N: tl.constexpr, CONSTRAINED: tl.constexpr):
    """What the columns k were divided by: one norm, or the norm of the stream that a column belongs to."""
    if CONSTRAINED:
        return tl.load(r + t, mask=real, other=1.0)[:, None]
    else:
        return tl.load(r + t[:, None] * N + (k % N)[None, :], mask=real[:, None], other=1.0)


@triton.jit
def store_pre_gradient(gradient, raw, alpha, bias, g_s, t, real, i, N: tl.constexpr, CONSTRAINED: tl.constexpr):
    """Column pre[i] of g_s from the gradient of H_pre[i], a scalar for a block of tokens."""
    K: tl.constexpr = N * N + 2 * N
    if CONSTRAINED:
        a = tl.sigmoid(tl.load(alpha) * tl.load(raw + t * K + i, mask=real, other=0.0) + tl.load(bias + i))
        gradient *= a * (1.0 - a)
    tl.store(g_s + t * K + i, gradient, mask=real)


@triton.jit
def store_gradients(
    g_post, g_res, raw, alpha, bias, g_s, t, real, iterations,
    N: tl.constexpr, NP: tl.constexpr, CONSTRAINED: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr,
    HISTORY: tl.constexpr,
):  # fmt: skip
    """Columns post and res of g_s from the gradients of H_post and H_res."""
    K: tl.constexpr = N * N + 2 * N
    j = tl.arange(0, NP)
    mask = real[:, None] & (j < N)[None, :]
    post = tl.load(g_post + t[:, None] * N + j[None, :], mask=mask, other=0.0)
    if CONSTRAINED:
        post_raw = tl.load(raw + t[:, None] * K + N + j[None, :], mask=mask, other=0.0)
        post_bias = tl.load(bias + N + j, mask=j < N, other=0.0)[None, :]
        b = tl.sigmoid(tl.load(alpha + 1) * post_raw + post_bias)
        post *= 2.0 * b * (1.0 - b)
    tl.store(g_s + t[:, None] * K + N + j[None, :], post, mask=mask)
    columns, valid = _res_columns(t, N, NP, TRANSPOSED)
    there = real[:, None, None] & valid
    i3 = tl.arange(0, NP)[None, :, None]
    j3 = tl.arange(0, NP)[None, None, :]
    res = tl.load(g_res + (t[:, None, None] * N + i3) * N + j3, mask=there, other=0.0)
    if CONSTRAINED:
        res_raw = tl.load(raw + t[:, None, None] * K + columns, mask=there, other=0.0)
        res_bias = tl.load(bias + columns, mask=valid, other=0.0)
        logits = tl.where(valid, tl.load(alpha + 2) * res_raw + res_bias, float("-inf"))
        res = _sinkhorn_backward(res, logits, valid, iterations, EPS, HISTORY)
    tl.store(g_s + t[:, None, None] * K + columns, res, mask=there)


@triton.jit
def _sinkhorn_backward(g_res, logits, valid, iterations, EPS: tl.constexpr, HISTORY: tl.constexpr):
    """The gradient of the logits: that of the iterations as executed.

    With q the gradient of the logarithm of the matrix m that a pass has made, that of what the pass was given is
    q - m sum(q), the sum along the axis that was normalised. HISTORY >= iterations, a power of two: the potentials of
    iteration k lie at place k of a tile (HISTORY, tokens, NP), which Triton keeps within a thread along its first axis.
    """
    step = tl.arange(0, HISTORY)[:, None, None]
    softmax, log_a = _first_pass(logits, valid, EPS)
    g = tl.zeros_like(tl.sum(log_a, axis=1))
    f = -_padded_log_sum(log_a, 2, EPS)
    all_f = tl.where(step == 0, f[None, :, :], 0.0)
    all_g = tl.zeros_like(all_f)
    for k in range(1, iterations):
        f, g = _iterate(log_a, f, g, EPS)
        all_f = tl.where(step == k, f[None, :, :], all_f)
        all_g = tl.where(step == k, g[None, :, :], all_g)
    m = _matrix(log_a, f, g, valid)
    q = g_res * m
    for k in range(1, iterations):
        before = step == iterations - 1 - k
        q -= m * tl.sum(q, axis=2, keep_dims=True)
        f = tl.sum(tl.where(before, all_f, 0.0), axis=0)
        q -= _matrix(log_a, f, g, valid) * tl.sum(q, axis=1, keep_dims=True)
        g = tl.sum(tl.where(before, all_g, 0.0), axis=0)
        m = _matrix(log_a, f, g, valid)
    q -= m * tl.sum(q, axis=2, keep_dims=True)
    if EPS > 0.0:  # the step between the first two passes: S -> S + eps
        q *= softmax / (softmax + EPS)
    return q - softmax * tl.sum(q, axis=1, keep_dims=True)

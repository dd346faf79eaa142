"""`pre` and `boundary` in Triton, forward. The gradients are not there yet.

MIX tells them apart. Without it the state X' that is projected is the X given; with it, X' is made from X, y, H_post
and H_res of the site before, rounded to its dtype and stored. Either way a program owns a block of tokens and sweeps
over C twice: first the projection and the sum of squares, then, with the coefficients known, u; the second sweep finds
its block in the cache.

A state of S streams meets phi (S * C, K), K = N^2 + 2N. S is N, or 1 where all streams are equal and phi's rows were
summed. X has M streams.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of
from mhc_rewrite.kernels.triton_coefficients import pre_of, store_coefficients
from mhc_rewrite.kernels.triton_configs import Launch, choose, power_of_two, precision


@triton.jit
def _load_streams(X, t, c, mask, C, COUNT: tl.constexpr):
    """The tiles of all streams, fp32."""
    tiles = ()
    for j in tl.static_range(COUNT):
        rows = X + (t * COUNT + j)[:, None] * C + c[None, :]
        tiles = tiles + (tl.load(rows, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _mixed(tiles, branch, h_post, h_res, t, real, i, M: tl.constexpr, N: tl.constexpr, dtype: tl.constexpr):
    """X'[i], rounded as it is stored, in fp32."""
    out = tl.load(h_post + t * N + i, mask=real, other=0.0)[:, None] * branch
    for j in tl.static_range(M):
        out += tl.load(h_res + (t * N + i) * M + j, mask=real, other=0.0)[:, None] * tiles[j]
    return out.to(dtype).to(tl.float32)


@triton.jit
def _forward_kernel(
    X, y, h_post_in, h_res_in, state, phi, alpha, bias, u, h_post, h_res, raw, r, T, C, iterations, eps_norm,
    MIX: tl.constexpr, M: tl.constexpr, S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr,
    CONSTRAINED: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = N * N + 2 * N
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    real = t < T
    k = tl.arange(0, KP)
    stream = tl.arange(0, NP)[None, :]
    product = tl.zeros((TOKENS, KP), tl.float32)
    squares = tl.zeros((TOKENS, NP), tl.float32)
    for start in range(0, C, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < C)[None, :]
        if MIX:
            branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tiles = _load_streams(X, t, c, mask, C, M)
        for i in range(S):
            rows = (t * S + i)[:, None] * C + c[None, :]
            if MIX:
                x = _mixed(tiles, branch, h_post_in, h_res_in, t, real, i, M, N, state.dtype.element_ty)
                tl.store(state + rows, x.to(state.dtype.element_ty), mask=mask)
            else:
                x = tl.load(X + rows, mask=mask, other=0.0).to(tl.float32)
            weights = phi + (i * C + c).to(tl.int64)[:, None] * K + k[None, :]
            w = tl.load(weights, mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
            product = tl.dot(x, w, product, input_precision=PRECISION)
            squares += tl.where(stream == i, tl.sum(x * x, axis=1)[:, None], 0.0)
    if CONSTRAINED:
        norm = tl.sqrt(tl.sum(squares, axis=1) / (S * C) + eps_norm)
        tl.store(r + t, norm, mask=real)
        columns = product / norm[:, None]
    else:
        if S == 1:
            squares = tl.sum(squares, axis=1)[:, None] + tl.zeros_like(squares)
        norms = tl.sqrt(squares / C + eps_norm)
        tl.store(r + t[:, None] * N + stream, norms, mask=real[:, None] & (stream < N))
        tl.debug_barrier()
        columns = product / tl.load(r + t[:, None] * N + (k % N)[None, :], mask=real[:, None], other=1.0)
    tl.store(raw + t[:, None] * K + k[None, :], columns, mask=real[:, None] & (k < K)[None, :])
    # Register tiles cannot be cut into columns: what follows reads them from the cache, in the shapes it needs.
    tl.debug_barrier()
    store_coefficients(raw, alpha, bias, h_post, h_res, t, real, iterations, N, NP, CONSTRAINED, EPS, TRANSPOSED)
    for start in range(0, C, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < C)[None, :]
        total = tl.zeros((TOKENS, WIDTH), tl.float32)
        for i in tl.static_range(S):
            weight = _pre_weight(raw, alpha, bias, t, real, i, S, N, CONSTRAINED, EPS)
            rows = (t * S + i)[:, None] * C + c[None, :]
            if MIX:
                x = tl.load(state + rows, mask=mask, other=0.0).to(tl.float32)
            else:
                x = tl.load(X + rows, mask=mask, other=0.0).to(tl.float32)
            total += weight[:, None] * x
        tl.store(u + t[:, None] * C + c[None, :], total.to(u.dtype.element_ty), mask=mask)


@triton.jit
def _pre_weight(
    raw, alpha, bias, t, real, i, S: tl.constexpr, N: tl.constexpr, CONSTRAINED: tl.constexpr, EPS: tl.constexpr
):
    """What u takes of stream i: H_pre[i], or the sum of H_pre where one stream stands for all."""
    K: tl.constexpr = N * N + 2 * N
    weight = pre_of(tl.load(raw + t * K + i, mask=real, other=0.0), alpha, bias, i, CONSTRAINED, EPS)
    if S < N:
        for j in tl.static_range(1, N):
            weight += pre_of(tl.load(raw + t * K + j, mask=real, other=0.0), alpha, bias, j, CONSTRAINED, EPS)
    return weight


def pre(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """u (T, C), H_post (T, n), H_res (T, n, n), raw (T, n^2 + 2n) and r (T, 1), or (T, n) for a norm per stream."""
    outputs = _outputs(X, phi, kind)
    forward_launch(X, None, X, phi, alpha, bias, outputs, kind, iterations, eps).run()
    return outputs


def boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """X' (T, n, C), then what `pre` returns of it."""
    tokens, _, width = X.shape
    state = X.new_empty((tokens, h_res.shape[1], width), dtype=torch.promote_types(X.dtype, y.dtype))
    outputs = _outputs(state, phi, kind)
    forward_launch(X, (y, h_post, h_res), state, phi, alpha, bias, outputs, kind, iterations, eps).run()
    return state, *outputs


def _outputs(state: Tensor, phi: Tensor, kind: str) -> tuple[Tensor, ...]:
    tokens, _, width = state.shape
    n = streams_of(phi.shape[1])
    sizes = ((tokens, n), (tokens, n, n), (tokens, phi.shape[1]), (tokens, 1 if KINDS[kind].constrained else n))
    return state.new_empty((tokens, width)), *(phi.new_empty(size) for size in sizes)


def _constants(X: Tensor, mixed: bool, state: Tensor, phi: Tensor, kind: str) -> dict[str, object]:
    n, rules = streams_of(phi.shape[1]), KINDS[kind]
    return {
        "MIX": mixed, "M": X.shape[1], "S": state.shape[1], "N": n, "NP": power_of_two(n),
        "KP": max(16, power_of_two(phi.shape[1])), "CONSTRAINED": rules.constrained, "PRECISION": precision(),
    }  # fmt: skip


def forward_launch(
    X: Tensor, mix: tuple[Tensor, Tensor, Tensor] | None, state: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor,
    outputs: tuple[Tensor, ...], kind: str, iterations: int, eps: float,
) -> Launch:  # fmt: skip
    """`mix`: y, H_post and H_res of the site before, or None for `pre`."""
    (tokens, _, width), rules = X.shape, KINDS[kind]
    config = choose("forward", streams_of(phi.shape[1]), width)
    names = ("X", "y", "h_post_in", "h_res_in", "state", "phi", "alpha", "bias", "u", "h_post", "h_res", "raw", "r")
    tensors = (X, *(mix or (X, X, X)), state, phi, alpha, bias, *outputs)  # without a mix X stands in, unread
    sizes = {"T": tokens, "C": width, "iterations": iterations, "eps_norm": eps}
    flags = {"EPS": rules.eps, "TRANSPOSED": rules.transposed, "TOKENS": config.tokens, "WIDTH": config.width}
    return Launch(
        _forward_kernel, (triton.cdiv(tokens, config.tokens),), {**dict(zip(names, tensors)), **sizes},
        {**_constants(X, mix is not None, state, phi, kind), **flags}, config,
    )  # fmt: skip

"""The gradients of phi, alpha and bias in Triton, one launch, from those of s = alpha * raw + bias and of x @ phi:

    g_phi = X'^T g_product    g_bias = sum_tokens g_s    g_alpha = sum_tokens,columns g_s raw

A block is `WIDTH` elements of C of all streams and `KB` columns; one more block is alpha and bias, or none where their
gradients are made elsewhere. X' is read, or made
again from X, y, H_post and H_res. The tokens are cut into parts, one program each: a program writes its sums to memory
and counts itself at its block; the one that finds all others there adds the sums of all parts, in their order. So the
bits do not depend on who came last. With ATOMIC the programs add to the gradients in whatever order they come.

What is read: g_product, g_s and raw, and X' once (from memory; more columns than KB read it again, from the cache).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of
from mhc_rewrite.kernels.triton_coefficients import tanh
from mhc_rewrite.kernels.triton_configs import Config, Launch, choose, padded, power_of_two, precision
from mhc_rewrite.kernels.triton_streams import add_product, as_stored


@triton.jit
def _parameters_kernel(
    X, y, h_post, h_res, raw, g_s, g_product, phi_parts, bias_parts, arrivals, g_phi, g_alpha, g_bias, T, C, BLOCKS,
    MIX: tl.constexpr, M: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, KB: tl.constexpr, ALPHA_AND_BIAS: tl.constexpr, CONSTRAINED: tl.constexpr, ATOMIC: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(1) * BLOCKS * TOKENS
    last = tl.minimum(first + BLOCKS * TOKENS, T)
    if tl.program_id(0) < tl.num_programs(0) - ALPHA_AND_BIAS:
        _phi_gradient(
            X, y, h_post, h_res, g_product, phi_parts, arrivals, g_phi, first, last, C,
            MIX, M, S, SP, N, K, KP, KB, ATOMIC, TOKENS, WIDTH, PRECISION,
        )  # fmt: skip
    elif ALPHA_AND_BIAS:
        _alpha_and_bias_gradients(
            raw, g_s, bias_parts, arrivals, g_alpha, g_bias, first, last, N, KP, CONSTRAINED, ATOMIC, TOKENS
        )


@triton.jit
def _phi_gradient(
    X, y, h_post, h_res, g_product, phi_parts, arrivals, g_phi, first, last, C,
    MIX: tl.constexpr, M: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, KB: tl.constexpr, ATOMIC: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    EXACT: tl.constexpr = X.dtype.element_ty == tl.bfloat16 and y.dtype.element_ty == tl.bfloat16
    block = tl.program_id(0)
    parts = tl.num_programs(1)
    k = block % (KP // KB) * KB + tl.arange(0, KB)
    start_c = block // (KP // KB) * WIDTH
    total = tl.zeros((SP * WIDTH, KB), tl.float32)
    for start in range(first, last, TOKENS):
        t = start + tl.arange(0, TOKENS).to(tl.int64)
        real = t < last
        x = _state_tile(X, y, h_post, h_res, t, real, start_c + tl.arange(0, WIDTH), C, MIX, M, S, SP, N)
        x = tl.trans(tl.reshape(x, (TOKENS, SP * WIDTH)))
        columns = g_product + t[:, None] * K + k[None, :]
        columns = tl.load(columns, mask=real[:, None] & (k < K)[None, :], other=0.0)
        total = add_product(x, columns, total, EXACT, PRECISION)
    row = tl.arange(0, SP * WIDTH)
    stream = row // WIDTH
    c = start_c + row % WIDTH
    mask = ((stream < S) & (c < C))[:, None] & (k < K)[None, :]
    places = (stream * C + c).to(tl.int64)[:, None] * K + k[None, :]
    if ATOMIC:
        tl.atomic_add(g_phi + places, total, mask=mask)
    else:
        size = tl.cast(C, tl.int64) * S * K
        tl.store(phi_parts + tl.program_id(1) * size + places, total, mask=mask)
        if is_last(arrivals + block, parts):
            total = tl.zeros((SP * WIDTH, KB), tl.float32)
            for part in range(parts):
                total += tl.load(phi_parts + part * size + places, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(g_phi + places, total, mask=mask)


@triton.jit
def _alpha_and_bias_gradients(
    raw, g_s, bias_parts, arrivals, g_alpha, g_bias, first, last,
    N: tl.constexpr, KP: tl.constexpr, CONSTRAINED: tl.constexpr, ATOMIC: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = N * N + 2 * N
    parts = tl.num_programs(1)
    k = tl.arange(0, KP)
    kind = tl.where(k < N, 0, tl.where(k < 2 * N, 1, 2))
    by_bias = tl.zeros((KP,), tl.float32)
    by_alpha = tl.zeros((KP,), tl.float32)
    for start in range(first, last, TOKENS):
        t = start + tl.arange(0, TOKENS).to(tl.int64)
        mask = (t < last)[:, None] & (k < K)[None, :]
        g = tl.load(g_s + t[:, None] * K + k[None, :], mask=mask, other=0.0)
        column = tl.load(raw + t[:, None] * K + k[None, :], mask=mask, other=0.0)
        if not CONSTRAINED:
            column = tanh(column)
        by_bias += tl.sum(g, axis=0)
        by_alpha += tl.sum(g * column, axis=0)
    if ATOMIC:
        tl.atomic_add(g_bias + k, by_bias, mask=k < K)
        tl.atomic_add(g_alpha + kind, by_alpha, mask=k < K)
    else:
        own = bias_parts + tl.program_id(1) * 2 * K + k
        tl.store(own, by_bias, mask=k < K)
        tl.store(own + K, by_alpha, mask=k < K)
        if is_last(arrivals + tl.program_id(0), parts):
            by_bias = tl.zeros((KP,), tl.float32)
            by_alpha = tl.zeros((KP,), tl.float32)
            for part in range(parts):
                place = bias_parts + part * 2 * K + k
                by_bias += tl.load(place, mask=k < K, other=0.0, cache_modifier=".cg")
                by_alpha += tl.load(place + K, mask=k < K, other=0.0, cache_modifier=".cg")
            tl.store(g_bias + k, by_bias, mask=k < K)
            for i in tl.static_range(3):
                tl.store(g_alpha + i, tl.sum(tl.where(kind == i, by_alpha, 0.0), axis=0))


@triton.jit
def _state_tile(
    X, y, h_post, h_res, t, real, c, C,
    MIX: tl.constexpr, M: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """X' (tokens, SP, width) as it is stored, in fp32; zero beyond S."""
    i = tl.arange(0, SP)
    inside = real[:, None, None] & (i < S)[None, :, None] & (c < C)[None, None, :]
    if MIX:
        mask = real[:, None] & (c < C)[None, :]
        there = real[:, None] & (i < S)[None, :]
        branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(h_post + t[:, None] * N + i[None, :], mask=there, other=0.0)
        x = weight[:, :, None] * branch[:, None, :]
        for j in tl.static_range(M):
            tile = tl.load(X + (t * M + j)[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(h_res + (t[:, None] * N + i[None, :]) * M + j, mask=there, other=0.0)
            x += weight[:, :, None] * tile[:, None, :]
        return as_stored(x, X, y)
    else:
        rows = (t[:, None] * S + i[None, :])[:, :, None] * C + c[None, None, :]
        return tl.load(X + rows, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def is_last(counter, parts):
    """Counts this program; whether all others of its block have been here, so that what they wrote can be read."""
    tl.debug_barrier()  # every thread has written before one of them counts
    return tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1


def blocks(config: Config, columns: int, width: int) -> int:
    """Blocks of phi. The launch needs a counter for each, and one for alpha and bias, all zero."""
    return triton.cdiv(width, config.width) * (padded(columns) // _block_of_columns(columns))


def config_of(mix: bool, n: int, width: int, tokens: int) -> Config:
    return choose("boundary_parameters" if mix else "pre_parameters", n, width, tokens)


class Summed(NamedTuple):
    """What the gradients of alpha and bias are made of, and where they go."""

    raw: Tensor
    g_s: Tensor
    g_alpha: Tensor
    g_bias: Tensor
    kind: str


def parameters_launch(
    X: Tensor, mix: tuple[Tensor, Tensor, Tensor] | None, g_product: Tensor, arrivals: Tensor, g_phi: Tensor,
    summed: Summed | None, config: Config, atomic: bool,
) -> Launch:  # fmt: skip
    """Gradients of phi and, if there is a `summed`, of alpha and bias; zero before where `atomic`.

    `mix`: y, H_post and H_res, or None where X is the state.
    """
    (tokens, given, width), columns = X.shape, g_product.shape[1]
    y, h_post, h_res = mix or (X, X, X)
    streams = given if mix is None else h_post.shape[1]
    count = blocks(config, columns, width) + (summed is not None)
    of_tokens = triton.cdiv(tokens, config.tokens)
    of_part = triton.cdiv(of_tokens, max(1, config.parts // count))
    parts = triton.cdiv(of_tokens, of_part)
    # Without a `summed` g_product and g_phi stand in, untouched.
    raw, g_s, g_alpha, g_bias = (g_product, g_product, g_phi, g_phi) if summed is None else summed[:4]
    arguments = {
        "X": X, "y": y, "h_post": h_post, "h_res": h_res, "raw": raw, "g_s": g_s, "g_product": g_product,
        "phi_parts": g_phi if atomic else g_phi.new_empty((parts, *g_phi.shape)),
        "bias_parts": g_bias if atomic or summed is None else g_bias.new_empty((parts, 2, columns)),
        "arrivals": arrivals, "g_phi": g_phi, "g_alpha": g_alpha, "g_bias": g_bias,
        "T": tokens, "C": width, "BLOCKS": of_part,
    }  # fmt: skip
    constants = {
        "MIX": mix is not None, "M": given, "S": streams, "SP": power_of_two(streams),
        "N": streams if summed is None else streams_of(columns), "K": columns, "KP": padded(columns),
        "KB": _block_of_columns(columns), "ALPHA_AND_BIAS": int(summed is not None),
        "CONSTRAINED": summed is None or KINDS[summed.kind].constrained,
        "ATOMIC": atomic, "TOKENS": config.tokens, "WIDTH": config.width, "PRECISION": precision(),
    }  # fmt: skip
    return Launch(_parameters_kernel, (count, parts), arguments, constants, config)


def _block_of_columns(columns: int) -> int:
    return min(padded(columns), 128)

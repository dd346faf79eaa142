"""The gradients of `pre` and `boundary` in Triton, two launches each: here what belongs to tokens, then parameters.

A program owns a block of tokens and sweeps over C twice. First the gradient of H_pre, the dot products of g_u with the
streams of X'. From it and the gradients of H_post and H_res come those of s = alpha * raw + bias, Sinkhorn-Knopp's
iterations run again on chip; they, and g_product = alpha g_s / r, are written for the launch of the parameters. Then,
with S streams in X' and r its norm,

    G[i] = g_product phi[i]^T - X'[i] sum(g_product raw) / (S C r) + H_pre[i] g_u

is the gradient of X'. For `pre` that is all. For `boundary` (MIX) the gradient that came with X' is added, X' is made
again from X, y, H_post and H_res, and the same sweep ends what `post` began:

    g_X[j] = sum_i H_res[i, j] G[i]    g_H_res[i, j] = G[i] . X[j]
    g_y    = sum_i H_post[i] G[i]      g_H_post[i]   = G[i] . y

so that a token reads (2n + 2)C elements and writes (n + 1)C; the second sweep finds its block in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of
from mhc_rewrite.kernels.triton_coefficients import load_divisor, raw_gradient, store_gradients, store_pre_gradient
from mhc_rewrite.kernels.triton_configs import Launch, choose, cut, gradient_precision, power_of_two
from mhc_rewrite.kernels.triton_parameters import blocks, is_last, parameters_launch
from mhc_rewrite.kernels.triton_streams import load_streams, mixed, pre_weight


@triton.jit
def _dots_kernel(
    g_u, X, y, dots, T, C, PART,
    MIX: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """g_u . X[j] and, with MIX, g_u . y of a part of C, M + 1 numbers a token and part."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    X += first * M * C
    g_u += first * C
    y += first * C
    start_c = tl.program_id(1) * PART
    last = tl.minimum(start_c + PART, C)
    products = ()
    for _j in tl.static_range(M + MIX):
        products = products + (tl.zeros((TOKENS, WIDTH), tl.float32),)
    for start in range(start_c, last, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < last)[None, :]
        from_u = tl.load(g_u + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tiles = load_streams(X, t, c, mask, C, M)
        if MIX:
            branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            tiles = tiles + (branch,)
        new = ()
        for j in tl.static_range(M + MIX):
            new = new + (products[j] + from_u * tiles[j],)
        products = new
    own = dots + (first * tl.num_programs(1) + t * tl.num_programs(1) + tl.program_id(1)) * (M + 1)
    for j in tl.static_range(M + MIX):
        tl.store(own + j, tl.sum(products[j], axis=1), mask=real)


@triton.jit
def _coefficients_kernel(
    dots, g_post, g_res, h_post, h_res, alpha, bias, raw, r, g_s, g_product, decays, arrivals,
    T, C, PARTS, iterations, COUNTERS,
    MIX: tl.constexpr, M: tl.constexpr, S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr,
    CONSTRAINED: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr, HISTORY: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """g_s, g_product and the decay of X' of every token; the counters of the launches behind it become zero."""
    K: tl.constexpr = N * N + 2 * N
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    dots += first * PARTS * (M + 1)
    g_post += first * N
    g_res += first * N * N
    raw += first * K
    g_s += first * K
    g_product += first * K
    r += first * (1 if CONSTRAINED else N)
    decays += first * (1 if CONSTRAINED else S)
    if MIX:
        h_post += first * N
        h_res += first * N * M
    sums = ()
    for j in tl.static_range(M + MIX):
        total = tl.zeros((TOKENS,), tl.float32)
        for part in range(PARTS):
            total += tl.load(dots + (t * PARTS + part) * (M + 1) + j, mask=real, other=0.0)
        sums = sums + (total,)
    for i in tl.static_range(N):
        if MIX:  # g_u . X'[i]: X' need not be made for it
            gradient = tl.load(h_post + t * N + i, mask=real, other=0.0) * sums[M]
            for j in tl.static_range(M):
                gradient += tl.load(h_res + (t * N + i) * M + j, mask=real, other=0.0) * sums[j]
        else:
            gradient = sums[i % M]
        store_pre_gradient(gradient, raw, alpha, bias, g_s, t, real, i, N, CONSTRAINED)
    store_gradients(
        g_post, g_res, raw, alpha, bias, g_s, t, real, iterations, N, NP, CONSTRAINED, EPS, TRANSPOSED, HISTORY
    )
    tl.debug_barrier()  # columns were written one by one and are read as one tile
    k = tl.arange(0, KP)
    inside = real[:, None] & (k < K)[None, :]
    divisor = load_divisor(r, t, k, real, N, CONSTRAINED)
    product = raw_gradient(g_s, raw, alpha, t, k, real, N, CONSTRAINED) / divisor
    tl.store(g_product + t[:, None] * K + k[None, :], product, mask=inside)
    # r depends on x too: d(product / r) holds - raw x / (size r^2), with the size that the mean is taken over.
    shrink = product * tl.load(raw + t[:, None] * K + k[None, :], mask=inside, other=0.0) / divisor / C
    if CONSTRAINED:
        tl.store(decays + t, tl.sum(shrink, axis=1) / S, mask=real)
    elif S == 1:
        tl.store(decays + t, tl.sum(shrink, axis=1), mask=real)
    else:
        for j in tl.static_range(N):  # the columns of stream j
            own = tl.sum(tl.where((k % N == j)[None, :], shrink, 0.0), axis=1)
            tl.store(decays + t * N + j, own, mask=real)
    if tl.program_id(0) == 0:
        for start in range(0, COUNTERS, 128):
            place = start + tl.arange(0, 128)
            tl.store(arrivals + place, tl.zeros((128,), tl.int32), mask=place < COUNTERS)


@triton.jit
def _state_kernel(
    g_state, g_u, X, y, h_post, h_res, phi, alpha, bias, raw, g_product, decays,
    g_X, g_y, g_h_post, g_h_res, shares, arrivals, T, C, PART,
    MIX: tl.constexpr, M: tl.constexpr, S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr,
    CONSTRAINED: tl.constexpr, EPS: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of the streams in a part of C, and of what mixed them."""
    K: tl.constexpr = N * N + 2 * N
    # Tokens count from the first of the block: what lies within a block is addressed in int32, which saves registers.
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    X += first * M * C
    g_X += first * M * C
    g_u += first * C
    raw += first * K
    g_product += first * K
    decays += first * (1 if CONSTRAINED else S)
    if MIX:
        g_state += first * N * C
        y += first * C
        g_y += first * C
        h_post += first * N
        g_h_post += first * N
        h_res += first * N * M
        g_h_res += first * N * M
        shares += first * N * (M + 1)
    k = tl.arange(0, KP)
    WHOLE: tl.constexpr = KP <= 32  # more columns would not fit into registers
    if WHOLE:
        columns = tl.load(g_product + t[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
    else:
        columns = g_product
    stream = tl.arange(0, NP)[None, :]
    res_sums = ()
    if MIX:
        for _j in tl.static_range(M + 1):
            res_sums = res_sums + (tl.zeros((TOKENS, NP), tl.float32),)
    start_c = tl.program_id(1) * PART
    last = tl.minimum(start_c + PART, C)
    for start in range(start_c, last, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < last)[None, :]
        from_u = tl.load(g_u + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if MIX:
            tiles = load_streams(X, t, c, mask, C, M)
            branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            sums = ()
            for _j in tl.static_range(M + 1):
                sums = sums + (tl.zeros((TOKENS, WIDTH), tl.float32),)
        for i in range(S):
            rows = (t * S * C)[:, None] + c[None, :] + i * C
            gradient = _through_phi(columns, phi, t, real, i, c, C, K, KP, WHOLE, TOKENS, WIDTH, PRECISION)
            gradient += pre_weight(raw, alpha, bias, t, real, i, S, N, CONSTRAINED, EPS)[:, None] * from_u
            if MIX:
                gradient += tl.load(g_state + rows, mask=mask, other=0.0).to(tl.float32)
                x = mixed(tiles, branch, X, y, h_post, h_res, t, real, i, M, N)
            else:
                x = tl.load(X + rows, mask=mask, other=0.0).to(tl.float32)
            decay = tl.load(decays + (t if CONSTRAINED else t * S + i), mask=real, other=0.0)
            gradient -= decay[:, None] * x
            if MIX:
                new_sums = ()
                new_res = ()
                for j in tl.static_range(M):
                    weight = tl.load(h_res + t * N * M + i * M + j, mask=real, other=0.0)
                    new_sums = new_sums + (sums[j] + weight[:, None] * gradient,)
                    dot = tl.sum(gradient * tiles[j], axis=1)[:, None]
                    new_res = new_res + (res_sums[j] + tl.where(stream == i, dot, 0.0),)
                weight = tl.load(h_post + t * N + i, mask=real, other=0.0)
                sums = new_sums + (sums[M] + weight[:, None] * gradient,)
                dot = tl.sum(gradient * branch, axis=1)[:, None]
                res_sums = new_res + (res_sums[M] + tl.where(stream == i, dot, 0.0),)
            else:
                tl.store(g_X + rows, gradient.to(g_X.dtype.element_ty), mask=mask)
        if MIX:
            rows = (t * M * C)[:, None] + c[None, :]
            for j in tl.static_range(M):
                tl.store(g_X + rows + j * C, sums[j].to(g_X.dtype.element_ty), mask=mask)
            tl.store(g_y + t[:, None] * C + c[None, :], sums[M].to(g_y.dtype.element_ty), mask=mask)
    if MIX:
        inside = real[:, None] & (stream < N)
        parts = tl.num_programs(1)
        if parts > 1:
            places = shares + (t[:, None] * N + stream) * (M + 1)
            size = T * N * (M + 1)
            for j in tl.static_range(M + 1):
                tl.store(places + tl.program_id(1).to(tl.int64) * size + j, res_sums[j], mask=inside)
            if is_last(arrivals + tl.program_id(0), parts):
                for j in tl.static_range(M + 1):
                    total = tl.zeros((TOKENS, NP), tl.float32)
                    for part in range(parts):
                        share = places + tl.cast(part, tl.int64) * size + j
                        total += tl.load(share, mask=inside, other=0.0, cache_modifier=".cg")
                    _store_mix_gradient(total, g_h_post, g_h_res, t, stream, inside, j, M, N)
        else:
            for j in tl.static_range(M + 1):
                _store_mix_gradient(res_sums[j], g_h_post, g_h_res, t, stream, inside, j, M, N)


@triton.jit
def _store_mix_gradient(total, g_h_post, g_h_res, t, stream, inside, j: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    if j < M:
        tl.store(g_h_res + (t[:, None] * N + stream) * M + j, total, mask=inside)
    else:
        tl.store(g_h_post + t[:, None] * N + stream, total, mask=inside)


@triton.jit
def _through_phi(
    columns, phi, t, real, i, c, C,
    K: tl.constexpr, KP: tl.constexpr, WHOLE: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """g_product phi[i]^T at c, (tokens, width): from all columns of g_product, or from where they are in memory."""
    phi += tl.cast(i * C, tl.int64) * K
    if WHOLE:
        k = tl.arange(0, KP)
        w = tl.load(phi + c[:, None] * K + k[None, :], mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
        return tl.dot(columns, tl.trans(w), input_precision=PRECISION)
    else:
        total = tl.zeros((TOKENS, WIDTH), tl.float32)
        for first in range(0, K, 16):
            k = first + tl.arange(0, 16)
            w = tl.load(phi + c[:, None] * K + k[None, :], mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
            some = tl.load(columns + t[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
            total = tl.dot(some, tl.trans(w), total, input_precision=PRECISION)
        return total


def pre_backward(
    g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
    atomic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of X, phi, alpha and bias from those of u, H_post and H_res.

    `atomic`: phi's gradient by atomic additions, in an order that may differ from call to call.
    """
    outputs, parameters = (torch.empty_like(X),), _like(phi, alpha, bias, atomic=atomic)
    given = (g_u, g_post, g_res)
    for launch in backward_launches(
        None, given, X, None, phi, alpha, bias, raw, r, outputs, parameters, kind, iterations, atomic
    ):
        launch.run()
    return *outputs, *parameters


def boundary_backward(
    g_state: Tensor, g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
    atomic: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of X, y, H_post, H_res, phi, alpha and bias; `atomic` as in `pre_backward`."""
    outputs = torch.empty_like(X), torch.empty_like(y), torch.empty_like(h_post), torch.empty_like(h_res)
    parameters = _like(phi, alpha, bias, atomic=atomic)
    given, mix = (g_u, g_post, g_res), (y, h_post, h_res)
    for launch in backward_launches(
        g_state, given, X, mix, phi, alpha, bias, raw, r, outputs, parameters, kind, iterations, atomic
    ):
        launch.run()
    return *outputs, *parameters


def _like(*tensors: Tensor, atomic: bool) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(tensor) if atomic else torch.empty_like(tensor) for tensor in tensors)


def backward_launches(
    g_state: Tensor | None, given: tuple[Tensor, Tensor, Tensor],
    X: Tensor, mix: tuple[Tensor, Tensor, Tensor] | None, phi: Tensor, alpha: Tensor, bias: Tensor,
    raw: Tensor, r: Tensor, outputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...],
    kind: str, iterations: int, atomic: bool,
) -> list[Launch]:  # fmt: skip
    """The launch of the tokens and that of the parameters.

    Args:
        g_state: the gradient of X', None for `pre`.
        given: gradients of u, H_post and H_res.
        mix: y, H_post and H_res of the site before, or None for `pre`.
        outputs: gradients of X and of `mix`, to be written.
        parameters: gradients of phi, alpha and bias, to be written.
    """
    (tokens, streams, width), columns = X.shape, phi.shape[1]
    n, rules = streams_of(columns), KINDS[kind]
    config = choose("boundary_backward" if mix else "pre_backward", n, width, tokens)
    dotted, solved = choose("dots", n, width, tokens), choose("coefficients", n, width, tokens)
    of_dots, dot_parts = cut(width, dotted)
    part, parts = cut(width, config)
    of_state = triton.cdiv(tokens, config.tokens)
    g_s, g_product = torch.empty_like(raw), torch.empty_like(raw)
    counters = raw.new_empty((of_state + blocks(n, columns, width, tokens),), dtype=torch.int32)
    g_u, g_post, g_res = given
    y, h_post, h_res = mix or (X, X, X)  # without a mix X stands in, unread and unwritten
    g_X, g_y, g_h_post, g_h_res = outputs if mix else (*outputs, X, X, X)
    state = n if mix else streams
    made = {"g_s": g_s, "g_product": g_product}
    multiplied = gradient_precision(torch.promote_types(X.dtype, y.dtype))
    between = {
        "dots": raw.new_empty((tokens, dot_parts, streams + 1)),
        "decays": raw.new_empty((tokens, 1 if rules.constrained else state)),
        "shares": raw.new_empty((parts, tokens, n, streams + 1) if mix and parts > 1 else (1,)),
    }
    sizes: dict[str, Any] = {"MIX": mix is not None, "M": streams}
    more = {**sizes, "S": state, "N": n, "NP": power_of_two(n), "KP": max(16, power_of_two(columns))}
    more.update({"CONSTRAINED": rules.constrained, "EPS": rules.eps})
    first = Launch(
        _dots_kernel, (triton.cdiv(tokens, dotted.tokens), dot_parts),
        {"g_u": g_u, "X": X, "y": y, "dots": between["dots"], "T": tokens, "C": width, "PART": of_dots},
        {**sizes, "TOKENS": dotted.tokens, "WIDTH": dotted.width}, dotted,
    )  # fmt: skip
    second = Launch(
        _coefficients_kernel, (triton.cdiv(tokens, solved.tokens),),
        {
            "dots": between["dots"], "g_post": g_post, "g_res": g_res, "h_post": h_post, "h_res": h_res,
            "alpha": alpha, "bias": bias, "raw": raw, "r": r, **made, "decays": between["decays"],
            "arrivals": counters, "T": tokens, "C": width, "PARTS": dot_parts, "iterations": iterations,
            "COUNTERS": len(counters),
        },
        {**more, "TRANSPOSED": rules.transposed, "HISTORY": power_of_two(iterations), "TOKENS": solved.tokens}, solved,
    )  # fmt: skip
    third = Launch(
        _state_kernel, (of_state, parts),
        {
            "g_state": X if g_state is None else g_state, "g_u": g_u, "X": X, "y": y, "h_post": h_post, "h_res": h_res,
            "phi": phi, "alpha": alpha, "bias": bias, "raw": raw, "g_product": g_product, "decays": between["decays"],
            "g_X": g_X, "g_y": g_y, "g_h_post": g_h_post, "g_h_res": g_h_res, "shares": between["shares"],
            "arrivals": counters, "T": tokens, "C": width, "PART": part,
        },
        {**more, "TOKENS": config.tokens, "WIDTH": config.width, "PRECISION": multiplied}, config,
    )  # fmt: skip
    fourth = parameters_launch(X, mix, raw, g_s, g_product, counters[of_state:], parameters, kind, atomic)
    return [first, second, third, fourth]

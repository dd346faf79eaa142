"""The gradients of `pre` and `boundary` in Triton, in four launches and five: here what belongs to tokens.

First the dot products of g_u with the streams and y, which give the gradient of H_pre. A launch of the coefficients
takes from it and the gradients of H_post and H_res those of s = alpha * raw + bias, Sinkhorn-Knopp's iterations run
again on chip. With g_product = alpha g_s / r, S streams in X' and r its norm,

    G[i] = g_product phi[i]^T - X'[i] sum(g_product raw) / (S C r) + H_pre[i] g_u

is the gradient of X', which a third launch makes. For `pre` that is all. For `boundary` (MIX) the gradient that came
with X' is added, and what decays waits for the next launch: the gradient of `post`, which has X and y at hand and takes
X' sum(...) off before all else. So each of the two launches can be cut as suits it, `tl.dot`'s layout the one and long
rows the other; G passes through memory in between, in the dtype of X'. One launch did both with 230 registers a thread
and took twice the time. The last launch is that of the parameters, triton_parameters.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of
from mhc_rewrite.kernels.triton_coefficients import load_divisor, raw_gradient, store_gradients, store_pre_gradient
from mhc_rewrite.kernels.triton_configs import Launch, choose, cut, gradient_precision, padded, power_of_two
from mhc_rewrite.kernels.triton_parameters import Summed, blocks, config_of, parameters_launch
from mhc_rewrite.kernels.triton_post import post_backward_launch
from mhc_rewrite.kernels.triton_streams import load_streams, pre_weight


@triton.jit
def _dots_kernel(
    g_u, X, y, dots, T, C, PART,
    MIX: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """g_u . X[j] and, with MIX, g_u . y of a part of C, M + MIX numbers a token and part."""
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
    own = dots + (first * tl.num_programs(1) + t * tl.num_programs(1) + tl.program_id(1)) * (M + MIX)
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
    dots += first * PARTS * (M + MIX)
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
    sums = add_dots(dots, t, real, PARTS, MIX, M, TOKENS)
    for i in tl.static_range(N):
        gradient = dot_with_state(sums, h_post, h_res, t, real, i, MIX, M, N)
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
        zero(arrivals, COUNTERS)


@triton.jit
def add_dots(dots, t, real, PARTS, MIX: tl.constexpr, M: tl.constexpr, TOKENS: tl.constexpr):
    """What `_dots_kernel` left of all parts, added."""
    sums = ()
    for j in tl.static_range(M + MIX):
        total = tl.zeros((TOKENS,), tl.float32)
        for part in range(PARTS):
            total += tl.load(dots + (t * PARTS + part) * (M + MIX) + j, mask=real, other=0.0)
        sums = sums + (total,)
    return sums


@triton.jit
def dot_with_state(sums, h_post, h_res, t, real, i: tl.constexpr, MIX: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """g_u . X'[i]: X' need not be made for it."""
    if MIX:
        gradient = tl.load(h_post + t * N + i, mask=real, other=0.0) * sums[M]
        for j in tl.static_range(M):
            gradient += tl.load(h_res + (t * N + i) * M + j, mask=real, other=0.0) * sums[j]
    else:
        gradient = sums[i % M]
    return gradient


@triton.jit
def zero(counters, count):
    for start in range(0, count, 128):
        place = start + tl.arange(0, 128)
        tl.store(counters + place, tl.zeros((128,), tl.int32), mask=place < count)


@triton.jit
def _state_kernel(
    given, g_u, phi, alpha, bias, raw, h_pre, g_product, decays, out, T, C, PART,
    MIX: tl.constexpr, S: tl.constexpr, N: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    MADE: tl.constexpr, CONSTRAINED: tl.constexpr, EPS: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G of a part of C, from X'. With MIX `given` is the gradient that came with X', and what decays is left out.

    MADE: H_pre was made from raw, alpha and bias as `Kind` says, and is again; else `h_pre` (tokens, S) is there. With
    K = 0 nothing was projected.
    """
    # Tokens count from the first of the block: what lies within a block is addressed in int32, which saves registers.
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    given += first * S * C
    out += first * S * C
    g_u += first * C
    raw += first * K
    h_pre += first * S
    g_product += first * K
    decays += first * (1 if CONSTRAINED else S)
    k = tl.arange(0, KP)
    WHOLE: tl.constexpr = KP <= 32  # more columns would not fit into registers
    if WHOLE:
        columns = tl.load(g_product + t[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
    else:
        columns = g_product
    start_c = tl.program_id(1) * PART
    last = tl.minimum(start_c + PART, C)
    for start in range(start_c, last, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < last)[None, :]
        from_u = tl.load(g_u + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        for i in range(S):
            rows = (t * S * C)[:, None] + c[None, :] + i * C
            if K > 0:
                gradient = _through_phi(columns, phi, t, real, i, c, C, K, KP, WHOLE, TOKENS, WIDTH, PRECISION)
            else:
                gradient = tl.zeros((TOKENS, WIDTH), tl.float32)
            if MADE:
                weight = pre_weight(raw, alpha, bias, t, real, i, S, N, CONSTRAINED, EPS)
            else:
                weight = tl.load(h_pre + t * S + i, mask=real, other=0.0)
            gradient += weight[:, None] * from_u
            if MIX or K > 0:
                x = tl.load(given + rows, mask=mask, other=0.0).to(tl.float32)
            if MIX:
                gradient += x
            elif K > 0:
                gradient -= tl.load(decays + (t if CONSTRAINED else t * S + i), mask=real, other=0.0)[:, None] * x
            tl.store(out + rows, gradient.to(out.dtype.element_ty), mask=mask)


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
    """The launches of the tokens and that of the parameters.

    Args:
        g_state: the gradient of X', None for `pre`.
        given: gradients of u, H_post and H_res.
        mix: y, H_post and H_res of the site before, or None for `pre`.
        outputs: gradients of X and of `mix`, to be written.
        parameters: gradients of phi, alpha and bias, to be written.
    """
    (tokens, streams, width), columns = X.shape, phi.shape[1]
    n, rules = streams_of(columns), KINDS[kind]
    solved = choose("coefficients", n, width, tokens)
    summing = config_of(mix is not None, n, width, tokens)
    g_s, g_product = torch.empty_like(raw), torch.empty_like(raw)
    counters = raw.new_empty((blocks(summing, columns, width) + 1,), dtype=torch.int32)
    g_u, g_post, g_res = given
    y, h_post, h_res = mix or (X, X, X)  # without a mix X stands in, unread
    state = n if mix else streams
    decays = raw.new_empty((tokens, 1 if rules.constrained else state))
    of_state = outputs[0] if g_state is None else torch.empty_like(g_state)
    dot = dots_launch(g_u, X, mix and y, n)
    solve = Launch(
        _coefficients_kernel, (triton.cdiv(tokens, solved.tokens),),
        {
            "dots": dot.arguments["dots"], "g_post": g_post, "g_res": g_res, "h_post": h_post, "h_res": h_res,
            "alpha": alpha, "bias": bias, "raw": raw, "r": r, "g_s": g_s, "g_product": g_product, "decays": decays,
            "arrivals": counters, "T": tokens, "C": width, "PARTS": dot.grid[1], "iterations": iterations,
            "COUNTERS": len(counters),
        },
        {
            "MIX": mix is not None, "M": streams, "S": state, "N": n, "NP": power_of_two(n), "KP": padded(columns),
            "CONSTRAINED": rules.constrained, "EPS": rules.eps, "TRANSPOSED": rules.transposed,
            "HISTORY": power_of_two(iterations), "TOKENS": solved.tokens,
        },
        solved,
    )  # fmt: skip
    into = state_launch(X, g_state, g_u, phi, g_product, decays, of_state, n, pre_made(raw, alpha, bias, kind))
    apart = []
    if mix:
        g_X, g_y, g_h_post, g_h_res = outputs
        apart = [post_backward_launch(of_state, X, y, h_post, h_res, g_X, g_y, g_h_post, g_h_res, decays)]
    g_phi, g_alpha, g_bias = parameters
    summed = Summed(raw, g_s, g_alpha, g_bias, kind)
    return [dot, solve, into, *apart, parameters_launch(X, mix, g_product, counters, g_phi, summed, summing, atomic)]


def dots_launch(g_u: Tensor, X: Tensor, y: Tensor | None, n: int) -> Launch:
    """g_u . X[j] and, if there is a y, g_u . y: `dots` (T, parts, M), or (T, parts, M + 1)."""
    tokens, streams, width = X.shape
    config = choose("dots", n, width, tokens)
    part, parts = cut(width, config)
    dots = X.new_empty((tokens, parts, streams + (y is not None)), dtype=torch.float32)
    return Launch(
        _dots_kernel, (triton.cdiv(tokens, config.tokens), parts),
        {"g_u": g_u, "X": X, "y": X if y is None else y, "dots": dots, "T": tokens, "C": width, "PART": part},
        {"MIX": y is not None, "M": streams, "TOKENS": config.tokens, "WIDTH": config.width}, config,
    )  # fmt: skip


def state_launch(
    X: Tensor, g_state: Tensor | None, g_u: Tensor, phi: Tensor, g_product: Tensor, decays: Tensor, out: Tensor,
    n: int, h_pre: tuple[dict[str, Tensor], dict[str, Any]],
) -> Launch:  # fmt: skip
    """G, from the gradient of X', or from the state X where there is none; configured as for n streams.

    `h_pre` is what the kernel has H_pre from, arguments and constants: `pre_made` or `pre_given`.
    """
    (tokens, streams, width), columns = out.shape, phi.shape[1]
    config = choose("state", n, width, tokens)
    part, parts = cut(width, config)
    tensors = {"given": X if g_state is None else g_state, "g_u": g_u, "phi": phi, **h_pre[0]}
    tensors.update({"g_product": g_product, "decays": decays, "out": out})
    constants = {"MIX": g_state is not None, "S": streams, "K": columns, "KP": padded(columns), **h_pre[1]}
    constants.update({"TOKENS": config.tokens, "WIDTH": config.width, "PRECISION": gradient_precision(out.dtype)})
    grid = triton.cdiv(tokens, config.tokens), parts
    return Launch(_state_kernel, grid, {**tensors, "T": tokens, "C": width, "PART": part}, constants, config)


def pre_made(raw: Tensor, alpha: Tensor, bias: Tensor, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    rules = KINDS[kind]
    constants = {
        "MADE": True, "N": streams_of(len(bias)), "CONSTRAINED": rules.constrained, "EPS": rules.eps,
    }  # fmt: skip
    return {"raw": raw, "alpha": alpha, "bias": bias, "h_pre": raw}, constants


def pre_given(h_pre: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    constants = {"MADE": False, "N": h_pre.shape[1], "CONSTRAINED": True, "EPS": 0.0}
    return {"raw": h_pre, "alpha": h_pre, "bias": h_pre, "h_pre": h_pre}, constants

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

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of
from mhc_rewrite.kernels.triton_coefficients import load_divisor, raw_gradient, store_gradients, store_pre_gradient
from mhc_rewrite.kernels.triton_configs import Launch, choose, power_of_two, precision
from mhc_rewrite.kernels.triton_parameters import blocks, parameters_launch
from mhc_rewrite.kernels.triton_streams import load_streams, mixed, pre_weight


@triton.jit
def _state_backward_kernel(
    g_state, g_u, g_post, g_res, X, y, h_post, h_res, phi, alpha, bias, raw, r,
    g_X, g_y, g_h_post, g_h_res, g_s, g_product, arrivals, T, C, iterations, COUNTERS,
    MIX: tl.constexpr, M: tl.constexpr, S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr,
    CONSTRAINED: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr, HISTORY: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = N * N + 2 * N
    # Tokens count from the first of the block: what lies within a block is addressed in int32, which saves registers.
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    X += first * M * C
    g_X += first * M * C
    g_u += first * C
    g_post += first * N
    g_res += first * N * N
    raw += first * K
    g_s += first * K
    g_product += first * K
    r += first * (1 if CONSTRAINED else N)
    if MIX:
        g_state += first * N * C
        y += first * C
        g_y += first * C
        h_post += first * N
        g_h_post += first * N
        h_res += first * N * M
        g_h_res += first * N * M
    _store_pre_gradients(
        g_u, X, y, h_post, h_res, alpha, bias, raw, g_s, t, real, C, MIX, M, N, CONSTRAINED, TOKENS, WIDTH
    )
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
    decay = tl.sum(shrink, axis=1) / (S if CONSTRAINED else 1)
    if not CONSTRAINED and S > 1:
        decays = _by_stream(shrink, N, NP, KP)
    tl.debug_barrier()  # g_product, too, is read in another shape
    stream = tl.arange(0, NP)[None, :]
    res_sums = ()
    if MIX:
        for _j in tl.static_range(M + 1):
            res_sums = res_sums + (tl.zeros((TOKENS, NP), tl.float32),)
    for start in range(0, C, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < C)[None, :]
        from_u = tl.load(g_u + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if MIX:
            tiles = load_streams(X, t, c, mask, C, M)
            branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            sums = ()
            for _j in tl.static_range(M + 1):
                sums = sums + (tl.zeros((TOKENS, WIDTH), tl.float32),)
        for i in range(S):
            rows = (t * S * C)[:, None] + c[None, :] + i * C
            gradient = _through_phi(g_product, phi, t, real, i, c, C, K, TOKENS, WIDTH, PRECISION)
            gradient += pre_weight(raw, alpha, bias, t, real, i, S, N, CONSTRAINED, EPS)[:, None] * from_u
            if not CONSTRAINED and S > 1:
                decay = tl.sum(tl.where(stream == i, decays, 0.0), axis=1)
            if MIX:
                gradient += tl.load(g_state + rows, mask=mask, other=0.0).to(tl.float32)
                x = mixed(tiles, branch, X, y, h_post, h_res, t, real, i, M, N)
            else:
                x = tl.load(X + rows, mask=mask, other=0.0).to(tl.float32)
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
        mask = real[:, None] & (stream < N)
        for j in tl.static_range(M):
            tl.store(g_h_res + (t[:, None] * N + stream) * M + j, res_sums[j], mask=mask)
        tl.store(g_h_post + t[:, None] * N + stream, res_sums[M], mask=mask)
    if tl.program_id(0) == 0:
        for start in range(0, COUNTERS, 128):
            place = start + tl.arange(0, 128)
            tl.store(arrivals + place, tl.zeros((128,), tl.int32), mask=place < COUNTERS)


@triton.jit
def _by_stream(shrink, N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr):
    """The sum of the columns of every stream, (tokens, NP)."""
    k = tl.arange(0, KP)[None, :]
    stream = tl.arange(0, NP)[None, :]
    sums = tl.zeros((shrink.shape[0], NP), tl.float32)
    for j in tl.static_range(N):
        sums = tl.where(stream == j, tl.sum(tl.where(k % N == j, shrink, 0.0), axis=1)[:, None], sums)
    return sums


@triton.jit
def _through_phi(
    g_product, phi, t, real, i, c, C,
    K: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """g_product phi[i]^T at c, (tokens, width). In blocks of 16 columns: all would not fit into registers."""
    phi += tl.cast(i * C, tl.int64) * K
    total = tl.zeros((TOKENS, WIDTH), tl.float32)
    for first in range(0, K, 16):
        k = first + tl.arange(0, 16)
        w = tl.load(phi + c[:, None] * K + k[None, :], mask=(c < C)[:, None] & (k < K)[None, :], other=0.0)
        columns = tl.load(g_product + t[:, None] * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
        total = tl.dot(columns, tl.trans(w), total, input_precision=PRECISION)
    return total


@triton.jit
def _store_pre_gradients(
    g_u, X, y, h_post, h_res, alpha, bias, raw, g_s, t, real, C,
    MIX: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CONSTRAINED: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Columns pre of g_s, from the gradients of H_pre, g_u . X'[i].

    That is sum_j H_res[i, j] (g_u . X[j]) + H_post[i] (g_u . y): X' need not be made for it.
    """
    products = ()
    for _j in tl.static_range(M + 1):
        products = products + (tl.zeros((TOKENS, WIDTH), tl.float32),)
    for start in range(0, C, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < C)[None, :]
        from_u = tl.load(g_u + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        tiles = load_streams(X, t, c, mask, C, M)
        new = ()
        for j in tl.static_range(M):
            new = new + (products[j] + from_u * tiles[j],)
        if MIX:
            branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
            new = new + (products[M] + from_u * branch,)
        else:
            new = new + (products[M],)
        products = new
    dots = ()
    for j in tl.static_range(M + 1):
        dots = dots + (tl.sum(products[j], axis=1),)
    for i in tl.static_range(N):
        if MIX:
            gradient = tl.load(h_post + t * N + i, mask=real, other=0.0) * dots[M]
            for j in tl.static_range(M):
                gradient += tl.load(h_res + (t * N + i) * M + j, mask=real, other=0.0) * dots[j]
        else:
            gradient = dots[i % M]
        store_pre_gradient(gradient, raw, alpha, bias, g_s, t, real, i, N, CONSTRAINED)


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
    padded = max(16, power_of_two(columns))
    g_s, g_product = torch.empty_like(raw), torch.empty_like(raw)
    arrivals = raw.new_empty((blocks(n, columns, width, tokens),), dtype=torch.int32)
    parameter = parameters_launch(X, mix, raw, g_s, g_product, arrivals, parameters, kind, atomic)
    absent = (X, X, X)  # without a mix X stands in, unread and unwritten
    arguments = dict(zip(("g_u", "g_post", "g_res"), given))
    arguments.update(zip(("y", "h_post", "h_res"), mix or absent))
    arguments.update(zip(("g_X", "g_y", "g_h_post", "g_h_res"), outputs if mix else (*outputs, *absent)))
    arguments.update(g_state=X if g_state is None else g_state, X=X, phi=phi, alpha=alpha, bias=bias, raw=raw, r=r)
    sizes = {"T": tokens, "C": width, "iterations": iterations, "COUNTERS": len(arrivals)}
    constants = {
        "MIX": mix is not None, "M": streams, "S": n if mix else streams, "N": n, "NP": power_of_two(n),
        "KP": padded, "CONSTRAINED": rules.constrained, "EPS": rules.eps,
        "TRANSPOSED": rules.transposed, "HISTORY": power_of_two(iterations),
        "TOKENS": config.tokens, "WIDTH": config.width, "PRECISION": precision(),
    }  # fmt: skip
    state = Launch(
        _state_backward_kernel, (triton.cdiv(tokens, config.tokens),),
        {**arguments, "g_s": g_s, "g_product": g_product, "arrivals": arrivals, **sizes}, constants, config,
    )  # fmt: skip
    return [state, parameter]

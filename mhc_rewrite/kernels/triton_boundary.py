"""`pre` and `boundary` in Triton, forward. `boundary` is `post`'s launch, which stores X', and those of `pre` on it.

A program owns a block of tokens and sweeps over C twice: first the projection and the sum of squares, then, with the
coefficients known, u; the second sweep finds its block in the cache.

Long rows, or few tokens (decoding), would leave most of a GPU idle. Then every program sweeps over a part of C only and
writes its share of the projection and of the sum of squares, K + N numbers a token; a second launch, cut the same way,
adds the shares of all parts in their order and makes its part of u. The first of its programs also writes the
coefficients.

Tokens count from the first of a program's block: what lies within a block is addressed in int32, which saves registers.
A state of S streams meets phi (S * C, K), K = N^2 + 2N. S is N, or 1 where all streams are equal and phi's rows were
summed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of
from mhc_rewrite.kernels.triton_coefficients import pre_of, store_coefficients
from mhc_rewrite.kernels.triton_configs import Config, Launch, choose, cut, padded, power_of_two, precision
from mhc_rewrite.kernels.triton_post import post_launch
from mhc_rewrite.kernels.triton_streams import add_product, pre_weight


@triton.jit
def _project(
    state, phi, t, real, first, last, C,
    S: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x @ phi (tokens, KP) and every stream's sum of squares (tokens, NP), over the elements first to last of C."""
    EXACT: tl.constexpr = state.dtype.element_ty == tl.bfloat16
    k = tl.arange(0, KP)
    stream = tl.arange(0, NP)[None, :]
    product = tl.zeros((TOKENS, KP), tl.float32)
    squares = tl.zeros((TOKENS, NP), tl.float32)
    for start in range(first, last, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < last)[None, :]
        for i in range(S):
            x = tl.load(state + (t * S * C)[:, None] + c[None, :] + i * C, mask=mask, other=0.0)
            weights = phi + tl.cast(i * C, tl.int64) * K
            w = tl.load(weights + c[:, None] * K + k[None, :], mask=(c < last)[:, None] & (k < K)[None, :], other=0.0)
            product = add_product(x, w, product, EXACT, PRECISION)
            x = x.to(tl.float32)
            squares += tl.where(stream == i, tl.sum(x * x, axis=1)[:, None], 0.0)
    return product, squares


@triton.jit
def normalised(
    product, squares, C, eps_norm,
    S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, CONSTRAINED: tl.constexpr,
):  # fmt: skip
    """raw (tokens, KP) and the norm, (tokens, 1), or (tokens, NP) where it is taken per stream."""
    if CONSTRAINED:
        norm = tl.sqrt(tl.sum(squares, axis=1) / (S * C) + eps_norm)[:, None]
        raw = product / norm
    else:
        stream = tl.arange(0, NP)[None, :]
        if S == 1:
            squares = tl.sum(squares, axis=1)[:, None] + tl.zeros_like(squares)
        norm = tl.sqrt(squares / C + eps_norm)
        divisor = tl.zeros_like(product)
        for j in tl.static_range(N):  # columns pre[j], post[j] and res[i, j] by the norm of stream j
            own = tl.sum(tl.where(stream == j, norm, 0.0), axis=1)[:, None]
            divisor = tl.where((tl.arange(0, KP) % N)[None, :] == j, own, divisor)
        raw = product / divisor
    return raw, norm


@triton.jit
def store_projection(
    columns, norm, raw, r, t, real,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, CONSTRAINED: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, KP)
    stream = tl.arange(0, NP)[None, :]
    if CONSTRAINED:
        tl.store(r + t[:, None], norm, mask=real[:, None])
    else:
        tl.store(r + t[:, None] * N + stream, norm, mask=real[:, None] & (stream < N))
    tl.store(raw + t[:, None] * K + k[None, :], columns, mask=real[:, None] & (k < K)[None, :])


@triton.jit
def _finish(
    columns, norm, alpha, bias, h_post, h_res, raw, r, t, real, iterations,
    N: tl.constexpr, NP: tl.constexpr, KP: tl.constexpr, CONSTRAINED: tl.constexpr, EPS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Stores raw, the norm, H_post and H_res."""
    K: tl.constexpr = N * N + 2 * N
    store_projection(columns, norm, raw, r, t, real, N, NP, K, KP, CONSTRAINED)
    # Register tiles cannot be cut into columns: what follows reads them from the cache, in the shapes it needs.
    tl.debug_barrier()
    store_coefficients(raw, alpha, bias, h_post, h_res, t, real, iterations, N, NP, CONSTRAINED, EPS, TRANSPOSED)


@triton.jit
def _forward_kernel(
    state, phi, alpha, bias, u, h_post, h_res, raw, r, T, C, iterations, eps_norm,
    S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    CONSTRAINED: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    state += first * S * C
    u += first * C
    h_post += first * N
    h_res += first * N * N
    raw += first * K
    r += first * (1 if CONSTRAINED else N)
    product, squares = _project(state, phi, t, real, 0, C, C, S, NP, K, KP, TOKENS, WIDTH, PRECISION)
    columns, norm = normalised(product, squares, C, eps_norm, S, N, NP, KP, CONSTRAINED)
    _finish(
        columns, norm, alpha, bias, h_post, h_res, raw, r, t, real, iterations, N, NP, KP, CONSTRAINED, EPS, TRANSPOSED
    )
    for start in range(0, C, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < C)[None, :]
        total = tl.zeros((TOKENS, WIDTH), tl.float32)
        for i in tl.static_range(S):
            weight = pre_weight(raw, alpha, bias, t, real, i, S, N, CONSTRAINED, EPS)
            x = tl.load(state + (t * S * C)[:, None] + c[None, :] + i * C, mask=mask, other=0.0)
            total += weight[:, None] * x.to(tl.float32)
        tl.store(u + t[:, None] * C + c[None, :], total.to(u.dtype.element_ty), mask=mask)


@triton.jit
def _project_part_kernel(
    state, phi, products, squares, T, C, PART,
    S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part's share of `_project`: K and N numbers a token."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    state += first * S * C
    products += first * tl.num_programs(1) * K
    squares += first * tl.num_programs(1) * N
    start = tl.program_id(1) * PART
    last = tl.minimum(start + PART, C)
    product, square = _project(state, phi, t, real, start, last, C, S, NP, K, KP, TOKENS, WIDTH, PRECISION)
    k = tl.arange(0, KP)
    stream = tl.arange(0, NP)[None, :]
    rows = (t * tl.num_programs(1) + tl.program_id(1))[:, None]
    tl.store(products + rows * K + k[None, :], product, mask=real[:, None] & (k < K)[None, :])
    tl.store(squares + rows * N + stream, square, mask=real[:, None] & (stream < N))


@triton.jit
def add_parts(
    products, squares, t, real, PARTS,
    N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The shares of all parts, in their order: x @ phi (tokens, KP) and the sums of squares (tokens, NP)."""
    k = tl.arange(0, KP)
    stream = tl.arange(0, NP)[None, :]
    product = tl.zeros((TOKENS, KP), tl.float32)
    square = tl.zeros((TOKENS, NP), tl.float32)
    for part in range(PARTS):
        rows = (t * PARTS + part)[:, None]
        product += tl.load(products + rows * K + k[None, :], mask=real[:, None] & (k < K)[None, :], other=0.0)
        square += tl.load(squares + rows * N + stream, mask=real[:, None] & (stream < N), other=0.0)
    return product, square


@triton.jit
def _finish_part_kernel(
    state, products, squares, alpha, bias, u, h_post, h_res, raw, r, T, C, PART, PARTS, iterations, eps_norm,
    S: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    CONSTRAINED: tl.constexpr, EPS: tl.constexpr, TRANSPOSED: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - block
    state += block * S * C
    products += block * PARTS * K
    squares += block * PARTS * N
    u += block * C
    h_post += block * N
    h_res += block * N * N
    raw += block * K
    r += block * (1 if CONSTRAINED else N)
    k = tl.arange(0, KP)
    product, square = add_parts(products, squares, t, real, PARTS, N, NP, K, KP, TOKENS)
    columns, norm = normalised(product, square, C, eps_norm, S, N, NP, KP, CONSTRAINED)
    first = tl.program_id(1) * PART
    for start in range(first, tl.minimum(first + PART, C), WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < C)[None, :]
        total = tl.zeros((TOKENS, WIDTH), tl.float32)
        for i in tl.static_range(N):
            column = tl.sum(tl.where((k == i)[None, :], columns, 0.0), axis=1)
            rows = (t * S * C)[:, None] + c[None, :] + i % S * C
            x = tl.load(state + rows, mask=mask, other=0.0).to(tl.float32)
            total += pre_of(column, alpha, bias, i, CONSTRAINED, EPS)[:, None] * x
        tl.store(u + t[:, None] * C + c[None, :], total.to(u.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        _finish(
            columns, norm, alpha, bias, h_post, h_res, raw, r, t, real, iterations,
            N, NP, KP, CONSTRAINED, EPS, TRANSPOSED,
        )  # fmt: skip


def pre(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    """u (T, C), H_post (T, n), H_res (T, n, n), raw (T, n^2 + 2n) and r (T, 1), or (T, n) for a norm per stream."""
    outputs = _outputs(X, phi, kind)
    for launch in pre_launches(X, phi, alpha, bias, outputs, kind, iterations, eps):
        launch.run()
    return outputs


def boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """X' (T, n, C), then what `pre` returns of it."""
    tokens, _, width = X.shape
    state = X.new_empty((tokens, h_res.shape[1], width), dtype=torch.promote_types(X.dtype, y.dtype))
    outputs = _outputs(state, phi, kind)
    post_launch(X, y, h_post, h_res, state).run()
    for launch in pre_launches(state, phi, alpha, bias, outputs, kind, iterations, eps):
        launch.run()
    return state, *outputs


def _outputs(state: Tensor, phi: Tensor, kind: str) -> tuple[Tensor, ...]:
    tokens, _, width = state.shape
    n = streams_of(phi.shape[1])
    sizes = ((tokens, n), (tokens, n, n), (tokens, phi.shape[1]), (tokens, 1 if KINDS[kind].constrained else n))
    return state.new_empty((tokens, width)), *(phi.new_empty(size) for size in sizes)


def pre_launches(
    state: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, outputs: tuple[Tensor, ...],
    kind: str, iterations: int, eps: float,
) -> list[Launch]:  # fmt: skip
    """One launch, or two where C is cut into parts."""
    (tokens, streams, width), n, rules = state.shape, streams_of(phi.shape[1]), KINDS[kind]
    config = choose("pre", n, width, tokens)
    sizes = {"S": streams, "N": n, "NP": power_of_two(n), "K": phi.shape[1], "KP": padded(phi.shape[1])}
    flags = {"CONSTRAINED": rules.constrained, "EPS": rules.eps, "TRANSPOSED": rules.transposed}
    made: dict[str, Any] = dict(zip(("u", "h_post", "h_res", "raw", "r"), outputs))
    made.update({"alpha": alpha, "bias": bias, "iterations": iterations, "eps_norm": eps})
    if config.parts == 1:
        given = {"state": state, "phi": phi, "T": tokens, "C": width}
        sweep = {**sizes, "TOKENS": config.tokens, "WIDTH": config.width, "PRECISION": precision()}
        blocks = triton.cdiv(tokens, config.tokens)
        return [Launch(_forward_kernel, (blocks,), {**given, **made}, {**sweep, **flags}, config)]
    project, parts = project_launch(state, phi, n, config)
    shares = {name: project.arguments[name] for name in ("products", "squares")}
    finish = choose("finish", n, width, tokens)
    of_finish, finishing = cut(width, finish)
    finished = {"state": state, "T": tokens, "C": width, "PART": of_finish, "PARTS": parts}
    sizes.update({"TOKENS": finish.tokens, "WIDTH": finish.width})
    grid = triton.cdiv(tokens, finish.tokens), finishing
    return [project, Launch(_finish_part_kernel, grid, {**finished, **shares, **made}, {**sizes, **flags}, finish)]


def project_launch(state: Tensor, phi: Tensor, n: int, config: Config) -> tuple[Launch, int]:
    """The first half: the shares of every part, `products` (T, parts, K) and `squares` (T, parts, n); and the parts."""
    (tokens, streams, width), columns = state.shape, phi.shape[1]
    part, parts = cut(width, config)
    arguments = {
        "state": state, "phi": phi, "products": phi.new_empty((tokens, parts, columns)),
        "squares": phi.new_empty((tokens, parts, n)), "T": tokens, "C": width, "PART": part,
    }  # fmt: skip
    constants = {
        "S": streams, "N": n, "NP": power_of_two(n), "K": columns, "KP": padded(columns),
        "TOKENS": config.tokens, "WIDTH": config.width, "PRECISION": precision(),
    }  # fmt: skip
    grid = triton.cdiv(tokens, config.tokens), parts
    return Launch(_project_part_kernel, grid, arguments, constants, config), parts

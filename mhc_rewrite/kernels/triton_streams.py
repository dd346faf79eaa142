"""What the kernels of `pre` and `boundary` share, inside a kernel: tiles of streams, and the state made from them.

A state X' of S streams is either given, or made from X (M streams), y, H_post and H_res of the site before and rounded
to its dtype. S is N, or 1 where all streams are equal and phi's rows were summed. K = N^2 + 2N.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mhc_rewrite.kernels.triton_coefficients import pre_of


@triton.jit
def load_streams(X, t, c, mask, C, COUNT: tl.constexpr):
    """The tiles of all streams, fp32."""
    tiles = ()
    first = X + (t * COUNT * C)[:, None] + c[None, :]  # one address a token: C alone tells the streams apart
    for j in tl.static_range(COUNT):
        tiles = tiles + (tl.load(first + j * C, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def add_product(x, w, total, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """total + x @ w to fp32's precision. EXACT: bf16 holds every x. Then w as the sum of three bf16 numbers takes three
    bf16 products, half the work of three in tf32, and x need not be split."""
    if EXACT:
        x = x.to(tl.bfloat16)
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        total = tl.dot(x, low, total)
        total = tl.dot(x, middle, total)
        return tl.dot(x, high, total)
    else:
        return tl.dot(x.to(tl.float32), w, total, input_precision=PRECISION)


@triton.jit
def as_stored(x, X, y):
    """x as a state made from X and y holds it, in fp32: rounded to the dtype of both, or not where they differ."""
    if X.dtype.element_ty == y.dtype.element_ty:
        return x.to(X.dtype.element_ty).to(tl.float32)
    else:
        return x


@triton.jit
def mixed(tiles, branch, X, y, h_post, h_res, t, real, i, M: tl.constexpr, N: tl.constexpr):
    """X'[i], rounded as it is stored, in fp32."""
    out = tl.load(h_post + t * N + i, mask=real, other=0.0)[:, None] * branch
    row = h_res + t * N * M + i * M
    for j in tl.static_range(M):
        out += tl.load(row + j, mask=real, other=0.0)[:, None] * tiles[j]
    return as_stored(out, X, y)


@triton.jit
def pre_weight(
    raw, alpha, bias, t, real, i, S: tl.constexpr, N: tl.constexpr, CONSTRAINED: tl.constexpr, EPS: tl.constexpr
):
    """What u takes of stream i: H_pre[i], or the sum of H_pre where one stream stands for all."""
    K: tl.constexpr = N * N + 2 * N
    weight = pre_of(tl.load(raw + t * K + i, mask=real, other=0.0), alpha, bias, i, CONSTRAINED, EPS)
    if S < N:
        for j in tl.static_range(1, N):
            weight += pre_of(tl.load(raw + t * K + j, mask=real, other=0.0), alpha, bias, j, CONSTRAINED, EPS)
    return weight

"""The operators that know no coefficients but those they are given, in Triton: what aten.py has from `project` on.

Their kernels are those of `pre` and `boundary`, but for the steps between the halves, which have C elements of nothing:

    project                 the projection's parts (triton_boundary.py), then raw and the norm from them
    read                    `post` with one row and no y (triton_post.py)
    read_products           g_u . X[j] (triton_boundary_backward.py), and the parts or H_post and H_res behind it
    project_backward        g_product and decay from g_raw, then G (triton_boundary_backward.py), then phi's gradient
                            (triton_parameters.py); for `post_project` that of `post` between the last two

    g_product = g_raw / r    decay = sum(g_raw raw) / (S C r^2)

phi has any number K of columns. With none nothing is projected, r is 1, and what would project does not run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.kinds import streams_of
from mhc_rewrite.kernels.triton_boundary import add_parts, normalised, project_launch, store_projection
from mhc_rewrite.kernels.triton_boundary_backward import (
    add_dots,
    dot_with_state,
    dots_launch,
    pre_given,
    state_launch,
    zero,
)
from mhc_rewrite.kernels.triton_configs import Launch, choose, padded, power_of_two
from mhc_rewrite.kernels.triton_parameters import blocks, config_of, parameters_launch
from mhc_rewrite.kernels.triton_post import post_backward_launch, post_launch

Mix = tuple[Tensor, Tensor, Tensor]


@triton.jit
def _norm_kernel(
    products, squares, raw, r, T, C, PARTS, eps_norm,
    S: tl.constexpr, SP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """raw and the norm from the shares of all parts."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    products += first * PARTS * K
    squares += first * PARTS * S
    raw += first * K
    r += first
    product, square = add_parts(products, squares, t, real, PARTS, S, SP, K, KP, TOKENS)
    columns, norm = normalised(product, square, C, eps_norm, S, S, SP, KP, True)
    store_projection(columns, norm, raw, r, t, real, S, SP, K, KP, True)


@triton.jit
def _products_kernel(
    dots, h_post, h_res, g_pre, T, PARTS,
    MIX: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The gradient of H_pre: g_u . X'[i] from the products with X and y of all parts."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    dots += first * PARTS * (M + MIX)
    g_pre += first * N
    if MIX:
        h_post += first * N
        h_res += first * N * M
    sums = add_dots(dots, t, real, PARTS, MIX, M, TOKENS)
    for i in tl.static_range(N):
        tl.store(g_pre + t * N + i, dot_with_state(sums, h_post, h_res, t, real, i, MIX, M, N), mask=real)


@triton.jit
def _product_gradient_kernel(
    g_raw, raw, r, g_product, decays, arrivals, T, C, COUNTERS,
    S: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """g_product and the decay of X' of every token; the counters of the launches behind it become zero."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    k = tl.arange(0, KP)
    places = first * K + t[:, None] * K + k[None, :]
    inside = real[:, None] & (k < K)[None, :]
    norm = tl.load(r + first + t, mask=real, other=1.0)[:, None]
    product = tl.load(g_raw + places, mask=inside, other=0.0) / norm
    tl.store(g_product + places, product, mask=inside)
    shrink = product * tl.load(raw + places, mask=inside, other=0.0) / norm / C
    tl.store(decays + first + t, tl.sum(shrink, axis=1) / S, mask=real)
    if tl.program_id(0) == 0:
        zero(arrivals, COUNTERS)


def project(X: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """raw (T, K) and r (T, 1), the norm over all streams together, from X (T, S, C) and phi (S * C, K)."""
    raw, r = _projected(X, phi)
    for launch in project_launches(X, phi, eps, raw, r):
        launch.run()
    return raw, r


def post_project(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """X' (T, n, C), then what `project` returns of it."""
    tokens, _, width = X.shape
    state = X.new_empty((tokens, h_res.shape[1], width), dtype=torch.promote_types(X.dtype, y.dtype))
    post_launch(X, y, h_post, h_res, state).run()
    return state, *project(state, phi, eps)


def read(X: Tensor, h_pre: Tensor) -> Tensor:
    """u (T, C) = sum_j H_pre[j] X[j], in X's dtype."""
    u = X.new_empty((len(X), X.shape[2]))
    read_launch(X, h_pre, u).run()
    return u


def read_products(g_u: Tensor, X: Tensor) -> Tensor:
    """g_u . X[j], the gradient of H_pre (T, S)."""
    return _products(g_u, X, None)


def post_read_products(g_u: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """g_u . X'[i], the gradient of H_pre (T, n)."""
    return _products(g_u, X, (y, h_post, h_res))


def project_backward(
    g_u: Tensor, h_pre: Tensor, g_raw: Tensor, X: Tensor, phi: Tensor, raw: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of X and phi from those of u, which H_pre (T, S) read, and of raw."""
    g_X, g_phi = torch.empty_like(X), torch.empty_like(phi)
    for launch in given_backward_launches(None, g_u, h_pre, g_raw, X, None, phi, raw, r, (g_X,), g_phi):
        launch.run()
    return g_X, g_phi


def post_project_backward(
    g_state: Tensor, g_u: Tensor, h_pre: Tensor, g_raw: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, raw: Tensor, r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of X, y, H_post, H_res and phi from those of X', u and raw. X' is built again instead of kept."""
    outputs = torch.empty_like(X), torch.empty_like(y), torch.empty_like(h_post), torch.empty_like(h_res)
    g_phi, mix = torch.empty_like(phi), (y, h_post, h_res)
    for launch in given_backward_launches(g_state, g_u, h_pre, g_raw, X, mix, phi, raw, r, outputs, g_phi):
        launch.run()
    return *outputs, g_phi


def _projected(state: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    tokens, columns = len(state), phi.shape[1]
    return phi.new_empty((tokens, columns)), phi.new_empty((tokens, 1)) if columns else phi.new_ones((tokens, 1))


def _size(streams: int, columns: int) -> int:
    """The number of streams whose configuration it takes: mHC's kernels were cut for n^2 + 2n columns."""
    return max(streams, streams_of(columns))


def project_launches(state: Tensor, phi: Tensor, eps: float, raw: Tensor, r: Tensor) -> list[Launch]:
    """Two launches, or none where phi has no columns."""
    (tokens, streams, width), columns = state.shape, phi.shape[1]
    if columns == 0:
        return []
    size = _size(streams, columns)
    shares, parts = project_launch(state, phi, streams, choose("pre", size, width, tokens))
    config = choose("finish", size, width, tokens)
    made = {name: shares.arguments[name] for name in ("products", "squares")}
    finish = Launch(
        _norm_kernel, (triton.cdiv(tokens, config.tokens),),
        {**made, "raw": raw, "r": r, "T": tokens, "C": width, "PARTS": parts, "eps_norm": eps},
        {
            "S": streams, "SP": power_of_two(streams), "K": columns, "KP": padded(columns), "TOKENS": config.tokens,
        },
        config,
    )  # fmt: skip
    return [shares, finish]


def read_launch(X: Tensor, h_pre: Tensor, u: Tensor) -> Launch:
    return post_launch(X, None, None, h_pre.unsqueeze(1), u.unsqueeze(1))


def _products(g_u: Tensor, X: Tensor, mix: Mix | None) -> Tensor:
    launches, g_pre = products_launches(g_u, X, mix)
    for launch in launches:
        launch.run()
    return g_pre


def products_launches(g_u: Tensor, X: Tensor, mix: Mix | None) -> tuple[list[Launch], Tensor]:
    """The launches and the gradient of H_pre that they make; one does where there is no mix and C is not cut."""
    tokens, given, width = X.shape
    y, h_post, h_res = mix or (None, X, X)
    streams = given if mix is None else h_post.shape[1]
    dot = dots_launch(g_u, X, y, streams)
    dots, parts = dot.arguments["dots"], dot.grid[1]
    if mix is None and parts == 1:
        return [dot], dots.view(tokens, streams)
    g_pre = dots.new_empty((tokens, streams))
    config = choose("coefficients", streams, width, tokens)
    finish = Launch(
        _products_kernel, (triton.cdiv(tokens, config.tokens),),
        {"dots": dots, "h_post": h_post, "h_res": h_res, "g_pre": g_pre, "T": tokens, "PARTS": parts},
        {"MIX": mix is not None, "M": given, "N": streams, "TOKENS": config.tokens}, config,
    )  # fmt: skip
    return [dot, finish], g_pre


def given_backward_launches(
    g_state: Tensor | None, g_u: Tensor, h_pre: Tensor, g_raw: Tensor, X: Tensor, mix: Mix | None,
    phi: Tensor, raw: Tensor, r: Tensor, outputs: tuple[Tensor, ...], g_phi: Tensor,
) -> list[Launch]:  # fmt: skip
    """The launches of the tokens and that of phi, which is left out with what prepares it where phi has no columns.

    Args:
        g_state: the gradient of X', None for `project`.
        mix: y, H_post and H_res of the site before, or None for `project`.
        outputs: gradients of X and of `mix`, to be written.
        g_phi: that of phi, to be written.
    """
    (tokens, _, width), (_, streams), columns = X.shape, h_pre.shape, phi.shape[1]
    size = _size(streams, columns)
    of_state = outputs[0] if g_state is None else torch.empty_like(g_state)
    first, last = [], []
    g_product, decays = h_pre, None  # without columns H_pre stands in, unread
    if columns:
        g_product, decays = torch.empty_like(raw), torch.empty_like(r)
        summing, solved = config_of(mix is not None, size, width, tokens), choose("coefficients", size, width, tokens)
        counters = raw.new_empty((blocks(summing, columns, width),), dtype=torch.int32)
        first = [Launch(
            _product_gradient_kernel, (triton.cdiv(tokens, solved.tokens),),
            {
                "g_raw": g_raw, "raw": raw, "r": r, "g_product": g_product, "decays": decays, "arrivals": counters,
                "T": tokens, "C": width, "COUNTERS": len(counters),
            },
            {"S": streams, "K": columns, "KP": padded(columns), "TOKENS": solved.tokens}, solved,
        )]  # fmt: skip
        last = [parameters_launch(X, mix, g_product, counters, g_phi, None, summing, atomic=False)]
    through = h_pre if decays is None else decays
    into = state_launch(X, g_state, g_u, phi, g_product, through, of_state, size, pre_given(h_pre))
    apart = []
    if mix:
        y, h_post, h_res = mix
        g_X, g_y, g_post, g_res = outputs
        apart = [post_backward_launch(of_state, X, y, h_post, h_res, g_X, g_y, g_post, g_res, decays)]
    return [*first, into, *apart, *last]

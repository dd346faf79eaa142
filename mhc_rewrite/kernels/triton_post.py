"""`post` and its gradient in Triton: X'[i] = sum_j H_res[i, j] X[j] + H_post[i] y.

Forward: every element of X and y is read once and every element of X' written once, (n + 1)C and nC a token.
Backward: the gradients of all four operands in one launch, (2n + 1)C read and (n + 1)C written.
Tokens count from the first of a program's block: what lies within a block is addressed in int32, which saves registers.
H_res may be rectangular, (rows, columns): one column after an expansion, one row together with the collapse. One row
and no y make what a block reads: u = sum_j H_pre[j] X[j].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_rewrite.kernels.triton_configs import Launch, choose
from mhc_rewrite.kernels.triton_streams import load_streams, mixed


@triton.jit
def _post_forward_kernel(
    X, y, h_post, h_res, out, T, C,
    BRANCH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Without BRANCH there are no y and H_post."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = t < T - first
    X += first * COLUMNS * C
    y += first * C
    h_post += first * ROWS
    h_res += first * ROWS * COLUMNS
    out += first * ROWS * C
    mask = real[:, None] & (c < C)[None, :]
    if BRANCH:
        branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    streams = ()
    for j in tl.static_range(COLUMNS):
        rows = (t * COLUMNS * C)[:, None] + c[None, :] + j * C
        streams = streams + (tl.load(X + rows, mask=mask, other=0.0).to(tl.float32),)
    for i in tl.static_range(ROWS):
        if BRANCH:
            mixed = tl.load(h_post + t * ROWS + i, mask=real, other=0.0)[:, None] * branch
        else:
            mixed = tl.zeros((TOKENS, WIDTH), tl.float32)
        for j in tl.static_range(COLUMNS):
            weight = tl.load(h_res + (t * ROWS + i) * COLUMNS + j, mask=real, other=0.0)
            mixed += weight[:, None] * streams[j]
        rows = (t * ROWS * C)[:, None] + c[None, :] + i * C
        tl.store(out + rows, mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _post_backward_kernel(
    g_out, X, y, h_post, h_res, decays, g_X, g_y, g_post, g_res, T, C,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DECAYS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """DECAYS: of so many decays a token, one for all rows or one each, X' times its own is taken off g_out first."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    t = tl.arange(0, TOKENS)
    real = t < T - first
    g_out += first * ROWS * C
    X += first * COLUMNS * C
    g_X += first * COLUMNS * C
    y += first * C
    g_y += first * C
    h_post += first * ROWS
    g_post += first * ROWS
    h_res += first * ROWS * COLUMNS
    g_res += first * ROWS * COLUMNS
    decays += first * DECAYS
    post_sums = ()
    res_sums = ()
    for _i in tl.static_range(ROWS):
        post_sums = post_sums + (tl.zeros((TOKENS,), tl.float32),)
        for _j in tl.static_range(COLUMNS):
            res_sums = res_sums + (tl.zeros((TOKENS,), tl.float32),)
    for start in range(0, C, WIDTH):
        c = start + tl.arange(0, WIDTH)
        mask = real[:, None] & (c < C)[None, :]
        branch = tl.load(y + t[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        to_branch = tl.zeros((TOKENS, WIDTH), tl.float32)
        gradients = ()
        new_post = ()
        if DECAYS:
            streams = load_streams(X, t, c, mask, C, COLUMNS)
        for i in tl.static_range(ROWS):
            rows = (t * ROWS * C)[:, None] + c[None, :] + i * C
            gradient = tl.load(g_out + rows, mask=mask, other=0.0).to(tl.float32)
            if DECAYS:
                decay = tl.load(decays + t * DECAYS + i % DECAYS, mask=real, other=0.0)[:, None]
                gradient -= decay * mixed(streams, branch, X, y, h_post, h_res, t, real, i, COLUMNS, ROWS)
            to_branch += tl.load(h_post + t * ROWS + i, mask=real, other=0.0)[:, None] * gradient
            new_post = new_post + (post_sums[i] + tl.sum(gradient * branch, axis=1),)
            gradients = gradients + (gradient,)
        post_sums = new_post
        tl.store(g_y + t[:, None] * C + c[None, :], to_branch.to(g_y.dtype.element_ty), mask=mask)
        new_res = ()
        for j in tl.static_range(COLUMNS):
            rows = (t * COLUMNS * C)[:, None] + c[None, :] + j * C
            if DECAYS:
                stream = streams[j]
            else:
                stream = tl.load(X + rows, mask=mask, other=0.0).to(tl.float32)
            to_stream = tl.zeros((TOKENS, WIDTH), tl.float32)
            for i in tl.static_range(ROWS):
                weight = tl.load(h_res + (t * ROWS + i) * COLUMNS + j, mask=real, other=0.0)
                to_stream += weight[:, None] * gradients[i]
                new_res = new_res + (res_sums[j * ROWS + i] + tl.sum(gradients[i] * stream, axis=1),)
            tl.store(g_X + rows, to_stream.to(g_X.dtype.element_ty), mask=mask)
        res_sums = new_res
    for i in tl.static_range(ROWS):
        tl.store(g_post + t * ROWS + i, post_sums[i], mask=real)
        for j in tl.static_range(COLUMNS):
            tl.store(g_res + (t * ROWS + i) * COLUMNS + j, res_sums[j * ROWS + i], mask=real)


def post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """X' (T, rows, C) from X (T, columns, C), y (T, C), H_post (T, rows), H_res (T, rows, columns)."""
    tokens, _, width = X.shape
    out = X.new_empty((tokens, h_res.shape[1], width), dtype=torch.promote_types(X.dtype, y.dtype))
    post_launch(X, y, h_post, h_res, out).run()
    return out


def post_backward(
    g_out: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of X, y, H_post and H_res from that of X'."""
    gradients = torch.empty_like(X), torch.empty_like(y), torch.empty_like(h_post), torch.empty_like(h_res)
    post_backward_launch(g_out, X, y, h_post, h_res, *gradients).run()
    return gradients


def post_launch(X: Tensor, y: Tensor | None, h_post: Tensor | None, h_res: Tensor, out: Tensor) -> Launch:
    """Without y and H_post only the streams are mixed."""
    (tokens, columns, width), rows = X.shape, h_res.shape[1]
    config = choose("post", max(rows, columns), width, tokens)
    return Launch(
        _post_forward_kernel,
        (triton.cdiv(tokens, config.tokens), triton.cdiv(width, config.width)),
        {
            "X": X, "y": X if y is None else y, "h_post": h_res if h_post is None else h_post, "h_res": h_res,
            "out": out, "T": tokens, "C": width,
        },
        {
            "BRANCH": y is not None, "COLUMNS": columns, "ROWS": rows, "TOKENS": config.tokens, "WIDTH": config.width,
        },
        config,
    )  # fmt: skip


def post_backward_launch(
    g_out: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    g_X: Tensor, g_y: Tensor, g_post: Tensor, g_res: Tensor, decays: Tensor | None = None,
) -> Launch:  # fmt: skip
    """`decays` (T, 1) or (T, rows): the gradient of X' is g_out - decays X'."""
    (tokens, columns, width), rows = X.shape, h_res.shape[1]
    config = choose("post_backward" if decays is None else "unmix", max(rows, columns), width, tokens)
    tensors = {"g_out": g_out, "X": X, "y": y, "h_post": h_post, "h_res": h_res}
    tensors["decays"] = h_post if decays is None else decays
    gradients = {"g_X": g_X, "g_y": g_y, "g_post": g_post, "g_res": g_res}
    return Launch(
        _post_backward_kernel,
        (triton.cdiv(tokens, config.tokens),),
        {**tensors, **gradients, "T": tokens, "C": width},
        {
            "COLUMNS": columns, "ROWS": rows, "DECAYS": 0 if decays is None else decays.shape[1],
            "TOKENS": config.tokens, "WIDTH": config.width,
        },
        config,
    )  # fmt: skip

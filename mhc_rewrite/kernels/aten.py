"""The operators and their gradients written out in aten: what a compiled CPU graph sees, and what runs where no kernel
does (fp64, other devices, no tokens).

Sums over streams are unrolled, which Inductor turns into one pass over memory; einsum and bmm become several. Sinkhorn-
Knopp alone stays an operator of its own: its iterations in the graph cost a minute of compilation.

All tensors are flat: T tokens, X (T, M, C) with M = n streams or 1 where all are still equal, y and u (T, C), the
coefficients (T, ...), phi (M * C, n^2 + 2n). Arithmetic is in phi's and H_res's dtype, fp32 or fp64. Equation numbers:
arXiv:2512.24880v2.

`pre` and `boundary` make their coefficients themselves. The operators from `project` on know no coefficients but those
they are given, and phi may have any number K of columns, 0 too: what makes H_pre, H_post and H_res of raw comes between
`project` or `post_project` and `read`, and its gradient between `read_products` or `post_read_products` and
`project_backward` or `post_project_backward`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_rewrite.kernels.kinds import KINDS, streams_of
from mhc_rewrite.kernels.reference import Coefficients, split


def pre(
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """u (T, C), H_post (T, n), H_res (T, n, n), raw (T, n^2 + 2n) and r (T, 1), or (T, n) for a norm per stream."""
    state = X.to(phi.dtype)
    raw, r = _project(state, phi, kind, eps)
    h = _coefficients(raw, alpha, bias, kind, iterations)
    h_pre = h.pre if X.shape[1] > 1 else h.pre.sum(-1, keepdim=True)
    return read(X, h_pre), h.post, h.res, raw, r


def pre_backward(
    g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of X, phi, alpha and bias from those of u, H_post and H_res."""
    n, (tokens, given, width) = streams_of(raw.shape[-1]), X.shape
    g_pre = read_products(g_u.to(phi.dtype), X.to(phi.dtype)).expand(tokens, n)
    h_pre, g_raw, g_alpha, g_bias = _coefficients_backward(g_pre, g_post, g_res, raw, alpha, bias, kind, iterations)
    if given == 1:
        h_pre = h_pre.sum(-1, keepdim=True)
    if KINDS[kind].constrained:
        return *project_backward(g_u, h_pre, g_raw, X, phi, raw, r), g_alpha, g_bias
    decay = (g_raw * raw).unflatten(-1, (n + 2, n)).sum(1) / (width * r * r)
    if given == 1:
        decay = decay.sum(-1, keepdim=True)
    return *_projected_backward(g_u, h_pre, g_raw / _divisor(r, kind, n), decay, X, phi), g_alpha, g_bias


def post(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """X' (T, rows, C) from X (T, columns, C), y (T, C), H_post (T, rows), H_res (T, rows, columns)."""
    state, branch = X.to(h_res.dtype), y.to(h_res.dtype)
    rows = [_sum(h_res[:, i], state, h_post[:, i, None] * branch) for i in range(h_res.shape[1])]
    return torch.stack(rows, dim=1).to(torch.promote_types(X.dtype, y.dtype))


def post_backward(
    g_out: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of X, y, H_post and H_res from that of X'."""
    dtype = h_res.dtype
    g, state, branch = g_out.to(dtype), X.to(dtype), y.to(dtype)
    rows, columns = h_res.shape[1:]
    g_state = torch.stack([_sum(h_res[:, :, j], g) for j in range(columns)], dim=1)
    g_post = torch.stack([(g[:, i] * branch).sum(-1) for i in range(rows)], dim=-1)
    g_res = torch.stack([(g[:, i] * state[:, j]).sum(-1) for i in range(rows) for j in range(columns)], dim=-1)
    return g_state.to(X.dtype), _sum(h_post, g).to(y.dtype), g_post, g_res.unflatten(-1, (rows, columns))


def boundary(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`post` of one site, then `pre` of the next."""
    state = post(X, y, h_post, h_res)
    return state, *pre(state, phi, alpha, bias, kind, iterations, eps)


def boundary_backward(
    g_state: Tensor, g_u: Tensor, g_post: Tensor, g_res: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor,
    phi: Tensor, alpha: Tensor, bias: Tensor, raw: Tensor, r: Tensor, kind: str, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of X, y, H_post, H_res, phi, alpha and bias. X' is built again instead of kept."""
    state = post(X, y, h_post, h_res)
    wide = state.to(phi.dtype)
    through, g_phi, g_alpha, g_bias = pre_backward(g_u, g_post, g_res, wide, phi, alpha, bias, raw, r, kind, iterations)
    g_X, g_y, g_h_post, g_h_res = post_backward(g_state.to(phi.dtype) + through, X, y, h_post, h_res)
    return g_X, g_y, g_h_post, g_h_res, g_phi, g_alpha, g_bias


def project(X: Tensor, phi: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """raw (T, K) and r (T, 1), the norm over all streams together, from X (T, S, C) and phi (S * C, K) [14, 15, 16]."""
    state = X.to(phi.dtype)
    squares = (state * state).sum(-1).sum(-1, keepdim=True)
    r = (squares / (X.shape[1] * X.shape[2]) + eps).sqrt()
    return (state.flatten(1) @ phi) / r, r


def project_backward(
    g_u: Tensor, h_pre: Tensor, g_raw: Tensor, X: Tensor, phi: Tensor, raw: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of X and phi from those of u, which H_pre (T, S) read, and of raw."""
    decay = (g_raw * raw).sum(-1, keepdim=True) / (X.shape[1] * X.shape[2] * r * r)
    return _projected_backward(g_u, h_pre, g_raw / r, decay, X, phi)


def _projected_backward(
    g_u: Tensor, h_pre: Tensor, g_product: Tensor, decay: Tensor, X: Tensor, phi: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of X and phi from that of the product with phi.

    r depends on x too: d(product / r) holds - raw x / (size r^2), with the size that the mean is taken over. That is
    `decay` (T, 1), or (T, S) for a norm per stream.
    """
    state = X.to(phi.dtype)
    projected = (g_product @ phi.T).unflatten(-1, X.shape[1:])
    g_state = projected - state * decay.unsqueeze(-1) + h_pre.unsqueeze(-1) * g_u.to(phi.dtype).unsqueeze(1)
    return g_state.to(X.dtype), state.flatten(1).T @ g_product


def read(X: Tensor, h_pre: Tensor) -> Tensor:
    """u (T, C) = sum_j H_pre[j] X[j], in X's dtype."""
    return _sum(h_pre, X.to(h_pre.dtype)).to(X.dtype)


def read_products(g_u: Tensor, X: Tensor) -> Tensor:
    """g_u . X[j], the gradient of H_pre (T, S); in fp32, or what is wider of g_u and X."""
    dtype = torch.promote_types(torch.promote_types(g_u.dtype, X.dtype), torch.float32)
    g, state = g_u.to(dtype), X.to(dtype)
    return torch.stack([(g * state[:, j]).sum(-1) for j in range(X.shape[1])], dim=-1)


def post_project(
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`post` of one site, then `project` of the next: X', raw, r."""
    state = post(X, y, h_post, h_res)
    return state, *project(state, phi, eps)


def post_read_products(g_u: Tensor, X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    """g_u . X'[i], the gradient of H_pre (T, n). X' is built again instead of kept."""
    return read_products(g_u.to(h_res.dtype), post(X, y, h_post, h_res).to(h_res.dtype))


def post_project_backward(
    g_state: Tensor, g_u: Tensor, h_pre: Tensor, g_raw: Tensor,
    X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor, phi: Tensor, raw: Tensor, r: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of X, y, H_post, H_res and phi from those of X', u and raw. X' is built again instead of kept."""
    wide = post(X, y, h_post, h_res).to(phi.dtype)
    through, g_phi = project_backward(g_u, h_pre, g_raw, wide, phi, raw, r)
    return *post_backward(g_state.to(phi.dtype) + through, X, y, h_post, h_res), g_phi


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """H_res (T, n, n) from logits of the same shape [9], on logarithms; `eps` as in the reference."""
    log_m, _, _ = _passes(logits, iterations, eps)
    return log_m.exp().movedim(-1, 0).contiguous()


def sinkhorn_backward(g_res: Tensor, logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The gradient of the iterations as executed, the matrices rebuilt from the sums that divided them."""
    log_m, sums, first = _passes(logits, iterations, eps)
    m = log_m.exp()
    q = g_res.movedim(0, -1) * m  # the gradient with respect to the logarithm
    for k in reversed(range(2 * iterations)):
        q = q - m * q.sum(dim=k % 2, keepdim=True)
        if k == 1 and eps:  # the step between the first two passes: S -> S + eps
            log_m = first
            m = log_m.exp()
            q = q * (m / (m + eps))
        else:
            log_m = log_m + sums[k]
            m = log_m.exp()
    return q.movedim(-1, 0).contiguous()


def _passes(logits: Tensor, iterations: int, eps: float) -> tuple[Tensor, list[Tensor], Tensor]:
    """The logarithm of the result as (n, n, T), long rows last; every pass's log sums; the result of the first pass."""
    log_m = first = logits.movedim(0, -1).contiguous()
    sums = []
    for k in range(2 * iterations):  # columns are summed along axis 0, rows along axis 1
        log_sum = log_m.logsumexp(dim=k % 2, keepdim=True)
        if eps and k:
            log_sum = (log_sum.exp() + eps).log()
        sums.append(log_sum)
        log_m = log_m - log_sum
        if k == 0:
            first = log_m
            log_m = (log_m.exp() + eps).log() if eps else log_m
    return log_m, sums, first


def _project(state: Tensor, phi: Tensor, kind: str, eps: float) -> tuple[Tensor, Tensor]:
    if KINDS[kind].constrained:
        return project(state, phi, eps)
    n = streams_of(phi.shape[-1])
    r = ((state * state).sum(-1) / state.shape[2] + eps).sqrt().expand(-1, n).contiguous()
    return (state.flatten(1) @ phi) / _divisor(r, kind, n), r


def _divisor(r: Tensor, kind: str, n: int) -> Tensor:
    """What each column is divided by: one norm, or the norm of the stream that the column belongs to."""
    return r if KINDS[kind].constrained else r.repeat(1, n + 2)


def _scales(alpha: Tensor, n: int) -> Tensor:
    return torch.cat([alpha[0].expand(n), alpha[1].expand(n), alpha[2].expand(n * n)])


def _coefficients(raw: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int) -> Coefficients:
    n, rules = streams_of(raw.shape[-1]), KINDS[kind]
    if not rules.constrained:
        parts = zip(split(bias, n), alpha, split(torch.tanh(raw), n))
        return Coefficients(*(shift + scale * part for shift, scale, part in parts))
    pre, post, res = split(_scales(alpha, n) * raw + bias, n)
    res = torch.ops.mhc_rewrite.sinkhorn(res.mT if rules.transposed else res, iterations, rules.eps)
    return Coefficients(torch.sigmoid(pre) + rules.eps, 2 * torch.sigmoid(post), res)


def _coefficients_backward(
    g_pre: Tensor, g_post: Tensor, g_res: Tensor, raw: Tensor, alpha: Tensor, bias: Tensor, kind: str, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H_pre again, and the gradients of raw, alpha and bias."""
    n, rules = streams_of(raw.shape[-1]), KINDS[kind]
    scale = _scales(alpha, n)
    if rules.constrained:
        pre, post, res = split(scale * raw + bias, n)
        a, b = torch.sigmoid(pre), torch.sigmoid(post)
        g_logits = torch.ops.mhc_rewrite.sinkhorn_backward(
            g_res, res.mT if rules.transposed else res, iterations, rules.eps
        )
        g_logits = g_logits.mT if rules.transposed else g_logits
        g = torch.cat([g_pre * a * (1 - a), 2 * g_post * b * (1 - b), g_logits.flatten(1)], dim=-1)
        h_pre, by_alpha, g_raw = a + rules.eps, g * raw, scale * g
    else:
        squashed = torch.tanh(raw)
        g = torch.cat([g_pre, g_post, g_res.flatten(1)], dim=-1)
        h_pre = bias[:n] + alpha[0] * squashed[:, :n]
        by_alpha, g_raw = g * squashed, scale * g * (1 - squashed * squashed)
    g_alpha = torch.stack([part.sum() for part in by_alpha.split([n, n, n * n], dim=-1)])
    return h_pre, g_raw, g_alpha, g.sum(0)


def _sum(weights: Tensor, state: Tensor, start: Tensor | None = None) -> Tensor:
    """sum_j weights[:, j] state[:, j] (+ start): (T, M), (T, M, C) -> (T, C)."""
    total = start
    for j in range(state.shape[1]):
        term = weights[:, j, None]
        total = term * state[:, j] if total is None else torch.addcmul(total, term, state[:, j])
    assert total is not None
    return total

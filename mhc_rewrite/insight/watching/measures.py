"""What is told of sites, as formulas over the coefficients and states of some tokens, the last of any leading axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mhc_rewrite.insight.experiments.measures import errors, gains
from mhc_rewrite.sites.streams import shares

__all__ = ["composites", "errors", "gains", "of_post", "of_pre", "of_res", "of_states", "products", "state_products"]

FEW = 32  # tokens of which singular values are taken


def of_res(res: Tensor) -> dict[str, Tensor]:
    """Of H_res (..., n, n) by token."""
    n = res.shape[-1]
    row, column = errors(res)
    forward, backward = gains(res)
    return {
        "row_error": row,
        "column_error": column,
        "from_identity": (res - torch.eye(n, dtype=res.dtype)).flatten(-2).norm(dim=-1),
        "from_uniform": (res - 1 / n).flatten(-2).norm(dim=-1),
        "second_singular": _where_finite(lambda H: torch.linalg.svdvals(H)[..., 1], _few(res)),
        "forward_gain": forward,
        "backward_gain": backward,
    }


def of_pre(pre: Tensor) -> dict[str, Tensor]:
    """Of H_pre (..., n) by token; `pre_argmax` is a stream's number."""
    size = pre.abs()
    share = size / size.sum(-1, keepdim=True)
    entropy = torch.special.entr(share).sum(-1)
    return {"pre_entropy": entropy / math.log(max(2, pre.shape[-1])), "pre_argmax": size.argmax(-1)}


def of_post(post: Tensor) -> dict[str, Tensor]:
    """Of H_post (..., n) by token."""
    return {"post_spread": post.std(-1, correction=0)}


def state_products(streams: Tensor) -> Tensor:
    """Of a state (..., n, C): the inner products of its streams' differences from their mean, and of the mean, which is
    the last row and column: (..., n + 1, n + 1). All that is told of a state follows from these, and differences of
    nearly equal streams keep their digits, as those of the streams' own products would not."""
    mean = streams.mean(-2, keepdim=True)
    parts = torch.cat([streams - mean, mean], dim=-2)
    return parts @ parts.mT


def of_states(product: Tensor) -> dict[str, Tensor]:
    """Of what `state_products` gives, by token; the spread over all tokens is the root of the sum of `apart` over that
    of `mean`, sums of squares a stream."""
    n = product.shape[-1] - 1
    differences, cross, mean = product[..., :n, :n], product[..., :n, n], product[..., n, n]
    own = differences + cross.unsqueeze(-1) + cross.unsqueeze(-2) + mean[..., None, None]  # of the streams themselves
    squares = own.diagonal(dim1=-2, dim2=-1)
    return {
        "apart": differences.diagonal(dim1=-2, dim2=-1).mean(-1),
        "mean": mean,
        "dominant": squares.amax(-1) / squares.sum(-1),
        "rank": _where_finite(_effective_rank, _few(own)),
    }


def _few(matrices: Tensor) -> Tensor:
    """Of so many tokens, as LAPACK takes them one by one."""
    return matrices[..., :: -(-matrices.shape[-3] // FEW), :, :]


def _effective_rank(products: Tensor) -> Tensor:
    singular = torch.linalg.eigvalsh(products).clamp_min(0).sqrt()
    return torch.special.entr(singular / singular.sum(-1, keepdim=True)).sum(-1).exp()


def _where_finite(function: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """NaN elsewhere: a run that diverges is to be seen, and LAPACK would raise."""
    finite = matrices.isfinite().all(-1).all(-1)
    some = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    values = function(torch.where(finite[..., None, None], matrices, some))
    return torch.where(finite, values, torch.nan)


def products(res: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Of H_res (tokens, n, n) of sites one after another: the product from the first site to each, and from each to the
    last. Where n changes, streams are resized between."""
    steps = [H if k == 0 else H @ _resizing(res[k - 1], H) for k, H in enumerate(res)]
    forward = list(res[:1])
    for step in steps[1:]:
        forward.append(step @ forward[-1])
    after, backward = torch.eye(res[-1].shape[-1], dtype=res[-1].dtype), []
    for k in range(len(res) - 1, -1, -1):
        backward.append(after @ res[k])
        after = after @ steps[k]
    return forward, backward[::-1]


def _resizing(before: Tensor, after: Tensor) -> Tensor:
    old, new = before.shape[-1], after.shape[-1]
    if old == new:
        return torch.eye(new, dtype=after.dtype)
    return torch.tensor(shares(old, new), dtype=after.dtype)


def composites(res: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The forward gain of the products to each site, by token; the backward gain of those from each; the whole one."""
    forward, backward = products(res)
    return [gains(product)[0] for product in forward], [gains(product)[1] for product in backward], forward[-1]

"""Which tokens are looked at, and how they are taken from what a site has."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mhc_rewrite.sites.hyper_connection import HyperConnection

_GOLDEN = 0.6180339887498949


def in_front(tensor: Tensor, site: HyperConnection, axes: int) -> Tensor:
    """With the axes of tokens in front of those of streams and features (2), or of features alone (1)."""
    if site.channel_dim == -1:
        return tensor
    return tensor.movedim((1, 2), (-2, -1)) if axes == 2 else tensor.movedim(1, -1)


def some(tensor: Tensor, h_post: Tensor, tokens: int) -> Tensor:
    """(k, ...): the same tokens of whatever has H_post's leading axes in front."""
    leading = h_post.shape[:-1]
    return tensor[_places(leading, tokens, h_post.device)] if leading else tensor.unsqueeze(0)


@functools.lru_cache(maxsize=8)
def _places(leading: torch.Size, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """One in each of as many equal parts, at another place in each: the first token of every text is like no other."""
    count = math.prod(leading)
    k = min(tokens, count)
    flat = [min(count - 1, int((i + i * _GOLDEN % 1) * count / k)) for i in range(k)]
    return torch.unravel_index(torch.tensor(flat, dtype=torch.long, device=device), leading)

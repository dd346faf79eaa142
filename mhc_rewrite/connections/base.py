"""What a connection is: how one site's parameters are shaped, started and made into H_pre, H_post and H_res."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_rewrite.kernels.reference import Coefficients

# (raw (T, K), alpha (3,), bias (K,), n) -> H_pre (T, n), H_post (T, n), H_res (T, n, n); K = 2n + columns(n).
Mappings = Callable[[Tensor, Tensor, Tensor, int], Coefficients]
# (phi, alpha, bias, n, index) -> None, in place. `index` is the site's place in its stream.
Start = Callable[[Tensor, Tensor, Tensor, int, int], None]

STARTS = {
    "preserve": "the original function, and streams that part at the first site",
    "equal": "the original function, and streams that stay equal until H_post has learned",
    "near_identity": "the original function; H_res as good as the identity, where it stays",
    "paper": "that of the connection's own source",
}


def gates(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre and H_post as mHC makes them, and the logits of H_res [16, 17, 18]."""
    columns = [n, n, bias.shape[-1] - 2 * n]
    pre, post, res = (
        a * part + b for a, part, b in zip(alpha.unbind(), raw.split(columns, -1), bias.split(columns, -1), strict=True)
    )
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), res


@dataclass(frozen=True)
class Connection:
    kind: str = ""
    phi_shape: Callable[[int, int], tuple[int, int]] | None = None
    projection: Callable[[Tensor, int], Tensor] | None = None
    starts: Mapping[str, Start] | None = None
    source: str = ""
    function: Mappings | None = None
    columns: Callable[[int], int] = lambda n: n * n
    refuses: Callable[[int], str] = lambda n: ""

"""No mixing among streams: H_res = I, H_pre and H_post as mHC's (an ablation of arXiv:2512.24880).

    H_pre = sigmoid(s_pre)    H_post = 2 sigmoid(s_post)    H_res = I

Streams differ in what they receive and in how they are read alone. No logits of H_res, no iterations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mhc_rewrite.connections.base import Connection, gates
from mhc_rewrite.connections.mhc import paper
from mhc_rewrite.connections.starts import starts
from mhc_rewrite.kernels.reference import Coefficients


def mappings(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> Coefficients:
    pre, post, _ = gates(raw, alpha, bias, n)
    return Coefficients(pre, post, torch.eye(n, dtype=pre.dtype, device=pre.device).expand(*pre.shape, n))


IDENTITY = Connection(
    function=mappings,
    starts=starts(lambda n, uniform: (), paper),
    source="ablation of arXiv:2512.24880",
    columns=lambda n: 0,
)

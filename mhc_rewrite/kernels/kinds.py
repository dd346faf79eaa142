"""What tells the relatives of mHC apart once their projection is there: four flags, one line a relative."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_STREAMS = 16  # what the kernels are written for


@dataclass(frozen=True)
class Kind:
    """How raw coefficients become H_pre, H_post and H_res. Kernels take the fields as compile-time constants.

    With s = alpha * raw + bias, columns [pre: n | post: n | res: n*n row-major]:

    - constrained: H_pre = sigmoid(s_pre) + eps, H_post = 2 sigmoid(s_post), H_res by Sinkhorn-Knopp of s_res, the
      norm of the state over all streams together (arXiv:2512.24880, eq. 14 to 19);
    - otherwise: H = bias + alpha * tanh(raw), the norm per stream: column pre[j], post[j] and res[i, j] are divided by
      the norm of stream j (arXiv:2409.19606).

    Attributes:
        constrained: see above.
        eps: added to H_pre, to the entries after the first column pass, and to every sum that divides afterwards.
        transposed: the res columns hold H_res[in, out], so Sinkhorn-Knopp runs on their transpose. Rows and columns
            change places with it: to someone who reads [in, out] the passes begin with rows and end with columns.
    """

    constrained: bool
    eps: float
    transposed: bool


KINDS = {
    "mhc": Kind(constrained=True, eps=0.0, transposed=False),
    "deepseek_v4": Kind(constrained=True, eps=1e-6, transposed=True),
    "hc": Kind(constrained=False, eps=0.0, transposed=False),
}


def streams_of(columns: int) -> int:
    """n from the number of columns of phi, n^2 + 2n."""
    return math.isqrt(columns + 1) - 1

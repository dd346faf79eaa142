"""What tells the relatives of mHC apart once their projection is there: three flags, or a function.

A kind is a name in `KINDS`, for which there are kernels, or in `FUNCTIONS`, which run on kernels that know nothing of
them. Behind "static " it has no projection: its coefficients come from the bias alone, alike for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mhc_rewrite.errors import KernelError

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


@dataclass(frozen=True)
class Function:
    """How raw coefficients become H_pre, H_post and H_res, in plain PyTorch.

    Attributes:
        run: (raw (T, K), alpha (3,), bias (K,), n) -> H_pre (T, n), H_post (T, n), H_res (T, n, n) as [out, in], with
            the columns [pre: n | post: n | res] and raw projected by the norm over all streams together.
        columns: n -> how many of the columns are H_res's.
    """

    run: Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]
    columns: Callable[[int], int]

    def __call__(self, raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `run` returns.

        Raises:
            KernelError: it has other shapes, which kernels would read beyond.
        """
        made = self.run(raw, alpha, bias, n)
        shapes = [tuple(h.shape[1:]) if isinstance(h, Tensor) else None for h in made]
        if shapes != [(n,), (n,), (n, n)]:
            raise KernelError(
                f"{self} returned {shapes} for each of the tokens: a connection's function returns H_pre (T, {n}), "
                f"H_post (T, {n}) and H_res (T, {n}, {n}) for raw (T, {raw.shape[-1]})."
            )
        return made

    def __str__(self) -> str:
        code = getattr(self.run, "__code__", None)
        where = f" ({code.co_filename}:{code.co_firstlineno})" if code else ""
        return getattr(self.run, "__qualname__", repr(self.run)) + where


FUNCTIONS: dict[str, Function] = {}

_STATIC = "static "


def static(name: str) -> str:
    """The kind without a projection."""
    return _STATIC + name


def is_static(kind: str) -> bool:
    return kind.startswith(_STATIC)


def name_of(kind: str) -> str:
    """Of a kind the name in `KINDS` or `FUNCTIONS`."""
    return kind.removeprefix(_STATIC)


def norms_of(kind: str, n: int) -> int:
    """How many norms a token has: one over all streams, or one of each."""
    return n if kind in KINDS and not KINDS[kind].constrained else 1


def streams_of(columns: int, kind: str = "mhc") -> int:
    """n from the length of the bias, 2n and H_res's columns; 0 where no n has as many."""
    name = name_of(kind)
    if name in KINDS:
        n = math.isqrt(columns + 1) - 1
        return n if n * n + 2 * n == columns else 0
    return next((n for n in range(1, MAX_STREAMS + 1) if 2 * n + FUNCTIONS[name].columns(n) == columns), 0)

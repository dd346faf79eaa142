"""The places where no public PyTorch API exists. Read in torch 2.13.0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeepsPrecision(nn.Module):
    """A module whose parameters never become narrower than 32 bits.

    `Module.half()`, `.bfloat16()` and `.to(dtype)` all go through `Module._apply`; no public hook sees them. Should
    `_apply` go, every caller of `.to(dtype)` has to cast the sites back, and tests/test_model_stays.py fails first.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and torch.finfo(moved.dtype).bits < 32:
                return tensor.to(moved.device) if not tensor.is_meta else torch.empty_like(tensor, device=moved.device)
            return moved

        return super()._apply(keep_wide, recurse)

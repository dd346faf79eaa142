"""Which code runs an operator: gpu.py, cpu.py, or aten.py for everything that neither takes."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from mhc_rewrite.kernels import aten, cpu, gpu
from mhc_rewrite.kernels.kinds import MAX_STREAMS

STREAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def kernels_for(X: Tensor, y: Tensor | None, coefficients: Tensor | None) -> ModuleType:
    """What runs an operator on these streams, this branch, and these parameters or coefficients, if it has them.

    aten.py has no limits; the kernels take the dtypes and numbers of streams that models have.
    """
    usual = X.dtype in STREAM_DTYPES and (y is None or y.dtype in STREAM_DTYPES) and X.shape[-2] <= MAX_STREAMS
    if usual and (coefficients is None or coefficients.dtype == torch.float32) and X.numel() > 0:
        if X.device.type == "cuda" and gpu.AVAILABLE:
            return gpu
        if X.device.type == "cpu" and cpu.available():
            return cpu
    return aten

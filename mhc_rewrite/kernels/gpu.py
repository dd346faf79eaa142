"""The operators on GPU tensors, by Triton. Same functions, shapes and results as aten.py, for T >= 1 tokens in fp32,
bf16 or fp16 with fp32 parameters.

Triton comes with torch's GPU builds. Where it is missing nothing here is called, and aten.py runs.
"""

from __future__ import annotations

import importlib.util

AVAILABLE = importlib.util.find_spec("triton") is not None

if AVAILABLE:
    from mhc_rewrite.kernels.triton_boundary import boundary, pre
    from mhc_rewrite.kernels.triton_boundary_backward import boundary_backward, pre_backward
    from mhc_rewrite.kernels.triton_post import post, post_backward

__all__ = ["AVAILABLE", "boundary", "boundary_backward", "post", "post_backward", "pre", "pre_backward"]

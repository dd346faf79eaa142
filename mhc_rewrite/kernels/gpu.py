"""The operators on GPU tensors, by Triton. Same functions, shapes and results as aten.py, for T >= 1 tokens in fp32,
bf16 or fp16 with fp32 parameters.

Triton comes with torch's GPU builds. Where it is missing nothing here is called, and aten.py runs.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

AVAILABLE = importlib.util.find_spec("triton") is not None

_FILES = {
    "boundary": "triton_boundary",
    "boundary_backward": "triton_boundary_backward",
    "post": "triton_post",
    "post_backward": "triton_post",
    "post_project": "triton_given",
    "post_project_backward": "triton_given",
    "post_read_products": "triton_given",
    "pre": "triton_boundary",
    "pre_backward": "triton_boundary_backward",
    "project": "triton_given",
    "project_backward": "triton_given",
    "read": "triton_given",
    "read_products": "triton_given",
}


def __getattr__(name: str) -> Any:
    """An operator, at its first use: Triton takes most of a second to import."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mhc_rewrite.kernels.{_FILES[name]}"), name)

"""Triton's interpreter multiplies the bits of bf16 numbers in `tl.dot`; here it multiplies the numbers. And NaN in
buffers that a kernel should write."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

_create_dot = interpreter.InterpreterBuilder.create_dot


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    numbers = (handle.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(numbers, tl.float32)


def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    return _create_dot(self, _widened(a), _widened(b), *rest)


interpreter.InterpreterBuilder.create_dot = _dot


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty buffers hold NaN, integers a large number: what a kernel does not write shows."""
    new_empty = Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 12345)

    monkeypatch.setattr(Tensor, "new_empty", lambda t, *args, **kw: poison(new_empty(t, *args, **kw)))
    monkeypatch.setattr(torch, "empty_like", lambda t: poison(torch.zeros_like(t)))

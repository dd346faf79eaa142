"""What the tests of kernels hold against the truth in fp64, and how closely."""

from __future__ import annotations

import torch
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {F32: 1e-5, BF16: 2e-2, F16: 2e-2}


def gaussian(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(got: tuple[Tensor, ...], want: tuple[Tensor, ...], close: float) -> None:
    assert len(got) == len(want)
    for place, (mine, truth) in enumerate(zip(got, want)):
        assert mine.shape == truth.shape and mine.isfinite().all(), place
        assert (mine.double() - truth).norm() <= close * truth.norm(), place


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double().requires_grad_() for tensor in tensors]


def gradients(*outputs: Tensor) -> list[Tensor]:
    return [gaussian(*out.shape, seed=20 + k, dtype=out.dtype) for k, out in enumerate(outputs)]


def branch(tokens: int, rows: int, columns: int, width: int, dtype: torch.dtype, y_dtype: torch.dtype) -> list[Tensor]:
    sizes = ((tokens, columns, width), (tokens, width), (tokens, rows), (tokens, rows, columns))
    return [gaussian(*s, seed=k, dtype=d) for k, (s, d) in enumerate(zip(sizes, (dtype, y_dtype, F32, F32)))]

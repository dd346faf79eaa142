"""How the Triton kernels are cut into programs: named configurations, a fixed default for every size, and overrides.

Nothing is tuned unless asked: the defaults follow from n and C alone.
None has been timed on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel.

    Attributes:
        name: what `using` calls it.
        tokens: tokens of a block.
        width: elements of C of a block; a power of two.
        warps, stages: Triton's num_warps and num_stages.
    """

    name: str
    tokens: int
    width: int
    warps: int
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One kernel launch as data: `run` launches it, the tests compile it for GPUs that are not there."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    def run(self) -> None:
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


_overrides: dict[str, str] = {}


def choose(kernel: str, n: int, width: int) -> Config:
    """The configuration of a kernel for n streams of `width` elements."""
    name = _overrides.get(kernel, "default")
    return next(config for config in configurations(kernel, n, width) if config.name == name)


def configurations(kernel: str, n: int, width: int) -> list[Config]:
    """Everything that can be picked for a kernel; the first is the default.

    Args:
        kernel: `post`, `post_backward` or `forward`.
    """
    whole = power_of_two(width)
    if kernel in ("post", "post_backward"):
        # One warp a token row of 256 elements: 16-byte accesses in bf16, coefficients the same for the warp. Beyond
        # eight streams the tiles of all streams would not fit into registers at that width.
        columns = min(whole, 256 if n <= 4 else 128 if n <= 8 else 64)
        default = Config("default", max(1, 4 * 256 // columns // (1 if n <= 4 else 2)), columns, 4)
        return [default, dataclasses.replace(default, name="wide", tokens=max(1, default.tokens // 2), warps=2)]
    # phi is read once a block of tokens. The tiles of eight streams leave registers for less than those of four.
    block = 32 if n <= 4 else 16
    default = Config("default", block, min(max(whole, 16), block), 4)
    return [default, dataclasses.replace(default, name="eight_warps", warps=8)]


@contextlib.contextmanager
def using(kernel: str, name: str) -> Iterator[None]:
    """Inside, a kernel takes the configuration of this name.

    Raises:
        KeyError: there is none of this name.
    """
    names = {config.name for config in configurations(kernel, 4, 768)}
    if name not in names:
        raise KeyError(f"{kernel} has no configuration {name!r}; it has {', '.join(sorted(names))}.")
    before = _overrides.get(kernel)
    _overrides[kernel] = name
    try:
        yield
    finally:
        _overrides.pop(kernel)
        if before is not None:
            _overrides[kernel] = before


def power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << max(size - 1, 0).bit_length()


def precision() -> str:
    """How `tl.dot` multiplies fp32: three tf32 products where tensor cores have them, plain fp32 on AMD, where tf32
    does not compile on every chip."""
    return "ieee" if torch.version.hip else "tf32x3"

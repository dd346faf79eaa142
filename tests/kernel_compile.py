"""Compiles the Triton kernels ahead of time, for GPUs that need not be there, and reads what each needs of them.

`python tests/kernel_compile.py` prints the table. The launches are those that the package makes, on meta tensors.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mhc_rewrite.kernels import triton_boundary, triton_boundary_backward, triton_given, triton_post
from mhc_rewrite.kernels.kinds import KINDS
from mhc_rewrite.kernels.triton_configs import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
# n, and columns of phi where coefficients are given: none, few, as many as mHC has, many
COLUMNS = [(4, 0), (4, 8), (4, 24), (4, 32), (8, 80), (5, 130), (16, 288)]
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Resources(NamedTuple):
    """Registers a thread, bytes (NVIDIA) or registers (AMD) spilled, bytes of shared memory a program."""

    registers: int
    spills: int
    shared: int
    wide: int
    """Accesses of 16 bytes in the code."""


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiler_of(target: str) -> Any:
    """Inside, configurations are those of the target."""
    return mock.patch.object(torch.version, "hip", "7" if TARGETS[target].backend == "hip" else None)


def launches(
    n: int, target: str, width: int = 768, tokens: int = 4096, dtype: torch.dtype = torch.bfloat16, kind: str = "mhc"
) -> dict[str, Launch]:
    """Every kernel's launch at this size, as it would be made on the target; those of few tokens at 16 of them."""
    columns, norms = n * n + 2 * n, 1 if KINDS[kind].constrained else n
    stream, number = functools.partial(meta, dtype=dtype), functools.partial(meta, dtype=torch.float32)

    def boundaries(tokens: int) -> dict[str, list[Launch]]:
        X, mix = stream(tokens, n, width), (stream(tokens, width), number(tokens, n), number(tokens, n, n))
        y, *h = mix
        parameters, kept = (number(n * width, columns), number(3), number(columns)), (number(tokens, columns),)
        kept += (number(tokens, norms),)
        forward = (*parameters, (y, *h, *kept), kind, 20, 1e-6)
        backward = (*parameters, *kept)
        gradients = (y, *h)
        return {
            "pre": triton_boundary.pre_launches(X, *forward),
            "pre_backward": triton_boundary_backward.backward_launches(
                None, gradients, X, None, *backward, (X,), parameters, kind, 20, False
            ),
            "boundary_backward": triton_boundary_backward.backward_launches(
                X, gradients, X, mix, *backward, (X, *mix), parameters, kind, 20, False
            ),
        }

    X, y, h_post, h_res = stream(tokens, n, width), stream(tokens, width), number(tokens, n), number(tokens, n, n)
    with compiler_of(target):
        many = boundaries(tokens)
        few = boundaries(min(tokens, 16))
        return {
            "post": triton_post.post_launch(X, y, h_post, h_res, X),
            "post_backward": triton_post.post_backward_launch(X, X, y, h_post, h_res, X, y, h_post, h_res),
            "pre": many["pre"][0],
            "pre, dots": many["pre_backward"][0],
            "pre, coefficients": many["pre_backward"][1],
            "pre, state": many["pre_backward"][2],
            "pre, parameters": many["pre_backward"][3],
            "boundary, dots": many["boundary_backward"][0],
            "boundary, coefficients": many["boundary_backward"][1],
            "boundary, state": many["boundary_backward"][2],
            "boundary, unmix": many["boundary_backward"][3],
            "boundary, parameters": many["boundary_backward"][4],
            "pre, few tokens": few["pre"][0],
            "few tokens, finish": few["pre"][-1],
        }


def given_launches(
    n: int, columns: int, target: str, width: int = 768, tokens: int = 4096, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Launch]:
    """Those of the operators that are given their coefficients, for any number of columns."""
    stream, number = functools.partial(meta, dtype=dtype), functools.partial(meta, dtype=torch.float32)
    X, h_pre, phi = stream(tokens, n, width), number(tokens, n), number(n * width, columns)
    y = stream(tokens, width)
    mix = y, number(tokens, n), number(tokens, n, n)
    raw, r = number(tokens, columns), number(tokens, 1)
    with compiler_of(target):
        forward = triton_given.project_launches(X, phi, 1e-6, raw, r)
        few = triton_given.project_launches(X[:16], phi, 1e-6, raw[:16], r[:16])
        back = triton_given.given_backward_launches(None, y, h_pre, raw, X, None, phi, raw, r, (X,), phi)
        outputs = (X, *mix)
        mixed = triton_given.given_backward_launches(X, y, h_pre, raw, X, mix, phi, raw, r, outputs, phi)
        products, _ = triton_given.products_launches(y, X, mix)
        named = [
            *zip(("project", "norm"), forward), *zip(("project, few tokens", "norm, few tokens"), few),
            ("read", triton_given.read_launch(X, h_pre, y)), ("made, products", products[1]),
        ]  # fmt: skip
        before, after = (("product gradient",), ("parameters",)) if columns else ((), ())
        named += zip((*before, "state", *after), back)
        named += [(f"made, {name}", launch) for name, launch in zip((*before, "state", "unmix", *after), mixed)]
    return dict(named)


def resources(launch: Launch, target: GPUTarget) -> Resources:
    """What the compiled kernel needs."""
    amd, constants = target.backend == "hip", launch.constants
    signature, values, attributes = {}, {}, {}
    for place, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
            continue
        argument = launch.arguments[name]
        if isinstance(argument, int) and argument == 1:  # a constant, as at a launch
            signature[name], values[(place,)] = "constexpr", 1
            continue
        if isinstance(argument, Tensor):
            signature[name] = f"*{DTYPES[argument.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(argument, float) else "i32"
        # As at a launch: allocations are aligned, and so are sizes that 16 divides.
        if isinstance(argument, Tensor) or (isinstance(argument, int) and argument % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, values, attributes)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    compiled = triton.compile(source, target=target, options=options)
    shared = compiled.metadata.shared
    if amd:
        text = compiled.asm["amdgcn"]
        counts = [int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")]
        return Resources(*counts, shared, len(re.findall(r"(?:global|buffer)_(?:load|store)_dwordx4", text)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    wide = len(
        re.findall(r"(?:ld|st)\.global\S*\.v4\.b32|cp\.async\.c.\S+ \[[^]]*\], \[[^]]*\], 0x10", compiled.asm["ptx"])
    )
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], shared, wide)


def rows(streams: tuple[int, ...], targets: Iterable[str] = TARGETS) -> Iterator[tuple[str, str, str, Resources]]:
    """At the size of the table in docs/kernels.md; n, or n and the columns of phi."""
    made: list[tuple[str, dict[str, dict[str, Launch]]]] = []
    for n in streams:
        made.append((str(n), {target: launches(n, target, 2560, 8192) for target in targets}))
    for n, columns in COLUMNS:
        of = {target: given_launches(n, columns, target, 2560, 8192) for target in targets}
        made.append((f"{n}, {columns}", of))
    for size, of in made:
        for kernel in of[next(iter(of))]:
            for target in targets:
                yield size, kernel, target, resources(of[target][kernel], TARGETS[target])


if __name__ == "__main__":
    table = Table("n, columns", "kernel", "target", "registers", "spills", "shared memory", "16-byte accesses")
    for size, kernel, target, used in rows((2, 4, 8)):
        table.add_row(size, kernel, target, *map(str, used))
    Console(width=100).print(table)

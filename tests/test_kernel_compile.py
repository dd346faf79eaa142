"""The Triton kernels compile for GPUs that are not here, without spills and within a ceiling of registers."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="Triton has no build for this system")

import torch

import kernel_compile
from mhc_rewrite.kernels.triton_configs import KERNELS, configurations, using

# Registers a thread on NVIDIA, whose limit is 255, and on AMD, which counts 512. Default configurations, n <= 8.
CEILING = {
    "post": (128, 128),
    "post_backward": (250, 400),
    "pre": (248, 256),  # 241 by triton 3.6 for sm_80 and eight streams; by 3.7 at most 200
    "pre, dots": (80, 80),
    "pre, coefficients": (144, 128),
    "pre, state": (144, 128),
    "pre, parameters": (184, 256),
    "boundary, dots": (80, 80),
    "boundary, coefficients": (144, 128),
    "boundary, state": (128, 128),
    "boundary, unmix": (255, 400),
    "boundary, parameters": (255, 488),
    "pre, few tokens": (184, 184),
    "few tokens, finish": (96, 96),
}
STACK = 16  # bytes a thread that ptxas may put aside, to stay at 64 or 128 registers; a value of a loop takes more
STACK_OF_EIGHT = 144  # larger blocks that spill were faster than smaller ones that do not, on an H100
STACK_OF_MANY_ON_AMD = 48  # registers, with 288 columns
# MHC_WHOLE_GRID=1: more streams, all targets and every configuration; otherwise the newest two of NVIDIA, one of AMD,
# and one configuration that is no default.
WHOLE_GRID = os.environ.get("MHC_WHOLE_GRID") == "1"
TARGETS = list(kernel_compile.TARGETS) if WHOLE_GRID else ["sm_90", "sm_100", "gfx942"]
STREAMS = [2, 3, 4, 8] if WHOLE_GRID else [4]
COLUMNS = kernel_compile.COLUMNS if WHOLE_GRID else [(4, 0), (4, 32), (5, 130)]
OTHERS = [(kernel, config.name) for kernel in KERNELS for config in configurations(kernel, 4, 768, 4096)[1:]]
OTHERS = OTHERS if WHOLE_GRID else OTHERS[:1]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n", STREAMS)
def test_resources(n: int, target: str) -> None:
    amd = target.startswith("gfx")
    for kernel, launch in kernel_compile.launches(n, target).items():
        used = kernel_compile.resources(launch, kernel_compile.TARGETS[target])
        assert used.spills <= (0 if amd else STACK if n <= 4 else STACK_OF_EIGHT), (kernel, used)
        assert used.registers <= CEILING[kernel][amd], (kernel, used)
        assert used.shared <= kernel_compile.SHARED[target], (kernel, used)
        # Rows of 768 bf16 are aligned to 16 bytes: what streams through without tl.dot is read and written so.
        if kernel in ("post", "post_backward"):
            assert used.wide >= 2 * n + 1, (kernel, used)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("n,columns", COLUMNS)
def test_with_given_coefficients(n: int, columns: int, target: str) -> None:
    amd = target.startswith("gfx")
    launches = kernel_compile.given_launches(n, columns, target)
    assert ("project" in launches, "parameters" in launches) == (columns > 0, columns > 0)
    for kernel, launch in launches.items():
        used = kernel_compile.resources(launch, kernel_compile.TARGETS[target])
        assert used.shared <= kernel_compile.SHARED[target], (kernel, used)
        most = (0 if columns <= 130 else STACK_OF_MANY_ON_AMD) if amd else STACK if n <= 4 else STACK_OF_EIGHT
        assert used.spills <= most, (kernel, used)
        if kernel == "read":
            assert used.wide >= n + 1, (kernel, used)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_projections_of_sixteen_streams_fit(target: str, dtype: torch.dtype) -> None:
    """phi's 288 columns are 512 with the padding."""
    launches = [
        kernel_compile.given_launches(16, 288, target, width, dtype=dtype)[kernel]
        for width, kernel in ((768, "project"), (768, "project, few tokens"), (129, "project"))
    ] + [kernel_compile.launches(16, target, width, dtype=dtype)["pre"] for width in (768, 129)]
    for launch in launches:
        used = kernel_compile.resources(launch, kernel_compile.TARGETS[target])
        assert used.shared <= kernel_compile.SHARED[target], (launch.constants, used)


@pytest.mark.slow
@pytest.mark.parametrize("width,tokens,kind", [(1, 1, "deepseek_v4"), (129, 257, "hc")])
def test_odd_sizes_compile(width: int, tokens: int, kind: str) -> None:
    for launch in kernel_compile.launches(3, "sm_90", width, tokens, kind=kind).values():
        kernel_compile.resources(launch, kernel_compile.TARGETS["sm_90"])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel,name", OTHERS)
def test_other_configurations_compile(kernel: str, name: str, target: str) -> None:
    with using(kernel, name):
        for n in STREAMS:
            for launch in kernel_compile.launches(n, target).values():
                if launch.config.name == name:
                    kernel_compile.resources(launch, kernel_compile.TARGETS[target])

"""What this machine has for converted models: versions, devices, kernels, and what is missing with what brings it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from mhc_rewrite.kernels import cpu, gpu
from mhc_rewrite.version import VERSION

PACKAGES = ("triton", "transformers", "peft", "accelerate", "timm", "torchvision", "pytorch-lightning", "safetensors",
            "sympy", "numpy")  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Plain data.

    Attributes:
        versions: of Python, torch, this package and those that it meets; None for what is not installed.
        devices: one line each.
        cpu_kernels: whether they are built, where, by which compiler.
        triton: whether the GPU kernels can be used.
        missing: what does not work here, each with what brings it.
    """

    versions: dict[str, str | None]
    devices: tuple[str, ...]
    cpu_kernels: str
    triton: str
    missing: tuple[str, ...]


def machine() -> Machine:
    """Looks, and builds nothing."""
    from torch.utils import cpp_extension  # brings setuptools along, which no other command needs

    versions: dict[str, str | None] = {
        "mhc_rewrite": VERSION, "Python": platform.python_version(), "system": platform.platform(),
        "torch": str(torch.__version__),
    }  # fmt: skip
    versions.update({package: _version(package) for package in PACKAGES})
    missing = []
    compiler, library = shutil.which(cpp_extension.get_cxx_compiler()), cpu.library()
    into = _writable(library.folders)
    # What lies where it was put for want of a better place counts as long as there is none.
    usable = library.files if into != library.folders[0] else library.files[:1]
    found = next((file for file in usable if file.exists()), None)
    if found is not None:
        kernels = f"built, {found}"
    elif compiler is None:
        kernels = "can't be built: no C++ compiler"
        missing.append("a C++ compiler, for the CPU kernels: g++ 12 or newer, or clang; CXX=... names another")
    elif shutil.which("ninja", path=cpu.programs()) is None:
        kernels = "can't be built: no ninja"
        missing.append("ninja, for the CPU kernels: pip install ninja")
    else:
        place = into or f"no folder: none of {', '.join(map(str, library.folders))} can be written to"
        kernels = f"not built yet; by {compiler}, into {place}"
        missing.append("the CPU kernels, about 20 seconds at their first use, or ahead: mhc-rewrite build")
    devices = [f"CPU: {platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} "
               f"threads of torch, {torch.backends.cpu.get_cpu_capability()}"]  # fmt: skip
    for k in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(k)
        devices.append(f"GPU {k}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not gpu.AVAILABLE:
        triton = "not installed"
        if torch.cuda.is_available():
            missing.append("Triton, for the GPU kernels: pip install triton")
    elif torch.cuda.is_available():
        triton = "can be used"
    else:
        triton = "installed; torch finds no GPU"
        if torch.version.cuda is None and torch.version.hip is None:
            triton = "installed; this build of torch is for CPUs"
    return Machine(versions, tuple(devices), kernels, triton, tuple(missing))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _writable(folders: tuple[Path, ...]) -> Path | None:
    """The first folder in which, or in whose nearest parent that is there, something can be written."""
    for folder in folders:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        if there.is_dir() and os.access(there, os.W_OK):
            return folder
    return None

"""`mhc-rewrite doctor` and `mhc-rewrite build`."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mhc_rewrite.cli.errors import CommandError
from mhc_rewrite.insight.machine import Machine, machine
from mhc_rewrite.kernels import cpu
from mhc_rewrite.printing import plain_table


def register(
    app: typer.Typer, show: Callable[[RenderableType], None], working: Callable[[str], AbstractContextManager[Any]]
) -> None:
    """Adds the commands to an app. `show` prints; what is done within `working` fails with one message."""

    @app.command("doctor")
    def print_machine() -> None:
        """Show what a bug report needs and what this machine has: versions, devices, kernels, what is missing."""
        with working("Looking at this machine"):
            found = machine()
        show(_shown(found))

    @app.command("build")
    def build() -> None:
        """Build the CPU kernels now, for this processor and this torch, instead of at their first use."""
        with working("Building the CPU kernels"):
            before = [file for file in cpu.library().files if file.exists()]
            started = time.perf_counter()
            try:
                file = cpu.built()
                torch.ops.load_library(file)
            except Exception as error:
                raise CommandError(f"The CPU kernels could not be built: {error} See: mhc-rewrite doctor") from error
        seconds = time.perf_counter() - started
        show(Text(f"{'there already' if file in before else f'built in {seconds:.0f} s'}: {file}"))


def _shown(found: Machine) -> RenderableType:
    rows = [(name, version or "-") for name, version in found.versions.items()]
    rows += [("device", device) for device in found.devices]
    rows += [("CPU kernels", found.cpu_kernels), ("GPU kernels", f"Triton {found.triton}")]
    table = plain_table("", "")
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    ends = [Text(f"missing: {one}") for one in found.missing] or [Text("nothing is missing")]
    return Group(table, *ends)

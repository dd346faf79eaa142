"""How long `import mhc_rewrite` takes over `import torch`: fresh processes in turns, medians.

python demos/import_time.py
python demos/import_time.py --rounds 15
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import mhc_rewrite

AIM = 0.3  # seconds over torch
IMPORTS = {"torch": "import torch", "torch and mhc_rewrite": "import torch, mhc_rewrite"}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; in each either is imported once.")] = 9,
) -> None:
    """Time the import of the package beside that of torch alone."""
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for _ in track(range(rounds + 1), "Importing", console=Console(stderr=True), transient=True):
        for name, code in IMPORTS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}  # the first ones read the disk
    for name, median in medians.items():
        print(f"{name}: {median:.2f} s")
    plain, both = medians.values()
    print(f"over torch: {both - plain:.2f} s (aim: under {AIM} s)")
    print(f"median of {rounds} fresh processes each, in turns; torch {torch.__version__}, {mhc_rewrite.__version__}")


if __name__ == "__main__":
    typer.run(main)

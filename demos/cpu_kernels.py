"""What an mHC site costs on this CPU: designs of its operators, as fractions of the speed of a copy.

`python demos/cpu_kernels.py` prints the tables of docs/kernels.md (about four minutes). A fraction is the least number
of bytes that the operator can move, at the speed of `copy_` on a tensor of the streams' size, over the measured time:
1 is a site that costs its memory traffic and no more. All designs run in turn, in one process; figures are medians.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mhc_rewrite.insight.bench import KEEP_MEMORY
from mhc_rewrite.kernels import aten, cpu, ops, reference

OPTIONS = ("mhc", 20, 1e-6)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

console = Console(width=110)
stderr = Console(stderr=True)


@dataclass(frozen=True)
class Design:
    """One way to compute something.

    Attributes:
        what, name: the table's row.
        elements: the least that is moved, in units of tokens x C.
        run: computes it once.
    """

    what: str
    name: str
    elements: float
    run: Callable[[], Any]


# -- formulations of X' = H_res X + H_post y for Inductor --------------------------------------------------------------


def by_einsum(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    mixed = torch.einsum("tij,tjc->tic", h_res.to(X.dtype), X)
    return mixed + h_post.to(X.dtype)[:, :, None] * y[:, None]


def by_baddbmm(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return torch.baddbmm(h_post.to(X.dtype)[:, :, None] * y[:, None], h_res.to(X.dtype), X)


def by_broadcast(X: Tensor, y: Tensor, h_post: Tensor, h_res: Tensor) -> Tensor:
    return reference.post(X, y, h_post, h_res)


POSTS = {"einsum": by_einsum, "baddbmm": by_baddbmm, "broadcast and sum": by_broadcast, "unrolled sums": aten.post}


# -- a site: everything but its block ----------------------------------------------------------------------------------


def site_by_reference(X: Tensor, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    u, h_post, h_res = reference.pre(X, *parameters, *OPTIONS)
    return u, reference.post(X, y, h_post, h_res)


def site_by_operators(X: Tensor, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    u, h_post, h_res, _, _ = ops.pre(X, *parameters, *OPTIONS)
    return u, ops.post(X, y, h_post, h_res)


# torch.compile keeps one graph for each code object and kind of input: what is compiled in two ways needs two.
def site_for_aten(*given: Tensor) -> tuple[Tensor, Tensor]:
    return site_by_operators(*given)


def site_for_kernels(*given: Tensor) -> tuple[Tensor, Tensor]:
    return site_by_operators(*given)


class Aten:
    """Inside, the operators run and are compiled as where no kernel could be built."""

    def __enter__(self) -> None:
        self.available = cpu.available
        cpu.available = lambda: False

    def __exit__(self, *_: object) -> None:
        cpu.available = self.available


def in_aten(run: Callable[[], Any]) -> Callable[[], Any]:
    def inside() -> Any:
        with Aten():
            return run()

    return inside


def both_ways(site: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor]) -> Callable[[], Any]:
    weights = None

    def run() -> Any:
        nonlocal weights
        out = site(*leaves)
        weights = weights or [torch.randn_like(o) for o in out]
        return torch.autograd.grad(out, leaves, weights)

    return run


def without_gradient(site: Callable[..., Any], leaves: list[Tensor]) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        return site(*leaves)

    return run


def designs(tokens: int, width: int, n: int, dtype: torch.dtype, quick: bool) -> tuple[list[Design], dict[str, float]]:
    """Everything that is measured, compiled already, and the seconds that compiling one site took."""
    columns = n * n + 2 * n
    X, y = torch.randn(tokens, n, width).to(dtype), torch.randn(tokens, width).to(dtype)
    h_post, h_res = torch.rand(tokens, n), torch.rand(tokens, n, n)
    parameters = [torch.randn(n * width, columns) / (n * width) ** 0.5, torch.tensor([0.7, -0.4, 1.3])]
    parameters.append(torch.randn(columns))
    branch, leaves = [X, y, h_post, h_res], [t.requires_grad_() for t in (X, y, *parameters)]
    target = torch.empty_like(X)
    forward, backward = 3 * n + 2, 6 * n + 3
    boundary = without_gradient(ops.boundary, [*branch, *parameters, *OPTIONS])
    rows = [Design("copy_", "of the streams", 2 * n, without_gradient(target.copy_, [X]))]
    compiled = {}
    for name, post in POSTS.items():
        rows.append(Design("post", f"{name}, compiled", 2 * n + 1, without_gradient(torch.compile(post), branch)))
    rows.append(Design("post", "C++", 2 * n + 1, without_gradient(ops.post, branch)))
    rows.append(Design("post", "C++, compiled", 2 * n + 1, without_gradient(torch.compile(ops.post), branch)))
    sites = {
        "plain PyTorch, eager": site_by_reference,
        "aten, eager": site_by_operators,
        "aten, compiled": torch.compile(site_for_aten),
        "C++, eager": site_by_operators,
        "C++, compiled": torch.compile(site_for_kernels),
    }
    for name, site in sites.items():
        if quick and "plain" in name:
            continue
        bare = in_aten if name.startswith("aten") else lambda run: run
        for what, elements, way in (
            ("site forward", forward, without_gradient),
            ("site forward and backward", forward + backward, both_ways),
        ):
            run = bare(way(site, leaves))
            begin = time.perf_counter()
            run()
            if "compiled" in name and way is both_ways:
                compiled[name] = time.perf_counter() - begin
            rows.append(Design(what, name, elements, run))
    rows.append(Design("boundary forward", "aten, eager", 2 * n + 2, in_aten(boundary)))
    rows.append(Design("boundary forward", "C++", 2 * n + 2, boundary))
    whole = [t.detach().requires_grad_() for t in (*branch, *parameters)]
    both = both_ways(lambda *given: ops.boundary(*given, *OPTIONS)[:4], whole)
    rows.append(Design("boundary forward and backward", "aten, eager", 5 * n + 5, in_aten(both)))
    rows.append(Design("boundary forward and backward", "C++", 5 * n + 5, both))
    return rows, compiled


def measure(rows: list[Design], repetitions: int, label: str) -> list[float]:
    """Median seconds of each design, all in turn."""
    times: list[list[float]] = [[] for _ in rows]
    with Progress(console=stderr, transient=True) as progress:
        for _ in progress.track(range(repetitions), description=label):
            for row, seconds in zip(rows, times):
                begin = time.perf_counter()
                row.run()
                seconds.append(time.perf_counter() - begin)
    return [statistics.median(seconds) for seconds in times]


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens.")] = 4096,
    width: Annotated[int, typer.Option(min=1, help="C.")] = 768,
    n: Annotated[int, typer.Option(min=1, max=16, help="Number of streams.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    repetitions: Annotated[int, typer.Option(min=1, help="Rounds; in each everything runs once.")] = 21,
    quick: Annotated[bool, typer.Option(help="Leave the slowest design out.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
) -> None:
    """Times the designs of docs/kernels.md on this CPU, beside a copy."""
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(threads)
    capability, name = torch.backends.cpu.get_cpu_capability(), torch.cpu.get_capabilities().get("cpu_name", "")
    console.print(f"torch {torch.__version__}, {name} {capability}, {threads} threads, C++ kernels: {cpu.available()}")
    console.print(f"T = {tokens}, C = {width}, n = {n}, medians of {repetitions} interleaved rounds")
    console.print("allocator: " + " ".join(f"{key}={value}" for key, value in KEEP_MEMORY.items()))
    flops = 2 * tokens * n * width * (n * n + 2 * n)
    speed = matmul_speed()
    console.print(
        f"a large fp32 matmul runs at {speed / 1e9:.0f} GFLOP/s: at that, each of a site's three products with phi, "
        f"one forward and two backward, takes {1e3 * flops / speed:.1f} ms whatever the memory does"
    )
    figures: list[dict[str, object]] = []
    for kind, dtype in DTYPES.items():
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as caches:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches  # what an earlier run compiled would be found, not compiled
            with stderr.status(f"compiling, {kind} ..."):
                rows, compiled = designs(tokens, width, n, dtype, quick)
            seconds = measure(rows, repetitions, kind)
        unit = seconds[0] / rows[0].elements
        table = Table("", "design", "ms", "of copy", title=f"{kind}, copy_ at {bandwidth(tokens * width, dtype, unit)}")
        for row, time_of in zip(rows, seconds):
            fraction = row.elements * unit / time_of
            table.add_row(row.what, row.name, f"{1e3 * time_of:.2f}", f"{fraction:.2f}")
            figures.append({"dtype": kind, "what": row.what, "design": row.name, "s": time_of, "of_copy": fraction})
        console.print(table)
        for design, time_of in compiled.items():
            console.print(f"{kind}: first call of one compiled site, forward and backward, {design}: {time_of:.1f} s")
            figures.append({"dtype": kind, "what": "compile", "design": design, "s": time_of})
    if output:
        output.write_text(json.dumps(figures, indent=1))


def matmul_speed(size: int = 2048, repetitions: int = 7) -> float:
    """Flop/s."""
    a, seconds = torch.randn(size, size), []
    for _ in range(repetitions):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(seconds)


def bandwidth(elements: int, dtype: torch.dtype, seconds: float) -> str:
    return f"{elements * dtype.itemsize / seconds / 1e9:.1f} GB/s"


if __name__ == "__main__":
    typer.run(main)

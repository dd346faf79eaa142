"""What mHC costs a GPT: training steps, a forward pass and kept activations, beside the original.

`python demos/compile_and_bench.py` prints the table of docs/performance.md (about four minutes on two cores). The
model: C = 768, 12 heads, 4 layers (8 sites), vocabulary 1024, 2 x 512 tokens; converted with n = 4, 20 Sinkhorn
iterations, all site parameters perturbed. Ratios are medians, over rounds, of neighbouring times in one process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import torch
import typer
from cpu_kernels import ALLOCATOR
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_rewrite import MHCConfig
from mhc_rewrite.bench import EAGER, bench
from mhc_rewrite.kernels import cpu

console = Console(width=110)
VOCABULARY = 1024


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers, of two sites each.")] = 4,
    width: Annotated[int, typer.Option(min=12, help="C, a multiple of 12.")] = 768,
    length: Annotated[int, typer.Option(min=1, help="Tokens of each of two sequences.")] = 512,
    n: Annotated[int, typer.Option(min=2, max=16, help="Number of streams.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; in each everything runs once.")] = 11,
    compiled: Annotated[bool, typer.Option(help="With torch.compile too.")] = True,
    output: Annotated[Optional[Path], typer.Option("--json", help="Write the figures to this file.")] = None,  # noqa: UP045
) -> None:
    """Measure a converted GPT beside its original, on the CPU."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT(layers, width, 12, length)
    ids = torch.randint(0, VOCABULARY, (2, length))
    backends = [EAGER, "inductor"] if compiled else [EAGER]
    console.print(
        f"torch {torch.__version__}, {threads} threads, C++ kernels: {cpu.available()}; medians of {rounds} rounds"
    )
    console.print("allocator: " + " ".join(f"{key}={value}" for key, value in ALLOCATOR.items()))
    console.print(f"GPT: {layers} layers, C = {width}, 2 x {length} tokens, n = {n}")
    workloads = {
        "training step, fp32": {"training": True},
        "training step, bf16 autocast": {"training": True, "autocast": torch.bfloat16},
        "forward, fp32": {"training": False},
    }
    figures = []
    table = Table("", "backend", "original, s", "converted, s", "ratio", "kept, ratio")
    for what, options in workloads.items():
        torch._dynamo.reset()
        with Console(stderr=True).status(what) as status:
            costs = bench(
                model, {"ids": ids}, config=MHCConfig(n_streams=n), backends=backends, rounds=rounds,
                progress=lambda doing, what=what, status=status: status.update(f"{what}: {doing}"), **options,
            )  # fmt: skip
        for original, converted in zip(costs[::2], costs[1::2]):
            kept = f"{converted.saved / original.saved:.2f}" if original.saved else "-"
            seconds = f"{original.seconds:.3f}", f"{converted.seconds:.3f}"
            table.add_row(what, original.backend, *seconds, f"{converted.ratio:.3f}", kept)
        figures += [{"workload": what, **dataclasses.asdict(cost)} for cost in costs]
    console.print(table)
    if output:
        output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)

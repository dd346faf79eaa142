"""What mHC costs a GPT: training steps, prefill, decode, compilation and memory, beside the original.

`python demos/compile_and_bench.py` prints the table of docs/performance.md (about four minutes on two cores). The
model: C = 768, 12 heads, 4 layers (8 sites), vocabulary 1024, 2 x 512 tokens; converted with n = 4, 20 Sinkhorn
iterations, all site parameters perturbed. Ratios are medians, over rounds, of neighbouring times in one process;
compilation and memory, of the fp32 training step, are measured in a process for each way to run.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_rewrite import MHCConfig
from mhc_rewrite.cli.tables import bench_table
from mhc_rewrite.insight.bench import EAGER, KEEP_MEMORY, MHC, Workload, bench
from mhc_rewrite.kernels import cpu

console = Console(width=120)
VOCABULARY, HEADS, BATCH = 1024, 12, 2
FIRST, DECODE = "training step, fp32", "decode, one token of each sequence, fp32"


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, x: Tensor, past: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if past is not None:  # one token, which sees all before it
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        x = x + self.attend(self.norm1(x), past)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, past: list[Tensor] | None = None) -> Tensor:
        """`past`: for each layer keys and values of earlier tokens, (2, batch, heads, tokens, C / heads)."""
        first = 0 if past is None else past[0].shape[3]
        x = self.token(ids) + self.position(torch.arange(first, first + ids.shape[1], device=ids.device))
        for index, block in enumerate(self.blocks):
            x = block(x, None if past is None else past[index])
        return self.head(self.norm(x))


def load(layers: int = 4, width: int = 768, length: int = 512, decode: bool = False) -> tuple[nn.Module, Any]:
    """The model with two sequences of `length` tokens, or with the last token of each and a cache of those before."""
    torch.manual_seed(0)
    model = GPT(layers, width, length)
    ids = torch.randint(0, VOCABULARY, (BATCH, length))
    if not decode:
        return model, {"ids": ids}
    cached = [torch.randn(2, BATCH, HEADS, length - 1, width // HEADS) for _ in range(layers)]
    return model, {"ids": ids[:, -1:], "past": cached}


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers, of two sites each.")] = 4,
    width: Annotated[int, typer.Option(min=12, help="C, a multiple of 12.")] = 768,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each of two sequences.")] = 512,
    n: Annotated[int, typer.Option(min=2, max=16, help="Number of streams.")] = 4,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; in each everything runs once.")] = 9,
    compiled: Annotated[bool, typer.Option(help="With torch.compile too.")] = True,
    fresh: Annotated[bool, typer.Option(help="Compilation and memory too, of the fp32 training step.")] = True,
    output: Annotated[Optional[Path], typer.Option("--json", help="Write the figures to this file.")] = None,  # noqa: UP045
) -> None:
    """Measure a converted GPT beside its original, on the CPU."""
    if any(os.environ.get(name) != value for name, value in KEEP_MEMORY.items()):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(threads)
    backends = [EAGER, MHC] if compiled else [EAGER]
    console.print(
        f"torch {torch.__version__}, {threads} threads, C++ kernels: {cpu.available()}; "
        f"medians of {rounds} rounds, {10 * rounds} for decode"
    )
    console.print("allocator: " + " ".join(f"{key}={value}" for key, value in KEEP_MEMORY.items()))
    console.print(f"GPT: {layers} layers, C = {width}, {BATCH} x {length} tokens, n = {n}")
    sizes = functools.partial(load, layers, width, length)
    config = MHCConfig(n_streams=n)
    workloads = {
        FIRST: Workload(sizes, config),
        "training step, bf16 autocast": Workload(sizes, config, autocast=torch.bfloat16),
        "prefill, fp32": Workload(sizes, config, training=False),
        DECODE: Workload(functools.partial(sizes, decode=True), config, training=False),
    }
    figures = []
    for what, workload in workloads.items():
        torch._dynamo.reset()
        with Console(stderr=True).status(what) as status:
            measured = bench(
                workload, backends=backends, rounds=10 * rounds if what == DECODE else rounds,
                fresh=fresh and what == FIRST,
                progress=lambda doing, what=what, status=status: status.update(f"{what}: {doing}"),
            )  # fmt: skip
        console.print(f"\n[bold]{what}")
        console.print(bench_table(measured))
        figures += [{"workload": what, **dataclasses.asdict(one)} for one in measured]
    if output:
        output.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    typer.run(main)

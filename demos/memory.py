"""What a converted GPT keeps for backward, and its peak memory, beside its original and the cost model.

`python demos/memory.py` takes under five minutes on two cores; with `--width 768` it prints the tables of
docs/performance.md. GPTs on 2 x 512 tokens, converted with n = 4, all site parameters perturbed. The first table
counts, of a compiled GPT of 6 layers (12 sites), the numbers that pass from the forward to the backward graph. The
second has the memory of a training step of 12 layers (24 sites), as the system gives it, each in a process of its
own.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Annotated, Any

import torch
import typer
from compile_and_bench import BATCH, load
from rich.console import Console
from rich.table import Table
from torch import nn

import mhc_rewrite
from mhc_rewrite import MHCConfig, mhcify
from mhc_rewrite.cost import cost
from mhc_rewrite.insight.bench import CONVERTED, EAGER, INDUCTOR, MHC, ORIGINAL, Workload, in_a_fresh_process, perturb

console, stderr = Console(width=120), Console(stderr=True)


def saved(model: nn.Module, ids: torch.Tensor, width: int, recompute: Any) -> Counter[str]:
    """Elements from the forward to the backward graph by their shape, in units of tokens x C."""
    torch._dynamo.reset()
    out = mhc_rewrite.compile(model, options={"recompute": recompute})(ids)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: Counter[str] = Counter()
    for tensor in out.grad_fn.saved_tensors:
        if tensor.untyped_storage().data_ptr() in own or not tensor.is_floating_point():
            continue
        tokens = ids.numel()
        kind = "others"
        if tensor.numel() == tokens * width:
            kind = "C"
        elif tensor.numel() % (tokens * width) == 0:
            kind = "n x C" if tensor.shape[-1] == width else "wider"
        found[kind] += tensor.numel() / (tokens * width)
    return found


def graph_table(layers: int, width: int, length: int) -> Table:
    """The first table."""
    model, inputs = load(layers, width, length)
    ids = inputs["ids"]
    table = Table("", "states (n x C)", "C wide", "wider", "other", "all", "over original", "predicted states")
    counts = {"original": saved(model, ids, width, None)}
    mhcify(model, inputs)
    perturb(model)
    of = cost(mhc_rewrite.plan(load(layers, width, length)[0], inputs))
    sites = of.streams[0].sites
    lengths = [None, *(k for k in (1, 2) if k < sites), sites, "auto"]
    predicted: dict[str, int | None] = {"original": None}
    for recompute in lengths:
        name = "nothing recomputed" if recompute is None else f"L_r = {recompute}"
        with stderr.status(f"compiling: {name}"):
            counts[name] = saved(model, ids, width, recompute)
        formula, segment = of.kept_in_segments.states, None if recompute == "auto" else recompute
        states = of.evaluate(formula if recompute else of.kept.states, segment=segment) // width
        predicted[name] = states - 1  # the first segment's state is of C
    base = sum(counts["original"].values())
    for name, found in counts.items():
        total = sum(found.values())
        cells = (f"{found[kind]:.1f}" for kind in ("n x C", "C", "wider", "others"))
        states = predicted[name]
        table.add_row(name, *cells, f"{total:.1f}", f"{total - base:+.1f}", "-" if states is None else f"{states}.0")
    return table


def memory_table(layers: int, width: int, length: int) -> Table:
    """The second table."""
    sizes = functools.partial(load, layers, width, length)
    of = cost(mhc_rewrite.plan(*sizes()))
    table = Table("", "run by", "recompute", "kept, MB", "peak, MB", "over original", "predicted", "off by")
    rows: list[tuple[str, str, Any]] = [(ORIGINAL, EAGER, None), (CONVERTED, EAGER, None), (CONVERTED, EAGER, "auto")]
    rows += [(ORIGINAL, INDUCTOR, None), (CONVERTED, MHC, None), (CONVERTED, MHC, "auto")]
    for name, backend, recompute in rows:
        with stderr.status(f"{name}, {backend}, recompute {recompute}"):
            config = MHCConfig(recompute=recompute)
            figures = in_a_fresh_process(Workload(sizes, config), name, backend)
        cells = [name, backend, str(recompute or "-"), f"{figures['kept'] / 1e6:.0f}", f"{figures['peak'] / 1e6:.0f}"]
        if name == ORIGINAL:
            original = figures["peak"]
            table.add_row(*cells, "-", "-", "-")
            continue
        formula = of.peak_in_segments if recompute else of.peak
        ratio, expected = figures["peak"] / original, 1 + of.evaluate(formula, tokens=BATCH * length) / original
        table.add_row(*cells, f"{ratio:.3f}", f"{expected:.3f}", f"{ratio / expected - 1:+.1%}")
    return table


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers, of two sites each, of the second table.")] = 12,
    width: Annotated[int, typer.Option(min=12, help="C, a multiple of 12.")] = 384,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each of two sequences.")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 2,
    memory: Annotated[bool, typer.Option(help="The second table too.")] = True,
) -> None:
    """Count what a converted GPT keeps, and measure its memory, on the CPU."""
    torch.set_num_threads(threads)
    console.print(f"torch {torch.__version__}; C = {width}, {BATCH} x {length} tokens, n = 4, fp32")
    half = max(1, layers // 2)
    unit = BATCH * length * width
    console.print(f"\nFrom forward to backward, {2 * half} sites, compiled, in units of tokens x C = {unit:,}")
    console.print(graph_table(half, width, length))
    if memory:
        console.print(f"\nMemory of a training step beside what is there all the time, {2 * layers} sites")
        console.print(memory_table(layers, width, length))


if __name__ == "__main__":
    typer.run(main)

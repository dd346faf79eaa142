"""What watching a run costs: training steps of a small GPT-2, as they are and watched, in turns; medians.

python demos/watch_cost.py
python demos/watch_cost.py --layers 12 --width 256 --batch 8 --length 256 --rounds 30
python demos/watch_cost.py --device cuda --layers 24 --width 1024 --batch 8 --length 1024
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Annotated, Any

import torch
import typer
from convert_gpt import small_gpt2
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mhc_rewrite import mhcify, parameter_groups, watch

AIM = 0.02  # of a step's time


def main(
    layers: Annotated[int, typer.Option(min=1)] = 4,
    width: Annotated[int, typer.Option(min=8)] = 128,
    batch: Annotated[int, typer.Option(min=1)] = 16,
    length: Annotated[int, typer.Option(min=2)] = 128,
    every: Annotated[int, typer.Option(min=1, help="A sample at every so many steps.")] = 10,
    tokens: Annotated[int, typer.Option(min=1, help="That figures are taken from.")] = 128,
    rounds: Annotated[int, typer.Option(min=2, help="In each, both models make so many steps as EVERY says.")] = 15,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    compiled: Annotated[bool, typer.Option("--compiled", help='By the backend "mhc".')] = False,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on the CPU.")] = 1,
) -> None:
    """Time training steps with and without watching."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    plain = mhcify(small_gpt2(layers=layers, width=width, length=length)).to(device).train()
    models = {"not watched": plain, "watched": copy.deepcopy(plain)}
    ids = torch.randint(256, (batch, length), device=device)
    with watch(models["watched"], every=every, tokens=tokens) as seen:
        seen.abandon()  # steps say themselves when they begin
        steps = {
            name: Step(model, ids, seen if name == "watched" else None, compiled) for name, model in models.items()
        }
        taken: dict[str, list[list[float]]] = {name: [] for name in models}
        for _ in track(range(rounds + 1), "Training", console=Console(stderr=True), transient=True):
            for name, step in steps.items():
                taken[name].append([step() for _ in range(every)])
    # By the place in the round: the first step of each is sampled.
    medians = {name: [statistics.median(place) for place in zip(*times[1:])] for name, times in taken.items()}
    sampled = medians["watched"][0] - medians["not watched"][0]
    others = [watched - plain for watched, plain in zip(medians["watched"][1:], medians["not watched"][1:])]
    step = statistics.median(medians["not watched"])
    cost = sampled / every / step
    table = Table("", "ms", "of a step")
    table.add_row("a step", f"{1e3 * step:.2f}", "")
    table.add_row("more in a sampled step", f"{1e3 * sampled:.2f}", f"{sampled / step:.1%}")
    other = statistics.median(others) if others else 0.0
    table.add_row("more in another one", f"{1e3 * other:.2f}", f"{other / step:.1%}")
    table.add_row(
        f"[bold]more a step, with a sample at every {every}[/bold]", f"{1e3 * sampled / every:.2f}", f"{cost:.2%}"
    )
    sites = len(seen.header.sites)
    table.caption = (
        f"{layers} layers, width {width}, {sites} sites, {batch} x {length} tokens, {tokens} of them looked at; "
        f"{device}, {'compiled, ' if compiled else ''}threads: {threads}, torch {torch.__version__}; "
        f"medians of {rounds} rounds in turns. "
        f"Aim: at most {AIM:.0%}."
    )
    Console().print(table)


class Step:
    """A training step, timed."""

    def __init__(self, model: Any, ids: torch.Tensor, seen: Any, compiled: bool) -> None:
        self.model = torch.compile(model, backend="mhc") if compiled else model
        self.ids, self.seen, self.number = ids, seen, 0
        self.optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.1), lr=1e-4)

    def __call__(self) -> float:
        self.wait()
        began = time.perf_counter()
        if self.seen is not None:
            self.seen.begin(self.number)
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        if self.seen is not None:
            self.seen.end()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.wait()
        self.number += 1
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.ids.is_cuda:
            torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)

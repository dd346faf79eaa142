"""How demos/gpu_check.py measures: every contender and a copy in turn, medians, and the table of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_operators import CONTENDERS, OPERATORS, Contender, NotHere, Size, bytes_moved, distance, operands
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

CACHE = 256 * 2**20  # bytes; larger than any last-level cache of a GPU, written before each measurement


def measure(sizes: list[Size], dtype: torch.dtype, device: str, rounds: int, chosen: list[str]) -> list[dict[str, Any]]:
    """A row for each size, operator and pass: the copy's seconds, then each contender's, or why there are none."""
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("times", total=len(sizes) * len(OPERATORS))
        for size in sizes:
            values = operands(size, dtype, device)
            for name in OPERATORS:
                progress.update(task, description=f"times: {size}, {name}")
                torch._dynamo.reset()  # each size is compiled for itself
                contenders, absent = prepare(name, values, chosen)
                agreement = {who: disagreement(each, name, values) for who, each in contenders.items()}
                for backward in (False, True):
                    moved = bytes_moved(name, size, dtype, backward)
                    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
                    target = torch.empty_like(source)
                    calls = {"copy": lambda target=target, source=source: target.copy_(source)}
                    calls |= {who: each.both if backward else each.forward for who, each in contenders.items()}
                    seconds, failed = in_turn(calls, device, rounds)
                    rows.append({
                        "size": str(size), "operator": name, "backward": backward, "bytes": moved, "seconds": seconds,
                        "absent": {**absent, **failed}, "error": agreement,
                    })  # fmt: skip
                progress.advance(task)
    return rows


def prepare(name: str, values: dict[str, Tensor], chosen: list[str]) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders of one operator, and why the others are absent: a foreign operator that fails stops nothing."""
    contenders: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    for who in chosen:
        try:
            contenders[who] = CONTENDERS[who](name, values)
        except NotHere as reason:
            absent[who] = str(reason)
        except Exception as error:
            absent[who] = f"{type(error).__name__}: {error}"[:300]
    return contenders, absent


def disagreement(contender: Contender, name: str, values: dict[str, Tensor], tokens: int = 64) -> float:
    """Relative error of the first output, for the first tokens."""
    operator = OPERATORS[name]
    wide = [
        values[k].double() if k in ("phi", "alpha", "bias") else values[k][:tokens].double() for k in operator.operands
    ]
    truth = operator.truth(*wide, *operator.options("mhc"))
    truth = truth if isinstance(truth, Tensor) else truth[0]
    return distance(contender.layout(contender.forward()[0])[:tokens], truth) / float(truth.norm())


def in_turn(calls: dict[str, Callable[[], Any]], device: str, rounds: int) -> tuple[dict[str, float], dict[str, str]]:
    """Medians in seconds, one call after the other in each round, after two rounds that do not count."""
    taken: dict[str, list[float]] = {who: [] for who in calls}
    failed: dict[str, str] = {}
    spoil = torch.empty(CACHE, dtype=torch.uint8, device=device) if device == "cuda" else None
    for k in range(rounds + 2):
        for who, call in calls.items():
            if who in failed:
                continue
            try:
                seconds = clocked(call, spoil)
            except Exception as error:
                failed[who] = f"{type(error).__name__}: {error}"[:300]
                continue
            if k >= 2:
                taken[who].append(seconds)
    return {who: statistics.median(all_) for who, all_ in taken.items() if all_ and who not in failed}, failed


def clocked(call: Callable[[], Any], spoil: Tensor | None) -> float:
    if spoil is None:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    spoil.zero_()  # nothing of the operands is left in the cache
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def times_table(rows: list[dict[str, Any]], size: Size, dtype: str) -> Table:
    table = Table(title=f"{size}, {dtype}: microseconds, fraction of copy bandwidth, error of the first output")
    for column in ("operator", "pass", "MB", "copy"):
        table.add_column(column, justify="right" if column in ("MB", "copy") else "left")
    names = list(dict.fromkeys(who for row in rows for who in (*row["seconds"], *row["absent"]) if who != "copy"))
    for who in names:
        table.add_column(who, justify="right")
    for row in rows:
        copy = row["seconds"]["copy"]
        cells = []
        for who in names:
            if who in row["seconds"]:
                taken = row["seconds"][who]
                cells.append(f"{1e6 * taken:.1f}  {copy / taken:.2f}  {row['error'][who]:.0e}")
            else:
                cells.append(row["absent"][who])
        kind = "forward + backward" if row["backward"] else "forward"
        table.add_row(row["operator"], kind, f"{row['bytes'] / 1e6:.1f}", f"{1e6 * copy:.1f}", *cells)
    table.caption = (
        "bytes: what the operator must move, without the parameters and their gradients; "
        "Sinkhorn-Knopp stays one eager operator in compiled aten; other libraries order its passes in their own way"
    )
    return table

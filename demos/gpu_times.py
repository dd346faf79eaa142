"""How demos/gpu_check.py measures: every contender and a copy in turn, medians, and the table of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from gpu_operators import CONTENDERS, OPERATORS, Contender, NotHere, Size, bytes_moved, distance, operands
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

CACHE = 256 * 2**20  # bytes; larger than any last-level cache of a GPU, written before each measurement


def measure(
    sizes: list[Size], dtype: torch.dtype, device: str, rounds: int, chosen: list[str],
    each: Callable[[dict[str, Any]], Any] = lambda row: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each size, operator and pass: the copy's seconds, then each contender's, or why there are none; `each`
    gets them one by one."""
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("times", total=len(sizes) * len(OPERATORS))
        for size in sizes:
            values = operands(size, dtype, device)
            for name in OPERATORS:
                progress.update(task, description=f"times: {size}, {name}")
                torch._dynamo.reset()  # each size is compiled for itself
                contenders, absent = prepare(name, values, chosen)
                agreement = {who: disagreement(one, name, values) for who, one in contenders.items()}
                for backward in (False, True):
                    moved = bytes_moved(name, size, dtype, backward)
                    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
                    target = torch.empty_like(source)
                    calls = {"copy": lambda target=target, source=source: target.copy_(source)}
                    calls |= {who: one.both if backward else one.forward for who, one in contenders.items()}
                    seconds, host, failed = in_turn(calls, device, rounds)
                    rows.append({
                        "size": str(size), "operator": name, "backward": backward, "bytes": moved, "seconds": seconds,
                        "host": host, "absent": {**absent, **failed}, "error": agreement,
                    })  # fmt: skip
                    each(rows[-1])
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


class Clock:
    """How long a call takes on the device, and how long Python needs to launch it.

    On a GPU the queue gets a head start, writes of a buffer larger than its cache: the host is through with the call
    before the device begins it, so that the device never waits. That is checked, and the head start made longer.
    """

    def __init__(self, device: str) -> None:
        self._spoil = torch.empty(CACHE, dtype=torch.uint8, device=device) if device == "cuda" else None
        self._writes = 2

    def __call__(self, call: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> Timing:
        """`before` runs first, outside the time."""
        before()
        if self._spoil is None:
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            return Timing(seconds, seconds, True)
        while True:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            for _ in range(self._writes):
                self._spoil.zero_()
            first.record()
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
            last.record()
            ahead = not first.query()
            last.synchronize()
            if ahead or self._writes >= 128:
                self._writes = max(2, self._writes - 1)
                return Timing(first.elapsed_time(last) / 1e3, host, ahead)
            self._writes *= 2
            before()


class Timing(NamedTuple):
    """Seconds on the device; seconds in Python; whether the device never had to wait for Python."""

    device: float
    host: float
    ahead: bool


def in_turn(
    calls: dict[str, Callable[[], Any]], device: str, rounds: int
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Medians in seconds, on the device and in Python, one call after the other in each round, after two rounds that do
    not count; and why a call has none."""
    taken: dict[str, list[Timing]] = {who: [] for who in calls}
    failed: dict[str, str] = {}
    clock = Clock(device)
    for k in range(rounds + 2):
        for who, call in calls.items():
            if who in failed:
                continue
            try:
                timing = clock(call)
            except Exception as error:
                failed[who] = f"{type(error).__name__}: {error}"[:300]
                continue
            if k >= 2:
                taken[who].append(timing)
    for who, all_ in taken.items():
        if who not in failed and not all(timing.ahead for timing in all_):
            failed[who] = "the device waited for Python"
    both = {who: all_ for who, all_ in taken.items() if all_ and who not in failed}
    return (
        {who: statistics.median(timing.device for timing in all_) for who, all_ in both.items()},
        {who: statistics.median(timing.host for timing in all_) for who, all_ in both.items()},
        failed,
    )


def times_table(rows: list[dict[str, Any]], size: Size, dtype: str) -> Table:
    table = Table(title=f"{size}, {dtype}: microseconds on the device, fraction of copy bandwidth, in Python, error")
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
                cells.append(
                    f"{1e6 * taken:.1f}  {copy / taken:.2f}  {1e6 * row['host'][who]:.0f}  {row['error'][who]:.0e}"
                )
            else:
                cells.append(row["absent"][who])
        kind = "forward + backward" if row["backward"] else "forward"
        table.add_row(row["operator"], kind, f"{row['bytes'] / 1e6:.1f}", f"{1e6 * copy:.1f}", *cells)
    table.caption = (
        "bytes: what the operator must move, without the parameters and their gradients; "
        "Sinkhorn-Knopp stays one eager operator in compiled aten; other libraries order its passes in their own way"
    )
    return table

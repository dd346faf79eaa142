"""Measurements for a reader."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from mhc_rewrite.insight.bench import Measured
from mhc_rewrite.printing import plain_table


def bench_table(measured: Sequence[Measured]) -> Table:
    """One row for each way to run a model; bytes as MB of 10^6, and what is not measured as -."""
    columns: dict[str, Callable[[Measured], str | None]] = {
        "step, s": lambda one: f"{one.seconds:.4g}",
        "ratio": lambda one: f"{one.ratio:.3f}",
        "compilation, s": lambda one: None if one.compilation is None else f"{one.compilation:.1f}",
        "kept, MB": lambda one: None if one.kept is None else f"{one.kept / 1e6:,.0f}",
        "peak, MB": lambda one: None if one.peak is None else f"{one.peak / 1e6:,.0f}",
        "launches": lambda one: None if one.launches is None else f"{one.launches:,}",
    }
    rows = [[cell(one) for cell in columns.values()] for one in measured]
    shown = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    table = plain_table("model", "run by", *(list(columns)[k] for k in shown))
    for column in table.columns[2:]:
        column.justify = "right"
    for one, row in zip(measured, rows):
        table.add_row(one.model, one.backend, *(row[k] or "-" for k in shown))
    return table

"""Panels of pictures: curves over the steps of a run, and differences to plain residuals with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mhc_rewrite.insight.experiments.base import Findings, Look, Result
from mhc_rewrite.insight.experiments.reading import at_equal_time, at_equal_tokens, ended

Panel = Callable[[Any, Findings, dict[str, list[Result]]], None]  # (axis, findings, runs by variant)


def side_by_side(pyplot: Any, findings: Findings, parts: dict[str, dict[str, list[Result]]], *panels: Panel) -> Any:
    """A row for each part."""
    figure, axes = pyplot.subplots(
        len(parts), len(panels), figsize=(4.5 * len(panels), 3.4 * len(parts)), layout="constrained", squeeze=False
    )
    for row, (name, found) in zip(axes, parts.items(), strict=True):
        for axis, panel in zip(row, panels, strict=True):
            panel(axis, findings, found)
            axis.grid(alpha=0.3)
        if len(parts) > 1:
            row[0].set_ylabel(name)
    return figure


def curves(what: str, value: Callable[[Look], float], *, log: bool = True, legend: bool = False) -> Panel:
    """The mean over seeds at each look, of runs with sites."""

    def panel(axis: Any, findings: Findings, found: dict[str, list[Result]]) -> None:
        for variant, runs in found.items():
            if runs[0].job.init is None:
                continue
            points = [
                (looks[0].step, statistics.fmean(map(value, looks))) for looks in zip(*(run.looks for run in runs))
            ]
            axis.plot(*zip(*points), label=variant, marker=".", linewidth=1)
        axis.set(title=what, xlabel="step")
        if log:
            axis.set_yscale("log")
        if legend:
            axis.legend(fontsize="small")

    return panel


def loss_less_residual(legend: bool = True) -> Panel:
    """At equal tokens, over the steps, the mean over seeds."""

    def panel(axis: Any, findings: Findings, found: dict[str, list[Result]]) -> None:
        for variant, runs in found.items():
            pairs = [(run, plain) for run in ended(runs) if (plain := findings.residual(run.job, run.job.longer))]
            if runs[0].job.init is None or not pairs:
                continue
            curve = [
                (pair[0][0].step, statistics.fmean(mine.held_out - other.held_out for mine, other in pair))
                for pair in zip(*(zip(run.looks, plain.looks) for run, plain in pairs))
            ]
            axis.plot(*zip(*curve), label=variant, marker=".", linewidth=1)
        axis.axhline(0.0, color="grey", linewidth=0.8)
        axis.set(title="held-out loss, less the residual's", xlabel="step")
        if legend:
            axis.legend(fontsize="small")

    return panel


def differences(axis: Any, findings: Findings, found: dict[str, list[Result]]) -> None:
    """At the end, at equal tokens and at equal time: the mean over seeds and the standard deviation."""
    shown = [(variant, ended(runs)) for variant, runs in found.items() if runs[0].job.init is not None and ended(runs)]
    for offset, name, colour in ((-0.12, "at equal tokens", "tab:blue"), (0.12, "at equal time", "tab:orange")):
        places, means, deviations = [], [], []
        for k, (_, runs) in enumerate(shown):
            values = [value for run in runs if (value := _difference(run, findings, name)) is not None]
            if len(values) > 1:
                places.append(k + offset)
                means.append(statistics.fmean(values))
                deviations.append(statistics.stdev(values))
        if places:
            axis.errorbar(means, places, xerr=deviations, fmt="o", markersize=4, color=colour, label=name, capsize=2)
    axis.axvline(0.0, color="grey", linewidth=0.8)
    axis.set(title="held-out loss, less the residual's, at the end")
    axis.set_yticks(range(len(shown)), [variant for variant, _ in shown])
    axis.invert_yaxis()
    axis.legend(fontsize="small")


def _difference(run: Result, findings: Findings, name: str) -> float | None:
    if name == "at equal tokens":
        return at_equal_tokens(run, findings)
    found = at_equal_time(run, findings)
    return None if found is None or not math.isfinite(found[0]) else found[0]


def means(runs: Sequence[Result], value: Callable[[Result], float]) -> float:
    """Over seeds; not a number where none came to its end."""
    values = [value(run) for run in ended(runs)]
    return statistics.fmean(values) if values else math.nan

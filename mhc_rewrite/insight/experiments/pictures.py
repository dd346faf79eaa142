"""Panels of pictures: curves over the steps of a run, and differences to plain residuals with their spread."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mhc_rewrite.insight.experiments.base import Findings, Look, Result
from mhc_rewrite.insight.experiments.reading import at_equal_time, at_equal_tokens, ended

Colours = dict[str, str]  # by variant
Panel = Callable[[Any, Findings, dict[str, list[Result]], Colours], None]  # (axis, findings, runs by variant, colours)


def side_by_side(pyplot: Any, findings: Findings, parts: dict[str, dict[str, list[Result]]], *panels: Panel) -> Any:
    """A row for each part; one legend for all."""
    figure, axes = pyplot.subplots(
        len(parts), len(panels), figsize=(4.3 * len(panels) + 2, 3.6 * len(parts)), layout="constrained", squeeze=False
    )
    shown = dict.fromkeys(variant for found in parts.values() for variant, runs in found.items() if _has_sites(runs))
    colours = dict(zip(shown, pyplot.get_cmap("tab10" if len(shown) <= 10 else "tab20").colors))
    for row, (name, found) in zip(axes, parts.items(), strict=True):
        for axis, panel in zip(row, panels, strict=True):
            panel(axis, findings, found, colours)
            axis.grid(alpha=0.3)
        if len(parts) > 1:
            row[0].set_ylabel(name)
    lines = {line.get_label(): line for row in axes for line in row[0].get_lines() if line.get_label() in colours}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize="small")
    return figure


def curves(what: str, value: Callable[[Look], float], *, log: bool = True) -> Panel:
    """The mean over seeds at each look, of runs with sites."""

    def panel(axis: Any, findings: Findings, found: dict[str, list[Result]], colours: Colours) -> None:
        for variant, runs in found.items():
            if _has_sites(runs):
                together = zip(*(run.looks for run in runs))
                points = [(looks[0].step, statistics.fmean(map(value, looks))) for looks in together]
                axis.plot(*zip(*points), label=variant, color=colours[variant], marker=".", linewidth=1)
        axis.set(title=what, xlabel="step")
        if log:
            axis.set_yscale("log")

    return panel


def loss_less_residual(axis: Any, findings: Findings, found: dict[str, list[Result]], colours: Colours) -> None:
    """At equal tokens, over the steps, the mean over seeds."""
    for variant, runs in found.items():
        pairs = [(run, plain) for run in ended(runs) if (plain := findings.residual(run.job, run.job.longer))]
        if _has_sites(runs) and pairs:
            together = zip(*(zip(run.looks, plain.looks) for run, plain in pairs))
            points = [
                (pair[0][0].step, statistics.fmean(mine.held_out - other.held_out for mine, other in pair))
                for pair in together
            ]
            axis.plot(*zip(*points), label=variant, color=colours[variant], marker=".", linewidth=1)
    axis.axhline(0.0, color="grey", linewidth=0.8)
    axis.set(title="held-out loss, less the residual's", xlabel="step")


def _has_sites(runs: Sequence[Result]) -> bool:
    return runs[0].job.init is not None


def differences(axis: Any, findings: Findings, found: dict[str, list[Result]], colours: Colours) -> None:
    """At the end, at equal tokens and at equal time: the mean over seeds and the standard deviation."""
    shown = [(variant, ended(runs)) for variant, runs in found.items() if _has_sites(runs) and ended(runs)]
    for offset, name, colour in ((-0.15, "at equal tokens", "black"), (0.15, "at equal time", "grey")):
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

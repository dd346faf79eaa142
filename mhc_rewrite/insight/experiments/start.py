"""How should sites start? From fresh weights, and on a model trained half-way."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mhc_rewrite.insight.experiments.base import Experiment, Job, Result, spread, variants

# variant: init, strengths (apart, read_apart, uniform) of "preserve"
_STARTS: dict[str, tuple[str | None, tuple[float, float, float] | None]] = {
    "residual": (None, None),
    "near_identity": ("near_identity", None),
    "equal": ("equal", None),
    "preserve, weak": ("preserve", (0.25, 0.4, 0.1)),
    "preserve": ("preserve", None),
    "preserve, strong": ("preserve", (0.8, 0.9, 0.5)),
    "paper": ("paper", None),
}
_NOT_HALF_WAY = frozenset({"paper"})  # it does not keep what was learned


def _jobs(seeds: int, scale: float) -> list[Job]:
    steps = max(16, round(400 * scale))
    fresh = [
        Job(variant, seed, init, strengths, steps=steps)
        for seed in range(seeds)
        for variant, (init, strengths) in _STARTS.items()
    ]
    return fresh + [dataclasses.replace(job, half_way=True) for job in fresh if job.variant not in _NOT_HALF_WAY]


def _loss(runs: Sequence[Result], baseline: Sequence[Result]) -> str:
    return spread([run.looks[-1].held_out for run in runs])


def _gain(runs: Sequence[Result], baseline: Sequence[Result]) -> str:
    """Seed by seed: the same weights and batches."""
    own = {run.job.seed: run.looks[-1].held_out for run in baseline}
    if runs[0].job == baseline[0].job:
        return "-"
    return spread([run.looks[-1].held_out - own[run.job.seed] for run in runs])


def _with_sites(value: Callable[[Result], float], digits: str) -> Callable[[Sequence[Result], Sequence[Result]], str]:
    def cell(runs: Sequence[Result], baseline: Sequence[Result]) -> str:
        return "-" if runs[0].job.init is None else f"{statistics.fmean(map(value, runs)):{digits}}"

    return cell


def _share(mapping: str, look: int) -> Callable[[Result], float]:
    return lambda run: run.looks[look].gradients[mapping] / run.looks[look].gradients["post"]


def _draw(pyplot: Any, results: Sequence[Result]) -> Any:
    panels: dict[str, Callable[[Any], float]] = {
        "held-out loss, less the residual's": lambda look: look.held_out,
        "H_res moved, rms": lambda look: look.moved,
        "gradient of H_res over H_post's": lambda look: look.gradients["res"] / look.gradients["post"],
        "streams apart": lambda look: look.apart,
    }
    figure, axes = pyplot.subplots(2, len(panels), figsize=(4 * len(panels), 6.5), layout="constrained")
    found = variants(results)
    for row, half_way in zip(axes, (False, True)):
        baseline = found[("residual", half_way)]
        for axis, (what, value) in zip(row, panels.items()):
            for variant in _STARTS:
                runs = found.get((variant, half_way))
                if runs is None or variant == "residual":
                    continue
                less = baseline if "loss" in what else None
                steps = [look.step for look in runs[0].looks]
                curve = [
                    statistics.fmean(
                        value(run.looks[k]) - (value(less[i].looks[k]) if less else 0.0) for i, run in enumerate(runs)
                    )
                    for k in range(min(len(run.looks) for run in runs))
                ]
                axis.plot(steps[: len(curve)], curve, label=variant, marker=".", linewidth=1)
            axis.set(title=what, xlabel="step")
            axis.grid(alpha=0.3)
            if "loss" not in what:
                axis.set_yscale("log")
        row[0].set_ylabel("from half-way" if half_way else "from fresh weights")
    axes[0][0].legend(fontsize="small")
    return figure


START = Experiment(
    "How should sites start, from fresh weights and on a model trained half-way?",
    _jobs,
    {
        "held-out loss": _loss,
        "less the residual's": _gain,
        "gradient res/post, first step": _with_sites(_share("res", 0), ".1e"),
        "pre/post": _with_sites(_share("pre", 0), ".1e"),
        "H_res moved": _with_sites(lambda run: run.looks[-1].moved, ".1e"),
        "streams apart, first step": _with_sites(lambda run: run.looks[0].apart, ".2f"),
        "last": _with_sites(lambda run: run.looks[-1].apart, ".2f"),
    },
    _draw,
)

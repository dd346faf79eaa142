"""Do deep models stay stable? At growing depth and learning rate; H_res unconstrained, doubly stochastic, or fixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mhc_rewrite.insight.experiments.base import Experiment, Findings, Job, Result
from mhc_rewrite.insight.experiments.pictures import means
from mhc_rewrite.insight.experiments.reading import by_part, by_variant, facts, gain, less_residual, loss

_LAYERS = (4, 16, 32)
_RATES = (1e-3, 4e-3, 16e-3)
_CONNECTIONS = ("hc", "mhc", "identity")


def _jobs(seeds: int, scale: float) -> list[Job]:
    jobs = []
    for seed in range(seeds):
        for layers in _LAYERS:
            for rate in _RATES:
                plain = Job(
                    f"residual, lr {rate:g}", seed, steps=max(16, round(100 * scale)), layers=layers, width=32,
                    heads=2, length=32, batch=8, lr=rate,
                )  # fmt: skip
                jobs.append(plain)
                jobs += [
                    dataclasses.replace(plain, variant=f"{name}, lr {rate:g}", init="preserve", connection=name)
                    for name in _CONNECTIONS
                ]
    return sorted(jobs, key=lambda job: (job.seed, job.layers, job.lr))


def _sites(job: Job) -> str:
    return f"{2 * job.layers} sites"


def _largest(runs: Sequence[Result], findings: Findings) -> str:
    """After the first look, as the gradients of a start are large by themselves."""
    return f"{means(runs, lambda run: max(look.gradient for look in run.looks[1:])):.3g}"


def _draw(pyplot: Any, findings: Findings) -> Any:
    parts = by_part(findings.results, _sites)
    panels = {
        "gain of all H_res, forward, 99 % of tokens": lambda run: run.looks[-1].gains.get("forward 99%", 1.0),
        "backward": lambda run: run.looks[-1].gains.get("backward 99%", 1.0),
        "largest norm of the gradient": lambda run: max(look.gradient for look in run.looks[1:]),
        "held-out loss": lambda run: run.looks[-1].held_out,
    }
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), layout="constrained")
    colours = dict(zip(("residual", *_CONNECTIONS), ("grey", "tab:red", "tab:blue", "tab:green")))
    styles = dict(zip(_RATES, ("-", "--", ":")))
    depths = [runs[0].job.layers * 2 for found in parts.values() for runs in [next(iter(found.values()))]]
    for axis, (what, value) in zip(axes, panels.items(), strict=True):
        for variant in dict.fromkeys(variant for found in parts.values() for variant in found):
            job = next(iter(parts.values()))[variant][0].job
            heights = [means(found[variant], value) for found in parts.values()]
            axis.plot(depths, heights, label=variant, color=colours[variant.partition(",")[0]],
                      linestyle=styles[job.lr], marker=".")  # fmt: skip
        axis.set(title=what, xlabel="sites", xscale="log", xticks=depths, xticklabels=depths)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        if what != "held-out loss":
            axis.set_yscale("log")
    axes[-1].legend(fontsize="x-small", ncols=2)
    return figure


STABILITY = Experiment(
    "Do deep models stay stable where H_res is unconstrained, doubly stochastic, or fixed?",
    _jobs,
    facts,
    by_variant(
        {
            "held-out loss": loss,
            "less the residual's": less_residual,
            "largest gradient": _largest,
            "gain forward": gain("forward"),
            "backward": gain("backward"),
        },
        _sites,
    ),
    _draw,
    seeds=3,
)

"""How should sites start? From fresh weights, and on a model trained half-way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mhc_rewrite.insight.experiments.base import Experiment, Findings, Job, Result
from mhc_rewrite.insight.experiments.pictures import curves, loss_less_residual, side_by_side
from mhc_rewrite.insight.experiments.reading import by_part, by_variant, facts, less_residual, loss, part_of, with_sites

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


def _share(mapping: str, look: int) -> Callable[[Result], float]:
    return lambda run: run.looks[look].gradients[mapping] / run.looks[look].gradients["post"]


def _draw(pyplot: Any, findings: Findings) -> Any:
    return side_by_side(
        pyplot, findings, by_part(findings.results, part_of),
        loss_less_residual,
        curves("H_res moved, rms", lambda look: look.moved),
        curves("gradient of H_res over H_post's", lambda look: look.gradients["res"] / look.gradients["post"]),
        curves("streams apart", lambda look: look.apart),
    )  # fmt: skip


START = Experiment(
    "How should sites start, from fresh weights and on a model trained half-way?",
    _jobs,
    facts,
    by_variant({
        "held-out loss": loss,
        "less the residual's": less_residual,
        "gradient res/post, first step": with_sites(_share("res", 0), ".1e"),
        "pre/post": with_sites(_share("pre", 0), ".1e"),
        "H_res moved": with_sites(lambda run: run.looks[-1].moved, ".1e"),
        "streams apart, first step": with_sites(lambda run: run.looks[0].apart, ".2f"),
        "last": with_sites(lambda run: run.looks[-1].apart, ".2f"),
    }),
    _draw,
)  # fmt: skip

"""Is it worth converting a model that is half trained? Against going on with plain residuals, and against sites from
the first step on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mhc_rewrite.insight.experiments.base import Experiment, Findings, Job, Result, residuals, small
from mhc_rewrite.insight.experiments.pictures import curves, differences, loss_less_residual, side_by_side
from mhc_rewrite.insight.experiments.reading import COMPARED, by_part, by_variant, facts, part_of, with_sites
from mhc_rewrite.insight.experiments.timing import in_turn

_SITE_RATES = (1.0, 10.0, 30.0)
_FROM_THE_START = (1.0, 10.0)


def _jobs(seeds: int, scale: float) -> list[Job]:
    fresh, half_way = [], []
    for seed in range(seeds):
        plain = small("residual", seed, scale)
        first = [
            dataclasses.replace(plain, variant=f"mhc, site lr x {rate:g}", init="preserve", site_lr=rate)
            for rate in _SITE_RATES
        ]
        from_the_start = [job for job in first if job.site_lr in _FROM_THE_START]
        fresh += [plain, *from_the_start]
        half_way += residuals(dataclasses.replace(plain, half_way=True))
        half_way += [dataclasses.replace(job, half_way=True) for job in first]
        half_way += [
            dataclasses.replace(job, variant=f"{job.variant}, from the start", half_way=True, converted_first=True)
            for job in from_the_start
        ]
    return fresh + half_way


def _jump(runs: Sequence[Result], findings: Findings) -> str:
    """The largest change of the loss by the conversion itself."""
    if not runs[0].job.half_way or runs[0].job.init is None or runs[0].job.converted_first:
        return "-"
    pairs = [(run, plain) for run in runs if (plain := findings.residual(run.job))]
    return f"{max(abs(run.looks[0].held_out - plain.looks[0].held_out) for run, plain in pairs):.0e}"


def _draw(pyplot: Any, findings: Findings) -> Any:
    return side_by_side(
        pyplot, findings, by_part(findings.results, part_of),
        loss_less_residual, differences, curves("H_res moved, rms", lambda look: look.moved),
    )  # fmt: skip


UPCYCLE = Experiment(
    "Is it worth converting a model half-way through its training?",
    _jobs,
    facts,
    by_variant({
        **COMPARED,
        "jump at the conversion": _jump,
        "H_res moved": with_sites(lambda run: run.looks[-1].moved, ".0e"),
        "streams apart": with_sites(lambda run: run.looks[-1].apart, ".2f"),
    }),
    _draw,
    in_turn,
)  # fmt: skip

"""Where in depth do streams count? Two layers of four have four streams and two have two, in every order that is whole:
equal parameters and equal time."""

from __future__ import annotations

import dataclasses
from typing import Any

from mhc_rewrite.insight.experiments.base import SITE_LR, Experiment, Findings, Job, residuals, small
from mhc_rewrite.insight.experiments.pictures import curves, differences, loss_less_residual, side_by_side
from mhc_rewrite.insight.experiments.reading import COMPARED, by_part, by_variant, facts, part_of, with_sites
from mhc_rewrite.insight.experiments.timing import in_turn

_STREAMS: dict[str, int | tuple[int, ...]] = {
    "n = 2": 2,
    "n = 3": 3,
    "n = 4": 4,
    "n = 4, 4, 2, 2": (4, 4, 2, 2),
    "n = 2, 2, 4, 4": (2, 2, 4, 4),
    "n = 4, 2, 2, 4": (4, 2, 2, 4),
    "n = 2, 4, 4, 2": (2, 4, 4, 2),
}


def _jobs(seeds: int, scale: float) -> list[Job]:
    jobs = []
    for seed in range(seeds):
        plain = small("residual", seed, scale)
        jobs += residuals(plain)
        jobs += [
            dataclasses.replace(plain, variant=variant, init="preserve", streams=streams, site_lr=SITE_LR)
            for variant, streams in _STREAMS.items()
        ]
    return jobs


def _parameters(job: Job) -> int:
    """Of the sites, two a layer."""
    by_layer = job.streams if isinstance(job.streams, tuple) else (job.streams,) * job.layers
    return sum(2 * ((n * job.width + 1) * (n**2 + 2 * n) + 3) for n in by_layer)


def _draw(pyplot: Any, findings: Findings) -> Any:
    return side_by_side(
        pyplot, findings, by_part(findings.results, part_of),
        loss_less_residual, differences, curves("streams apart at the last site", lambda look: look.apart),
    )  # fmt: skip


ADAPTIVE = Experiment(
    "Where in depth do streams count?",
    _jobs,
    facts,
    by_variant({**COMPARED, "parameters of sites": with_sites(lambda run: _parameters(run.job), ",.0f")}),
    _draw,
    in_turn,
)

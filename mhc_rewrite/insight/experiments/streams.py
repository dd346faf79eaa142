"""How many streams? n = 1 is the plain residual."""

from __future__ import annotations

import dataclasses
from typing import Any

from mhc_rewrite.insight.experiments.base import SITE_LR, Experiment, Findings, Job, residuals, small
from mhc_rewrite.insight.experiments.pictures import curves, differences, loss_less_residual, side_by_side
from mhc_rewrite.insight.experiments.reading import COMPARED, by_part, by_variant, facts, gain, part_of
from mhc_rewrite.insight.experiments.timing import in_turn

_STREAMS = (2, 4, 8)


def _jobs(seeds: int, scale: float) -> list[Job]:
    jobs = []
    for seed in range(seeds):
        plain = small("n = 1", seed, scale)
        jobs += residuals(plain)
        jobs += [
            dataclasses.replace(plain, variant=f"n = {n}, site lr x {rate:g}", init="preserve", streams=n, site_lr=rate)
            for rate in (1.0, SITE_LR)
            for n in _STREAMS
        ]
    return jobs


def _draw(pyplot: Any, findings: Findings) -> Any:
    return side_by_side(
        pyplot, findings, by_part(findings.results, part_of),
        loss_less_residual, differences, curves("streams apart", lambda look: look.apart),
    )  # fmt: skip


STREAMS = Experiment(
    "How many streams are worth their time?",
    _jobs,
    facts,
    by_variant({**COMPARED, "gain forward": gain("forward"), "backward": gain("backward")}),
    _draw,
    in_turn,
)

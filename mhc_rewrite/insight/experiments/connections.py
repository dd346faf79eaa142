"""Which connection? All of the table that take four streams, with coefficients for each token and for all alike."""

from __future__ import annotations

import dataclasses
from typing import Any

from mhc_rewrite.connections import CONNECTIONS
from mhc_rewrite.insight.experiments.base import SITE_LR, Experiment, Findings, Job, residuals, small
from mhc_rewrite.insight.experiments.pictures import curves, differences, loss_less_residual, side_by_side
from mhc_rewrite.insight.experiments.reading import COMPARED, by_part, by_variant, facts, gain, part_of, with_sites
from mhc_rewrite.insight.experiments.timing import in_turn


def _jobs(seeds: int, scale: float) -> list[Job]:
    jobs = []
    for seed in range(seeds):
        plain = small("residual", seed, scale)
        jobs += residuals(plain)
        for dynamic in (True, False):
            jobs += [
                dataclasses.replace(plain, variant=f"{name}{'' if dynamic else ', static'}", init="preserve",
                                    connection=name, dynamic=dynamic, site_lr=SITE_LR)
                for name, connection in CONNECTIONS.items() if not connection.refuses(4)
            ]  # fmt: skip
    return jobs


def _draw(pyplot: Any, findings: Findings) -> Any:
    return side_by_side(
        pyplot, findings, by_part(findings.results, part_of),
        loss_less_residual, differences,
        curves("gain of all H_res, backward, 99 % of tokens", lambda look: look.gains["backward 99%"]),
    )  # fmt: skip


CONNECTIONS_COMPARED = Experiment(
    "Which connection is worth its time, dynamic and static?",
    _jobs,
    facts,
    by_variant({
        **COMPARED,
        "gain forward": gain("forward"),
        "backward": gain("backward"),
        "H_res moved": with_sites(lambda run: run.looks[-1].moved, ".0e"),
    }),
    _draw,
    in_turn,
)  # fmt: skip

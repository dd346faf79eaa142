"""How many iterations does Sinkhorn-Knopp need? Where H_res has left its start, which any number gives exactly."""

from __future__ import annotations

import dataclasses
from typing import Any

from mhc_rewrite.insight.experiments.base import SITE_LR, Experiment, Findings, Job, residuals, small
from mhc_rewrite.insight.experiments.pictures import curves, differences, loss_less_residual, side_by_side
from mhc_rewrite.insight.experiments.reading import COMPARED, by_part, by_variant, facts, gain, part_of, with_sites
from mhc_rewrite.insight.experiments.timing import in_turn
from mhc_rewrite.printing import plural

_ITERATIONS = (1, 2, 5, 10, 20, 40)


def _jobs(seeds: int, scale: float) -> list[Job]:
    jobs = []
    for seed in range(seeds):
        plain = small("residual", seed, scale)
        jobs += residuals(plain)
        jobs += [
            dataclasses.replace(plain, variant=plural(count, "iteration"), init="preserve", iterations=count,
                                site_lr=SITE_LR)
            for count in _ITERATIONS
        ]  # fmt: skip
    return jobs


def _draw(pyplot: Any, findings: Findings) -> Any:
    return side_by_side(
        pyplot, findings, by_part(findings.results, part_of),
        loss_less_residual, differences,
        curves("columns' sums off 1 by, 99 % of tokens", lambda look: max(look.errors["column 99%"], 1e-8)),
    )  # fmt: skip


SINKHORN = Experiment(
    "How many iterations does Sinkhorn-Knopp need?",
    _jobs,
    facts,
    by_variant({
        **COMPARED,
        "row sums off by, 99 %": with_sites(lambda run: run.looks[-1].errors["row 99%"], ".0e"),
        "column sums, median": with_sites(lambda run: run.looks[-1].errors["column"], ".0e"),
        "99 %": with_sites(lambda run: run.looks[-1].errors["column 99%"], ".0e"),
        "gain forward": gain("forward"),
        "backward": gain("backward"),
    }),
    _draw,
    in_turn,
)  # fmt: skip

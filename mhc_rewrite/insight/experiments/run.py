"""Runs an experiment: several processes, every result on disk before the next, and what is there is not run again."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from mhc_rewrite.errors import ConfigError
from mhc_rewrite.insight.bench import KEEP_MEMORY, environment
from mhc_rewrite.insight.experiments.base import Experiment, Findings, Job, Result, Times, as_row, from_row
from mhc_rewrite.insight.experiments.timing import time_in_turn
from mhc_rewrite.insight.experiments.training import train

Tell = Callable[[int, int, str], None]


def run(experiment: Experiment, file: Path, seeds: int, scale: float, jobs: int, tell: Tell) -> Findings:
    """The results of all runs.

    Args:
        file: a line of JSON a run; what it has already is not run again. Lines that begin with `{"times"` are of the
            steps that were timed, by themselves, before anything else.
        seeds: runs of each variant.
        scale: factor for the number of steps.
        jobs: processes, of one thread each.
        tell: is told (runs done, runs in all, what ended last).

    Raises:
        ConfigError: the file holds something else.
    """
    wanted = experiment.jobs(seeds, scale)
    groups = experiment.timed(wanted)
    results, times = _read(file)
    count = len(wanted) + len(groups)

    def told(last: str) -> None:
        tell(sum(job in results for job in wanted) + sum(group in times for group in groups), count, last)

    def keep(found: Result | Times) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(as_row(found), separators=(",", ":")) + "\n")
        if isinstance(found, Times):
            times[found.steps] = found
            told(f"{len(found.steps)} steps timed")
        else:
            results[found.job] = found
            told(f"{found.job.variant}, seed {found.job.seed}")

    told("")
    file.parent.mkdir(parents=True, exist_ok=True)
    spawned = multiprocessing.get_context("spawn")
    with (
        environment(KEEP_MEMORY),
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(jobs, spawned, _alone) as pool,
    ):
        for group in groups:
            if group not in times:
                keep(pool.submit(time_in_turn, group).result())
        left = [job for job in wanted if job not in results]
        for half_way in (False, True):
            waiting: list[Future[Result]] = [
                pool.submit(train, job, Path(folder)) for job in left if job.half_way is half_way
            ]
            for ended in as_completed(waiting):
                keep(ended.result())
    return Findings(tuple(results[job] for job in wanted), tuple(times[group] for group in groups))


def _alone() -> None:
    torch.set_num_threads(1)


def _read(file: Path) -> tuple[dict[Job, Result], dict[tuple[Job, ...], Times]]:
    if not file.exists():
        return {}, {}
    try:
        found = [from_row(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} holds something else than results of this experiment ({type(error).__name__}: {error}). Take "
            "another folder, or move it away."
        ) from error
    return (
        {one.job: one for one in found if isinstance(one, Result)},
        {one.steps: one for one in found if isinstance(one, Times)},
    )

"""Runs an experiment: several processes, every result on disk before the next, and what is there is not run again."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from mhc_rewrite.errors import ConfigError
from mhc_rewrite.insight.experiments.base import Experiment, Result, as_row, from_row
from mhc_rewrite.insight.experiments.training import train

Tell = Callable[[int, int, str], None]


def run(experiment: Experiment, file: Path, seeds: int, scale: float, jobs: int, tell: Tell) -> list[Result]:
    """The results of all runs, in the experiment's order.

    Args:
        file: a line of JSON a run; what it has already is not run again.
        seeds: runs of each variant.
        scale: factor for the number of steps.
        jobs: processes, of one thread each.
        tell: is told (runs done, runs in all, what ended last).

    Raises:
        ConfigError: the file holds something else.
    """
    wanted = experiment.jobs(seeds, scale)
    done = {one.job: one for one in _read(file)}
    left = [job for job in wanted if job not in done]
    tell(len(wanted) - len(left), len(wanted), "")
    file.parent.mkdir(parents=True, exist_ok=True)
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(jobs, spawned, _alone) as pool:
        for half_way in (False, True):
            waiting = [pool.submit(train, job, Path(folder)) for job in left if job.half_way is half_way]
            for ended in as_completed(waiting):
                result = ended.result()
                done[result.job] = result
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(as_row(result)) + "\n")
                tell(sum(job in done for job in wanted), len(wanted), f"{result.job.variant}, seed {result.job.seed}")
    return [done[job] for job in wanted]


def _alone() -> None:
    torch.set_num_threads(1)


def _read(file: Path) -> list[Result]:
    if not file.exists():
        return []
    try:
        return [from_row(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{file} holds something else than results of this experiment ({type(error).__name__}: {error}). Take "
            "another folder, or move it away."
        ) from error

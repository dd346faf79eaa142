"""How long steps take, next to each other: training steps of several models in turn, in one process."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

from mhc_rewrite.insight.bench import WARM_UP, clocked
from mhc_rewrite.insight.experiments.base import Job, Times, step_of
from mhc_rewrite.insight.experiments.training import (
    CLIP,
    DEVICE,
    Decoder,
    batches,
    convert,
    loss_of,
    optimizer_of,
    text,
    versions,
)

ROUNDS, FEWEST = 40, 9
PATIENCE = 60.0  # seconds after which no more than the fewest rounds are made


def in_turn(jobs: Sequence[Job]) -> list[tuple[Job, ...]]:
    """All different steps of an experiment's runs as one group."""
    return [tuple(dict.fromkeys(map(step_of, jobs)))]


def time_in_turn(steps: tuple[Job, ...]) -> Times:
    """The first is the one that ratios are taken to."""
    load = os.getloadavg()[0]
    ready = [_step(job) for job in steps]
    seconds: list[list[float]] = []
    began = time.monotonic()
    for k in range(WARM_UP + ROUNDS):
        seconds.append([clocked(step, DEVICE) for step in ready])
        if k + 1 >= WARM_UP + FEWEST and time.monotonic() - began > PATIENCE:
            break
    rounds = seconds[WARM_UP:]
    by_step = list(zip(*rounds, strict=True))
    ratios = [statistics.median(mine / first for mine, first in zip(one, by_step[0])) for one in by_step]
    return Times(steps, tuple(map(statistics.median, by_step)), tuple(ratios), len(rounds), load, versions())


def _step(job: Job) -> Callable[[], None]:
    torch.manual_seed(0)
    data = batches(text()[0].to(DEVICE), job, seed=0)
    model = Decoder(job).to(DEVICE)
    convert(model, job, next(data)[:, :-1])
    optimizer = optimizer_of(model, job)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, next(data)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    return step

"""What an experiment is: training runs that differ in one thing, each with several seeds, and how they are read."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One training run of a small decoder over bytes.

    Attributes:
        variant: the name of what differs.
        seed: of the weights and of the batches, so that variants of one seed can be compared pair by pair.
        init: how sites start; None trains the model with its plain residuals.
        strengths: (apart, read_apart, uniform) of `init="preserve"`, where they are not the default ones.
        half_way: begin with weights that were trained for as many steps, not with fresh ones.
        steps, layers, width, heads, length, batch: of the model and its training.
        streams: n.
        lr: of AdamW, after a warm-up over a tenth of the steps and with a cosine's decay to a tenth.
    """

    variant: str
    seed: int
    init: str | None = None
    strengths: tuple[float, float, float] | None = None
    half_way: bool = False
    steps: int = 400
    layers: int = 4
    width: int = 96
    heads: int = 4
    length: int = 96
    batch: int = 8
    streams: int = 4
    lr: float = 2e-3


@dataclass(frozen=True)
class Look:
    """A model during its training.

    Attributes:
        step: steps done.
        held_out: loss on text that is not trained on, nats a byte.
        gradients: norm of the gradient of each mapping's bias over all sites, by mapping; empty without sites.
        moved: root mean square of what H_res's entries have moved by since the start.
        apart: root mean square of the streams from their mean, over that of the mean, at the last site.
    """

    step: int
    held_out: float
    gradients: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    apart: float = 0.0


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        job: its settings.
        looks: at the start, some on the way, at the end.
        seconds: of a step, the median; runs beside each other share the machine.
        versions: of Python, torch and this package.
    """

    job: Job
    looks: tuple[Look, ...]
    seconds: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        question: in one sentence.
        jobs: seeds and a factor for the number of steps -> the runs, in an order in which half-way ones come last.
        columns: what the table shows of a variant's runs, by heading.
        draw: (pyplot, results) -> a figure.
    """

    question: str
    jobs: Callable[[int, float], list[Job]]
    columns: dict[str, Callable[[Sequence[Result], Sequence[Result]], str]]
    draw: Callable[[Any, Sequence[Result]], Any]


def variants(results: Sequence[Result]) -> dict[tuple[str, bool], list[Result]]:
    """The runs by variant and by whether they began half-way, in order."""
    found: dict[tuple[str, bool], list[Result]] = {}
    for one in results:
        found.setdefault((one.job.variant, one.job.half_way), []).append(one)
    return found


def spread(values: Sequence[float], digits: int = 4) -> str:
    """`mean ± standard deviation` over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def as_row(result: Result) -> dict[str, Any]:
    """Plain data, for a line of JSON."""
    return dataclasses.asdict(result)


def from_row(row: dict[str, Any]) -> Result:
    """The inverse of `as_row` after a way through JSON."""
    job = dict(row["job"])
    if job.get("strengths") is not None:
        job["strengths"] = tuple(job["strengths"])
    return Result(Job(**job), tuple(Look(**look) for look in row["looks"]), row["seconds"], row["versions"])

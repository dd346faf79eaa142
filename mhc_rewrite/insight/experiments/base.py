"""What an experiment is: training runs that differ in one thing, each with several seeds, and how they are read."""

from __future__ import annotations

import dataclasses
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
        streams: n, or that of each layer.
        lr: of AdamW, after a warm-up over a tenth of the steps and with a cosine's decay to a tenth.
        connection, dynamic, iterations: of the sites, as in `MHCConfig`.
        site_lr: learning rate of the sites, in terms of the model's own.
        longer: factor for the steps of this run, and with them of its schedule; not for those of the first half.
        converted_first: of a half-way run: the first half was trained with sites too.
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
    streams: int | tuple[int, ...] = 4
    lr: float = 2e-3
    connection: str = "mhc"
    dynamic: bool = True
    iterations: int = 20
    site_lr: float = 1.0
    longer: float = 1.0
    converted_first: bool = False


# What a plain residual has in the fields that are of sites alone.
_OF_SITES: dict[str, Any] = {
    name: Job.__dataclass_fields__[name].default
    for name in ("init", "strengths", "streams", "connection", "dynamic", "iterations", "site_lr", "converted_first")
}


def residual_of(job: Job, longer: float = 1.0) -> Job:
    """The run with plain residuals that a run is compared with, by another name."""
    return dataclasses.replace(job, variant="", longer=longer, **_OF_SITES)


# Plain residuals are trained over so many times the steps of the runs that they are compared with: what they come to in
# the time of a slower step lies between two of these, each with a whole schedule of its own.
LONGER = (1.0, 1.5, 2.0, 3.0)

# Where variants of sites are compared with each other, they learn at so many times the model's own rate: at the same
# one they hardly leave their start in runs of this length, and all end alike (`streams` and `upcycle` have both).
SITE_LR = 10.0


def small(variant: str, seed: int, scale: float, steps: int = 300) -> Job:
    """With plain residuals, of the size that most experiments have."""
    return Job(variant, seed, steps=max(16, round(steps * scale)), layers=4, width=64, length=64)


def residuals(plain: Job) -> list[Job]:
    """A run with plain residuals, and the longer ones of the same seed."""
    return [plain, *(dataclasses.replace(plain, variant=f"{plain.variant}, {longer:g} x steps", longer=longer)
                     for longer in LONGER[1:])]  # fmt: skip


def step_of(job: Job) -> Job:
    """What decides how long a step takes; nothing of all that decides what is learned."""
    init = None if job.init is None else "preserve"
    return dataclasses.replace(
        job, variant="", seed=0, init=init, strengths=None, half_way=False, steps=0, lr=0.0, site_lr=1.0, longer=1.0,
        converted_first=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Look:
    """A model during its training.

    Attributes:
        step: steps done.
        held_out: loss on text that is not trained on, nats a byte.
        gradients: norm of the gradient of each mapping's bias over all sites, by mapping; empty without sites.
        moved: root mean square of what H_res's entries have moved by since the start.
        apart: root mean square of the streams from their mean, over that of the mean, at the last site.
        gradient: largest norm of the whole gradient, before it is clipped, in the steps since the look before.
        gains: of the product of all sites' H_res, forward and backward: the median over tokens, and a rare quantile.
        errors: of H_res: the largest difference of a row's or a column's sum from 1; over tokens and sites likewise.
    """

    step: int
    held_out: float
    gradients: dict[str, float] = field(default_factory=dict)
    moved: float = 0.0
    apart: float = 0.0
    gradient: float = 0.0
    gains: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        job: its settings.
        looks: at the start, some on the way, at the end.
        seconds: of a step, the median; runs beside each other share the machine. `Times` are for comparisons.
        versions: of Python, torch and this package.
    """

    job: Job
    looks: tuple[Look, ...]
    seconds: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Times:
    """Training steps of several models, taken in turn in one process with nothing of this experiment beside it.

    Attributes:
        steps: what was timed, as by `step_of`.
        seconds: of a step, the medians.
        ratios: to the first one's, the medians over rounds.
        rounds: of which each runs everything once.
        load: processes that wanted a core when it began, the mean over a minute: what the machine did beside it.
        versions: of Python, torch and this package.
    """

    steps: tuple[Job, ...]
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    rounds: int
    load: float
    versions: dict[str, str]


@dataclass(frozen=True)
class Findings:
    """All that an experiment gave, in the order in which it asked for it."""

    results: tuple[Result, ...]
    times: tuple[Times, ...] = ()

    def ratio(self, job: Job) -> float | None:
        """Time of a run's step over that of the model it is compared with; None where it was not taken."""
        wanted = step_of(job)
        for times in self.times:
            if wanted in times.steps:
                return times.ratios[times.steps.index(wanted)]
        return None

    def residual(self, job: Job, longer: float = 1.0) -> Result | None:
        """The run with plain residuals of the same seed and settings, over `longer` times as many steps."""
        wanted = residual_of(job, longer)
        return next((one for one in self.results if dataclasses.replace(one.job, variant="") == wanted), None)


Table = list[list[str]]  # of which the first row is the heading


@dataclass(frozen=True)
class Experiment:
    """One question.

    Attributes:
        question: in one sentence.
        jobs: seeds and a factor for the number of steps -> the runs.
        facts: what all runs have in common, in one sentence.
        tables: what was found.
        draw: (pyplot, findings) -> a figure.
        timed: the runs -> groups of steps (`step_of`) that are timed in turn, the one to compare with first.
        seeds: runs of each variant by default.
    """

    question: str
    jobs: Callable[[int, float], list[Job]]
    facts: Callable[[Findings], str]
    tables: Callable[[Findings], list[Table]]
    draw: Callable[[Any, Findings], Any]
    timed: Callable[[Sequence[Job]], list[tuple[Job, ...]]] = lambda jobs: []
    seeds: int = 5


def as_row(found: Result | Times) -> dict[str, Any]:
    """Plain data, for a line of JSON; what a look leaves at its default is left out."""
    if isinstance(found, Times):
        return {"times": dataclasses.asdict(found)}
    empty = Look(0, 0.0)
    looks = [
        {name: value for name, value in dataclasses.asdict(look).items()
         if name in ("step", "held_out") or value != getattr(empty, name)}
        for look in found.looks
    ]  # fmt: skip
    return {**dataclasses.asdict(found), "looks": looks}


def from_row(row: dict[str, Any]) -> Result | Times:
    """The inverse of `as_row` after a way through JSON."""
    if "times" in row:
        fields = row["times"]
        lists = {name: tuple(fields[name]) for name in ("seconds", "ratios")}
        return Times(**{**fields, **lists, "steps": tuple(map(_job, fields["steps"]))})
    return Result(_job(row["job"]), tuple(Look(**look) for look in row["looks"]), row["seconds"], row["versions"])


def _job(fields: dict[str, Any]) -> Job:
    given: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Job(**given)

"""How findings read: a row for each variant, figures with their spread over seeds, at equal tokens and equal time."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from mhc_rewrite.insight.experiments.base import LONGER, Findings, Job, Result, Table
from mhc_rewrite.printing import plural

Column = Callable[[Sequence[Result], Findings], str]  # of one variant's runs


def spread(values: Sequence[float], digits: int = 4) -> str:
    """`mean ± standard deviation` over seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def part_of(job: Job) -> str:
    return "from half-way" if job.half_way else "from fresh weights"


def by_part(results: Sequence[Result], part: Callable[[Job], str]) -> dict[str, dict[str, list[Result]]]:
    """The runs by part of the experiment and by variant, in order."""
    found: dict[str, dict[str, list[Result]]] = {}
    for one in results:
        found.setdefault(part(one.job), {}).setdefault(one.job.variant, []).append(one)
    return found


def by_variant(columns: dict[str, Column], part: Callable[[Job], str] = part_of) -> Callable[[Findings], list[Table]]:
    """A table for each part."""

    def tables(findings: Findings) -> list[Table]:
        return [
            [[name, *columns], *([variant, *(column(runs, findings) for column in columns.values())]
                                 for variant, runs in found.items())]
            for name, found in by_part(findings.results, part).items()
        ]  # fmt: skip

    return tables


def facts(findings: Findings) -> str:
    """Of the runs, and of the times if there are any."""
    jobs = [one.job for one in findings.results]
    with_sites = [job for job in jobs if job.init is not None]
    said = (
        f"decoder over bytes of Python's sources: {_all(job.layers for job in jobs)} layers, "
        f"C = {_all(job.width for job in jobs)}, n = {_all(job.streams for job in with_sites)}; "
        f"{_all(job.steps for job in jobs)} steps of {_all(job.batch for job in jobs)} x "
        f"{_all(job.length for job in jobs)}, AdamW, lr {_all(job.lr for job in jobs)}, of sites "
        f"{_all(job.site_lr for job in with_sites)} x that; "
        f"{plural(len({job.seed for job in jobs}), 'seed')}: mean ± standard deviation"
    )
    for times in findings.times:
        said += (
            f"\ntimes: eager, one thread, medians of {times.rounds} rounds in turn; "
            f"load of the machine when it was begun: {times.load:.1f}"
        )
    return said


def _all(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in dict.fromkeys(values) if not isinstance(value, tuple))


# -- differences -------------------------------------------------------------------------------------------------------


def last_loss(run: Result) -> float:
    return run.looks[-1].held_out


def ended(runs: Sequence[Result]) -> list[Result]:
    """Those that did not diverge."""
    return [run for run in runs if math.isfinite(last_loss(run))]


def at_equal_tokens(run: Result, findings: Findings) -> float | None:
    """Its loss less that of plain residuals with the same seed, on the same batches; None where that is itself."""
    plain = findings.residual(run.job, run.job.longer)
    return None if plain is None or plain.job == run.job else last_loss(run) - last_loss(plain)


def time_of(job: Job, findings: Findings) -> float | None:
    """Of a whole run, in terms of a plain one's; the first half beyond a plain one's, if it was slower, included."""
    ratio = findings.ratio(job)
    if ratio is None:
        return None
    return max(1.0, 2 * ratio - 1 if job.converted_first else ratio)


def at_equal_time(run: Result, findings: Findings) -> tuple[float, bool] | None:
    """Its loss less that of plain residuals that were trained as long by the clock, and whether the longest was long
    enough; if not, the difference is at least this. Between two lengths of runs the loss is linear in their logarithm.
    """
    time = time_of(run.job, findings)
    plain = [(longer, found) for longer in LONGER if (found := findings.residual(run.job, longer))]
    if run.job.init is None or time is None or len(plain) < len(LONGER):
        return None
    reached = [(longer, last_loss(found)) for longer, found in plain]
    if time >= reached[-1][0]:
        return last_loss(run) - reached[-1][1], time == reached[-1][0]
    (a, before), (b, after) = next(pair for pair in itertools.pairwise(reached) if pair[0][0] <= time < pair[1][0])
    share = math.log(time / a) / math.log(b / a)
    return last_loss(run) - (before + share * (after - before)), True


# -- columns -----------------------------------------------------------------------------------------------------------


def loss(runs: Sequence[Result], findings: Findings) -> str:
    there = ended(runs)
    text = spread([last_loss(run) for run in there]) if there else "-"
    return text if len(there) == len(runs) else f"{text}, {len(runs) - len(there)} of {len(runs)} diverged"


def less_residual(runs: Sequence[Result], findings: Findings) -> str:
    found = [at_equal_tokens(run, findings) for run in ended(runs)]
    values = [value for value in found if value is not None and math.isfinite(value)]
    return spread(values) if values else "-"


def equal_time(runs: Sequence[Result], findings: Findings) -> str:
    found = [value for run in ended(runs) if (value := at_equal_time(run, findings)) is not None]
    if not found:
        return "-"
    return ("" if all(reached for _, reached in found) else "over ") + spread([value for value, _ in found])


def time_a_step(runs: Sequence[Result], findings: Findings) -> str:
    ratio = findings.ratio(runs[0].job)
    return "-" if ratio is None else f"{ratio:.2f}"


def with_sites(value: Callable[[Result], float], digits: str) -> Column:
    """The mean over seeds, for runs with sites."""

    def cell(runs: Sequence[Result], findings: Findings) -> str:
        there = ended(runs)
        return "-" if runs[0].job.init is None or not there else f"{statistics.fmean(map(value, there)):{digits}}"

    return cell


def gain(which: str) -> Column:
    """The median over tokens at the end, the mean over seeds, and the 99th percentile likewise."""
    median = with_sites(lambda run: run.looks[-1].gains[which], ".3g")
    rare = with_sites(lambda run: run.looks[-1].gains[f"{which} 99%"], ".3g")

    def cell(runs: Sequence[Result], findings: Findings) -> str:
        both = median(runs, findings), rare(runs, findings)
        return "-" if both[0] == "-" else f"{both[0]} ({both[1]})"

    return cell


# The four that every comparison has.
COMPARED: dict[str, Column] = {
    "held-out loss": loss,
    "less the residual's": less_residual,
    "time a step": time_a_step,
    "at equal time": equal_time,
}

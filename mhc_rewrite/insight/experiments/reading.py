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


def _plain_losses(run: Result, findings: Findings) -> list[tuple[float, float]]:
    """What plain residuals come to over 1 and more times as many steps; empty for one of these, and without them."""
    plain = [(longer, found) for longer in LONGER if (found := findings.residual(run.job, longer))]
    if run.job.init is None or len(plain) < len(LONGER):
        return []
    return [(longer, last_loss(found)) for longer, found in plain]


def at_equal_time(run: Result, findings: Findings) -> tuple[float, bool] | None:
    """Its loss less that of plain residuals that were trained as long by the clock, and whether the longest was long
    enough; if not, the difference is at least this. Between two lengths of runs the loss is linear in their logarithm.
    """
    time, reached = time_of(run.job, findings), _plain_losses(run, findings)
    if time is None or not reached:
        return None
    if time >= reached[-1][0]:
        return last_loss(run) - reached[-1][1], time == reached[-1][0]
    (a, before), (b, after) = next(pair for pair in itertools.pairwise(reached) if pair[0][0] <= time < pair[1][0])
    share = math.log(time / a) / math.log(b / a)
    return last_loss(run) - (before + share * (after - before)), True


def even_at(run: Result, findings: Findings) -> float | None:
    """Time of a step, in terms of a plain one's, at which it would come to what plain residuals come to by the clock.

    Below 1, and beyond the longest run, by the line through the two lengths next to it.
    """
    reached = _plain_losses(run, findings)
    if not reached:
        return None
    lines = list(itertools.pairwise(reached))
    (a, before), (b, after) = next((line for line in lines if last_loss(run) >= line[1][1]), lines[-1])
    if not before > after:  # more steps were no use
        return None
    time = a * (b / a) ** ((before - last_loss(run)) / (before - after))
    return (time + 1) / 2 if run.job.converted_first else time


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


def even(runs: Sequence[Result], findings: Findings) -> str:
    found = [value for run in ended(runs) if (value := even_at(run, findings)) is not None]
    return spread(found, 2) if found else "-"


def over_seeds(
    runs: Sequence[Result], value: Callable[[Result], float], of: Callable[[Sequence[float]], float] = statistics.fmean
) -> float:
    """The mean, or another figure of them; not a number where none came to its end."""
    values = [value(run) for run in ended(runs)]
    return of(values) if values else math.nan


def with_sites(
    value: Callable[[Result], float], digits: str, of: Callable[[Sequence[float]], float] = statistics.fmean
) -> Column:
    """The mean over seeds, or another figure of them, for runs with sites."""

    def cell(runs: Sequence[Result], findings: Findings) -> str:
        there = runs[0].job.init is not None and ended(runs)
        return f"{over_seeds(runs, value, of):{digits}}" if there else "-"

    return cell


def gain(which: str) -> Column:
    """The median over tokens at the end, and the 99th percentile; medians over seeds, which may be powers apart."""
    median = with_sites(lambda run: run.looks[-1].gains[which], ".3g", statistics.median)
    rare = with_sites(lambda run: run.looks[-1].gains[f"{which} 99%"], ".3g", statistics.median)

    def cell(runs: Sequence[Result], findings: Findings) -> str:
        both = median(runs, findings), rare(runs, findings)
        return "-" if both[0] == "-" else f"{both[0]} ({both[1]})"

    return cell


# What every comparison has.
COMPARED: dict[str, Column] = {
    "held-out loss": loss,
    "less the residual's": less_residual,
    "time a step": time_a_step,
    "at equal time": equal_time,
    "even at": even,
}

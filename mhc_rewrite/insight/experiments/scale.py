"""What do sites cost as models get wider? No training: steps are timed, and held against the cost model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mhc_rewrite.config import MHCConfig
from mhc_rewrite.cost import Cost, Stream, device, estimate
from mhc_rewrite.insight.experiments.base import Experiment, Findings, Job, Table, step_of

_WIDTHS = (128, 256, 512, 1024, 2048)
_STREAMS = (2, 4)
_LAYERS = 2


def _timed(jobs: Sequence[Job]) -> list[tuple[Job, ...]]:
    groups = []
    for width in _WIDTHS:
        sizes: dict[str, Any] = {"layers": _LAYERS, "width": width, "heads": width // 64, "length": 128, "batch": 2}
        steps = [Job("", 0, **sizes), *(Job("", 0, "preserve", streams=n, **sizes) for n in _STREAMS)]
        groups.append(tuple(map(step_of, steps)))
    return groups


def _facts(findings: Findings) -> str:
    job, times = findings.times[0].steps[0], findings.times
    return (
        f"decoder over bytes: {job.layers} layers, {job.batch} x {job.length} tokens, fp32; training steps with the "
        f"optimizer's, eager, one thread, medians of {min(one.rounds for one in times)} to "
        f"{max(one.rounds for one in times)} rounds in turn; load of the machine when each was begun: "
        + ", ".join(f"{one.load:.1f}" for one in times)
    )


def estimated(job: Job, on: str, itemsize: int) -> float:
    """The cost model's overhead of a decoder's step, which is there its matrices' products alone."""
    sites = 2 * job.layers
    of = Cost(MHCConfig(n_streams=job.streams), (Stream(job.width, sites, sites, itemsize),))  # type: ignore[arg-type]
    parameters = 12 * job.width**2 * job.layers + 256 * job.width
    return estimate(of, device(on), parameters).overhead


def overheads(findings: Findings) -> dict[int, list[tuple[Job, float]]]:
    """By n, over the widths: a step and its measured time over the plain one's, less 1."""
    return {
        n: [(times.steps[k], times.ratios[k] - 1) for times in findings.times]
        for k, n in enumerate(_STREAMS, start=1)
    }  # fmt: skip


def fit(widths: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """(a, b) of a + b / C, by least squares."""
    inverse = [1 / width for width in widths]
    mean_x, mean_y = sum(inverse) / len(inverse), sum(measured) / len(measured)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(inverse, measured, strict=True)) / sum(
        (x - mean_x) ** 2 for x in inverse
    )
    return mean_y - slope * mean_x, slope


def _tables(findings: Findings) -> list[Table]:
    tables = []
    for n, found in overheads(findings).items():
        rows = [
            [
                f"C = {job.width}", f"{times.seconds[0] * 1e3:.1f} ms", f"{measured:+.1%}",
                f"{estimated(job, 'cpu', 4):+.1%}", f"{estimated(job, 'h100', 2):+.1%}",
            ]
            for (job, measured), times in zip(found, findings.times, strict=True)
        ]  # fmt: skip
        limit, _ = fit([job.width for job, _ in found], [measured for _, measured in found])
        rows.append(["a + b / C tends to", "-", f"{limit:+.1%}", "+0.0%", "+0.0%"])
        tables.append([[f"n = {n}", "a plain step", "sites add", "cost model, CPU", "H100, bf16"], *rows])
    return tables


def _draw(pyplot: Any, findings: Findings) -> Any:
    figure, axis = pyplot.subplots(figsize=(6.5, 4.5), layout="constrained")
    for (n, found), colour in zip(overheads(findings).items(), ("tab:green", "tab:blue")):
        jobs = [job for job, _ in found]
        widths = [job.width for job in jobs]
        axis.plot(widths, [measured for _, measured in found], color=colour, marker="o", label=f"n = {n}, measured")
        for on, itemsize, style in (("cpu", 4, "--"), ("h100", 2, ":")):
            axis.plot(widths, [estimated(job, on, itemsize) for job in jobs], color=colour, linestyle=style,
                      label=f"n = {n}, cost model, {on}")  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="C", title="what sites add to a training step", xticks=widths,
             xticklabels=widths)  # fmt: skip
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


SCALE = Experiment("What do sites cost as models get wider?", lambda seeds, scale: [], _facts, _tables, _draw, _timed)

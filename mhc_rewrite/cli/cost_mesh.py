"""`mhc-rewrite cost --mesh`: what ranks send one another, and what they wait for, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mhc_rewrite import cost as costs
from mhc_rewrite.cli.cost_tables import estimates, formula_text, numbers_table, prose, section
from mhc_rewrite.cost import Device, Job, Mesh, MeshCost, MeshEstimate
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.printing import plain_table

WAYS = {"fsdp": "FSDP", "dp": "DDP", "tensor": "TP or SP", "pipeline": "pipeline"}

# One row: a mesh and n.
Rows = Sequence[tuple[MeshCost, Job]]


def mesh_tables(title: str, rows: Rows, on: Device, beside: Mapping[str, Mapping[int, float]] | None = None,
                notes: Sequence[str] = ()) -> RenderableType:  # fmt: skip
    """Formulas, bytes and an estimate for each mesh and n.

    Raises:
        ConfigError: there is no figure for a mesh.
    """
    meshes = [of.mesh for of, _ in rows]
    schedules = list(costs.SCHEDULES) if any(mesh.pp > 1 for mesh in meshes) else list(costs.SCHEDULES)[:1]
    estimated, missing = _estimated(rows, on, schedules)
    shown = [way for way in WAYS if any(_axis(mesh, way) > 1 for mesh in meshes)]
    of, job = rows[0]
    twice = "of a pipeline under 1F1B; under DualPipeV, with two stages a rank, twice as many"
    return Group(
        Text(title, style="bold"),
        *_formulas(of, shown),
        *section("bytes that a rank sends in a step: as the model was -> converted", _bytes(rows, shown), prose(twice)),
        *estimates(
            _times(rows, schedules, estimated, beside or {}),
            (*notes, *missing, *costs.mesh_assumptions(of, on, job)),
        ),
    )


def _estimated(
    rows: Rows, on: Device, schedules: Sequence[str]
) -> tuple[dict[tuple[int, str], MeshEstimate], list[str]]:
    """By row and schedule; and why some are not there."""
    found: dict[tuple[int, str], MeshEstimate] = {}
    missing: dict[str, None] = {}
    for k, (of, job) in enumerate(rows):
        errors: list[ConfigError] = []
        for schedule in schedules:
            try:
                found[k, schedule] = costs.estimate_on_mesh(of, on, job, schedule)
            except ConfigError as error:
                errors.append(error)
        if len(errors) == len(schedules):
            raise errors[0]
        missing.update(dict.fromkeys(str(error).rstrip(".") for error in errors))
    return found, list(missing)


def _formulas(of: MeshCost, shown: Sequence[str]) -> list[RenderableType]:
    table = plain_table("bytes", "the model's weights", "blocks and cuts of a stream", "mHC adds to a stream")
    for way, sent in ((way, of.sent[way]) for way in shown):
        table.add_row(WAYS[way], *map(formula_text, (sent.weights, sent.blocks, sent.sites)))
    waited = plain_table("seconds", "waited for in a step")
    for way in shown:
        if way != "pipeline":
            waited.add_row(WAYS[way], formula_text(costs.exposed(way)))
    for name, schedule in costs.SCHEDULES.items() if "pipeline" in shown else ():
        waited.add_row(f"pipeline, {name}", formula_text(schedule.exposed))
    more = f"sites in groups of their own add {formula_text(of.collectives)} collectives to a step of FSDP"
    cut = f"a message right behind the expansion could be {formula_text(of.after_expansion)} bytes"
    names = ", ".join(f"{symbol} = {what}" for symbol, what in costs.MESH_SYMBOLS.items())
    times = ", ".join(f"{symbol} = {what}" for symbol, what in costs.TIME_SYMBOLS.items())
    return [
        *section("sent by a rank in a training step", table),
        *(Padding(prose(text), (0, 0, 0, 2)) for text in (names, f"{more}; {cut}" if of.sites_apart else cut)),
        *section("waited for, by the model below", waited),
        Padding(prose(times), (0, 0, 0, 2)),
    ]


def _bytes(rows: Rows, shown: Sequence[str]) -> RenderableType:
    table = numbers_table("mesh", "ranks", "microbatches", "n", *(f"{WAYS[way]}, GB" for way in shown), "a message, MB")
    for of, job in rows:
        cells = [" -> ".join(f"{value / 1e9:,.3f}" for value in costs.sent_bytes(of, job, way)) for way in shown]
        message = " -> ".join(f"{value / 1e6:,.1f}" for value in of.message(job.tokens)) if of.mesh.pp > 1 else "-"
        table.add_row(str(of.mesh), f"{of.mesh.size:,}", str(job.microbatches), _streams(of), *cells, message)
    return table


def _axis(mesh: Mesh, way: str) -> int:
    return {"fsdp": mesh.fsdp, "dp": mesh.dp, "tensor": mesh.blocks, "pipeline": mesh.pp}[way]


def _streams(of: MeshCost) -> str:
    return of.cost.config.streams_as_text()


def _times(
    rows: Rows, schedules: Sequence[str], found: Mapping[tuple[int, str], MeshEstimate],
    beside: Mapping[str, Mapping[int, float]],
) -> Table:  # fmt: skip
    headers = [
        f"{schedule}:\n{what}" if len(schedules) > 1 else what
        for schedule in schedules
        for what in ("a step, s", "waiting, s", "overhead")
    ]
    table = numbers_table("mesh", "ranks", "n", *headers, *beside)
    for k, (of, _) in enumerate(rows):
        cells: list[str] = []
        for schedule in schedules:
            one = found.get((k, schedule))
            if one is None:
                cells += ["-"] * 3
                continue
            both = (one.original, one.converted)
            cells += [" -> ".join(f"{time.total:.3g}" for time in both)]
            cells += [" -> ".join(f"{time.waiting:.3g}" for time in both), f"{one.overhead:.1%}"]
        theirs = (figures.get(of.cost.config.n) for figures in beside.values())
        table.add_row(
            str(of.mesh), f"{of.mesh.size:,}", _streams(of), *cells,
            *("-" if share is None else f"{share:.1%}" for share in theirs),
        )  # fmt: skip
    return table

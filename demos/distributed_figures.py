"""The figures of docs/distributed.md: what converted models on several processes must reach, and what they do.

    python demos/distributed_figures.py
    python demos/distributed_figures.py --only checkpoint
    python demos/distributed_figures.py --write

Runs cases of the tests in two processes on gloo, on CPUs, and prints a table in Markdown; `--write` puts it into
docs/distributed.md. What does not hold has no figure, and its error is shown. In a clone: the cases live in tests/.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ranks  # noqa: E402

PAGE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- figures: begin -->\n", "<!-- figures: end -->\n"
HEAD = ("| what | bar | reached |", "| --- | --- | --- |")
LIMIT = 1800.0  # seconds a launch


class Launch(NamedTuple):
    """Cases that share processes, in this order."""

    cases: tuple[str, ...]
    world: int = 2
    fails: bool = False  # as it has to


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        what: was run.
        bar: what has to be reached.
        module: of the tests, which holds the cases.
        launches: one after another, in one folder.
        figure: what was reached, to be filled in from what the cases return.
    """

    what: str
    bar: str
    module: str
    launches: tuple[Launch, ...]
    figure: str


def row(what: str, bar: str, module: str, *cases: str, figure: str = "held") -> Row:
    """A row of one launch of two processes."""
    return Row(what, bar, module, (Launch(cases),), figure)


RECIPE, FIGURES, PIPELINE = "rank_cases_recipe", "rank_cases_figures", "rank_cases_pipeline"
ROWS = (
    row(
        "FSDP2, `recompute=` 1, 2, 4, 6, 8, auto; resharded behind forward or not; sites in their layer's group or by "
        "themselves; 8 and 12 layers",
        "no crash, 1e-5", FIGURES, "every_recompute",
        figure="{runs} runs: loss {loss:.0e}, gradients {gradients:.0e}",
    ),
    row(
        "policy in bf16, and weights in bf16, with `shard_sites`", "sites and H in fp32, row sums within 1e-6", FIGURES,
        "bf16_beside_fp32_sites", figure="{dtypes}, row sums within {sums:.1e}",
    ),
    row(
        "gathers + reductions of a step, FSDP2", "as unconverted, but for the sites' own groups", FIGURES,
        "fsdp_traffic", figure="{plain} unconverted, {together} converted, {alone} with `shard_sites`",
    ),
    row(
        "collectives of a step, tensor parallelism; with sequence parallelism", "as unconverted", FIGURES,
        "tensor_traffic", figure="{tp}; {sp}",
    ),
    row(
        "sequence parallelism with plain tensors and with DTensors between the regions, eager and compiled; three "
        "steps of AdamW with clipping",
        "loss 1e-5, gradients 1e-4, equal on all ranks", "rank_cases_tensor", "trains",
        "trains_in_compiled_layers", "trains_compiled",
    ),
    row(
        "stages by `pipeline_stage`, `recompute=3`: GPipe, 1F1B, Interleaved1F1B, InterleavedZeroBubble, ZBV, "
        "DualPipeV",
        "gradients 1e-5, cut (B, T, n, C), 2.5 evaluations a site and microbatch", PIPELINE, "schedules",
        figure="gradients {gradients:.0e}, cut {sent}, {evaluations:.1f} evaluations",
    ),
    Row(
        "two stages, each sharded by FSDP2 over two of four processes", "gradients 1e-5", PIPELINE,
        (Launch(("with_fsdp",), world=4),), "held",
    ),
    row(
        "a Llama on the meta device, sharded, `to_empty`, weights from one rank, `reset_parameters`",
        "equal to a plain start",
        RECIPE, "llama_from_meta", figure="parameters equal to the bit",
    ),
    Row(
        "checkpoint (DCP, also `async_save`) of 2 processes loaded by 2 and by 1", "to the bit; loss 1e-5", RECIPE,
        (
            Launch(("saves_in_the_background", "resumes_to_the_bit", "saves", "resumes_to_the_bit")),
            Launch(("resumes_alone",), world=1),
        ),
        "2: equal to the bit; 1: loss {loss:.0e}",
    ),
    Row(
        "one of 2 processes killed, and a new launch", "losses equal to the bit", RECIPE,
        (Launch(("is_not_killed",)), Launch(("is_killed",), fails=True), Launch(("goes_on_after_the_kill",))),
        "{steps} losses behind the checkpoint equal to the bit",
    ),
    row(
        "boundaries of 4 layers fused by the compiler", "as many as in one process, or why not", FIGURES,
        "all_fused_boundaries",
        figure="one process {one process}, DDP {DDP}, FSDP2 of the model {FSDP2 of the model}, of each layer "
        "{FSDP2 of each layer} (its hooks end a graph at each layer), with `shard_sites` {with sites by themselves}",
    ),
)  # fmt: skip


def reached(row: Row) -> str:
    """Runs a row's launches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for cases, world, fails in row.launches:
            try:
                ranks.run(row.module, *cases, folder=folder, world=world, limit=LIMIT)
            except AssertionError:
                if not fails:
                    raise
        figures: dict[str, Any] = {}
        for file in folder.glob("*.json"):
            figures |= json.loads(file.read_text())
    return row.figure.format_map(figures)


def main(
    only: Annotated[str, typer.Option(help="Rows whose text has this in it.")] = "",
    write: Annotated[bool, typer.Option("--write", help="Put the table into docs/distributed.md.")] = False,
) -> None:
    """Measure the table of docs/distributed.md."""
    console = Console(stderr=True)
    rows = [row for row in ROWS if only in row.what]
    if not rows:
        raise typer.BadParameter("--only is in no row.")
    found, failed = {}, False
    for row in rows:
        began = time.monotonic()
        with console.status(row.what):
            try:
                found[row.what] = said = reached(row)
            except AssertionError as error:
                said, failed = f"FAILED\n{error}", True
        console.print(f"{time.monotonic() - began:5.0f} s  {row.what}: {said}", markup=False, highlight=False)
    print(table(found), end="")
    if write:
        PAGE.write_text(written(PAGE.read_text(), found))
    raise typer.Exit(1 if failed else 0)


def table(found: dict[str, str]) -> str:
    lines = [f"| {row.what} | {row.bar} | {found[row.what]} |" for row in ROWS if row.what in found]
    return "\n".join([*HEAD, *lines]) + "\n"


def marked() -> re.Pattern[str]:
    """What stands between the marks of a page."""
    return re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)


def shown(page: str) -> dict[str, str]:
    """What a page says was reached, by row."""
    inside = marked().search(page)
    if inside is None:
        raise typer.BadParameter(f"{PAGE.name} has no place for the table.")
    lines = [line.strip("| ").split(" | ") for line in inside[0].strip().splitlines()[len(HEAD) :]]
    return {what: figure for what, _, figure in lines}


def written(page: str, found: dict[str, str]) -> str:
    """The page with these figures in place of what it says of the same rows."""
    both = {**shown(page), **found}
    return marked().sub(lambda _: f"\n{table(both)}\n", page)


if __name__ == "__main__":
    typer.run(main)

"""`mhc-rewrite experiment`: what mhc_rewrite/insight/experiments finds, as a table, lines of JSON and a picture."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from mhc_rewrite.cli.bench import pyplot
from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.insight.experiments import EXPERIMENTS, Experiment, Findings, run
from mhc_rewrite.printing import plain_table, plural

Name = Annotated[
    Optional[str],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Argument(metavar="[NAME]", help="Which; without it, the list of them.", show_default=False),
]
Out = Annotated[Path, typer.Option("--out", file_okay=False, help="Folder for NAME.jsonl and NAME.svg.")]
Seeds = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=2, help="Runs of each variant; as the experiment has it.", show_default=False),
]
Scale = Annotated[float, typer.Option(min=0.01, help="Factor for the number of steps of each run.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at once, of one thread each.")]

# Text as text, and one name for its font.
_SMALL = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}


def register(
    app: typer.Typer,
    show: Callable[[RenderableType], None],
    working: Callable[[str], AbstractContextManager[Callable[[str], None]]],
) -> None:
    """Adds the command to an app. `show` prints; what is done within `working` fails with one message."""

    @app.command("experiment")
    def print_experiment(
        name: Name = None, out: Out = Path("demo-output"), seeds: Seeds = None, scale: Scale = 1.0, jobs: Jobs = 2
    ) -> None:
        """Train small models that differ in one thing; goes on where it was stopped."""
        if name is None:
            show(_list())
            return
        with working(f"Experiment {name}") as tell:
            if name not in EXPERIMENTS:
                raise UsageError(f"There is no experiment {name!r}. There are: {', '.join(EXPERIMENTS)}.")
            experiment, drawn, progress = EXPERIMENTS[name], pyplot("experiment"), _Progress(tell)
            findings = run(experiment, out / f"{name}.jsonl", seeds or experiment.seeds, scale, jobs, progress)
            with drawn.rc_context(
                {"svg.fonttype": "none", "svg.hashsalt": name, "font.sans-serif": ["DejaVu Sans"]}
            ):  # small, and the same each time
                figure = experiment.draw(drawn, findings)
                figure.savefig(out / f"{name}.svg", metadata={"Date": None})
            drawn.close(figure)
        show(Group(*tables(experiment, findings), Text(f"results and picture: {out / name}.jsonl, .svg", style="dim")))


class _Progress:
    """`12 of 65 runs, 9 min left`, by the pace of this call's own runs."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.began, self.there = tell, time.monotonic(), 0

    def __call__(self, done: int, count: int, last: str) -> None:
        text = f"{done} of {plural(count, 'run')}"
        if last:
            pace = (time.monotonic() - self.began) / (done - self.there)
            text += f", {pace * (count - done) / 60:.0f} min left"
        else:
            self.there = done
        self.tell(text)


def _list() -> RichTable:
    table = plain_table("name", "question")
    for name, experiment in EXPERIMENTS.items():
        table.add_row(name, experiment.question)
    return table


def tables(experiment: Experiment, findings: Findings) -> list[RenderableType]:
    """What was found, below what all of it has in common."""
    shown: list[RenderableType] = [
        Text(experiment.question, style="bold"), Text(experiment.facts(findings), style="dim"),
    ]  # fmt: skip
    for heading, *rows in experiment.tables(findings):
        table = plain_table(*heading)
        for row in rows:
            table.add_row(*row)
        shown += [Text(), table]
    return shown

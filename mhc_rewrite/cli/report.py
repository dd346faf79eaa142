"""`mhc-rewrite report` and `mhc-rewrite watch`: what insight/report and insight/watching know of a run's file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import RenderableType
from rich.text import Text

from mhc_rewrite.cli import live
from mhc_rewrite.errors import RunFileError
from mhc_rewrite.insight.report.writing import write_report
from mhc_rewrite.insight.watching.format import Scan

RunFile = Annotated[Path, typer.Argument(metavar="RUN.jsonl", help="What mhc_rewrite.watch wrote.", show_default=False)]
Page = Annotated[Path, typer.Option("-o", "--out", dir_okay=False, help="The page: one file, without network.")]
Other = Annotated[
    Optional[Path],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Option("--compare", metavar="OTHER.jsonl", help="Another run, beside it.", show_default=False),
]
Figures = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--figures", file_okay=False, help="Pictures for a paper into this folder, .svg and .pdf.",
                 show_default=False),
]  # fmt: skip
Once = Annotated[bool, typer.Option("--once", help="Show what is there, and end.")]


def register(
    app: typer.Typer,
    show: Callable[[RenderableType], None],
    working: Callable[[str], AbstractContextManager[Callable[[str], None]]],
) -> None:
    """Adds the commands to an app. `show` prints; what is done within `working` fails with one message."""

    @app.command("report")
    def print_report(
        run: RunFile, out: Page = Path("report.html"), compare: Other = None, figures: Figures = None
    ) -> None:
        """Write a page about a watched run: what stands out in words, curves, and all matrices over its steps."""
        with working(f"Reading {run}"):
            written = write_report(run, out, compare=compare, figures=figures)
        show(Text(str(written)))

    @app.command("watch")
    def watch_run(run: RunFile, once: Once = False) -> None:
        """Show a run in progress: figures by site and their way so far; ends with the run, or with Ctrl-C."""
        with working(f"Reading {run}"):
            scan = Scan(run)
        try:
            live.follow(scan, once)
        except RunFileError:
            with working(f"Reading {run}"):
                raise

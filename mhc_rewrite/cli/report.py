"""`mhc-rewrite report` and `mhc-rewrite watch`: what insight/report and insight/watching know of a run's file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from mhc_rewrite.cli import live
from mhc_rewrite.cli.errors import CommandError, UsageError
from mhc_rewrite.errors import RunFileError
from mhc_rewrite.insight.watching.format import Scan
from mhc_rewrite.printing import plural

if TYPE_CHECKING:
    from mhc_rewrite.insight.report.reading import Shown

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
    def write_report(
        run: RunFile, out: Page = Path("report.html"), compare: Other = None, figures: Figures = None
    ) -> None:
        """Write a page about a watched run: what stands out in words, curves, and all matrices over its steps."""
        with working(f"Reading {run}") as tell:
            report = _report()
            first = report.reading.shown(run)
            second = None if compare is None else report.reading.shown(compare)
            names = _names(run, compare)
            tell("drawing")
            _written(out, report.page.page(first, second, names))
            pictures = [] if figures is None else _pictures(report, figures, first, second, names)
        said = report.findings.findings(first)
        if second is not None:
            said = [*report.findings.differences(first, second, names), *said]
        lines = [Text(("! " if one.bad else "  ") + one.text.replace("`", "")) for one in said]
        files = [str(out)] + ([f"{plural(len(pictures), 'picture')} in {figures}"] if pictures else [])
        show(Group(*lines, Text(), *(Text(f"written: {file}", style="dim") for file in files)))

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


def _report() -> Any:
    """The package of reports, which needs what `mhc-rewrite[look]` installs."""
    try:
        import mhc_rewrite.insight.report.figures
        import mhc_rewrite.insight.report.findings
        import mhc_rewrite.insight.report.page
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").split(".")[0]) == "mhc_rewrite":
            raise
        raise CommandError(f'report needs {missing}. Install it with: pip install "mhc-rewrite[look]"') from error
    return mhc_rewrite.insight.report


def _names(run: Path, other: Path | None) -> tuple[str, str]:
    """By which runs are called: the files' names, with their folders where those are alike."""
    if other is None or run.name != other.name:
        return run.name, other.name if other else ""
    mine, others = run.resolve(), other.resolve()
    if mine == others:
        raise UsageError(f"--compare {other}: that is the same file.")
    while mine.parent.name == others.parent.name:
        mine, others = mine.parent, others.parent
    return f"{mine.parent.name}/{run.name}", f"{others.parent.name}/{other.name}"


def _written(file: Path, text: str) -> None:
    if not file.resolve().parent.is_dir():
        raise UsageError(f"{file}: there is no folder {file.parent}.")
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} can't be written: {error.strerror or error}.") from error


def _pictures(report: Any, folder: Path, run: Shown, other: Shown | None, names: tuple[str, str]) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return list(report.figures.write(folder, run, other, names))
    except OSError as error:
        raise UsageError(f"{folder} can't be written: {error.strerror or error}.") from error

"""`write_report`: from the file of a run to its page, its pictures, and what stands out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mhc_rewrite.errors import ReportError
from mhc_rewrite.printing import plural

if TYPE_CHECKING:
    from mhc_rewrite.insight.report.findings import Finding


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote. As text it is what stands out.

    Attributes:
        page: the file.
        findings: what stands out, as on the page: `text`, and whether it is `bad`.
        pictures: the files in `figures`.
    """

    page: Path
    findings: Sequence[Finding]
    pictures: Sequence[Path]

    def __str__(self) -> str:
        lines = [("! " if one.bad else "  ") + one.text.replace("`", "") for one in self.findings]
        written = f"written: {self.page}" + (
            f", {plural(len(self.pictures), 'picture')} in {self.pictures[0].parent}" if self.pictures else ""
        )
        return "\n".join([*lines, "", written])


def write_report(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str] = "report.html",
    *,
    compare: str | os.PathLike[str] | None = None,
    figures: str | os.PathLike[str] | None = None,
) -> Report:
    """Writes a page about a watched run: one file, that fetches nothing.

    Args:
        run: the file that `watch` wrote; the run may go on still.
        out: the page, `.html`.
        compare: the file of another run, to stand beside it.
        figures: a folder for pictures for a paper, as .svg and .pdf.

    Raises:
        RunFileError: a file can't be read, is none of a run, or has no sample yet.
        ReportError: something can't be written, or a library is missing.
    """
    out = Path(out)
    if not out.resolve().parent.is_dir():
        raise ReportError(f"{out} can't be written: there is no folder {str(out.parent)!r}.")
    reading, findings, page, drawing = _parts()
    first = reading.shown(run)
    second = None if compare is None else reading.shown(compare)
    names = _names(Path(run), None if compare is None else Path(compare))
    said = findings.findings(first)
    if second is not None:
        said = [*findings.differences(first, second, names), *said]
    try:
        out.write_text(page.page(first, second, names), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{out} can't be written: {error.strerror or error}.") from error
    pictures: list[Path] = []
    if figures is not None:
        try:
            Path(figures).mkdir(parents=True, exist_ok=True)
            pictures = drawing.write(Path(figures), first, second, names)
        except OSError as error:
            raise ReportError(f"{figures} can't be written: {error.strerror or error}.") from error
    return Report(out, said, pictures)


def _parts() -> tuple[ModuleType, ModuleType, ModuleType, ModuleType]:
    """The files that need libraries which `mhc-rewrite[look]` installs."""
    try:
        from mhc_rewrite.insight.report import figures, findings, page, reading
    except ModuleNotFoundError as error:
        if (missing := (error.name or "").split(".")[0]) == "mhc_rewrite":
            raise
        raise ReportError(f'A report needs {missing}. Install it with: pip install "mhc-rewrite[look]"') from error
    return reading, findings, page, figures


def _names(run: Path, other: Path | None) -> tuple[str, str]:
    """What runs are called: the files' names, with a folder where those are alike."""
    if other is None or run.name != other.name:
        return run.name, other.name if other else ""
    mine, others = run.resolve(), other.resolve()
    if mine == others:
        raise ReportError(f"{other} is the same file: a run is compared with another one.")
    while mine.parent.name == others.parent.name:
        mine, others = mine.parent, others.parent
    return f"{mine.parent.name}/{run.name}", f"{others.parent.name}/{other.name}"

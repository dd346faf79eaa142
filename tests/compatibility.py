"""Writes a row of docs/compatibility.md: what a run of the tests was made with, and how it ended.

python tests/compatibility.py SESSION REPORT, where pytest has written REPORT (`--junit-xml`) in this environment.
"""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

import torch

PAGE = Path(__file__).resolve().parents[1] / "docs" / "compatibility.md"
PACKAGES = ("torch", "triton", "transformers", "torchvision", "timm", "peft", "numpy")
COLUMNS = ("session", "Python", *PACKAGES, "passed", "skipped", "failed")


def row(session: str, report: Path) -> list[str]:
    """The cells of a session: versions of this environment, counts of the report."""
    suites = list(ElementTree.parse(report).iter("testsuite"))
    total, skipped, failed, broken = (
        sum(int(suite.attrib[count]) for suite in suites) for count in ("tests", "skipped", "failures", "errors")
    )
    passed = total - skipped - failed - broken
    versions = (torch.__version__ if package == "torch" else metadata.version(package) for package in PACKAGES)
    return [session, platform.python_version(), *versions, f"{passed:,}", f"{skipped:,}", f"{failed + broken:,}"]


def written(page: str, cells: list[str]) -> str:
    """The page with the row in the place of the session's, or below the others."""
    line = f"| {' | '.join(cells)} |"
    page, known = re.subn(rf"^\| {re.escape(cells[0])} \|.*$", line, page, flags=re.MULTILINE)
    if known:
        return page
    head = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
    before, table, after = page.partition(head)
    assert table, f"{PAGE} has no table that begins with\n{head}"
    rows = re.match(r"(\|.*\n)*", after)
    return f"{before}{head}{rows[0]}{line}\n{after[rows.end() :]}"


if __name__ == "__main__":
    cells = row(sys.argv[1], Path(sys.argv[2]))
    PAGE.write_text(written(PAGE.read_text(), cells))
    print(" | ".join(cells))
    sys.exit(cells[-1] != "0")

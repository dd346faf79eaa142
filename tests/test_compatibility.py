"""docs/compatibility.md has rows of noxfile.py's sessions, in which no test failed, and pyproject.toml's bounds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import compatibility

ROOT = Path(__file__).resolve().parents[1]
REPORT = '<testsuites><testsuite tests="9" skipped="2" failures="1" errors="1"/></testsuites>'


# Not among the fast tests, quick as they are: the table is of those, which could not pass before it says that they do.
not_fast = pytest.mark.slow


def rows() -> dict[str, dict[str, str]]:
    """The table, by session and column."""
    lines = [line.strip("| ").split(" | ") for line in compatibility.PAGE.read_text().splitlines() if line[:1] == "|"]
    start = lines.index(list(compatibility.COLUMNS))
    table = [line for line in lines[start + 2 :] if len(line) == len(compatibility.COLUMNS)]
    return {line[0]: dict(zip(compatibility.COLUMNS, line)) for line in table}


@not_fast
def test_sessions_have_passed() -> None:
    sessions = re.findall(r'^    "(\w+)": \("3', (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert set(rows()) == set(sessions)
    assert {row["failed"] for row in rows().values()} == {"0"}


@not_fast
def test_bounds_are_what_was_tested() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    oldest = rows()["oldest"]
    for package in ("torch", "triton", "transformers", "torchvision", "timm", "peft"):
        bounds = set(re.findall(rf'"{package}>=([0-9.]+)', project))
        assert len(bounds) == 1, (package, bounds)
        assert (oldest[package] + ".").startswith(bounds.pop() + "."), package
    assert oldest["Python"].startswith(re.search(r'requires-python = ">=([0-9.]+)"', project)[1])
    pythons = re.findall(r'^    "\w+": \("(3\.\d+)"', (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    assert set(re.findall(r"Python :: (3\.\d+)", project)) == set(pythons)


def test_a_row_stands_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests.xml").write_text(REPORT)
    monkeypatch.setattr(compatibility, "PACKAGES", ("torch",))
    cells = compatibility.row("oldest", tmp_path / "tests.xml")
    assert cells[-3:] == ["5", "2", "2"]
    head = f"| {' | '.join(compatibility.COLUMNS)} |\n|{' --- |' * len(compatibility.COLUMNS)}\n"
    first = compatibility.written(f"Before\n\n{head}\nAfter\n", ["oldest", "1"])
    assert first == f"Before\n\n{head}| oldest | 1 |\n\nAfter\n"
    second = compatibility.written(first, ["newest", "2"])
    assert second == f"Before\n\n{head}| oldest | 1 |\n| newest | 2 |\n\nAfter\n"
    assert compatibility.written(second, ["oldest", "3"]) == second.replace("| oldest | 1 |", "| oldest | 3 |")

"""The demo of several processes, in its quick setting, and the table of figures."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import distributed_figures
import pytest
import typer

import ranks

DEMO = Path(__file__).resolve().parents[1] / "demos" / "train_distributed.py"
PAGE = (DEMO.parents[1] / "docs" / "distributed.md").read_text()


def cell(printed: str, row: str) -> str:
    (found,) = re.findall(rf"│ {re.escape(row)} +│ (.*?) +│", printed)
    return found


def trained(way: str, folder: Path, *arguments: str, world: int = 2) -> tuple[float, float]:
    """The losses of the first step and the last; the demo itself holds what it does against one process."""
    command = ["--parallel", way, "--quick", "--folder", "checkpoints", *arguments]
    printed = ranks.torchrun(DEMO, *command, folder=folder, world=world)
    processes = "1 process" if world == 1 else f"{world} processes"
    assert printed.count(f"{way}{', bf16' if '--bf16' in arguments else ''}: {processes} on cpu") == 1
    errors = {name: cell(printed, f"{name}: off one process's by") for name in ("loss", "gradients")}
    for error in errors.values():
        (reached, allowed) = re.fullmatch(r"(\S+) \(allowed: (\S+)\)", error).groups()  # type: ignore[union-attr]
        assert float(reached) <= float(allowed)
    return float(cell(printed, "loss of the first step")), float(cell(printed, "loss of the last step"))


@pytest.mark.long
def test_the_demo_resumes_on_another_number_of_processes(tmp_path: Path) -> None:
    first, last = trained("fsdp", tmp_path)
    assert (tmp_path / "checkpoints" / "4" / ".metadata").exists()
    again, end = trained("ddp", tmp_path, "--resume", world=1)
    assert end < again < last < first
    assert (tmp_path / "checkpoints" / "8" / ".metadata").exists()


@pytest.mark.long
@pytest.mark.parametrize("bf16", ([], ["--bf16"]), ids=["fp32", "bf16"])
def test_the_demo_in_every_way(bf16: list[str], tmp_path: Path) -> None:
    """Each from the same start, and each from the checkpoint of the one before."""
    ways = [("ddp", 2), ("fsdp", 4), ("tp", 2), ("pp", 2), ("fsdp+pp", 4)]
    starts = [trained(way, tmp_path / way, *bf16, world=world) for way, world in ways if not (tmp_path / way).mkdir()]
    assert max(first for first, _ in starts) - min(first for first, _ in starts) < (1e-2 if bf16 else 1e-5)
    for number, (way, world) in enumerate(ways, 2):
        assert trained(way, tmp_path / "ddp", "--resume", *bf16, world=world)[1] < starts[0][1]
        assert (tmp_path / "ddp" / "checkpoints" / str(4 * number) / ".metadata").exists()


@pytest.mark.long
def test_the_demo_says_what_it_does_not_do(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="2 or 4 processes"):
        trained("fsdp+pp", tmp_path, world=1)
    with pytest.raises(AssertionError, match="no checkpoint in checkpoints"):
        trained("fsdp", tmp_path, "--resume", world=1)


def test_the_page_has_the_rows_of_the_figures() -> None:
    assert list(distributed_figures.shown(PAGE)) == [row.what for row in distributed_figures.ROWS]


@pytest.mark.parametrize("row", distributed_figures.ROWS, ids=lambda row: row.what)
def test_the_cases_of_a_row_are_there(row: distributed_figures.Row) -> None:
    module = importlib.import_module(row.module)
    assert all(callable(getattr(module, case)) for launch in row.launches for case in launch.cases)


def test_figures_go_between_their_marks() -> None:
    first, *_, last = distributed_figures.ROWS
    page = f"before\n{distributed_figures.BEGIN}{distributed_figures.END}behind\n"
    page = distributed_figures.written(page, {last.what: "3"})
    page = distributed_figures.written(page, {first.what: "1 + 1", last.what: "4"})
    assert distributed_figures.shown(page) == {first.what: "1 + 1", last.what: "4"}
    assert page.startswith("before\n") and page.endswith("behind\n")
    assert f"| {last.what} | {last.bar} | 4 |\n" in page
    with pytest.raises(typer.BadParameter, match="no place"):
        distributed_figures.written("nothing", {})


def test_what_fails_has_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(row: distributed_figures.Row) -> str:
        if row.what == distributed_figures.ROWS[0].what:
            raise AssertionError("out of bounds")
        return "2"

    monkeypatch.setattr(distributed_figures, "reached", fails)
    with pytest.raises(typer.Exit) as ended:
        distributed_figures.main(only="", write=False)
    assert ended.value.exit_code == 1
    said = capsys.readouterr()
    assert "out of bounds" in said.err and said.out.count(" | 2 |\n") == len(distributed_figures.ROWS) - 1


@pytest.mark.long
def test_a_row_is_what_its_cases_reach(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        distributed_figures.main(only="gathers", write=False)
    assert ended.value.exit_code == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3 and "9 + 5 unconverted, 9 + 5 converted, 17 + 13 with" in printed[2]

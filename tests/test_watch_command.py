"""`mhc-rewrite watch`: a run in progress in the terminal, and where stdout is none."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import report_runs
from mhc_rewrite.cli import live
from mhc_rewrite.cli.main import app

COMMAND = [sys.executable, "-m", "mhc_rewrite.cli.main", "watch"]
PATIENCE = 120.0


def called(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["watch", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, done.output


def row(printed: str, name: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
    return " ".join(line.removeprefix(name).split())


def test_once(tmp_path: Path) -> None:
    file = report_runs.write(tmp_path / "run.jsonl", samples=40, end=None)
    code, printed = called("--once", file)
    assert code == 0 and "LlamaForCausalLM, 8 sites" in printed and "step 390, 40 samples, running" in printed
    assert row(printed, "loss").startswith("6 2.") and "█" in row(printed, "loss")
    assert row(printed, "composite gain, backward").startswith("1 1.3 ▁")
    # Told of is the site where it is worst.
    assert row(printed, "composite gain, backward").endswith("█ model.layers.0.mhc_0")
    assert row(printed, "entropy of H_pre").endswith("▁ model.layers.3.mhc_1")
    assert "\x1b" not in printed


def test_what_is_the_matter_is_said(tmp_path: Path) -> None:
    def change(sample: dict, k: int, of: int) -> None:
        sample["dead"]["res"], sample["loss"], sample["notes"] = [0, 1], None, ["Compilation was paused."]
        del sample["figures"]["spread"]

    code, printed = called("--once", report_runs.write(tmp_path / "run.jsonl", change=change, end="KeyError: x"))
    assert code == 0 and "No gradient above 1e-08: H_res of 2 sites." in printed and "failed: KeyError: x" in printed
    assert "Compilation was paused." in printed and row(printed, "loss") == "- -" and "streams apart" not in printed


def test_bad_files_end_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "other.jsonl").write_text("{}\n")
    for name, says in (("empty", "holds no line yet"), ("other", "no file of a watched run"), ("none", "be read")):
        code, printed = called(tmp_path / f"{name}.jsonl")
        assert code == 1 and printed.startswith("error: ") and says in " ".join(printed.split())
    (tmp_path / "begun.jsonl").write_text(json.dumps(report_runs.header(4).to_dict()) + "\n")
    code, printed = called("--once", tmp_path / "begun.jsonl")
    assert code == 0 and "No sample yet: one is taken at every 10 steps." in printed and "running" in printed


@pytest.mark.parametrize(
    "values, width, text",
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8, "▁▂▃▄▅▆▇█"),
        ([1.0, 10.0, 100.0], 3, "▁▅█"),  # of logarithms: 10 is half-way
        ([5.0], 8, "▁"),
        ([2.0] * 9, 3, "▁▁▁"),
        ([0.0, float("nan"), 1.0], 3, "▁ █"),
        ([float("nan")] * 2, 8, "  "),
        ([0.0] * 50 + [8.0] * 50, 2, "▁█"),
        ([], 8, ""),
    ],
)
def test_sparklines(values: list[float], width: int, text: str) -> None:
    assert live.spark(values, width) == text


def append(file: Path, k: int, of: int = 9) -> None:
    with file.open("a") as opened:
        opened.write(json.dumps(report_runs.sample(k, of, 8)) + "\n")


@pytest.mark.slow
def test_a_pipe_gets_a_line_a_sample_until_the_end(tmp_path: Path) -> None:
    file = report_runs.write(tmp_path / "run.jsonl", samples=2, end=None)
    with subprocess.Popen([*COMMAND, str(file)], stdout=subprocess.PIPE, text=True, env=environment()) as watching:
        assert watching.stdout is not None
        lines = iter(watching.stdout.readline, "")
        assert next(lines).startswith("step 0  loss 6  composite gain, forward 1") and next(lines).startswith(
            "step 10 "
        )
        append(file, 2)
        assert next(lines).startswith("step 20 ")
        append(file, 1)  # from a checkpoint, once more
        assert next(lines).startswith("step 10 ")
        with file.open("a") as opened:
            opened.write('{"end": "finished"}\n')
        assert list(lines) == ["finished\n"] and watching.wait(PATIENCE) == 0


@pytest.mark.slow
def test_a_terminal_gets_a_table_that_follows_until_ctrl_c(tmp_path: Path) -> None:
    file = report_runs.write(tmp_path / "run.jsonl", samples=2, end=None)
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        [*COMMAND, str(file)], stdin=theirs, stdout=theirs, stderr=theirs, env={**environment(), "TERM": "xterm"}
    )
    os.close(theirs)
    try:
        seen = read_until(ours, "step 10, 2 samples, running")
        append(file, 2)
        read_until(ours, "step 20, 3 samples, running")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE) == 0 and "\x1b[" in seen
    finally:
        watching.kill()
        os.close(ours)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1]), "COLUMNS": "120"}


def read_until(terminal: int, text: str) -> str:
    seen, end = "", time.monotonic() + PATIENCE
    while text not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 1.0)[0]:
            seen += os.read(terminal, 1 << 16).decode("utf-8", "replace")
    return seen

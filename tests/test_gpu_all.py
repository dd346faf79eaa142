"""demos/gpu_all.py on the CPU: it runs from a checkout, loses nothing where a part fails, and takes times rightly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEMOS = ROOT / "demos"


@pytest.fixture
def demos() -> Iterator[None]:
    sys.path.insert(0, str(DEMOS))
    yield
    sys.path.remove(str(DEMOS))


def dry_run(folder: Path, *options: str) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """The rows of each part, and the log."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, str(DEMOS / "gpu_all.py"), "--out", str(folder / "out"), "--tiny", "--budget", "900"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "out" / "gpu.json").read_text())
    of = {part: [row for row in rows if row["part"] == part] for part in {row["part"] for row in rows}}
    return of, (folder / "out" / "log.txt").read_text()


@pytest.mark.slow
def test_a_dry_run(tmp_path: Path) -> None:
    of, log = dry_run(tmp_path, "--parts", "checks,times")
    assert {row["job"]: row["rc"] for row in of["jobs"]} == {"checks:0:1": 0, "times:0:1": 0}, log
    assert len(of["checks"]) == 8 + 2 and not any(row["wrong"] for row in of["checks"])
    assert len(of["times"]) == 4 * 8


@pytest.mark.long
def test_a_dry_run_of_every_part(tmp_path: Path) -> None:
    of, log = dry_run(tmp_path)
    assert {row["job"]: row["rc"] for row in of["jobs"]} == {
        **{f"{part}:0:1": 0 for part in ("checks", "compile", "sweep", "training", "times")},
        "models:0:4": 0,
        "warm:1:4": 0,
    }, log
    assert len(of["checks"]) == 8 + 2 and not any(row["wrong"] for row in of["checks"])
    assert len(of["models"]) == 12 and all(row["right"] for row in of["models"]), of["models"]
    assert not any("failed" in row for row in of["warm"] + of["sweep"] + of["training"]), log
    assert all(row["error"] < 2e-2 for row in of["sweep"])
    assert len(of["times"]) == 4 * 8 and len(of["training"]) == 6
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text.count("\n## ") == 5 and "converted, compiled, recomputed" in text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.md", "log.txt", "rows.jsonl"]


def test_a_job_that_outlasts_its_limit_is_ended_and_the_others_are_not_lost(
    demos: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    import gpu_all

    popen = subprocess.Popen

    def stands_in(command: list[str], **options: Any) -> Any:
        part = command[command.index("--job") + 1].split(":")[0]
        body = {"checks": "import time; time.sleep(60)", "times": "raise SystemExit(3)", "sweep": "print('said')"}[part]
        return popen([sys.executable, "-c", body], **options)

    monkeypatch.setattr(subprocess, "Popen", stands_in)
    jobs = [gpu_all.Job(part, 0, 1, limit) for part, limit in (("checks", 1.0), ("times", 30.0), ("sweep", 30.0))]
    gpu_all.run_jobs(jobs, 2, tmp_path, time.monotonic() + 40, tiny=False)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["job"]: row["rc"] for row in rows} == {"checks:0:1": -9, "times:0:1": 3, "sweep:0:1": 0}
    assert "said" in (tmp_path / "log.txt").read_text()
    gpu_all.run_jobs(jobs[:1], 1, tmp_path, time.monotonic(), tiny=False)
    assert "no time left" in (tmp_path / "rows.jsonl").read_text().splitlines()[-1]


def test_the_queue_gets_a_head_start(demos: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is asked, once the host is through, whether it began already; then all is done again, later."""
    import gpu_times

    writes = 0

    class Spoil:
        def zero_(self) -> None:
            nonlocal writes
            writes += 1

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return writes < 10

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = gpu_times.Clock("cpu")
    clock._spoil = Spoil()  # type: ignore[assignment]
    calls: list[str] = []
    timing = clock(lambda: calls.append("call"), lambda: calls.append("before"))
    assert (timing.device, timing.ahead) == (2e-3, True)
    assert writes == 2 + 4 + 8 and calls == ["before", "call"] * 3

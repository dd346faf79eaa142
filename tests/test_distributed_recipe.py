"""What people do with several processes: wrappers' options, checkpoints, trainers, compilers; the demo of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ranks

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow

CASES = [
    "ddp_options",
    "ddp_accumulates",
    "fsdp_root_only",
    "fsdp_offloaded",
    "sites_of_stages_are_checked",
    "clipped_steps",
]
LONG = [
    "all_fused_boundaries",
    "every_recompute",
    "compiled_ddp",
    "compiled_fsdp",
    "compiled_fsdp_further",
    "compiled_recompute",
]


def test_two_processes(tmp_path: Path) -> None:
    ranks.run("rank_cases_recipe", *CASES, folder=tmp_path)


@pytest.mark.long
def test_compilers_fuse_what_they_see(tmp_path: Path) -> None:
    ranks.run("rank_cases_figures", "some_fused_boundaries", folder=tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", LONG)
def test_two_processes_for_long(case: str, tmp_path: Path) -> None:
    ranks.run("rank_cases_figures", case, folder=tmp_path, limit=900)


def test_checkpoints(tmp_path: Path) -> None:
    """To the bit in as many processes, in one of a loss of 1e-5; written at once and in the background."""
    ways = "saves_in_the_background", "saves"
    cases = [case for way in ways for case in (way, "resumes_to_the_bit")]
    ranks.run("rank_cases_recipe", *cases, "full_state_dicts", folder=tmp_path)
    ranks.run("rank_cases_recipe", "resumes_alone", folder=tmp_path, world=1)


@pytest.mark.long
def test_a_killed_rank_and_a_new_launch(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is_killed: failed"):
        ranks.run("rank_cases_recipe", "is_not_killed", "is_killed", folder=tmp_path)
    ranks.run("rank_cases_recipe", "goes_on_after_the_kill", folder=tmp_path)


@pytest.mark.long
def test_trainers(tmp_path: Path) -> None:
    for world in (2, 1):
        ranks.run("rank_cases_recipe", "trainer", "accelerates", "llama_from_meta", folder=tmp_path, world=world)


# -- the harness itself ------------------------------------------------------------------------------------------------


def are_gone(folder: Path) -> bool:
    """Whether the processes that said who they are have ended."""
    numbers = [int(number) for file in folder.glob("pids*") for number in file.read_text().split()]
    assert len(numbers) >= 2
    end = time.monotonic() + 10
    while (left := [number for number in numbers if runs(number)]) and time.monotonic() < end:
        time.sleep(0.05)
    return not left


def runs(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="of the second one"):
        ranks.run("rank_cases_recipe", "fails_beside_one_that_waits", folder=tmp_path)
    assert are_gone(tmp_path)


def test_nothing_is_left_of_a_test_that_is_killed(tmp_path: Path) -> None:
    code = f"import pathlib, ranks; ranks.run('rank_cases_recipe', 'waits', folder=pathlib.Path({str(tmp_path)!r}))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    test = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("pids*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.2)
    finally:
        test.send_signal(signal.SIGKILL)
        test.wait()
    assert are_gone(tmp_path)

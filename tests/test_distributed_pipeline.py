"""Pipelines of stages that `pipeline_stage` makes: two processes on gloo, four with FSDP, against one."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

pytestmark = pytest.mark.slow


def test_two_processes(tmp_path: Path) -> None:
    ranks.run("rank_cases_pipeline", "schedules", folder=tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", ["without_recompute", "without_sites", "cut_by_pipeline", "with_tensor_parallelism"])
def test_further(case: str, tmp_path: Path) -> None:
    ranks.run("rank_cases_pipeline", case, folder=tmp_path, limit=300)


@pytest.mark.long
def test_four_processes(tmp_path: Path) -> None:
    ranks.run("rank_cases_pipeline", "with_fsdp", folder=tmp_path, world=4, limit=300)

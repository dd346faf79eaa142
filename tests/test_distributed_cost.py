"""Bytes that two processes really exchange, against the cost model's formulas."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

pytestmark = pytest.mark.slow


def test_bytes_are_the_formulas(tmp_path: Path) -> None:
    cases = ("fsdp_bytes", "fsdp_collectives", "ddp_bytes", "tp_bytes", "sp_bytes", "pipeline_bytes")
    ranks.run("rank_cases_cost", *cases, folder=tmp_path)

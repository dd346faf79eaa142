"""Tensor and sequence parallelism: two processes on gloo, against one."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

pytestmark = pytest.mark.slow

CASES = {
    "operators": ["sites_on_dtensors"],
    "training": ["counts", "trains"],
    "sites": ["tensor_parallel_alone", "wrong_gradients_are_found", "wrong_use_is_refused", "sites_keep_their_ways"],
}


@pytest.mark.parametrize("kind", CASES)
def test_two_processes(kind: str, tmp_path: Path) -> None:
    ranks.run("rank_cases_tensor", *CASES[kind], folder=tmp_path)

"""Converted models on torch.distributed: two processes on gloo, against one."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

pytestmark = pytest.mark.slow


def test_fsdp(tmp_path: Path) -> None:
    cases = "fsdp_fp32", "fsdp_bf16_policy", "fsdp_norm_behind_the_streams"
    ranks.run("rank_cases", *cases, "fsdp_back_to_the_original", "fsdp_starts_anew", folder=tmp_path)


def test_fsdp_recompute(tmp_path: Path) -> None:
    ranks.run("rank_cases", "fsdp_recompute", folder=tmp_path)

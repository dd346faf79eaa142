"""Converted models on torch.distributed: two processes on gloo, against one."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

pytestmark = pytest.mark.slow


CASES = {
    "fsdp": ["fsdp_fp32", "fsdp_bf16_policy", "fsdp_bf16_weights", "fsdp_collectives", "fsdp_norm_behind_the_streams"],
    "fsdp recompute": ["fsdp_recompute", "fsdp_sites_by_themselves"],
    "fsdp in time": ["fsdp_back_to_the_original", "fsdp_starts_anew", "fsdp_new_kind_of_call"],
    "fsdp further": ["fsdp_replicas", "fsdp_accumulates", "fsdp_checkpointed"],
    "too late": ["fsdp_refuses_conversion", "ddp_refuses_conversion", "tp_refuses_conversion"],
    "pipelines": ["pipeline_of_converted_stages", "pipeline_of_a_converted_model"],
    "others": ["ddp", "sites_are_checked", "tp", "tp_of_transformers"],
}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.long) if kind in ("fsdp further", "fsdp in time") else kind
        for kind in CASES
    ],
)
def test_two_processes(kind: str, tmp_path: Path) -> None:
    ranks.run("rank_cases", *CASES[kind], folder=tmp_path)


def test_an_error_of_one_rank_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)-- rank 1:.*of the second one"):
        ranks.run("rank_cases", "fails_on_one", folder=tmp_path)


def test_what_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not done after 5 s"):
        ranks.run("rank_cases", "hangs", folder=tmp_path, limit=5)

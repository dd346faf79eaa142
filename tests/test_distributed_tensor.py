"""Tensor and sequence parallelism: two processes on gloo, against one."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks
from mhc_rewrite.torch_private import optimizers_sum_shares

pytestmark = pytest.mark.slow

CASES = {
    "sites": [
        "counts",
        "tensor_parallel_alone",
        "loss_in_parts",
        "wrong_gradients_are_found",
        "wrong_use_is_refused",
        "sites_keep_their_ways",
    ],
    "others": ["with_fsdp", "others_see_the_trunk"],
}
TRAINING = pytest.mark.skipif(
    not optimizers_sum_shares(), reason="AdamW of torch 2.11 squares shares of a gradient's sum, of norms too"
)
DTENSORS = ["sites_on_dtensors", "results_that_nobody_uses", "kinds_on_dtensors", "dropout_on_dtensors"]
COMPILED = ["trains_in_compiled_layers", "trains_compiled", "trains_by_inductor", "trains_by_mhc"]


@pytest.mark.parametrize("kind", ["sites", pytest.param("others", marks=pytest.mark.long)])
def test_two_processes(kind: str, tmp_path: Path) -> None:
    ranks.run("rank_cases_tensor", *CASES[kind], folder=tmp_path)


def test_dtensors(tmp_path: Path) -> None:
    ranks.run("rank_cases_dtensor", *DTENSORS, folder=tmp_path)


@TRAINING
def test_training(tmp_path: Path) -> None:
    ranks.run("rank_cases_tensor", "trains", folder=tmp_path)


@TRAINING
@pytest.mark.long
@pytest.mark.parametrize("case", COMPILED)
def test_compiled(case: str, tmp_path: Path) -> None:
    ranks.run("rank_cases_tensor", case, folder=tmp_path, limit=600)


@pytest.mark.long
def test_four_processes(tmp_path: Path) -> None:
    ranks.run("rank_cases_tensor", "in_two_dimensions", folder=tmp_path, world=4, limit=300)

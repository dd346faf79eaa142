"""`mhc-rewrite bench`: sizes, ways to run, files. Seconds are not looked at."""

# ruff: noqa: F811 (the fixture `folder` is another module's)

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite.cli import bench as command
from mhc_rewrite.insight import bench
from mhc_rewrite.insight.bench import Measured, Workload
from test_cli import folder, run  # noqa: F401 (folder is a fixture)

TOKENS = """
import torch
from torch import nn

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids, scale):
        x = self.table(ids) * scale
        for layer in self.layers:
            x = x + layer(x)
        return x

def make():
    return Tokens(), {"ids": torch.tensor([[1, 2, 3]]), "scale": torch.ones(1, 1, 1)}
"""

FIGURES = [
    Measured("original", "eager", 0.5, 1.0, None, None, 10_000_000, 20_000_000),
    Measured("converted", "mhc", 0.25, 1.0625, None, 3.25, 15_000_000, 25_000_000),
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Workload, dict[str, object]]]:
    """What would have been measured."""
    found: list[tuple[Workload, dict[str, object]]] = []

    def measured(workload: Workload, **options: object) -> list[Measured]:
        found.append((workload, options))
        return FIGURES

    monkeypatch.setattr(bench, "bench", measured)
    return found


def test_a_run(folder: Path) -> None:
    result = run("bench", "nets.py:make", "--no-compiled", "--no-fresh", "--rounds", "1", "--threads", "1")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("model: nets.py:make, 282 parameters, n = 4") and "inputs: 0 (2, 4, 8)" in lines
    assert "building the model" in result.stderr
    rows = [line.split() for line in lines if line.startswith(("original", "converted"))]
    assert [row[:2] for row in rows] == [["original", "eager"], ["converted", "eager"]] and rows[0][3] == "1.000"
    assert "compilation" not in result.stdout and "launches" not in result.stdout


def test_options_reach_the_benchmark(folder: Path, asked: list[tuple[Workload, dict[str, object]]]) -> None:
    result = run(
        "bench", "nets.py:make", "--n", "3", "--forward", "--autocast", "bf16", "--recompute", "2", "--rounds", "5",
        "--peers", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    ((workload, options),) = asked
    assert (workload.config.n_streams, workload.config.recompute) == (3, 2)
    assert (workload.training, workload.autocast, workload.device) == (False, torch.bfloat16, "cpu")
    assert options["backends"] == ["eager", "mhc"] and options["rounds"] == 5 and options["fresh"] is True
    assert "liger-kernel" not in options["peers"] and "left out: liger-kernel: it runs on cuda only" in result.stdout
    assert "step: forward, autocast torch.bfloat16, recompute 2" in result.stdout


def test_files(folder: Path, asked: object) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra `demo`")
    result = run("bench", "nets.py:make", "--json", "a.json", "--csv", "a.csv", "--plot", "a.png")
    assert result.exit_code == 0, result.output
    data = json.loads((folder / "a.json").read_text())
    assert data["settings"]["model"].startswith("nets.py:make") and data["measured"][1]["ratio"] == 1.0625
    with (folder / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["peak"] for row in rows] == ["20000000", "25000000"] and rows[0]["compilation"] == ""
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "converted  mhc        0.25  1.062             3.2        15        25" in result.stdout


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("--json", "no/a.json"), "no/a.json: there is no folder no."),
        (("--plot", "a.bmpx"), "--plot a.bmpx: "),
        (("--recompute", "some"), 'recompute must be a number of sites from 1 on, "auto" or None'),
        (("--recompute", "0"), "recompute must be a number of sites"),
    ],
)
def test_wrong_options(folder: Path, asked: object, arguments: tuple[str, ...], message: str) -> None:
    result = run("bench", "nets.py:make", *arguments)
    assert result.exit_code in (1, 2) and f"error: {message}" in " ".join(result.stderr.split())


def test_inputs_that_the_model_does_not_take(folder: Path) -> None:
    (folder / "words.py").write_text(TOKENS.replace("ids) * scale", "ids + 7) * scale"))
    result = run("bench", "words.py:make", "--no-compiled", "--no-fresh")
    assert result.exit_code == 1, result.output
    said = " ".join(result.stderr.split())
    assert "error: Tokens can't be called with these inputs, of the shapes (1, 3), (1, 1, 1): IndexError:" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_no_gpu(folder: Path) -> None:
    result = run("bench", "nets.py:make", "--device", "cuda")
    assert result.exit_code == 2 and "torch sees no GPU here" in result.stderr


@pytest.mark.parametrize(
    "batch,length,ids", [(None, None, [[1, 2, 3]]), (2, 5, [[1, 2, 3, 1, 2]] * 2), (1, 2, [[1, 2]])]
)
def test_sizes(folder: Path, batch: int | None, length: int | None, ids: list[list[int]]) -> None:
    """Rows of every tensor, columns of token ids alone."""
    (folder / "words.py").write_text(TOKENS)
    model, inputs = command.load("words.py:make", (), batch, length)
    assert isinstance(model, nn.Module) and isinstance(inputs, dict)
    assert inputs["ids"].tolist() == ids and inputs["scale"].shape == (batch or 1, 1, 1)


def test_length_of_a_model_without_inputs() -> None:
    pytest.importorskip("transformers", reason="hf: models need the extra `hf`")
    _, inputs = command.load("hf:gpt2", (), 3, None)
    assert isinstance(inputs, dict) and isinstance(inputs["input_ids"], Tensor)
    assert inputs["input_ids"].shape == (3, 128)

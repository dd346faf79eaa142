"""The sweep on a few models: what it says of them, that its oracle can fail, and the table that it prints."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import sweep
import sweep_oracle
from handmade import nested
from handmade.common import Kind
from mhc_rewrite import mhcify, report
from mhc_rewrite.errors import UnsupportedModelError
from oracle import perturb, site_params


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.f, self.g = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(self.norm(x))
        return (x + self.g(x)).relu()


class Net(nn.Module):
    """What counts as a model of timm: its config says what pictures it takes."""

    default_cfg = {"input_size": (3, 8, 8)}

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.Sequential(*(Block() for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


def examined(build: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        sweep.examine(build, row)
    except sweep.Broken as broken:
        row.update(verdict=broken.verdict, reason=str(broken))
    return row


def test_a_row() -> None:
    """Counts and errors of a model that converts; its statistics do not tell the two runs apart."""
    row = examined(lambda: Net(2).eval())
    assert row["verdict"] == "exact" and row["sites"] == row["adds"] == 4 and row["streams"] == 1, row
    assert row["class"] == "Net" and row["inputs"] == {"0": [2, 3, 8, 8]}
    assert max(row["evaluation"], row["training"], row["perturbed"], row["gradients"]) < 1e-12


def test_models_without_a_stream_or_an_example() -> None:
    assert examined(lambda: Net(0).eval())["verdict"] == "no residual"
    assert examined(lambda: nn.Linear(3, 3))["verdict"] == "no example"
    assert examined(lambda: [][0])["verdict"] == "does not build"


def test_a_refusal_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise UnsupportedModelError("for a reason")

    monkeypatch.setattr("mhc_rewrite.mhcify", refused)
    row = examined(lambda: Net(2).eval())
    assert row["verdict"] == "refused" and row["reason"] == "UnsupportedModelError: for a reason"


class Drawing(Net):
    """Draws from numpy in training, as augmentations of spectra do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + numpy.random.rand() if self.training else x)


def test_a_model_that_draws_from_numpy_begins_with_the_same_numbers() -> None:
    row = examined(lambda: Drawing(2).eval())
    assert row["verdict"] == "exact", row


class Sharp(Net):
    """The last digits of fp64 are seen in its fifth, as behind parts in fp32 and many sharp layers."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + torch.sin(1e12 * x)


@pytest.mark.parametrize("factor", [1.0, 1.002])
def test_a_model_is_held_to_its_own_rounding(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not to more: what is wrong by as much as rounding is not told from it, what is wrong by more is."""
    convert = mhcify

    def converted(model: nn.Module) -> None:
        convert(model)
        model.register_forward_hook(lambda module, args, result: factor * result)

    monkeypatch.setattr("mhc_rewrite.mhcify", converted)
    row = examined(lambda: Sharp(2).eval())
    assert row["evaluation"] > sweep.START
    assert row["verdict"] == ("exact" if factor == 1.0 else "wrong"), row
    assert ("own rounding" in row["note"]) == (factor == 1.0)


@pytest.mark.parametrize("wrong", ["parameters", "order", "ignored"])
def test_the_oracle_can_fail(wrong: str) -> None:
    """It tells a conversion with another site's parameters, with two sites exchanged, or with none, from the right."""
    torch.manual_seed(0)
    model = Net(2).double().eval()
    run = sweep_oracle.Run(copy.deepcopy(model), (torch.randn(2, 3, 8, 8, dtype=torch.float64),), {})
    picture = run.kept[0]
    mhcify(model, (picture,))
    perturb(model)
    plan = report(model).plan
    named = dict(model.named_parameters())
    parameters = {site.name: site_params(named, site.name) for site in plan.sites}
    got = sweep_oracle.tensors_of(model(picture))
    right = sweep._error(got, sweep_oracle.tensors_of(run.replay(plan.streams, parameters, 4, 1e-6)))
    first, second, *_ = parameters
    if wrong == "parameters":
        parameters[first] = parameters[first]._replace(bias=parameters[first].bias + 0.1)
    elif wrong == "order":
        parameters[first], parameters[second] = parameters[second], parameters[first]
    streams = [] if wrong == "ignored" else plan.streams
    off = sweep._error(got, sweep_oracle.tensors_of(run.replay(streams, parameters, 4, 1e-6)))
    assert right < 1e-12 and off > 1e-3


@pytest.mark.parametrize("kind", (*nested.KINDS, *nested.ADAPTED), ids=str)
def test_the_oracle_reads_trunks_as_one_does_by_hand(kind: Kind) -> None:
    """Trunks within blocks, beside one another, and on a part of the tokens; test_nested has the models by hand."""
    model, arguments = kind.model(), kind.arguments()
    run = sweep_oracle.Run(copy.deepcopy(model), arguments, {})
    mhcify(model, arguments)
    perturb(model)
    planned, named = report(model).plan, dict(model.named_parameters())
    parameters = {site.name: site_params(named, site.name) for site in planned.sites}
    wanted = sweep_oracle.tensors_of(run.replay(planned.streams, parameters, 4, 1e-6))
    assert sweep._error(sweep_oracle.tensors_of(model(*arguments)), wanted) < 1e-12


def test_numbers_that_are_none_are_never_right() -> None:
    one, none = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert sweep._error([one], [none]) == sweep._error([none], [one]) == float("inf")
    assert sweep._error([one], [one[:1]]) == float("inf") and sweep._error([none], [none]) == 0.0


def test_the_table(tmp_path: Path) -> None:
    rows = [
        {"library": "timm", "name": "one", "verdict": "exact", "sites": 4, "streams": 1, "adds": 4, "seconds": 0.5,
         "inputs": {"0": [2, 3, 8, 8]}, "evaluation": 1e-16, "training": None, "perturbed": 0.0, "gradients": 2e-15},
        {"library": "timm", "name": "two", "verdict": "refused", "reason": "CaptureError: a | b"},
    ]  # fmt: skip
    sweep.write_coverage(rows, tmp_path / "coverage.md")
    text = (tmp_path / "coverage.md").read_text()
    assert "| one | 0 2x3x8x8 | 4 | 1 | 4 | 1e-16 | - | 0 | 2e-15 | 0.5 | exact |" in text
    assert "- two: CaptureError: a / b" in text and "| timm | 2 | 1 | 1 | 0 |" in text


@pytest.mark.slow
@pytest.mark.long
def test_two_models_in_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(Path(__file__).parent / "sweep.py"), "timm", "transformers", "--only", "test_vit",
               "--only", "gpt2", "--jobs", "2", "--out", str(out)]  # fmt: skip
    subprocess.run(command, check=True)
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert {name: row["verdict"] for name, row in rows.items()} == {"gpt2": "exact", "test_vit": "exact"}
    assert rows["gpt2"]["sites"] == rows["gpt2"]["adds"] == 8 and rows["test_vit"]["perturbed"] < 1e-12
    again = subprocess.run([*command, "--resume"], check=True, capture_output=True, text=True)
    assert len(out.read_text().splitlines()) == 4 and "{'exact': 2}" in again.stdout  # a model's last row counts

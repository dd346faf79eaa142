"""Experiments: what is measured, on runs of a few steps; resuming; how they read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mhc_rewrite.cli.experiment import tables
from mhc_rewrite.cli.main import app
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.insight.experiments import EXPERIMENTS, run
from mhc_rewrite.insight.experiments.base import Experiment, Job, Result, as_row, from_row
from mhc_rewrite.insight.experiments.training import LOOKS, Decoder, batches, text, train
from mhc_rewrite.printing import as_text

TINY = {"steps": 8, "layers": 2, "width": 16, "heads": 2, "length": 12, "batch": 2}


def job(variant: str = "preserve", init: str | None = "preserve", seed: int = 0, **fields: object) -> Job:
    return Job(variant, seed, init, **{**TINY, **fields})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_run(tmp_path: Path) -> None:
    residual, preserve = train(job("residual", None), tmp_path), train(job(), tmp_path)
    for result in (residual, preserve):
        assert [look.step for look in result.looks] == list(range(LOOKS + 1)) and result.seconds > 0
        assert from_row(json.loads(json.dumps(as_row(result)))) == result
    first, last = preserve.looks[0], preserve.looks[-1]
    assert abs(first.held_out - residual.looks[0].held_out) < 1e-5  # one function
    assert abs(last.held_out - residual.looks[-1].held_out) > 1e-6  # and two trainings
    assert min(first.gradients.values()) > 0 and first.moved == 0 and last.moved > 0 and first.apart > 0
    assert residual.looks[-1].gradients == {}
    assert train(job(), tmp_path).looks == preserve.looks


def test_half_way_goes_on_with_what_was_trained(tmp_path: Path) -> None:
    residual = train(job("residual", None), tmp_path)
    (weights,) = tmp_path.iterdir()
    went_on = train(job(half_way=True), tmp_path)
    assert abs(went_on.looks[0].held_out - residual.looks[-1].held_out) < 1e-5
    weights.unlink()  # as after a stop
    assert train(job(half_way=True), tmp_path).looks == went_on.looks


def test_strengths(tmp_path: Path) -> None:
    """They change the start and not the function."""
    weak, strong = (train(job(strengths=s), tmp_path).looks[0] for s in ((0.1, 0.1, 0.1), (0.9, 0.9, 0.5)))
    assert abs(weak.held_out - strong.held_out) < 1e-5 and strong.apart > 3 * weak.apart


def test_batches_are_of_the_text_and_of_the_seed() -> None:
    train_on, held_out = text()
    assert len(train_on) > 5 * len(held_out) > 0
    one, again, other = (next(batches(train_on, job(), seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and one.shape == (2, 13)
    model = Decoder(job())
    changed = one.clone()
    changed[:, -2] = (changed[:, -2] + 1) % 256
    seen, after = model(one[:, :-1]), model(changed[:, :-1])
    assert torch.allclose(seen[:, :-1], after[:, :-1]) and not torch.allclose(seen[:, -1], after[:, -1])  # causal


def tiny(seeds: int, scale: float) -> list[Job]:
    runs = [job(v, init, seed) for seed in range(seeds) for v, init in (("residual", None), ("preserve", "preserve"))]
    return [*runs, *(dataclasses.replace(one, half_way=True) for one in runs)]


SMALL = Experiment("A question?", tiny, EXPERIMENTS["start"].columns, EXPERIMENTS["start"].draw)


def test_results_are_kept_and_not_made_again(tmp_path: Path) -> None:
    file, told = tmp_path / "small.jsonl", []
    results = run(SMALL, file, 2, 1.0, 1, lambda *what: told.append(what))
    assert [one.job for one in results] == tiny(2, 1.0) and told[-1][:2] == (8, 8)
    lines = file.read_text().splitlines()
    assert len(lines) == 8
    file.write_text("\n".join(lines[:7]) + "\n")
    told.clear()
    assert [one.looks for one in run(SMALL, file, 2, 1.0, 1, lambda *what: told.append(what))] == [
        one.looks for one in results
    ]
    assert [what[0] for what in told] == [7, 8] and len(file.read_text().splitlines()) == 8
    shown = "\n".join(as_text(part) for part in tables(SMALL, results))
    assert "from half-way" in shown and "±" in shown and "2 seeds" in shown
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"small\.jsonl holds something else"):
        run(SMALL, file, 2, 1.0, 1, lambda *what: None)


def test_differences_are_taken_seed_by_seed() -> None:
    def result(variant: str, seed: int, loss: float) -> Result:
        look = dataclasses.replace(RESULT.looks[0], held_out=loss)
        return dataclasses.replace(RESULT, job=job(variant, None, seed), looks=(look,))

    baseline = [result("residual", 0, 1.0), result("residual", 1, 3.0)]
    runs = [result("preserve", 1, 2.9), result("preserve", 0, 0.9)]
    assert EXPERIMENTS["start"].columns["less the residual's"](runs, baseline) == "-0.1000 ± 0.0000"


RESULT = from_row(
    {"job": dataclasses.asdict(job()), "looks": [{"step": 0, "held_out": 1.0}], "seconds": 1.0, "versions": {}}
)


def test_the_command_lists_and_refuses() -> None:
    listed = CliRunner().invoke(app, ["experiment"])
    assert listed.exit_code == 0 and all(name in listed.output for name in EXPERIMENTS)
    wrong = CliRunner().invoke(app, ["experiment", "strat"])
    assert wrong.exit_code == 2 and "start" in wrong.output

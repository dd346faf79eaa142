"""Experiments: what is measured, on runs of a few steps; resuming; how they read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mhc_rewrite.cli import experiment as command
from mhc_rewrite.cli.experiment import tables
from mhc_rewrite.cli.main import app
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.insight.experiments import EXPERIMENTS, run, scale, timing
from mhc_rewrite.insight.experiments.base import (
    LONGER,
    Experiment,
    Findings,
    Job,
    Look,
    Result,
    Times,
    as_row,
    from_row,
    residual_of,
    residuals,
    step_of,
)
from mhc_rewrite.insight.experiments.measures import composite, errors, gains, matrices, quantiles, sites_of, states
from mhc_rewrite.insight.experiments.reading import COMPARED, at_equal_time, by_variant, facts
from mhc_rewrite.insight.experiments.timing import in_turn, time_in_turn
from mhc_rewrite.insight.experiments.training import LOOKS, Decoder, batches, convert, text, train
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
        assert [look.step for look in result.looks] == [0, 2, 4, 6, 8] and result.seconds > 0
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


# -- measures ----------------------------------------------------------------------------------------------------------


def test_gains_of_known_matrices() -> None:
    turn = torch.eye(4, dtype=torch.float64)[[1, 2, 3, 0]]
    mixed = 0.5 * turn + 0.5 * torch.eye(4, dtype=torch.float64)
    for matrix, factor in ((turn, 1.0), (mixed, 1.0), (2 * turn, 2.0), (-turn, 1.0)):
        sites = [matrix.expand(3, 4, 4)] * 10
        for gain in gains(composite(sites)):
            assert torch.equal(gain, torch.full((3,), factor**10, dtype=torch.float64))
    forward, backward = gains(torch.tensor([[[1.0, -2.0], [0.0, 0.0]], [[1.0, 0.0], [-3.0, 0.0]]]))
    assert forward.tolist() == [3.0, 3.0] and backward.tolist() == [2.0, 4.0]


def test_the_first_site_acts_first() -> None:
    torch.manual_seed(0)
    sites = list(torch.randn(5, 7, 3, 3, dtype=torch.float64))
    x = torch.randn(7, 3, 1, dtype=torch.float64)
    through = x
    for res in sites:
        through = torch.einsum("toi,tic->toc", res, through)
    torch.testing.assert_close(composite(sites) @ x, through)
    shared = [res[:1] for res in sites]  # the same for all tokens
    torch.testing.assert_close(composite([shared[0], *sites[1:]])[0], composite(sites)[0])


def test_errors_of_sums() -> None:
    res = torch.tensor([[[0.5, 0.5], [0.5, 0.5 + 1e-12]], [[1.0, 0.0], [0.25, 0.5]]], dtype=torch.float64)
    rows, columns = errors(res)
    torch.testing.assert_close(rows, torch.tensor([1e-12, 0.25], dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(columns, torch.tensor([1e-12, 0.5], dtype=torch.float64), rtol=1e-3, atol=0)
    assert quantiles(row=torch.arange(101.0)) == {"row": 50.0, "row 99%": 99.0}


@pytest.mark.parametrize("connection", ["mhc", "hc"])
def test_the_product_is_what_the_model_does(connection: str) -> None:
    """Where no block writes anything, the last site reads the product of the others' H_res of what the first read."""
    one = job(connection=connection, layers=3)
    torch.manual_seed(0)
    model, inputs = Decoder(one).double(), torch.randint(256, (2, one.length))
    with torch.no_grad():
        for layer in model.layers.layers:
            for last in (layer.self_attn.out_proj, layer.linear2):
                last.weight.zero_()
                last.bias.zero_()
        convert(model, one, inputs)
        for site in sites_of(model):
            for parameter in site.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    seen = states(model, inputs)
    begin, end = (X.expand(2, one.length, 4, one.width).flatten(0, 1) for X in (seen[0][1], seen[-1][1]))
    assert len(seen) == 6 and end.dtype == torch.float64
    torch.testing.assert_close(composite(matrices(seen)[:-1]) @ begin, end)


# -- runs --------------------------------------------------------------------------------------------------------------


def test_first_halves(tmp_path: Path) -> None:
    """A run that was converted first goes on with its sites, others with plain residuals; none begins with a jump."""
    fresh, plain = (train(job(init=init, site_lr=10.0 if init else 1.0), tmp_path) for init in ("preserve", None))
    went_on = train(job(site_lr=10.0, half_way=True, converted_first=True), tmp_path)
    converted = train(job(site_lr=10.0, half_way=True), tmp_path)
    assert went_on.looks[0].held_out == pytest.approx(fresh.looks[-1].held_out, abs=1e-6)
    assert converted.looks[0].held_out == pytest.approx(plain.looks[-1].held_out, abs=1e-5)
    assert went_on.looks[0].held_out != converted.looks[0].held_out


def test_longer_runs_have_a_schedule_of_their_own(tmp_path: Path) -> None:
    longer = train(job("residual", None, longer=2.0), tmp_path)
    assert longer.looks[-1].step == 2 * TINY["steps"] and not any(tmp_path.iterdir())
    assert longer.looks == train(job("residual", None, steps=2 * TINY["steps"]), tmp_path).looks


def test_sites_learn_at_their_own_rate(tmp_path: Path) -> None:
    slow, fast = (train(job(site_lr=rate), tmp_path).looks[-1].moved for rate in (1.0, 30.0))
    assert fast > 5 * slow > 0


def test_divergence_is_a_result(tmp_path: Path) -> None:
    diverged = train(job(lr=1e38), tmp_path)
    assert len(diverged.looks) < LOOKS + 1
    read = from_row(json.loads(json.dumps(as_row(diverged))))
    assert isinstance(read, Result) and read.looks[-1].held_out != read.looks[-1].held_out
    fine = train(job(seed=1), tmp_path)
    (table,) = by_variant(COMPARED)(Findings((diverged, fine)))
    assert table[1][1].endswith("1 of 2 diverged")


def tiny(seeds: int, scale: float) -> list[Job]:
    runs = [job(v, init, seed) for seed in range(seeds) for v, init in (("residual", None), ("preserve", "preserve"))]
    return [*runs, *(dataclasses.replace(one, half_way=True) for one in runs)]


SMALL = Experiment("A question?", tiny, facts, by_variant(COMPARED), EXPERIMENTS["start"].draw, in_turn, seeds=2)


@pytest.fixture
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)


def test_results_are_kept_and_not_made_again(tmp_path: Path) -> None:
    file, told = tmp_path / "small.jsonl", []
    findings = run(SMALL, file, 2, 1.0, 1, lambda *what: told.append(what))
    assert [one.job for one in findings.results] == tiny(2, 1.0) and told[-1][:2] == (9, 9)
    assert findings.times[0].steps == tuple(map(step_of, tiny(1, 1.0)[:2]))
    lines = file.read_text().splitlines()
    assert len(lines) == 9 and lines[0].startswith('{"times"')
    for kept in (lines[:8], lines[1:]):  # without the last run; without the times, as when they are to be taken again
        file.write_text("\n".join(kept) + "\n")
        told.clear()
        again = run(SMALL, file, 2, 1.0, 1, lambda *what: told.append(what))
        assert [one.looks for one in again.results] == [one.looks for one in findings.results]
        assert [what[0] for what in told] == [8, 9] and len(file.read_text().splitlines()) == 9
    shown = "\n".join(as_text(part) for part in tables(SMALL, again))
    assert "from half-way" in shown and "±" in shown and "2 seeds" in shown and "rounds in turn" in shown
    file.write_text("{}\n")
    with pytest.raises(ConfigError, match=r"small\.jsonl holds something else"):
        run(SMALL, file, 2, 1.0, 1, lambda *what: None)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Findings(tuple(map(result_of, EXPERIMENTS["streams"].jobs(2, 1.0))))
    monkeypatch.setattr(command, "run", lambda experiment, file, seeds, *rest: made if seeds == 5 else None)
    shown = CliRunner().invoke(app, ["experiment", "streams", "--out", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "n = 8" in shown.output and (tmp_path / "streams.svg").read_text().count("n = 8") >= 1


def test_the_command_lists_and_refuses() -> None:
    listed = CliRunner().invoke(app, ["experiment"])
    assert listed.exit_code == 0 and all(name in listed.output for name in EXPERIMENTS)
    wrong = CliRunner().invoke(app, ["experiment", "strat"])
    assert wrong.exit_code == 2 and "start" in wrong.output


# -- each experiment ---------------------------------------------------------------------------------------------------


def result_of(one: Job, loss: float = 2.0) -> Result:
    """As a run would give it."""
    made = {name: 1.0 for name in ("pre", "post", "res")}
    both = quantiles(forward=torch.ones(3), backward=torch.ones(3), row=torch.ones(3), column=torch.ones(3))
    looks = [Look(step, loss + 1 / (1 + step), made, 0.1, 0.1, 1.0, both, both) for step in (0, 10, 20)]
    return Result(one, tuple(looks), 1.0, {})


TRAINED = [name for name in EXPERIMENTS if name != "scale"]


@pytest.mark.parametrize("name", TRAINED)
def test_every_run_has_one_to_compare_with(name: str) -> None:
    experiment = EXPERIMENTS[name]
    jobs = experiment.jobs(2, 1.0)
    assert len(set(jobs)) == len(jobs)
    assert {job.seed for job in jobs} == {0, 1}
    plain = {dataclasses.replace(one, variant="") for one in jobs if one.init is None}
    for one in jobs:
        assert residual_of(one, one.longer) in plain
        if experiment.timed(jobs) and (one.half_way or name != "upcycle"):
            assert all(residual_of(one, longer) in plain for longer in LONGER)
    for group in experiment.timed(jobs):
        assert group[0].init is None and {step_of(one) for one in jobs} == set(group)
    assert all(one.steps >= 16 for one in experiment.jobs(1, 0.01))


@pytest.mark.parametrize("name", TRAINED)
def test_tables_and_pictures(name: str) -> None:
    plt = command.pyplot("this test")
    experiment = EXPERIMENTS[name]
    jobs = experiment.jobs(2, 1.0)
    times = [Times(group, (1.0,) * len(group), (1.0, *[1.25] * (len(group) - 1)), 3, 0.5, {})
             for group in experiment.timed(jobs)]  # fmt: skip
    findings = Findings(tuple(map(result_of, jobs)), tuple(times))
    shown = "\n".join(as_text(part) for part in tables(experiment, findings))
    assert all(one.variant in shown for one in jobs) and "0.0000 ± 0.0000" in shown
    plt.close(experiment.draw(plt, findings))


@pytest.mark.parametrize("name", [name for name in TRAINED if name != "start"])
def test_tiny_runs(name: str, tmp_path: Path) -> None:
    """Every different step of an experiment, at its real options and a small size."""
    sizes = {**TINY, "steps": 2, "layers": 4}
    kinds = {step_of(one): one for one in EXPERIMENTS[name].jobs(1, 1.0) if one.longer == 1 and not one.half_way}
    done = {dataclasses.replace(one, **sizes) for one in kinds.values()}
    for one in done:
        looks = train(one, tmp_path).looks
        assert looks[-1].held_out < looks[0].held_out
        if one.init is not None:
            assert looks[-1].moved > 0 or one.connection == "identity"
            assert looks[0].gains.get("backward 99%", 1.0) == pytest.approx(1.0, abs=1e-4)


# -- how it reads ------------------------------------------------------------------------------------------------------


def compared(ratio: float, **fields: object) -> tuple[Result, Findings]:
    """Plain residuals end at 2.0 after as many steps, and by 0.1 lower at each longer run; the other at 1.9."""
    plain, other = residuals(job("residual", None)), job(**fields)
    results = [result_of(one) for one in (*plain, other)]
    results = [dataclasses.replace(one, looks=(Look(8, 2.0 - 0.1 * k),)) for k, one in enumerate(results)]
    results[-1] = dataclasses.replace(results[-1], looks=(Look(8, 1.9),))
    times = Times((step_of(plain[0]), step_of(other)), (1.0, ratio), (1.0, ratio), 3, 0.0, {})
    return results[-1], Findings(tuple(results), (times,))


@pytest.mark.parametrize(
    ("ratio", "difference", "reached"),
    [
        (0.9, -0.1, True),
        (1.0, -0.1, True),
        (1.5**0.5, -0.05, True),
        (1.5, 0.0, True),
        (3.0, 0.2, True),
        (4.0, 0.2, False),
    ],
)
def test_at_equal_time(ratio: float, difference: float, reached: bool) -> None:
    mine, findings = compared(ratio)
    found = at_equal_time(mine, findings)
    assert found is not None and found[0] == pytest.approx(difference) and found[1] is reached
    table = by_variant(COMPARED)(findings)[0]
    assert table[-1][:3] == ["preserve", "1.9000 ± nan", "-0.1000 ± nan"]
    assert table[-1][4].startswith("over ") is not reached
    assert by_variant(COMPARED)(Findings(findings.results))[0][-1][3:] == ["-", "-"]  # where no times were taken


def test_both_halves_take_time() -> None:
    """A second half that follows a slower first half has to be compared with a longer run still."""
    plain = [dataclasses.replace(one, half_way=True) for one in residuals(job("residual", None))]
    other = job(half_way=True, converted_first=True)
    results = [
        dataclasses.replace(result_of(one), looks=(Look(8, 2.0 - 0.1 * k),)) for k, one in enumerate((*plain, other))
    ]
    times = Times((step_of(plain[0]), step_of(other)), (1.0, 1.25), (1.0, 1.25), 3, 0.0, {})
    found = at_equal_time(results[-1], Findings(tuple(results), (times,)))
    assert found is not None and found[0] == pytest.approx(1.6 - 1.9)  # at 1.5 times the steps


def test_differences_are_taken_seed_by_seed() -> None:
    def result(variant: str, init: str | None, seed: int, loss: float) -> Result:
        return dataclasses.replace(result_of(job(variant, init, seed)), looks=(Look(8, loss),))

    baseline = [result("residual", None, 0, 1.0), result("residual", None, 1, 3.0)]
    runs = [result("preserve", "preserve", 1, 2.9), result("preserve", "preserve", 0, 0.9)]
    (table,) = by_variant(COMPARED)(Findings((*baseline, *runs)))
    assert table[2][2] == "-0.1000 ± 0.0000" and table[1][2] == "-"


# -- times -------------------------------------------------------------------------------------------------------------


def test_times_are_those_of_training_steps(few_rounds: None) -> None:
    steps = in_turn([job("residual", None), job(), job("again", seed=3, site_lr=10.0), job(streams=8)])[0]
    assert len(steps) == 3 and steps[0].init is None
    times = time_in_turn(steps)
    assert times.ratios[0] == 1.0 and min(times.seconds) > 0 and times.rounds == 2 and times.load >= 0
    assert from_row(json.loads(json.dumps(as_row(times)))) == times


def test_scale_finds_what_it_tends_to() -> None:
    widths = [128, 256, 512, 1024, 2048]
    assert scale.fit(widths, [0.03 + 20 / width for width in widths]) == pytest.approx((0.03, 20))
    groups = EXPERIMENTS["scale"].timed([])
    assert [group[0].width for group in groups] == widths and all(group[0].init is None for group in groups)
    times = [
        Times(group, (1.0,) * 3, (1.0, 1 + 10 / group[0].width, 1 + 40 / group[0].width), 9, 0.0, {})
        for group in groups
    ]
    shown = "\n".join(as_text(part) for part in tables(EXPERIMENTS["scale"], Findings((), tuple(times))))
    assert "C = 2048" in shown and "+31.2%" in shown and "tends to" in shown
    wide, wider = (scale.estimated(groups[k][2], "cpu", 4) for k in (3, 4))
    assert 1.9 < wide / wider < 2.1 and scale.estimated(groups[3][1], "cpu", 4) < wide
    plt = command.pyplot("this test")
    plt.close(EXPERIMENTS["scale"].draw(plt, Findings((), tuple(times))))

"""`n_streams` by stretches: the option, what plans, reports and the cost model say of it, files, the command line."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from families_text import BY_NAME as TEXT
from handmade.common import WIDTH, features
from mhc_rewrite import HyperConnection, MHCConfig, graphs, load_sites, mhcify, plan, report, save_sites
from mhc_rewrite.cost import FUSIONS, Stream, best_segment, cost, with_streams
from mhc_rewrite.errors import ConfigError, SitesError
from test_cli import folder as _folder
from test_cli import run as cli
from test_stretches import chosen

folder = _folder


def test_options_round_trip(tmp_path: Path) -> None:
    given = {"layers.0-11": 4, "a*": 2, "*": 3}
    config = MHCConfig(n_streams=given)
    assert config.n_streams == tuple(given.items()) == config.stretches and MHCConfig().stretches == ()
    config.save(tmp_path / "options.json")
    sorted_keys = json.loads(json.dumps(config.to_dict(), sort_keys=True))
    for other in (
        MHCConfig.load(tmp_path / "options.json"), MHCConfig.from_dict(sorted_keys),
        MHCConfig(n_streams=config.n_streams), pickle.loads(pickle.dumps(config)),
        dataclasses.replace(config, min_sites=2),
    ):  # fmt: skip
        assert other == config and hash(other) == hash(config)
    assert config != MHCConfig(n_streams=dict(reversed(given.items())))  # the first one that matches decides
    with pytest.raises(ConfigError, match=r"One site has one number of streams"):
        HyperConnection(8, config)


@pytest.mark.parametrize(
    "n_streams,said",
    [
        ({}, "n_streams takes an int, or pairs of a pattern and an int"),
        ([4, 2], "n_streams takes an int, or pairs"),
        ({3: 4}, 'takes name patterns, as in {"layers.0-11": 4, "layers.12-23": 2}, not 3'),
        ({"": 4}, "takes name patterns"),
        ((("a", 4), ("a", 2)), "has 'a' twice"),
        ({"a": 17}, "ints from 2 to 16, not 17 for 'a'"),
        ({"a": 0}, "ints from 2 to 16, not 0"),
        ({"a": True}, "ints from 2 to 16, not True"),
        ({"a": "4"}, "ints from 2 to 16, not '4'"),
        ({"a": 1, "*": 2}, r"one stream is a plain residual. .*exclude=\('a',\)"),
        ({"a": 2, "*": 1}, r"one stream is a plain residual. .*include=\('a',\)"),
        ({"*": 1}, "n_streams=1 leaves the whole model as it is"),
    ],
    ids=str,
)
def test_what_options_refuse(n_streams: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MHCConfig(n_streams=n_streams)


def test_connections_that_are_not_defined_for_all_numbers() -> None:
    with pytest.raises(ConfigError, match="connection='mhc_lite' with n_streams=6"):
        MHCConfig(n_streams={"a": 4, "*": 6}, connection="mhc_lite")
    with pytest.raises(ConfigError, match="Use init='equal'"):
        MHCConfig(n_streams={"a": 4, "*": 2}, connection="kromhc")


def test_a_sum_is_not_kept() -> None:
    with pytest.raises(ConfigError, match="collapse='sum' contradicts n_streams by stretches"):
        MHCConfig(n_streams={"*": 2}, collapse="sum", init="paper")


def stretched(n_streams: Any, **options: Any) -> list[int | None]:
    """n of the sites of `chosen`, in order."""
    return [site.n_streams for site in plan(chosen(), (features(2, 5, WIDTH),), n_streams=n_streams, **options).sites]


def test_patterns() -> None:
    assert stretched({"layers.0-2": 4, "layers.3": 2}) == [4] * 6 + [2] * 2
    assert stretched({"layers.1-2": 4, "*": 2}) == [2] * 2 + [4] * 4 + [2] * 2
    assert stretched({"*.mhc_0": 3, "layers.0-3": 2}) == [3, 2] * 4
    assert stretched({"layers.2-9.mhc_*": 3, "layers": 2}) == [2] * 4 + [3] * 4
    assert stretched({"layers.[02]": 3, "*": 2}) == [3, 3, 2, 2] * 2
    assert stretched({"layers": 3, "*": 2}) == [3] * 8
    assert stretched({"layers.0": 3}, include="layers.0") == [3] * 2
    assert stretched({"layers.0-3": 3}, exclude=("layers.1-2",)) == [3, 3, None, None, None, None, 3, 3]
    assert stretched(3) == [None] * 8


@pytest.mark.parametrize(
    "n_streams,said",
    [
        ({"layers.0-2": 4}, r"n_streams says nothing of site 'layers.3.mhc_0' .*Add '\*': 4, as the last one"),
        ({"layers.0-2": 4, "layer.3": 2}, "n_streams='layer.3' matches no site. Near: 'layers.3'"),
        ({"layers.4-7": 4, "*": 2}, "n_streams='layers.4-7' matches no site"),
        ({"*": 4, "layers.3": 2}, r"n_streams='layers.3' is of no effect: .* \('\*'\).* Put it before them"),
    ],
    ids=str,
)
def test_what_a_model_refuses(n_streams: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        stretched(n_streams)


def test_the_advice_works() -> None:
    assert stretched({"layers.0-2": 4, "*": 4}) == [4] * 8
    assert stretched({"layers.3": 2, "*": 4}) == [4] * 6 + [2] * 2
    assert stretched({"layers.0-1": 2, "*": 4}, exclude=("layers.2",))[4:] == [None, None, 4, 4]


def test_plans_and_reports_say_it() -> None:
    x = (features(2, 5, WIDTH),)
    made = plan(chosen(), x, n_streams={"layers.0-1": 4, "*": 2}, exclude="layers.2.mhc_0")
    said = str(made)
    assert "(n = 4 at layers.0-1, 2 at *, mhc, init preserve)" in said
    assert "n = 4 at 4 sites, then 2 at 3 sites" in said
    rows = [line.split() for line in said.splitlines() if "mhc_" in line]
    assert [(row[0], row[-3]) for row in rows if row[-3].isdigit()] == [
        ("layers.{0,1}.mhc_0", "4"), ("layers.{0,1}.mhc_1", "4"),
        ("layers.{2,3}.mhc_1", "2"), ("layers.3.mhc_0", "2"),
    ]  # fmt: skip
    model = mhcify(chosen(), x, n_streams={"layers.0-1": 4, "*": 2})
    added = sum(p.numel() for name, p in oracle.site_parameters(model))
    assert report(model).parameters_added == (added,) and cost(report(model).plan).parameters is not None
    shapes = {node.shape for graph in graphs(model) for node in graph.rewritten if node.role == "resize"}
    assert shapes == {(2, 5, 4, WIDTH), (2, 5, 2, WIDTH)}


def test_costs() -> None:
    """By hand: sites of each n, and what it takes to resize 4 streams to 2: 4C read and 2C written, and back."""
    made = plan(chosen(), (features(2, 5, WIDTH),), n_streams={"layers.0": 4, "*": 2})
    of = cost(made)
    assert of.streams == (Stream(WIDTH, 2, 2, 8, 4), Stream(WIDTH, 6, 6, 8, 2, 4))
    model = mhcify(chosen(), (features(2, 5, WIDTH),), n_streams={"layers.0": 4, "*": 2})
    assert of.evaluate(of.parameters) == sum(p.numel() for _, p in oracle.site_parameters(model))
    apart = [cost(plan(chosen(), (features(2, 5, WIDTH),), n_streams=n)) for n in (4, 2)]
    for fusion in FUSIONS:
        both = zip(of.moved(fusion, 10), *(alone.moved(fusion, 10) for alone in apart))
        for got, four, two in both:
            assert got == four * 2 // 8 + two * 6 // 8 + 10 * 8 * (4 + 2) * WIDTH
    assert (of.best_segment(0), of.best_segment(1)) == (best_segment(4, 2), best_segment(2, 6))
    assert cost(with_streams(made, 3)) == cost(plan(chosen(), (features(2, 5, WIDTH),), n_streams=3))
    assert of.evaluate(of.kept.states) == WIDTH * (4 + 1 + 2 * 6)


def test_saved_sites(tmp_path: Path) -> None:
    x, n_streams = features(2, 5, WIDTH), {"layers.2": 3, "layers.0-1": 4, "*": 2}
    model = mhcify(chosen(), (x,), n_streams=n_streams)
    oracle.perturb(model)
    save_sites(model, tmp_path)
    for example in (None, (x,)):
        loaded = load_sites(chosen(), tmp_path, example)
        assert torch.equal(loaded(x), model(x)) and torch.equal(loaded(x, (3, 0, 2)), model(x, (3, 0, 2)))
        assert report(loaded).plan.streams[0].stretches == report(model).plan.streams[0].stretches
        save_sites(loaded, tmp_path)
    assert torch.equal(load_sites(mhcify(chosen(), (x,), n_streams=n_streams), tmp_path)(x), model(x))
    with pytest.raises(SitesError, match=r"'layers.0.mhc_0' was saved with n_streams=4 and has n_streams=2 here"):
        load_sites(mhcify(chosen(), (x,), n_streams=2), tmp_path)
    with pytest.raises((SitesError, RuntimeError)):
        mhcify(chosen(), (x,), n_streams=2).load_state_dict(model.state_dict())


def test_saved_with_transformers(tmp_path: Path) -> None:
    family = TEXT["Llama"]
    model = mhcify(family.model(torch.float32), n_streams={"model.layers.1": 2, "*": 4})
    oracle.perturb(model)
    model.save_pretrained(tmp_path)
    ids = family.example()
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**ids).logits, model(**ids).logits)
    base = type(model.model).from_pretrained(tmp_path)  # its modules have other names
    assert torch.equal(base(**ids).last_hidden_state, model.model(**ids).last_hidden_state)


def test_the_command_line(folder: Path) -> None:
    result = cli("sites", "nets.py:make", "--format", "json", "--n-streams", "layers.0-1=4,layers.2=2")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert [site["n_streams"] for site in data["streams"][0]["sites"]] == [4, 4, 2]
    assert data["config"]["n_streams"] == [["layers.0-1", 4], ["layers.2", 2]]
    shown = cli("print", "nets.py:make", "--n", "layers.0=4, *=2", "--format", "text").stdout
    assert "resized(post, 2, -1)" in shown or "resized(x, 2, -1)" in shown
    assert cli("print", "nets.py:make", "--n", "layers.0=4,*=2", "--format", "json").exit_code == 0
    costs = cli("cost", "nets.py:make", "--n-streams", "layers.0-1=4,layers.2=2")
    assert costs.exit_code == 0 and "2 sites, n = 4, C = 8" in costs.stdout and "n_0 = streams before" in costs.stdout
    assert "4 at layers.0-1, 2 at layers.2" in costs.stdout
    for text in ("layers.0-1=four", "=4", "4,2", "*=4,*=2", "17", "*=", ""):
        assert cli("sites", "nets.py:make", "--n", text).exit_code == 2, text
    refused = cli("sites", "nets.py:make", "--n", "layers.0=4")
    assert refused.exit_code == 1 and "n_streams says nothing of site 'layers.1.mhc_0'" in refused.stderr

"""Drawings: what stands in them, against the plan, the rewritten graphs and the cost model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn

import mhc_rewrite
from mhc_rewrite import cost
from mhc_rewrite.insight.drawing import Drawing, draw
from mhc_rewrite.insight.drawing.data import Figures, Step
from mhc_rewrite.insight.drawing.svg import sheet
from mhc_rewrite.plans import Rejection, SourceLine
from pictured import MODELS, deep_plan, drawing_of, example, overlapping, seen


@pytest.fixture(params=MODELS)
def drawing(request: pytest.FixtureRequest) -> Drawing:
    return drawing_of(request.param)


def steps(drawing: Drawing) -> list[Step]:
    return [step for part in drawing.picture.parts for step in part.steps()]


# -- content against the plan ------------------------------------------------------------------------------------------


def test_every_call_of_a_site_is_drawn_with_its_streams(drawing: Drawing) -> None:
    """Unfolded: a ring and a block before; after, as many points that are read and written as there are streams."""
    plan = drawing.picture.plan
    calls = [site for stream in plan.streams for site in stream.sites]
    found = seen(Drawing(drawing.picture, folded=False).svg())
    streams = sum(plan.streams_at(site) for site in calls)
    assert found.classes["mhc-plus"] == len(calls)
    assert found.classes["mhc-block"] == 2 * len(calls)
    assert found.count(r"mhc-dot-\d") == 2 * streams
    assert found.count(r"mhc-mix-\d|mhc-faint-\d") == streams
    assert [text for text in found.texts if text == "H_res"] == ["H_res"] * len(calls)


def test_folded_once_for_all_that_are_alike(drawing: Drawing) -> None:
    """What is drawn, times how often it says that it comes, is all of it; in order, under the right names."""
    for part in drawing.picture.parts:
        layers = [layer for group in part.groups for layer in group.layers]
        assert sum(group.count * len(group.pattern) for group in part.groups) == len(layers)
        names = [step.name for layer in layers for step in layer.steps if step.kind in ("site", "excluded")]
        assert names == [site.name for site in part.stream.sites]
    texts = seen(drawing.svg()).texts
    counts = [int(text[2:]) for text in texts if text.startswith("× ")]
    assert counts == [group.count for part in drawing.picture.parts for group in part.groups if group.count > 1]
    shown = [step for part in drawing.picture.parts for g in part.groups for layer in g.pattern for step in layer.steps]
    assert seen(drawing.svg()).classes["mhc-plus"] == sum(step.kind == "site" for step in shown)


def test_all_that_was_left_alone_stands_in_its_place_with_its_reason(drawing: Drawing) -> None:
    plan = drawing.picture.plan
    left = drawing.picture.left_alone()
    told = [(step.number, step.name, step.rule, step.reason) for step in left]
    assert told == [(k, r.module, r.rule, r.reason) for k, r in enumerate(plan.rejections, 1)]
    for part in drawing.picture.parts:
        for layer in (layer for group in part.groups for layer in group.layers):
            inside = [step for step in layer.steps if step.kind == "left alone"]
            assert all(f"{step.name}.".startswith(f"{layer.name}.") for step in inside)
    found = seen(drawing.svg())
    assert found.classes["mhc-left"] == 2 * len(left)  # before and after
    written = " ".join(found.texts)
    for step in left:
        assert f"{step.number}  {step.rule}" in written
        assert all(word in written for word in step.reason.split()), step.reason


def test_costs_add_up_to_those_of_the_cost_model(drawing: Drawing) -> None:
    plan = drawing.picture.plan
    of = cost.cost(plan)
    total = sum((part.figures for part in drawing.picture.parts), Figures())
    forward, backward = of.moved("boundary")
    assert total == Figures(forward, backward, of.evaluate(of.kept.bytes), of.evaluate(of.parameters))


@pytest.mark.parametrize(
    "name",
    ["DeepNorm", "cast on the trunk", "norm on the trunk", "reshape on the trunk", "Conformer", "norm in the parent",
     "spellings of the add", "post-norm without layers.0.mhc_1", "BERT", "ALBERT"],
)  # fmt: skip
def test_operations_stand_where_the_rewritten_graphs_have_them(name: str) -> None:
    """Read, write, and what acts on all streams between them, in the order of the graphs that run."""
    model, inputs, options = example(name)
    converted = mhc_rewrite.mhcify(copy.deepcopy(model), inputs, **options)
    graphs = {graph.module: graph for graph in mhc_rewrite.graphs(converted)}
    roles = {"pre": "r", "post": "w", "boundary": "wr", "collapse": "w", "trunk": "o"}
    for part in draw(converted).picture.parts:
        calls = dict.fromkeys(site.carrier for site in part.stream.sites)
        times = len(part.stream.sites) // len({site.name for site in part.stream.sites})
        ran = "".join(
            roles.get(node.role, "") for carrier in [*calls] * times for node in graphs[carrier].rewritten
            if node.op != "placeholder"
        )  # fmt: skip
        drawn = "".join(
            {"site": "r" + "o" * len(step.beside) + "w", "excluded": "w", "operation": "o"}.get(step.kind, "")
            for step in part.steps()
        )
        # A boundary's results, and a mean behind a post, are nodes of their own.
        assert "o" in drawn and drawn == re.sub("w+", "w", ran).rstrip("o")


def test_blocks_say_class_and_size() -> None:
    model, inputs, _ = example("GPT-2")
    drawn = {step.name: step for step in steps(draw(model, inputs)) if step.kind == "site"}
    attention = model.get_submodule("transformer.h.1.attn")
    step = drawn["transformer.h.1.mhc_0"]
    assert (step.label, step.block) == ("attn", "GPT2Attention")
    assert step.block_parameters == sum(p.numel() for p in attention.parameters())
    plan_alone = draw(mhc_rewrite.plan(model, inputs))
    assert {step.block for step in steps(plan_alone)} == {""}


def test_a_converted_model_is_drawn_as_it_was_planned() -> None:
    model, inputs, _ = example("T5")
    planned = draw(model, inputs, n_streams=2)
    converted = mhc_rewrite.mhcify(model, inputs, n_streams=2)
    for drawn in (
        draw(converted),
        draw(nn.ModuleDict({"wrapped": converted})),
        draw(mhc_rewrite.report(converted), of=model),
    ):
        assert steps(drawn) == steps(planned)
        assert drawn.picture.about.endswith("; converted")
    assert planned.picture.about.endswith("nothing is converted")


def test_a_decoder_reads_its_encoder() -> None:
    for name in ("T5", "Whisper"):
        model, inputs, _ = example(name)
        drawn = draw(model, inputs)
        assert [part.stream.reads for part in drawn.picture.parts] == [(), (0,)]
        found = seen(drawn.svg())
        assert "to stream 1" in found.texts and any("reads the result of stream 0" in text for text in found.texts)
        assert "exit0 -> entry1" in drawn.dot()


def test_a_stream_that_several_read_says_so_once_and_no_line_crosses_another_stream() -> None:
    """Of five streams, in two rows of the page, the first is read by three: the one beside it alone gets a line."""
    (stream,) = deep_plan(3).streams
    reads: tuple[tuple[int, ...], ...] = ((), (0,), (0,), (), (0, 3))
    plan = dataclasses.replace(deep_plan(3), streams=tuple(dataclasses.replace(stream, reads=r) for r in reads))
    drawn = draw(plan)
    found = seen(drawn.svg())
    assert found.texts.count("to stream 1 and 2 and 4") == 1 and found.texts.count("to stream 4") == 1
    assert found.classes["mhc-link"] == 2 * 2 and overlapping(sheet(drawn.picture)) == []
    assert drawn.dot().count("style=dashed, label=reads") == 4


class Pyramid(nn.Module):
    """Three runs of layers, each of another width, and an input that goes to the last as well."""

    def __init__(self) -> None:
        super().__init__()
        widths = (16, 32, 24)
        self.stages = nn.ModuleList(nn.ModuleList(Residual(width) for _ in range(2)) for width in widths)
        self.between = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k, stage in enumerate(self.stages):
            for layer in stage:
                x = layer(x)
            if k < 2:
                x = self.between[k](x)
        return x


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Twins(nn.Module):
    """Two towers that know nothing of one another."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(*(Residual(16) for _ in range(3)))
        self.right = nn.Sequential(*(Residual(16) for _ in range(2)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.left(x).mean(1) + self.right(y).mean(1)


def test_each_stage_reads_the_one_before_it_and_towers_nothing() -> None:
    x = torch.randn(2, 5, 16)
    assert [stream.reads for stream in mhc_rewrite.plan(Pyramid(), (x,)).streams] == [(), (0,), (1,)]
    assert [stream.reads for stream in mhc_rewrite.plan(Twins(), (x, x)).streams] == [(), ()]


# -- excluded sites, stretches, patterns -------------------------------------------------------------------------------


def test_excluded_sites_stand_on_the_streams_without_maps() -> None:
    model, inputs, _ = example("GPT-2")
    drawn = draw(model, inputs, exclude=["transformer.h.1.*"], n_streams=3)
    found = seen(drawn.svg())
    kinds = [step.kind for step in steps(drawn) if step.kind != "left alone"]
    assert kinds == ["site", "site", "excluded", "excluded", "site", "site"]
    assert found.texts.count("excluded") == 2 and found.texts.count("H_res") == 4
    assert found.classes["mhc-plus"] == 6 + 2 * 3  # before; and an add on each stream
    assert found.count(r"mhc-dot-\d") == 4 * 2 * 3
    outside = draw(model, inputs, exclude=["transformer.h.0.*"])
    first = outside.picture.parts[0]
    assert [step.rule for step in first.ahead].count("excluded") == 2
    assert first.groups[0].title == "transformer.h.{1,2}"


def test_stretches_change_the_lanes() -> None:
    model, inputs, _ = example("GPT-2")
    drawn = draw(model, inputs, n_streams={"transformer.h.0": 2, "transformer.h.1": 4, "*": 3})
    assert [(s.n, s.out) for s in steps(drawn) if s.kind == "resize"] == [(2, 4), (4, 3)]
    found = seen(drawn.svg())
    assert {"expand: 1 to 2 equal streams", "2 to 4 streams", "4 to 3 streams", "collapse: mean of 3 streams"} <= set(
        found.texts
    )
    assert found.count(r"mhc-dot-\d") == 2 * 2 * (2 + 4 + 3)
    of = cost.cost(drawn.picture.plan)
    total = drawn.picture.parts[0].figures
    assert (total.forward, total.backward) == of.moved("boundary")
    assert total.kept == of.evaluate(of.kept.bytes)


def test_one_stream_is_said_to_be_the_model_as_it_is() -> None:
    drawn = draw(deep_plan(2, 1))
    assert drawn.picture.about.endswith("nothing would be rewritten") and drawn.picture.parts[0].figures == Figures()


def test_layers_that_alternate_are_one_pattern() -> None:
    plan = deep_plan(12)
    (stream,) = plan.streams
    sites = tuple(
        dataclasses.replace(site, branch="mamba") if site.branch == "self_attn" and k % 6 else site
        for k, site in enumerate(stream.sites)
    )
    mixed = dataclasses.replace(plan, streams=(dataclasses.replace(stream, sites=sites),))
    (group,) = draw(mixed).picture.parts[0].groups
    assert (group.count, len(group.pattern)) == (4, 3)
    texts = seen(draw(mixed).svg()).texts
    assert texts.count("mamba") == 2 * 2 and texts.count("self_attn") == 2
    assert {"model.layers.0", "model.layers.1", "model.layers.2"} <= set(texts)


def test_a_layer_that_differs_stands_apart() -> None:
    plan = deep_plan(9)
    (stream,) = plan.streams
    sites = list(stream.sites)
    sites[8] = dataclasses.replace(sites[8], width=32)
    changed = dataclasses.replace(plan, streams=(dataclasses.replace(stream, sites=tuple(sites)),))
    titles = [(group.title, group.count) for group in draw(changed).picture.parts[0].groups]
    assert titles == [("model.layers.{0..3}", 4), ("model.layers.4", 1), ("model.layers.{5..8}", 4)]


def test_rejections_find_their_place_without_a_model() -> None:
    line = SourceLine("model.py", 3, "x = wte + wpe")
    plan = deep_plan(4)
    rejections = (
        Rejection("model", line, "broadcast", "shapes differ"),
        Rejection("model.layers.2.mlp.act", None, "no-mixing", "an activation"),
        Rejection("model.layers.11", None, "excluded", "excluded, at the end of a stream"),
    )
    (part,) = draw(dataclasses.replace(plan, rejections=rejections)).picture.parts
    assert [step.number for step in part.ahead] == [1] and [step.number for step in part.behind] == [3]
    (group,) = part.groups
    assert group.count == 4
    assert [step.number or step.label for step in group.pattern[0].steps] == ["self_attn", 2, "mlp"]
    assert [step.number or step.label for step in group.layers[2].steps] == ["self_attn", 2, "mlp"]


def test_streams_that_code_between_them_ends() -> None:
    (one,), (two,) = deep_plan(3).streams, deep_plan(3).streams
    moved = (
        dataclasses.replace(site, name=f"model.more.{k}.mhc_0", holder=f"model.more.{k}")
        for k, site in enumerate(two.sites)
    )
    second = dataclasses.replace(two, sites=tuple(moved))
    ended = Rejection("model", None, "operation-between", "'roll' stands on the trunk; the stream ends there")
    plan = dataclasses.replace(deep_plan(3), streams=(one, second), rejections=(ended,))
    first, last = draw(plan).picture.parts
    assert [step.rule for step in first.behind] == ["operation-between"] and not last.ahead and not last.behind

"""Drawings: what stands in them, against the plan and against the rewritten graphs; nothing overlaps; bad input."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mhc_rewrite
from families_text import BY_NAME as FAMILIES
from handmade import BY_NAME as HANDMADE
from mhc_rewrite import cost
from mhc_rewrite.cli.main import app
from mhc_rewrite.errors import DrawingError
from mhc_rewrite.insight.drawing import Drawing, draw
from mhc_rewrite.insight.drawing.data import Figures, Step
from mhc_rewrite.insight.drawing.marks import STYLES, Label, text_width
from mhc_rewrite.insight.drawing.svg import Sheet, sheet
from mhc_rewrite.plans import Rejection, SourceLine
from pictured import deep_plan, seen

MODELS = ("GPT-2", "BERT", "T5", "ALBERT", "Whisper", "Gemma-2")
SMALL = ("DeepNorm", "cast on the trunk", "dropout on the trunk", "norm on the trunk")


def example(name: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model of the tables by its name, with its inputs and options."""
    if name in FAMILIES:
        family = FAMILIES[name]
        return family.model(torch.float32), family.example(torch.float32), {}
    kind = HANDMADE[name]
    return kind.model(), kind.inputs(), dict(kind.options)


@pytest.fixture(scope="module")
def drawings() -> dict[str, Drawing]:
    return {}


@pytest.fixture(params=[*MODELS, *SMALL])
def drawing(request: pytest.FixtureRequest, drawings: dict[str, Drawing]) -> Drawing:
    if request.param not in drawings:
        model, inputs, options = example(request.param)
        drawings[request.param] = draw(model, inputs, **options)
    return drawings[request.param]


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


@pytest.mark.parametrize("name", ["DeepNorm", "cast on the trunk", "norm on the trunk", "BERT", "ALBERT"])
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
            if node.op != "placeholder" and not (node.role == "collapse" and node.name == "collapse")
        )  # fmt: skip
        drawn = "".join(
            "r" + "o" * len(step.beside) + "w" if step.kind == "site" else "o"
            for step in part.steps() if step.kind in ("site", "operation")
        )  # fmt: skip
        assert "o" in drawn and drawn == ran.rstrip("o")


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
    assert [step.number or step.label for step in group.pattern[0].steps] == ["self_attn", "mlp", 2]
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


# -- layout ------------------------------------------------------------------------------------------------------------


def boxes(drawn: Sheet) -> Iterator[tuple[float, float, float, float, str]]:
    """Left, top, right, bottom of every text, at least as large as it is shown."""
    for block in drawn.blocks:
        for mark in block.placed():
            if isinstance(mark, Label):
                width, size = text_width(mark.text, mark.role), STYLES[mark.role].size
                left = mark.x - {"start": 0, "middle": width / 2, "end": width}[mark.anchor]
                yield left, mark.y - 0.75 * size, left + width, mark.y + 0.2 * size, mark.text


def overlapping(drawn: Sheet) -> list[tuple[str, str]]:
    found, active = [], []
    for box in sorted(boxes(drawn), key=lambda box: box[1]):
        active = [other for other in active if other[3] > box[1]]
        found += [(other[4], box[4]) for other in active if other[0] < box[2] and box[0] < other[2]]
        active.append(box)
    return found


def test_no_text_overlaps_another_or_leaves_the_page(drawing: Drawing) -> None:
    for picture in (drawing.picture, drawing.picture.unfolded()):
        drawn = sheet(picture)
        assert overlapping(drawn) == []
        out = [text for left, top, right, bottom, text in boxes(drawn) if left < 0 or right > drawn.width + 1]
        assert out == [] and all(0 <= box[1] and box[3] <= drawn.height for box in boxes(drawn))


@pytest.mark.parametrize(("layers", "n"), [(4, 1), (48, 4), (200, 8), (1000, 16)])
def test_any_depth_folds_to_one_card_and_unfolds_without_overlaps(layers: int, n: int) -> None:
    folded, unfolded = (draw(deep_plan(layers, n), folded=f) for f in (True, False))
    text = folded.svg()
    assert f"× {layers}" in seen(text).texts and len(text) < 100_000
    assert sheet(folded.picture).height < 1200
    assert overlapping(sheet(folded.picture)) == [] and overlapping(sheet(unfolded.picture.unfolded())) == []
    assert seen(unfolded.svg()).classes["mhc-plus"] == 2 * layers
    assert len(folded.html()) < 100_000 + 300 * layers


def test_long_names_are_cut_in_the_picture_and_whole_beside_it() -> None:
    model, inputs, _ = example("ALBERT")
    drawn = draw(model, inputs)
    assert overlapping(sheet(drawn.picture)) == []
    assert any("albert_layers.0.attention.mhc_0" in told for told in seen(drawn.svg()).told)


# -- the page, dot, PNG ------------------------------------------------------------------------------------------------


def test_the_page_knows_every_layer_and_row(drawing: Drawing) -> None:
    page = drawing.html()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])  # type: ignore[index]
    many = [group for part in drawing.picture.parts for group in part.groups if group.count > 1]
    assert [[layer[0] for layer in group] for group in data["groups"]] == [
        [layer.name for layer in group.layers] for group in many
    ]
    for group, layers in zip(many, data["groups"]):
        rows = [[row[3] for row in layer[1]] for layer in layers]
        assert rows == [[step.name for step in layer.steps] for layer in group.layers]
        for layer, drawn in zip(group.layers, layers):
            for step, (_, _, fact, _, _) in zip(layer.steps, drawn[1]):
                said = dict(data["facts"][fact])
                assert not step.figures.parameters or said["adds"] == f"{step.figures.parameters:,} parameters"
                assert step.source is None or str(step.source.line) in said["source"]
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\((?!["']?data:)|@import|https?://(?!www\.w3\.org)""", page)


def test_names_of_the_user_cannot_break_the_page() -> None:
    plan = deep_plan(3)
    evil = dataclasses.replace(
        plan,
        model="</script><b>&",
        rejections=(Rejection("a<b>", SourceLine("x.py", 1, 'if "</script>"'), "r", "<i>&amp;"),),
    )
    drawn = draw(evil)
    assert drawn.html().count("</script>") == 2 and "<b>" not in drawn.html() and "<i>" not in drawn.html()
    assert "</script><b>&" in seen(drawn.svg()).texts  # and it is XML
    assert '\\"' in draw(dataclasses.replace(plan, model='a "b" \\ c')).dot()


def test_dot_names_every_site_of_the_pattern() -> None:
    model, inputs, _ = example("T5")
    text = draw(model, inputs).dot()
    assert text.count("[label=H_pre]") == text.count("[label=H_post, constraint=false]") == 5
    assert text.count("subgraph cluster_") == 4 and "T5Block × 2" in text


def test_png_has_the_size_of_the_drawing(tmp_path: Path) -> None:
    drawn = draw(deep_plan(4))
    data = drawn.save(tmp_path / "model.png").read_bytes()
    size = sheet(drawn.picture)
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert abs(width - 2 * size.width) < 3 and abs(height - 2 * size.height) < 3
    from matplotlib.image import imread

    pixels = imread(tmp_path / "model.png")[..., :3].reshape(-1, 3)
    lanes = [
        pixels[(abs(pixels - torch.tensor(rgb).numpy() / 255) < 0.02).all(1)]
        for rgb in ([47, 111, 222], [209, 102, 31])
    ]
    assert all(len(lane) > 500 for lane in lanes)
    with pytest.raises(DrawingError, match="too large for a PNG"):
        draw(deep_plan(1000), folded=False).save(tmp_path / "deep.png")


def test_a_notebook_shows_it() -> None:
    drawn = draw(deep_plan(2))
    assert drawn._repr_svg_() == drawn.svg() and drawn.svg().startswith("<svg ")


# -- bad input, and what is not there ----------------------------------------------------------------------------------


def test_what_cannot_be_drawn_or_written_says_so(tmp_path: Path) -> None:
    plan = deep_plan(2)
    with pytest.raises(DrawingError, match=r"'model.gif' does not say what to draw: a name ends in .svg, .html"):
        draw(plan).save(tmp_path / "model.gif")
    with pytest.raises(DrawingError, match="there is no folder"):
        draw(plan).save(tmp_path / "nowhere" / "model.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(DrawingError, match="can't be written"):
        draw(plan).save(tmp_path / "folder.svg")
    with pytest.raises(DrawingError, match="takes a model, a plan or a report, not str"):
        draw("gpt2")  # type: ignore[arg-type]
    with pytest.raises(DrawingError, match="leave out n_streams"):
        draw(plan, n_streams=2)
    with pytest.raises(mhc_rewrite.errors.NoResidualError, match="no residual stream"):
        draw(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.zeros(2, 8),))


MODEL = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.zeros(2, 8),)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.mlp(x)

def make():
    return nn.Sequential(*(Block() for _ in range(5))), (torch.zeros(2, 8),)
"""


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MODEL)
    make, plain = (f"{tmp_path / 'net.py'}:{name}" for name in ("make", "plain"))
    for ending in ("svg", "html", "png", "dot"):
        to = tmp_path / f"model.{ending}"
        done = CliRunner().invoke(app, ["draw", make, "-o", str(to), "--n", "3"])
        assert (done.exit_code, done.stdout.strip()) == (0, str(to)), done.output
        assert to.stat().st_size > 800
    assert "× 5" in seen((tmp_path / "model.svg").read_text()).texts
    unfolded = CliRunner().invoke(app, ["draw", make, "-o", str(tmp_path / "all.svg"), "--unfolded"])
    assert unfolded.exit_code == 0 and seen((tmp_path / "all.svg").read_text()).classes["mhc-plus"] == 5
    for arguments, said in (
        ([make, "-o", "model.gif"], "a name ends in .svg, .html, .png, .dot"),
        ([make, "-o", str(tmp_path / "none" / "x.svg")], "there is no folder"),
        ([plain, "-o", str(tmp_path / "x.svg")], "no residual"),
    ):
        failed = CliRunner().invoke(app, ["draw", *arguments])
        assert failed.exit_code == 1 and said in " ".join(failed.stderr.split()), failed.output
        assert "Traceback" not in failed.output


@pytest.mark.parametrize(("library", "ending"), [("kiwisolver", "svg"), ("kiwisolver", "html"), ("matplotlib", "png")])
def test_what_is_not_installed_is_named(
    library: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library or name.startswith(f"{DRAWING}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    for hidden in ("figure", "backends", "backends.backend_agg"):
        monkeypatch.setitem(sys.modules, f"{library}.{hidden}", None)
    with pytest.raises(DrawingError, match=r'not installed: pip install "mhc-rewrite\[look\]"'):
        draw(deep_plan(2)).save(tmp_path / f"model.{ending}")
    assert draw(deep_plan(2)).save(tmp_path / "model.dot").exists()


DRAWING = "mhc_rewrite.insight.drawing"


def test_importing_the_package_imports_none_of_it() -> None:
    script = (
        "import sys, mhc_rewrite; "
        "print([m for m in sys.modules if m.startswith(('mhc_rewrite.insight', 'kiwisolver', 'matplotlib'))]); "
        "mhc_rewrite.draw"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="has no attribute 'drew'"):
        mhc_rewrite.drew  # noqa: B018

"""Drawings as files: nothing overlaps in them, the page and the other formats hold all of it, bad input is told."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import mhc_rewrite
from mhc_rewrite.cli.main import app
from mhc_rewrite.errors import DrawingError
from mhc_rewrite.insight.drawing import Drawing, draw
from mhc_rewrite.insight.drawing.data import Figures
from mhc_rewrite.insight.drawing.layout import columns
from mhc_rewrite.insight.drawing.marks import Box, Dot
from mhc_rewrite.insight.drawing.svg import sheet
from mhc_rewrite.plans import Rejection, SourceLine
from pictured import MODELS, boxes, deep_plan, drawing_of, example, overlapping, seen


@pytest.fixture(params=MODELS)
def drawing(request: pytest.FixtureRequest) -> Drawing:
    return drawing_of(request.param)


# -- layout ------------------------------------------------------------------------------------------------------------


def test_no_text_overlaps_another_or_leaves_the_page(drawing: Drawing) -> None:
    for picture in (drawing.picture, drawing.picture.unfolded()):
        drawn = sheet(picture)
        assert overlapping(drawn) == []
        out = [text for left, top, right, bottom, text in boxes(drawn) if left < 0 or right > drawn.width + 1]
        assert out == [] and all(0 <= box[1] and box[3] <= drawn.height for box in boxes(drawn))


@pytest.mark.parametrize("n", [1, 2, 8, 16])
@pytest.mark.parametrize(("head", "label", "block"), [(0, 0, 0), (0, 0, 500), (0, 300, 90), (900, 40, 200)])
def test_columns_have_room_for_all_that_stands_in_them(n: int, head: float, label: float, block: float) -> None:
    (part,) = draw(deep_plan(2, n)).picture.parts
    made = columns(part, [head], [label], [block])
    assert made.before.left == 0 and made.after.left == pytest.approx(made.before.width)
    assert made.width == pytest.approx(made.before.width + made.after.width) and made.width >= head
    for panel, streams in ((made.before, 1), (made.after, n)):
        lanes = panel.lanes(streams)
        assert lanes[0] >= 10 and all(b - a >= 8 for a, b in itertools.pairwise(lanes))
        assert panel.block - lanes[-1] >= 40 and panel.end + 10 <= panel.width
        assert lanes[-1] + 18 + label <= panel.width
        assert min(block, 200) <= panel.end - panel.block <= 240


@pytest.mark.parametrize("n", [1, 2, 8, 16])
def test_blocks_stand_in_their_cards_beside_the_lanes(n: int) -> None:
    marks = [mark for block in sheet(draw(deep_plan(3, n)).picture).blocks for mark in block.placed()]
    (card,) = (mark for mark in marks if isinstance(mark, Box) and mark.role == "card")
    blocks = [mark for mark in marks if isinstance(mark, Box) and mark.role == "block"]
    lanes = {round(mark.x, 1) for mark in marks if isinstance(mark, Dot) and mark.role.startswith("dot ")}
    assert len(blocks) == 4
    for block in blocks:
        assert card.x < block.x and block.x + block.width + 10 < card.x + card.width
        assert card.y < block.y and block.y + block.height < card.y + card.height
        assert not [x for x in lanes if block.x - 20 < x < block.x + block.width]
    before, after = sorted({(block.x, block.width) for block in blocks})
    assert before[0] + before[1] < min(x for x in lanes if x > before[0])
    assert {block.y for block in blocks} == {block.y for block in blocks if block.x == after[0]}  # in one row


@pytest.mark.parametrize(("layers", "n"), [(4, 1), (48, 4), (200, 16), (1000, 4)])
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


def test_model_explorer_gets_graphs_and_a_figure_for_every_site(drawing: Drawing, tmp_path: Path) -> None:
    """In its formats: a label and graphs; results by graph and node. Edges come from nodes that are there."""
    drawing.save(tmp_path / "model.json")
    made = json.loads((tmp_path / "model.json").read_text())
    plan, figures = drawing.picture.plan, sum((part.figures for part in drawing.picture.parts), Figures())
    names = {site.name for site in plan.sites}
    assert made["label"] == plan.model and [graph["id"] for graph in made["graphs"]] == ["after", "before"]
    for graph in made["graphs"]:
        nodes = {node["id"]: node for node in graph["nodes"]}
        assert len(nodes) == len(graph["nodes"]) and names <= set(nodes)
        edges = [(edge["sourceNodeId"], node["id"]) for node in graph["nodes"] for edge in node["incomingEdges"]]
        assert {source for source, _ in edges} <= set(nodes)
        for name in names:  # the trunk and the block's result come in, and the block reads the trunk
            trunk, block = (edge["sourceNodeId"] for edge in nodes[name]["incomingEdges"])
            assert [edge["sourceNodeId"] for edge in nodes[block]["incomingEdges"]] == [trunk]
        left = [node["label"] for node in graph["nodes"] if node["label"].startswith("left alone: ")]
        assert sorted(left) == sorted(f"left alone: {rejection.rule}" for rejection in plan.rejections)
    for figure in ("parameters", "forward", "backward", "kept"):
        ((graph, data),) = json.loads((tmp_path / f"model.{figure}.json").read_text()).items()
        assert graph == "after" and set(data["results"]) == {site.name for site in plan.sites if not site.excluded}
        assert sum(result["value"] for result in data["results"].values()) == getattr(figures, figure)
        assert [stop["stop"] for stop in data["gradient"]] == [0, 1]


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
        ([make, "-o", "model.gif"], "a name ends in .svg, .html, .png, .dot, .json"),
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

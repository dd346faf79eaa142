"""Reading runs for a report, and `mhc-rewrite report`: what it writes, and what it says of bad input."""

from __future__ import annotations

import base64
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import report_runs
from mhc_rewrite.cli.main import app
from mhc_rewrite.errors import RunFileError
from mhc_rewrite.insight.watching.format import FIGURES, Scan, SiteCall, read

pytest.importorskip("numpy")
pytest.importorskip("plotly")
import numpy as np
from plotly.offline import get_plotlyjs

from mhc_rewrite.insight.report import figures
from mhc_rewrite.insight.report.cards import CARDS, Card
from mhc_rewrite.insight.report.page import packed, short_names
from mhc_rewrite.insight.report.reading import SPANS, shown, thin


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report_runs.write(tmp_path_factory.mktemp("run") / "run.jsonl")


def called(*arguments: Any) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(one) for one in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.output
    return done.exit_code, " ".join(done.output.split())


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_scan_is_the_run(run: Path) -> None:
    scan, whole = Scan(run), read(run)
    assert list(scan.samples()) == whole.samples and scan.steps == whole.steps
    assert scan.run.end == whole.end == "finished" and scan.run.samples == []


def test_a_scan_goes_on_where_the_file_does(tmp_path: Path) -> None:
    file = report_runs.write(tmp_path / "run.jsonl", samples=6, end=None)
    scan = Scan(file)
    line = json.dumps(report_runs.sample(6, 9, 8)) + "\n"
    with file.open("a") as opened:
        opened.write(line[:100])
        opened.flush()
        assert scan.more() == [] and scan.fresh == 6
        opened.write(line[100:])
    assert [sample["step"] for sample in scan.more()] == [60] and scan.fresh == 6
    # A run that goes on from a checkpoint makes steps a second time.
    with file.open("a") as opened:
        opened.write(json.dumps({**report_runs.sample(4, 9, 8), "loss": 7.0}) + "\n")
    assert [sample["loss"] for sample in scan.more()] == [7.0]
    assert scan.fresh == 4 and scan.steps == [0, 10, 20, 30, 40]
    assert list(scan.samples()) == read(file).samples


def test_few_samples_are_kept_as_they_are(run: Path) -> None:
    found, whole = shown(run), read(run)
    assert found.steps.tolist() == found.spans.tolist() == whole.steps
    assert found.loss.tolist() == [sample["loss"] for sample in whole.samples]
    for name in FIGURES:
        values = np.array(whole.figure(name), dtype=float)
        assert np.allclose(found.grids[name], values, rtol=1e-6, equal_nan=True), name
        want = np.stack([np.nanmin(values, 1), np.nanmedian(values, 1), np.nanmax(values, 1)])
        assert np.allclose(found.over_sites[name], want), name
    assert found.moments == whole.steps
    for k, sample in enumerate(whole.samples):
        assert [one.ravel().tolist() for one in found.maps["res"][k]] == [
            pytest.approx(one) for one in sample["maps"]["res"]
        ]


def test_of_many_the_extremes_are_kept(tmp_path: Path) -> None:
    """A gain of one sample and one site is seen in the curve and in the heat map; so is a loss."""

    def change(sample: dict[str, Any], k: int, of: int) -> None:
        if k == 777:
            sample["figures"]["forward_gain_99"][1], sample["loss"] = 33.0, 44.0
        sample["figures"]["spread"][2] = None if k % 2 else 0.5

    found = shown(report_runs.write(tmp_path / "run.jsonl", 1, 1000, change, head=report_runs.header(2)))
    assert len(found.spans) == SPANS and found.grids["spread"].shape == (SPANS, 4)
    span = int(np.searchsorted(found.spans, 7770, side="right")) - 1
    assert found.grids["forward_gain_99"][span, 1] == 33 and (found.grids["forward_gain_99"][:, 1] == 33).sum() == 1
    assert found.over_sites["forward_gain_99"][2, 777] == 33
    assert np.allclose(found.grids["spread"][:, 2], 0.5)  # the mean of what is known
    assert found.moments[0] == 0 and found.moments[-1] == 9990
    steps, loss = thin(found.steps, found.loss, 50)
    assert len(steps) <= 102 and (steps[loss.argmax()], loss.max()) == (7770, 44)


@pytest.mark.parametrize("count", [1, 2, 5, 99, 1000])
def test_thinning_keeps_both_ends_and_gaps(count: int) -> None:
    steps, values = np.arange(count), np.sin(np.arange(count))
    values[count // 2 : count // 2 + max(1, count // 10)] = np.nan
    x, y = thin(steps, values, 20)
    assert x[0] == 0 and x[-1] == count - 1 and len(x) <= 42 and (np.diff(x) > 0).all()
    assert np.nanmax(y, initial=-2) == np.nanmax(values, initial=-2) and np.isnan(y).any()


@pytest.mark.parametrize("log", [False, True])
def test_numbers_come_back_from_the_page(log: bool) -> None:
    values = np.array([[1e-4, 0.5, np.nan], [0.25, 2.0, 1.0]])
    found = packed(values, log)
    codes = np.frombuffer(base64.b64decode(found["codes"]), "<u2").reshape(found["rows"], -1)
    back = np.where(codes == 65535, np.nan, found["low"] + codes / 65534 * (found["high"] - found["low"]))
    assert np.allclose(
        10**back if log else back, values, rtol=1e-3 if log else 0, atol=0 if log else 1e-4, equal_nan=True
    )
    nothing = packed(np.array([[0.0, -1.0]]), True)
    assert (nothing["low"], nothing["high"]) == (0.0, 0.0)


def test_short_names() -> None:
    sites = report_runs.header(2).sites
    assert short_names(sites) == ["0.self_attn", "0.mlp", "1.self_attn", "1.mlp"]
    assert short_names(sites[:1]) == ["self_attn"]
    names = ("encoder.block.0.layer.1.mhc_0", "decoder.block.3.layer.0.mhc_0", "norm.mhc_0")
    assert short_names([SiteCall(0, name, k, "mlp" if k else "", 4, 8) for k, name in enumerate(names)]) == [
        "encoder.0.1.mhc_0", "decoder.3.0.mlp (2)", "norm.mlp (3)",
    ]  # fmt: skip


def test_every_card_shows_figures_that_there_are() -> None:
    for card in CARDS:
        assert set(card.lines) <= set(FIGURES) and card.grid in FIGURES, card.key
    assert len({card.key for card in CARDS}) == len(CARDS)


# -- on the command line -----------------------------------------------------------------------------------------------


def test_a_page_is_written_and_what_stands_out_is_said(run: Path, tmp_path: Path) -> None:
    code, printed = called("report", run, "-o", tmp_path / "page.html")
    assert code == 0 and "The loss falls from 6 at step 0 to" in printed and "written:" in printed
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not re.search(r"""<(script|link|img|iframe)[^>]+(src|href)=["']?(https?:)?//""", page)


@pytest.fixture
def some_cards(monkeypatch: pytest.MonkeyPatch) -> list[Card]:
    """One of each kind, as matplotlib takes a while for all."""
    cards = [card for card in CARDS if card.key in ("phi_gradient", "composite_forward", "rank")]
    monkeypatch.setattr(figures, "CARDS", cards)
    return cards


def test_pictures_for_a_paper(run: Path, tmp_path: Path, some_cards: list[Card]) -> None:
    code, printed = called("report", run, "-o", tmp_path / "page.html", "--figures", tmp_path / "pictures")
    assert code == 0 and f"{2 * (4 + len(some_cards))} pictures in" in printed, printed
    names = {file.name for file in (tmp_path / "pictures").iterdir()}
    wanted = {"loss", "map_res", "map_composite", "map_read_write", *(card.key for card in some_cards)}
    assert names == {f"{name}.{kind}" for name in wanted for kind in ("svg", "pdf")}
    for file in (tmp_path / "pictures").glob("*.svg"):
        ElementTree.parse(file)
        assert "step" in file.read_text(encoding="utf-8")  # text as text
    assert all(file.read_bytes().startswith(b"%PDF") for file in (tmp_path / "pictures").glob("*.pdf"))


@pytest.mark.slow
@pytest.mark.usefixtures("some_cards")
def test_two_runs_of_other_models(run: Path, tmp_path: Path) -> None:
    other = report_runs.write(tmp_path / "run.jsonl", 2, 20)  # by the same name
    code, printed = called("report", run, "--compare", other, "-o", tmp_path / "p.html", "--figures", tmp_path / "f")
    assert code == 0 and "The runs are of the same model with other sites" in printed
    text = (tmp_path / "f" / "rank.svg").read_text(encoding="utf-8")
    assert f"{run.parent.name}/run.jsonl" in text and f"{tmp_path.name}/run.jsonl" in text
    assert (tmp_path / "f" / "map_res_other.pdf").exists()


def bad_files(folder: Path, run: Path) -> dict[str, tuple[Path, str]]:
    """Files that hold no report, and what is said of each."""
    lines = run.read_text().splitlines(keepends=True)
    contents = {
        "empty": ("", "holds no line yet"),
        "cut in the header": (lines[0][:200], "holds no line yet"),
        "no sample": (lines[0], "has no sample yet: its run was watched at every 10 steps"),
        "cut in the first sample": (lines[0] + lines[1][:300], "has no sample yet"),
        "ended before it began": (lines[0] + '{"end": "KeyError: x"}\n', "It ended: KeyError: x."),
        "another program's": ('{"step": 1, "loss": 2.0}\n', "is no file of a watched run"),
        "no JSON": ("step,loss\n1,2\n", "is no file of a watched run"),
        "another format": (lines[0].replace('"format":1', '"format":9'), "format 1 is understood"),
        "something else between": (lines[0] + lines[1] + "hello\n" + lines[2], "Line 3"),
        "samples of another model": (lines[0] + json.dumps(report_runs.sample(0, 2, 3)) + "\n", "Line 2"),
    }
    found = {}
    for name, (text, says) in contents.items():
        file = folder / f"{name.replace(' ', '_')}.jsonl"
        file.write_text(text)
        found[name] = (file, says)
    (folder / "bytes.jsonl").write_bytes(bytes(range(256)) * 20)
    return {**found, "missing": (folder / "none.jsonl", "can't be read"), "a folder": (folder, "can't be read"),
            "bytes": (folder / "bytes.jsonl", "is no file of a watched run")}  # fmt: skip


def test_bad_files_end_in_a_sentence(run: Path, tmp_path: Path) -> None:
    for name, (file, says) in bad_files(tmp_path, run).items():
        for arguments in ((file,), (run, "--compare", file)):
            code, printed = called("report", *arguments, "-o", tmp_path / "page.html")
            assert code == 1 and printed.startswith("error: ") and says in printed, (name, printed)
        with pytest.raises(RunFileError):
            shown(file)
    assert not (tmp_path / "page.html").exists()


def test_bad_places_end_in_a_sentence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for arguments, says in (
        (("-o", tmp_path / "no" / "page.html"), "there is no folder"),
        (("-o", tmp_path / "page.html", "--figures", tmp_path / "file" / "pictures"), "can't be written"),
        (("-o", tmp_path / "page.html", "--compare", run), "is the same file"),
    ):
        code, printed = called("report", run, *arguments)
        assert code == 1 and printed.startswith("error: ") and says in printed, printed


def test_a_cut_off_last_line_is_left_out(run: Path, tmp_path: Path) -> None:
    lines = run.read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:4]) + lines[4][:700])
    assert shown(tmp_path / "cut.jsonl").steps.tolist() == [0, 10, 20]
    code, printed = called("report", tmp_path / "cut.jsonl", "-o", tmp_path / "page.html")
    assert code == 0 and "at step 20" in printed


def test_what_is_missing_is_named(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "mhc_rewrite.insight.report.page")
    monkeypatch.delattr("mhc_rewrite.insight.report.page")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    code, printed = called("report", run, "-o", tmp_path / "page.html")
    assert code == 1 and printed == 'error: A report needs plotly. Install it with: pip install "mhc-rewrite[look]"'


@pytest.mark.usefixtures("some_cards")
def test_runs_without_some_of_it(tmp_path: Path) -> None:
    """No loss, no gradients, no maps, figures that are never finite: the rest is shown."""

    def change(sample: dict[str, Any], k: int, of: int) -> None:
        sample["loss"] = None
        sample["figures"] = {name: values for name, values in sample["figures"].items() if "gradient" not in name}
        sample["figures"]["rank"] = [None] * 8
        sample["maps"]["res"] = [None] * 8
        sample["composite"] = [None]
        sample["notes"] = ["Compilation was paused."]

    found = shown(report_runs.write(tmp_path / "run.jsonl", change=change))
    assert "rank" not in found.grids and not found.known and math.isnan(found.loss[0])
    assert found.notes == {"Compilation was paused.": (0, 60)}
    code, printed = called("report", tmp_path / "run.jsonl", "-o", tmp_path / "p.html", "--figures", tmp_path / "f")
    assert code == 0, printed
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert "Compilation was paused." in page and 'id="phi_gradient"' not in page and 'id="spread"' in page
    assert not (tmp_path / "f" / "loss.svg").exists()


def test_names_are_no_html(tmp_path: Path) -> None:
    head = report_runs.header(1)
    evil = "</script><script>alert(1)</script>"
    site = type(head.sites[0])(0, evil, 0, "<b>", 4, 8)
    head = type(head)(evil, {"connection": evil}, head.settings, (site,), evil, "<svg onload='alert(1)'/>")
    code, _ = called("report", report_runs.write(tmp_path / "run.jsonl", head=head), "-o", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = page.replace(get_plotlyjs(), "")
    assert code == 0 and "alert(1)" in page and "<script>alert" not in page and "onload" not in page

"""The page of a report in a real browser: it is not empty, no script fails, the heat maps have colours, on any screen.

MHC_SCREENSHOTS=FOLDER keeps the pictures.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import report_runs
from browser import Browser, Page, needs_browser

pytest.importorskip("numpy")
pytest.importorskip("plotly")
pytest.importorskip("PIL")
import numpy as np
from PIL import Image

from mhc_rewrite.insight.report.page import page
from mhc_rewrite.insight.report.reading import Shown, shown

pytestmark = [needs_browser, pytest.mark.slow]
WIDE, PHONE = 1280, 390
PATIENCE = 60.0
ALL = "document.documentElement.dataset.drawn === 'all'"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("pages")

    def write(name: str, run: Shown, other: Shown | None = None) -> Path:
        file = folder / f"{name}.html"
        file.write_text(page(run, other), encoding="utf-8")
        return file

    return write


def made(name: str, folder: Path, **more: Any) -> Shown:
    return shown(report_runs.write(folder / f"{name}.jsonl", **more))


def until(there: Page, condition: str) -> None:
    end = time.monotonic() + PATIENCE
    while not there.evaluate(condition):
        assert time.monotonic() < end, f"never: {condition}"
        time.sleep(0.05)


def pixels(there: Page, name: str) -> np.ndarray:
    """The whole page, as (height, width, RGB)."""
    shot = there.screenshot()
    if folder := os.environ.get("MHC_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.png").write_bytes(shot)
    with Image.open(io.BytesIO(shot)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def sound(there: Page) -> None:
    """No script failed, nothing was fetched, nothing is wider than the screen."""
    assert there.errors == []
    assert [url for url in there.requests if not url.startswith(("file:", "blob:"))] == []
    assert there.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def boxes(there: Page, selector: str) -> list[tuple[int, int, int, int]]:
    """left, top, width and height in the page."""
    script = f"""[...document.querySelectorAll({json.dumps(selector)})].map(one => {{
        const box = one.getBoundingClientRect();
        return [box.left + scrollX, box.top + scrollY, box.width, box.height].map(Math.round); }})"""
    return [tuple(box) for box in there.evaluate(script)]


def colours(picture: np.ndarray, box: tuple[int, int, int, int]) -> int:
    """How many there are in a part of the picture."""
    left, top, width, height = box
    return len(np.unique(picture[top : top + height, left : left + width] @ (65536, 256, 1)))


LOOKS = [
    (WIDE, False), pytest.param(WIDE, True, marks=pytest.mark.long), pytest.param(PHONE, False, marks=pytest.mark.long),
    (PHONE, True),
]  # fmt: skip


@pytest.mark.parametrize("width, dark", LOOKS)
def test_a_page(width: int, dark: bool, browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    there = browser.open(written("small", made("run", tmp_path, samples=30)), width=width, dark=dark)
    until(there, ALL)
    sound(there)
    picture = pixels(there, f"report-{width}-{'dark' if dark else 'light'}")
    assert len(picture) > 3000 and (picture[5, 5].mean() < 60) == dark
    for selector, least in (
        ("[data-lines] .main-svg", 10),
        ("[data-grid] .heatmaplayer", 20),
        ("[data-map] .heatmaplayer", 3),
    ):
        seen = [box for box in boxes(there, selector) if box[2] > 20 and box[3] > 20]
        counts = [colours(picture, box) for box in seen if box[1] + box[3] < len(picture)]
        # Some figures have a few values only; none has one.
        assert len(counts) >= 3 and min(counts) > 2 and sorted(counts)[len(counts) // 2] >= least, (selector, counts)
    assert there.evaluate("document.querySelectorAll('#said li').length") >= 2
    assert "The loss falls from 6 at step 0" in there.evaluate("document.body.innerText")


@pytest.mark.long
@pytest.mark.parametrize("layers", [48, 200])
@pytest.mark.parametrize("width", [WIDE, PHONE])
def test_deep_models(layers: int, width: int, browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    there = browser.open(written(f"deep{layers}", made("run", tmp_path, layers=layers, samples=6)), width=width)
    until(there, ALL)
    sound(there)
    # Each site has its tile, none smaller than can be told apart, and no name lies on another.
    tiles = there.evaluate("""(() => {
        const plot = document.querySelector('[data-map=res]'), [heat, names] = plot.data;
        const cell = plot.layout.width / heat.z[0].length;
        return {cell, sites: names.x.length, tall: plot.layout.height,
                filled: heat.z.flat().filter(value => value !== null).length};
    })()""")
    assert tiles["sites"] == 2 * layers and tiles["filled"] == 2 * layers * 16 and tiles["cell"] >= 6
    assert tiles["tall"] < 2600
    for plot in ("[data-map=pre]", "[data-grid=rank]"):
        labels = [box for box in boxes(there, f"{plot} .xtick text, {plot} .ytick text")]
        assert len(labels) > 4 and not any(overlap(a, b) for k, a in enumerate(labels) for b in labels[:k]), plot


def overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return all(min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) > 3 for k in (0, 1))


def test_the_slider_moves_all_matrices(browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    run = made("run", tmp_path, samples=20)
    there = browser.open(written("slider", run))
    there.evaluate("document.getElementById('map_post').scrollIntoView()")
    until(there, "!document.querySelector('[data-map]:not(.js-plotly-plot)')")
    values = "document.querySelector('[data-map={}]').data[0].z"
    for step, key in ((190, None), (0, "Home"), (10, "ArrowRight")):
        if key:
            there.evaluate("document.getElementById('moment').focus()")
            code = {"Home": 36, "ArrowRight": 39}[key]
            there.send("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code)
            there.send("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)
        assert there.evaluate("document.getElementById('step').value") == f"{step}"
        k = step // 10
        shown_there = [value for row in there.evaluate(values.format("res")) for value in row if value is not None]
        assert sorted(shown_there) == pytest.approx(sorted(np.stack(run.maps["res"][k]).ravel()), abs=1e-4)
        assert np.allclose(np.array(there.evaluate(values.format("pre"))), np.stack(run.maps["pre"][k]).T, atol=1e-4)
        assert np.allclose(np.array(there.evaluate(values.format("post"))), np.stack(run.maps["post"][k]).T, atol=1e-4)
        assert np.allclose(there.evaluate(values.format("composite")), run.composites[k][0], atol=1e-3)
    assert there.errors == []


def test_curves_and_heat_maps_are_the_runs(browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    run = made("run", tmp_path, samples=25)
    there = browser.open(written("curves", run))
    until(there, ALL)
    x, y = there.evaluate("(([trace]) => [trace.x, trace.y])(document.querySelector('[data-lines=loss]').data)")
    assert x == run.steps.tolist() and np.allclose(y, run.loss, rtol=1e-4)
    lines = there.evaluate("document.querySelector('[data-lines=rank]').data.map(trace => trace.y)")
    assert np.allclose(lines, run.over_sites["rank"][[0, 2, 1]], rtol=1e-4)
    z = there.evaluate("document.querySelector('[data-grid=phi_gradient]').data[0].customdata")
    assert np.allclose(np.array(z).T, run.grids["phi_res_gradient"], rtol=1e-3)
    places = there.evaluate("document.querySelector('[data-grid=rank]').data[0].text.map(row => row[0])")
    assert places == [str(site) for site in run.header.sites]


def negative(sample: dict[str, Any], k: int, of: int) -> None:
    sample["maps"]["res"] = [[-value for value in one] for one in sample["maps"]["res"]]


@pytest.mark.parametrize("width", [WIDE, pytest.param(PHONE, marks=pytest.mark.long)])
def test_two_runs(width: int, browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    head = report_runs.header(3, n=2, connection="hc")
    other = made("other", tmp_path, samples=12, n=2, head=head, change=negative)
    there = browser.open(written("two", made("run", tmp_path, samples=30), other), width=width)
    until(there, ALL)
    sound(there)
    text = there.evaluate("document.getElementById('said').innerText")
    assert "Between the two" in text and "with other sites" in text
    left, right = boxes(there, "[data-map=res]")
    assert (left[1] == right[1] and right[0] > left[0]) if width == WIDE else right[1] > left[1]
    assert len(boxes(there, "[data-grid=rank]")) == 2
    # The same colours for the same numbers; numbers below 0 have colours of their own.
    maps = "[...document.querySelectorAll('[data-map=res]')].map(plot => [plot.data[0].zmin, plot.data[0].zmax])"
    (low, high), others = there.evaluate(maps)
    assert low < 0 < high and [low, high] == others
    pixels(there, f"report-two-{width}")


def test_a_run_without_most_of_it(browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    def change(sample: dict[str, Any], k: int, of: int) -> None:
        sample.update(loss=None, maps={"pre": [None] * 8, "post": [None] * 8, "res": [None] * 8}, composite=[None])
        sample["figures"] = {"rank": sample["figures"]["rank"]}

    there = browser.open(written("little", made("run", tmp_path, samples=4, change=change)))
    until(there, ALL)
    sound(there)
    assert "The run holds no loss." in there.evaluate("document.body.innerText")


def test_a_single_sample(browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    there = browser.open(written("single", made("run", tmp_path, samples=1)))
    until(there, ALL)
    sound(there)
    assert there.evaluate("document.querySelectorAll('[data-lines=loss] .points path').length") == 1


def test_it_prints_in_ink_on_white(browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    there = browser.open(written("print", made("run", tmp_path, samples=10)), dark=True)
    assert there.printed().startswith(b"%PDF")  # all plots are drawn for it, those out of sight too
    assert there.evaluate("[...document.querySelectorAll('.plot')].every(plot => plot.data)")
    there.evaluate("dispatchEvent(new Event('beforeprint'))")
    line = "document.querySelector('[data-lines=loss]').data[0].line.color"
    on_paper = there.evaluate(line)
    there.evaluate("dispatchEvent(new Event('afterprint'))")
    assert on_paper == "#2257c4" and there.evaluate(line) != on_paper
    assert there.errors == []


@pytest.mark.long
def test_a_long_run_opens_at_once(browser: Browser, written: Callable[..., Path], tmp_path: Path) -> None:
    """100,000 samples. Three seconds on a machine that does nothing else; here others may be at work."""
    run = shown(report_runs.write_many(tmp_path / "run.jsonl", 100_000))
    file = written("long", run)
    assert file.stat().st_size < 8e6
    there = browser.open(file)
    opened = there.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1000
    until(there, "document.querySelector('[data-lines=loss]').data")
    assert opened < 15, f"{opened:.1f} s"
    sound(there)
    x, y = there.evaluate("(([trace]) => [trace.x, trace.y])(document.querySelector('[data-lines=loss]').data)")
    assert len(x) < 1000 and max(y) == 99.0 and x[y.index(99.0)] == 333_330  # the one sample that stands out is there

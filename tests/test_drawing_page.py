"""The page of a drawing, in a browser: it fetches nothing, no script fails, keys and search work, it fits a phone."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, Page, needs_browser
from mhc_rewrite.insight.drawing import Drawing, draw
from mhc_rewrite.plans import Rejection, ResidualStream, RewritePlan, SourceLine
from pictured import deep_plan

pytestmark = needs_browser

ROWS = "[...document.querySelectorAll('.row[data-n]')].filter(row => row.getClientRects().length)"
NAMES = f"{ROWS}.map(row => row.dataset.n)"
FOCUSED = "document.activeElement.dataset.n || document.activeElement.id || document.activeElement.className"
TIP = "document.querySelector('#tip.on')?.textContent || ''"


def two_streams(layers: int = 12) -> RewritePlan:
    """An encoder and a decoder that reads it, with an add that was left alone."""
    plan = deep_plan(layers)
    (decoder,) = plan.streams
    moved = (
        dataclasses.replace(
            site, name=site.name.replace("model", "encoder"), holder=site.holder.replace("model", "encoder")
        )
        for site in decoder.sites
    )
    encoder = ResidualStream(tuple(moved), "encoder.layers.0", "encoder.layers.11", "encoder")
    left = Rejection("model.layers.3.mlp.act", SourceLine("model.py", 40, "return x + y"), "no-mixing", "an activation")
    streams = (encoder, dataclasses.replace(decoder, reads=(0,)))
    return dataclasses.replace(plan, streams=streams, rejections=(left,))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(two_streams()).save(tmp_path_factory.mktemp("page") / "model.html")


@pytest.fixture(scope="module")
def page(browser: Browser, path: Path) -> Page:
    return browser.open(path)


@pytest.fixture(autouse=True)
def _folded(request: pytest.FixtureRequest) -> None:
    if "page" in request.fixturenames:
        open_page: Page = request.getfixturevalue("page")
        open_page.evaluate(
            "document.querySelectorAll('.card.open .head').forEach(h => h.click()); document.activeElement.blur()"
        )
        open_page.key("/")
        open_page.key("Escape")


def test_it_is_one_file_without_errors(page: Page, path: Path) -> None:
    assert page.requests == [path.resolve().as_uri()]
    assert page.evaluate("document.title") == "Decoder: streams"
    names = page.evaluate(NAMES)
    assert [name.split(".mhc")[0] for name in names] == [
        "encoder.layers.{0..11}", "encoder.layers.{0..11}", "model.layers.{0..11}", "model.layers.3.mlp.act",
        "model.layers.{0..11}",
    ]  # fmt: skip
    assert page.errors == []


def test_enter_unfolds_and_arrows_walk(page: Page) -> None:
    page.evaluate("document.querySelector('#stream-1 .head').focus()")
    page.key("Enter")
    names = page.evaluate(NAMES)
    assert names[2:] == [
        name for k in range(12) for name in (
            f"model.layers.{k}.mhc_0", *(["model.layers.3.mlp.act"] if k == 3 else []), f"model.layers.{k}.mhc_1"
        )
    ]  # fmt: skip
    assert page.evaluate("document.querySelector('#stream-1 .head').getAttribute('aria-expanded')") == "true"
    page.key("ArrowDown")
    page.key("ArrowDown")
    assert page.evaluate(FOCUSED) == "model.layers.0.mhc_1"
    said = page.evaluate(TIP)
    assert all(text in said for text in ("mhc_rewrite::pre", "(..., 4, 64)", "6,171 parameters", "model.py:13")), said
    page.key("ArrowUp")
    assert page.evaluate(FOCUSED) == "model.layers.0.mhc_0"
    page.key("Escape")
    assert page.evaluate(TIP) == ""
    page.key("Enter")  # on a row: folds its layers again
    assert len(page.evaluate(NAMES)) == 5
    assert page.errors == []


def test_tab_reaches_everything(page: Page) -> None:
    page.evaluate("document.querySelector('#q').focus()")
    reached = []
    for _ in range(8):
        page.key("Tab")
        reached.append(page.evaluate(FOCUSED))
    assert reached[0] == "all"
    assert set(page.evaluate(NAMES)) <= set(reached)
    assert reached.count("head") == 2


def test_a_slash_searches_and_enter_goes_on(page: Page) -> None:
    page.key("/")
    assert page.evaluate(FOCUSED) == "q" and page.evaluate("document.querySelector('#q').value") == ""
    for letter in "layers.7.":
        page.key(letter)
    assert page.evaluate("document.querySelector('#found').textContent").startswith("4 found")
    hits = []
    for _ in range(5):
        page.key("Enter")
        hits.append(page.evaluate("document.querySelector('.hit').dataset.n"))
    four = [f"{part}.layers.7.mhc_{k}" for part in ("encoder", "model") for k in (0, 1)]
    assert hits == [*four, four[0]]
    shown = page.evaluate(
        "(box => box.top >= 0 && box.bottom <= innerHeight)(document.querySelector('.hit').getBoundingClientRect())"
    )
    assert shown and four[0] in page.evaluate(TIP)
    page.evaluate(
        "document.querySelector('#q').value = 'nowhere'; document.querySelector('#q').dispatchEvent(new Event('input'))"
    )
    assert page.evaluate("document.querySelector('#found').textContent") == "nothing found"


def test_hovering_tells(page: Page) -> None:
    page.evaluate(f"{ROWS}[3].scrollIntoView({{block: 'center'}})")
    x, y = page.evaluate(f"(b => [b.left + 90, b.top + 12])({ROWS}[3].getBoundingClientRect())")
    page.hover(x, y)
    said = page.evaluate(TIP)
    assert all(text in said for text in ("model.layers.3.mlp.act", "no-mixing", "an activation", "model.py:40")), said
    page.hover(2, 2)
    assert page.evaluate(TIP) == ""


def test_texts_are_no_wider_than_they_were_measured(page: Page) -> None:
    """Nothing in a drawing leaves its panel, in the fonts that this machine has."""
    out = page.evaluate("""[...document.querySelectorAll('.row svg')].flatMap(svg => {
        const text = [...document.querySelectorAll(svg.firstChild.getAttribute('href') + ' text')];
        const width = svg.viewBox.baseVal.width + 1;
        return text.filter(t => t.getBBox().x < 0 || t.getBBox().x + t.getBBox().width > width).map(t => t.textContent);
    })""")
    assert out == []
    assert page.evaluate("document.querySelectorAll('defs text').length") > 20


@pytest.mark.parametrize(("dark", "paper"), [(False, "rgb(255, 255, 255)"), (True, "rgb(20, 23, 28)")])
def test_a_phone_shows_one_side_in_the_readers_colours(browser: Browser, path: Path, dark: bool, paper: str) -> None:
    page = browser.open(path, width=390, height=844, dark=dark)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    visible = (
        "[...document.querySelectorAll('.row svg')].filter(s => s.getClientRects().length).map(s => s.classList[1])"
    )
    assert set(page.evaluate(visible)) == {"a"}
    assert page.evaluate(
        "Math.max(...[...document.querySelectorAll('.card')].map(c => c.getBoundingClientRect().right)) <= 390"
    )
    page.evaluate("document.querySelector('#side-b').click()")
    assert set(page.evaluate(visible)) == {"b"}
    page.evaluate("document.querySelector('#all').click()")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    lane = "getComputedStyle(document.querySelector('.mhc-lane-0')).stroke"
    assert page.evaluate(lane) == ("rgb(110, 162, 255)" if dark else "rgb(47, 111, 222)")
    assert page.errors == []


def test_a_thousand_layers_unfold_and_print(browser: Browser, tmp_path: Path) -> None:
    deep = Drawing(draw(deep_plan(1000, 8)).picture, folded=False)
    page = browser.open(deep.save(tmp_path / "deep.html"))
    assert page.evaluate("document.querySelectorAll('.layer').length") == 1000
    tops = page.evaluate(
        "[...document.querySelectorAll('.layer')].map(l => [l.offsetTop, l.offsetTop + l.offsetHeight])"
    )
    assert all(end <= top for (_, end), (top, _) in itertools.pairwise(tops))
    page.evaluate("document.querySelector('#all').click()")
    assert page.printed().startswith(b"%PDF-") and page.errors == []


def test_paper_gets_both_sides_on_white(browser: Browser, path: Path) -> None:
    page = browser.open(path, width=718, dark=True)
    scheme = {"name": "prefers-color-scheme", "value": "dark"}
    page.send("Emulation.setEmulatedMedia", media="print", features=[scheme])
    visible = "[...document.querySelectorAll('.row svg')].filter(s => s.getClientRects()[0]).map(s => s.classList[1])"
    assert set(page.evaluate(visible)) == {"a", "b"}
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.documentElement.scrollWidth") == 718
    assert page.evaluate("document.querySelector('.tools').getClientRects().length") == 0


def test_the_picture_is_coloured_by_the_reader_too(browser: Browser, tmp_path: Path) -> None:
    """Also what is drawn once and used often."""
    path = draw(deep_plan(3), folded=False).save(tmp_path / "model.svg")
    shots = [browser.open(path, dark=dark).screenshot() for dark in (False, True)]
    assert shots[0] != shots[1]
    page = browser.open(path, dark=True)
    fill = "getComputedStyle(document.querySelector('.mhc-paper')).fill"
    assert page.evaluate(fill) == "rgb(20, 23, 28)" and page.errors == []
    assert page.evaluate("document.querySelectorAll('use').length") >= 6


def test_without_scripts_the_folded_picture_stands(browser: Browser, path: Path) -> None:
    page = browser.open(path)
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.send("Page.reload")
    page.send("Emulation.setScriptExecutionDisabled", value=False)
    assert len(page.evaluate(NAMES)) == 5

"""The site of the documentation: it builds without a warning, holds every page, and fetches nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import mhc_rewrite
from mhc_rewrite import distributed, errors, hf

pytest.importorskip("mkdocs")
pytest.importorskip("material")
import yaml

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("index.md", "architecture.md", "changelog.md", "contributing.md")  # docs/hooks.py brings them


class Page(HTMLParser):
    """What a page fetches, where it leads, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.assets: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.assets.append(given["href"])
        self.assets += [given[name] for name in ("src", "srcset", "data", "poster") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html") if file.name != "404.html"}


def in_navigation(entries: object) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    else:
        for entry in entries.values() if isinstance(entries, dict) else entries:  # type: ignore[attr-defined]
            yield from in_navigation(entry)


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = list(in_navigation(settings["nav"]))
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed)) and set(listed) == there | set(OUTSIDE)


@pytest.mark.parametrize("module", [mhc_rewrite, errors, hf, distributed], ids=lambda module: module.__name__)
def test_every_public_name_has_its_entry(module: ModuleType, pages: dict[Path, Page], site: Path) -> None:
    classes = [name for name, value in vars(module).items() if isinstance(value, type)]
    names = getattr(module, "__all__", classes)
    anchors = set().union(*(page.anchors for file, page in pages.items() if file.parent == site / "api"))
    homes = {
        name: getattr(getattr(module, name), "__module__", "") for name in names
    }  # of those imported when asked for
    assert names and not [
        name for name in names if anchors.isdisjoint({f"{module.__name__}.{name}", f"{homes[name]}.{name}"})
    ]


def test_nothing_is_fetched_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for file, page in pages.items():
        elsewhere = [asset for asset in page.assets if urlsplit(asset).netloc]
        assert not elsewhere, (file, elsewhere)
        # Material fetches the library of such a diagram when it meets one.
        assert 'class="mermaid"' not in file.read_text(), file
    for file in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", file.read_text()), file


def test_links_lead_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    lost = []
    for file, page in pages.items():
        for link in (*page.links, *page.assets):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchor = unquote(parts.fragment)
            if not target.is_file():
                lost.append((file.relative_to(site), link))
            elif anchor and target in pages and anchor not in pages[target].anchors:
                lost.append((file.relative_to(site), link))
    assert len(pages) > 40 and not lost, lost


def test_a_page_that_lies_elsewhere_is_there_with_its_links(site: Path, pages: dict[Path, Page]) -> None:
    """README's links are the repository's and those of the site; code that looks like a link stays as it is."""
    assert "tutorials/convert_your_model.html" in pages[site / "index.html"].links
    assert "architecture.html" in pages[site / "index.html"].links
    assert "../sources/demos/finetune_llama.py.html" in pages[site / "tutorials" / "finetune_llama.html"].links
    assert "return get_peft_model" in re.sub(
        r"<[^>]+>", "", (site / "sources/demos/finetune_llama.py.html").read_text()
    )

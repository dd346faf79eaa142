"""What mkdocs.yml calls: pages that lie elsewhere in the repository become pages of the site, and links lead to them.

README.md, ARCHITECTURE.md, CONTRIBUTING.md and CHANGELOG.md stay at the root, where their readers look for them, and
the demos stay runnable files; on the site they are pages too. In the sources all links are those of the repository.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SHOWN = ("LICENSE", "constraints.txt", "demos/*.py", "demos/*.ipynb")  # as they are, each on a page of its own
# A link's target without its anchor; addresses, anchors of the same page and code are none.
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)[^)#\s]+(?=[)#])")
CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for source in sources():
        files.append(File.generated(config, shown_at(source), content=listing(source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the repository has them, relative to the page's own file, as links of the site."""
    source = page.file.abs_src_path
    if source is None:
        return markdown
    folder, here = Path(source).resolve().parent, Path(page.file.src_uri).parent
    places = site_places()

    def moved(match: re.Match[str]) -> str:
        place = places.get((folder / match[0]).resolve())
        return match[0] if place is None else Path(os.path.relpath(place, here)).as_posix()

    kept: list[str] = []
    text = CODE.sub(lambda match: kept.append(match[0]) or f"\0{len(kept) - 1}\0", markdown)
    return re.sub("\0(\\d+)\0", lambda match: kept[int(match[1])], LINK.sub(moved, text))


def sources() -> list[str]:
    return [path.relative_to(ROOT).as_posix() for pattern in SHOWN for path in sorted(ROOT.glob(pattern))]


def shown_at(source: str) -> str:
    return f"sources/{source}.md"


def listing(source: str) -> str:
    text = (ROOT / source).read_text()
    head = f"---\nsearch:\n  exclude: true\n---\n# {source}\n\n"
    if source.endswith(".ipynb"):
        return head + "\n\n".join(map(cell, json.loads(text)["cells"])) + "\n"
    language = "python" if source.endswith(".py") else "text"
    return f"{head}````{language}\n{text}````\n"


def cell(of_notebook: dict[str, Any]) -> str:
    text = "".join(of_notebook["source"])
    # Its headings stand below that of the page.
    return f"````python\n{text}\n````" if of_notebook["cell_type"] == "code" else re.sub("^#", "##", text, flags=re.M)


def site_places() -> dict[Path, str]:
    """Where a file of the repository is on the site."""
    own = {path: path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    return {**own, **{ROOT / s: p for s, p in PAGES.items()}, **{ROOT / s: shown_at(s) for s in sources()}}

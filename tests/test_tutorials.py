"""The code of the tutorials is code that runs: as the page shows it, or in the demo that the page walks through."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import pages

ROOT = Path(__file__).resolve().parents[1]
DEMOS = {path.stem: path for path in (ROOT / "demos").glob("*.py")}
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
WALKS = [page for page in TUTORIALS if page.stem in DEMOS]
OWN = [page for page in TUTORIALS if page.stem not in DEMOS]


@pytest.mark.parametrize("page", WALKS, ids=lambda page: page.stem)
def test_a_tutorial_shows_its_demo(page: Path) -> None:
    """A demo takes minutes and has its own test; what the page shows of it are lines of it."""
    there = {line.strip() for line in DEMOS[page.stem].read_text().splitlines()}
    code = [block.text for block in pages.blocks(page) if block.language == "python"]
    shown = {line.strip() for text in code for line in text.splitlines() if line.strip()}
    assert shown and shown <= there, shown - there


@pytest.mark.slow
@pytest.mark.parametrize("page", OWN, ids=lambda page: page.stem)
def test_a_tutorial_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pages.run(page, tmp_path)
        finally:
            torch._dynamo.reset()
            for name in [name for name in set(sys.modules) - before if (tmp_path / f"{name}.py").exists()]:
                del sys.modules[name]


PAGE = """
```python title="doubled.py"
def twice(x):
    return 2 * x
```

```python
from doubled import twice
print("twice", twice(4))
```

```text
twice 8
```
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", None),
        ("twice 8", "...", None),
        ("2 * x", "3 * x", r"page.md:13 shows\ntwice 8\n\nand what is printed is\ntwice 12"),
        ("```text\ntwice 8\n```\n", "", "page.md:8 shows"),
        ("```python\nfrom", "```console\n$ ls\n```\n\n```python\nfrom", "mhc-rewrite's alone"),
    ],
    ids=["as it is", "anything", "other output", "not shown", "another command"],
)
def test_a_page_is_held_to_what_it_prints(
    old: str, new: str, said: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(PAGE.replace(old, new))
    try:
        if said is None:
            pages.run(page, tmp_path)
        else:
            with pytest.raises(AssertionError, match=said):
                pages.run(page, tmp_path)
    finally:
        sys.modules.pop("doubled", None)


def test_every_block_is_read() -> None:
    """Whatever is fenced in a tutorial is a block to the runner, which knows these languages."""
    for page in OWN:
        found = pages.blocks(page)
        assert len(re.findall(r"^```", page.read_text(), re.MULTILINE)) == 2 * len(found), page
        assert {block.language for block in found} <= {"python", "console", *pages.PRINTED}, page

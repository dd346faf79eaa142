"""Runs a page of the documentation as its reader would, block after block, and holds what is printed to what it shows.

- A block of `python` with a title is a file of that name, which later blocks import.
- Any other block of `python` runs, all of a page in one namespace.
- A block of `text`, or of `pytb` (messages of errors, whose lines the site breaks), is what the block before it prints.
  What prints must show it; a line `...` stands for any lines, and `...` within one for any characters.
- A block of `console` has commands after `$ `, of `mhc-rewrite` alone, each followed by what it prints.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from mhc_rewrite.cli.main import app

PRINTED = ("text", "pytb")
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its title or "", its text, and the number of its first line in the page."""

    language: str
    title: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m[1], m[2] or "", m[3], text.count("\n", 0, m.start(3)) + 1) for m in FENCE.finditer(text)]


def run(page: Path, folder: Path) -> None:
    """Runs a page in the current folder, which is `folder` and on sys.path.

    Raises:
        AssertionError: something else is printed than the page shows.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed, line = "", 1
    for block in blocks(page):
        if block.language in PRINTED:
            check(page, block.line, block.text, printed)
            printed = ""
            continue
        check(page, line, "", printed)
        printed, line = "", block.line
        if block.language == "python" and block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "python":
            # Lines are numbered as in the page, which is what tracebacks and plans then show.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, namespace)
            printed = output.getvalue()
        elif block.language == "console":
            for command, shown in commands(block.text):
                check(page, block.line, shown, called(command))
    check(page, line, "", printed)


def commands(text: str) -> Iterator[tuple[str, str]]:
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def called(command: str) -> str:
    name, *arguments = shlex.split(command, comments=True)
    assert name == "mhc-rewrite", f"{command!r}: a page's commands are mhc-rewrite's alone"
    return CliRunner().invoke(app, arguments).stdout


def check(page: Path, line: int, shown: str, printed: str) -> None:
    """Blanks at the ends of lines, and around the whole, do not count."""
    want, got = ("\n".join(map(str.rstrip, text.strip("\n").splitlines())) + "\n" for text in (shown, printed))
    if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS):
        raise AssertionError(f"{page.name}:{line} shows\n{want}\nand what is printed is\n{got}")

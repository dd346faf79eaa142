"""The rooms of the package: imports run down the list in ARCHITECTURE.md, and never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mhc_rewrite"
# From the top down; rooms of one line may not import each other.
FLOORS = [
    {"cli"},
    {"hf", "insight"},
    {"__init__"},
    {"lifecycle", "distributed"},
    {"api"},
    {"lowering", "conversion"},
    {"passes"},
    {"cost", "capture"},
    {"plans", "sites"},
    {"config"},
    {"connections"},
    {"kernels"},
    {"printing", "errors", "torch_private", "version"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imported_rooms(source: str) -> Iterator[str]:
    """The rooms that a file's imports name, those inside functions and for types too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "mhc_rewrite":
                room = rest.split(".")[0]
                yield room if room in FLOOR else "__init__"


def test_every_room_has_a_floor() -> None:
    assert {room_of(file) for file in FILES} == set(FLOOR)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_down(file: Path) -> None:
    room = room_of(file)
    for other in imported_rooms((PACKAGE / file).read_text()):
        assert other == room or FLOOR[other] > FLOOR[room], f"{file} imports {other}, which is not below {room}"

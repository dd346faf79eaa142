"""Data for a reader: names that differ by number folded into one, plain tables, and the same as plain text."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

T = TypeVar("T")
PROSE_WIDTH = 72
# A rule under the header and no other lines, in ASCII, which every pipe and log takes.
BOX = box.Box("\n".join(["    ", "    ", " -- ", *["    "] * 5]), ascii=True)


def as_text(renderable: Any) -> str:
    """A renderable as plain text: no colour codes, as wide as its names need, no trailing blanks."""
    console = Console(file=io.StringIO(), width=100_000, color_system=None, force_terminal=False, legacy_windows=False)
    console.width = max(1, Measurement.get(console, console.options, renderable).maximum)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


# Names that differ by number only ------------------------------------------------------------------------------------


def fold(names: Iterable[str]) -> dict[str, list[str]]:
    """Dotted names grouped where they differ by number only, under one name as a shell would write it.

    `["h.0.mlp", "h.1.mlp", "h.2.mlp", "norm"]` -> `{"h.{0..2}.mlp": [...], "norm": ["norm"]}`.
    """
    shapes: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for name in names:
        parts = name.split(".")
        shape = tuple("#" if _is_number(part) else part for part in parts)
        shapes.setdefault(shape, {})[tuple(int(part) for part in parts if _is_number(part))] = name
    folded = {}
    for shape, rows in shapes.items():
        for sets in _fold_numbers(list(rows)):
            texts = iter([_number_set(values) for values in sets])
            pattern = ".".join(next(texts) if part == "#" else part for part in shape)
            covered = [row for row in rows if all(n in values for n, values in zip(row, sets, strict=True))]
            folded[pattern] = [rows[row] for row in covered]
    return folded


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _fold_numbers(rows: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Rows of numbers as products of sets: one where they fill it, else split at the first number that varies."""
    sets = tuple(tuple(sorted(set(column))) for column in zip(*rows, strict=True))
    if len(list(itertools.product(*sets))) == len(rows):
        return [sets]
    split = next(i for i, values in enumerate(sets) if len(values) > 1)
    # Halves that hold the same in every other place are one again: stages 0, 1 and 3 of a pyramid, say.
    merged: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for value in sets[split]:
        for part in _fold_numbers([row for row in rows if row[split] == value]):
            merged.setdefault((*part[:split], *part[split + 1 :]), []).append(value)
    return [(*rest[:split], tuple(values), *rest[split:]) for rest, values in merged.items()]


def _number_set(values: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` -> `{0..2,5}`; `(0, 2, 4, 6)` -> `{0..6..2}`; `(3,)` -> `3`."""
    if len(values) == 1:
        return str(values[0])
    steps = {b - a for a, b in itertools.pairwise(values)}
    if len(values) > 3 and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{{{values[0]}..{values[-1]}..{step}}}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = (f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return "{" + ",".join(texts) + "}"


def without_numbers(text: str) -> str:
    """Text with `#` for the numbers in dotted names: what layers of one kind have in common."""
    return re.sub(r"(?<=[A-Za-z_]\.)\d+\b|^\d+(?=\.)", "#", text)


def groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


# Pieces ---------------------------------------------------------------------------------------------------------------


def module_name(name: str) -> str:
    """A module's qualified name; the model itself has the empty one."""
    return name or "(model)"


def folded_names(names: Iterable[str]) -> str:
    return "\n".join(fold(map(module_name, names)))


def times(count: int) -> str:
    return f"x{count}" if count > 1 else ""


def plain_table(*headers: str) -> Table:
    table = Table(box=BOX, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for header in headers:
        # The count under the empty header stays whole; names break anywhere rather than lose their end.
        table.add_column(header, overflow="fold", no_wrap=not header)
    return table


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"

"""Where things stand: the columns of each stream, and the streams on the page, as constraints that kiwisolver solves.

A trunk is a chain, so there are no crossings to take out, which is what layouts of layered graphs (Graphviz's dot) are
for; they would move the lanes from row to row. What has to hold here is that lanes stay straight, that the same block
stands in one row before and after, that every text has room, and that nothing overlaps: constraints, which matplotlib
lays out its axes by with the same solver.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mhc_rewrite.errors import DrawingError
from mhc_rewrite.insight.drawing.data import Part
from mhc_rewrite.insight.drawing.marks import text_width

try:
    import kiwisolver as kiwi
except ImportError as error:
    raise DrawingError(
        'Pictures are laid out by kiwisolver, which is not installed: pip install "mhc-rewrite[look]". A .dot file '
        "does without it."
    ) from error

ABREAST = 3  # streams beside each other
MARGIN, BETWEEN, PAD = 28.0, 44.0, 14.0
BLOCK = (124.0, 236.0)  # narrowest and widest
GAP = {4: 15.0, 8: 11.0, 16: 8.0}  # between lanes, up to so many


@dataclass(frozen=True)
class Panel:
    """The columns of one side, before or after, from its own left edge.

    Attributes:
        left: where it begins in its stream.
        width: of the panel.
        middle: of the lanes.
        gap: between them.
        block: left edge of the blocks.
        end: right edge of the blocks.
    """

    left: float
    width: float
    middle: float
    gap: float
    block: float
    end: float

    def lanes(self, n: int) -> tuple[float, ...]:
        """Where n streams run."""
        return tuple(self.middle + (k - (n - 1) / 2) * self.gap for k in range(n))


@dataclass(frozen=True)
class Columns:
    """Of one stream: both panels, and how wide they are together."""

    before: Panel
    after: Panel
    width: float


@dataclass(frozen=True)
class Spot:
    """The upper left corner of a stream on the page."""

    x: float
    y: float


@dataclass(frozen=True)
class Page:
    """Streams on a page, below a head, above a foot."""

    spots: tuple[Spot, ...]
    width: float
    foot: float


def columns(part: Part, heads: Sequence[float], labels: Sequence[float], blocks: Sequence[float]) -> Columns:
    """The columns of a stream.

    Args:
        heads: widths that its heads take, across both panels.
        labels: widths of texts that stand beside the lanes.
        blocks: widths of texts in blocks.
    """
    solver = kiwi.Solver()
    gap = next(g for most, g in GAP.items() if part.widest <= most)
    names = ("left", "first", "last", "block", "end", "right")
    before, after = ({name: kiwi.Variable(name) for name in names} for _ in range(2))
    wide = min(max(BLOCK[0], *(width + 2 * PAD for width in blocks)), BLOCK[1])
    maps = text_width("H_post", "map")
    for panel, n, ahead, room in ((before, 1, 10.0, 44.0), (after, part.widest, maps + 10, maps + 34)):
        for constraint in (
            panel["first"] >= panel["left"] + ahead + PAD,
            panel["last"] == panel["first"] + (n - 1) * gap,
            panel["block"] >= panel["last"] + room,
            panel["end"] == panel["block"] + wide,
            panel["right"] >= panel["end"] + PAD,
            *(panel["right"] >= panel["last"] + 18 + label for label in labels),
            (panel["first"] == panel["left"]) | "medium",
            (panel["block"] == panel["last"]) | "medium",
            (panel["right"] == panel["left"]) | ("medium" if panel is before else "weak"),
        ):
            solver.addConstraint(constraint)
    solver.addConstraint(before["left"] == 0)
    solver.addConstraint(after["left"] == before["right"])
    for head in heads:
        solver.addConstraint(after["right"] >= head)
    solver.updateVariables()

    def made(of: dict[str, kiwi.Variable]) -> Panel:
        value = {name: variable.value() for name, variable in of.items()}
        left = value["left"]
        return Panel(
            left, value["right"] - left, (value["first"] + value["last"]) / 2 - left, gap, value["block"] - left,
            value["end"] - left,
        )  # fmt: skip

    return Columns(made(before), made(after), after["right"].value())


def page(sizes: Sequence[tuple[float, float]], head: float, widest: float) -> Page:
    """Streams of these widths and heights, in rows; the page is as wide as the widest row, or as `widest` at least."""
    solver = kiwi.Solver()
    x, y = ([kiwi.Variable(f"{axis}{k}") for k in range(len(sizes))] for axis in "xy")
    right, foot = kiwi.Variable("right"), kiwi.Variable("foot")
    solver.addConstraint(right >= widest + MARGIN)
    for k, (width, height) in enumerate(sizes):
        first = k - k % ABREAST
        solver.addConstraint(right >= x[k] + width + MARGIN)
        solver.addConstraint(foot >= y[k] + height)
        solver.addConstraint(x[k] == MARGIN if k == first else x[k] == x[k - 1] + sizes[k - 1][0] + BETWEEN)
        if k != first:
            solver.addConstraint(y[k] == y[first])
            continue
        solver.addConstraint(y[k] >= head)
        for above in range(max(0, first - ABREAST), first):
            solver.addConstraint(y[k] >= y[above] + sizes[above][1] + BETWEEN)
        solver.addConstraint((y[k] == 0) | "weak")
    for edge in (right, foot):
        solver.addConstraint((edge == 0) | "weak")
    solver.updateVariables()
    spots = tuple(Spot(a.value(), b.value()) for a, b in zip(x, y))
    return Page(spots, right.value(), foot.value())


def stacked(heights: Sequence[float]) -> list[float]:
    """The top of each, one below the other, and the end of all."""
    return list(itertools.accumulate(heights, initial=0.0))

"""A stream as rows, one below the other, and what each of them shows: on the left before, on the right after."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from mhc_rewrite.insight.drawing.data import Group, Layer, Part, Step
from mhc_rewrite.insight.drawing.facts import block_text, head_texts, site_text
from mhc_rewrite.insight.drawing.layout import Columns, Panel, columns
from mhc_rewrite.insight.drawing.marks import (
    Box,
    Dot,
    Label,
    Mark,
    Path,
    branch,
    curve,
    fitted,
    lane,
    line,
    text_width,
)
from mhc_rewrite.printing import module_name
from mhc_rewrite.sites.streams import shares

HEIGHTS = {
    "site": 100.0, "excluded": 100.0, "operation": 34.0, "resize": 52.0, "left alone": 32.0,
    "entry": 62.0, "exit": 72.0, "head": 48.0, "layer": 24.0, "foot": 8.0, "strip": 20.0,
}  # fmt: skip
Marks = tuple[Mark, ...]
BESIDE = 24.0  # more for a site with an operation beside its block


@dataclass(frozen=True)
class Row:
    """A row of a stream.

    Attributes:
        kind: a key of `HEIGHTS`.
        n: streams that come in.
        step: what it shows, where it is a step.
        group: whose head it is, or in whose card it stands; None outside of cards.
        layer: whose head it is, or to which it belongs.
    """

    kind: str
    n: int
    step: Step | None = None
    group: Group | None = None
    layer: str = ""

    @property
    def look(self) -> Hashable:
        """What is the same for rows of one stream that look the same."""
        if self.step is None:
            return self.kind, self.n
        step = self.step
        texts = step.label, block_text(step), site_text(step, self.layer), step.rule, step.number
        return self.kind, self.n, step.out, step.beside, self.group is None, texts

    @property
    def height(self) -> float:
        more = BESIDE if self.step is not None and self.step.beside else 0.0
        return HEIGHTS[self.kind] + more


def rows_of(part: Part) -> Iterator[Row]:
    """The rows of a stream, folded as its groups are."""
    first, last = part.streams
    yield from (Row("left alone", 1, step) for step in part.ahead)
    yield Row("entry", first)
    for number, group in enumerate(part.groups):
        n = group.pattern[0].steps[0].n
        if number:
            yield Row("strip", n)
        yield Row("head", n, group=group)
        yield from group_rows(group)
        yield Row("foot", group.pattern[-1].steps[-1].out, group=group)
    yield Row("exit", last)
    yield from (Row("left alone", 1, step) for step in part.behind)


def group_rows(group: Group) -> Iterator[Row]:
    """The rows of what repeats in a group."""
    for layer in group.pattern:
        if len(group.pattern) > 1:
            yield Row("layer", layer.steps[0].n, group=group, layer=layer.name)
        yield from layer_rows(layer, group)


def layer_rows(layer: Layer, group: Group) -> Iterator[Row]:
    """The rows of one layer."""
    return (Row(step.kind, step.n, step, group, layer.name) for step in layer.steps)


# -- columns -----------------------------------------------------------------------------------------------------------


def columns_of(part: Part) -> Columns:
    """Wide enough for all its texts, but blocks no wider than layout's."""
    ends = (_end_text("entry", part.streams[0], part), _end_text("exit", part.streams[1], part))
    heads, labels, blocks = [0.0], [text_width(text, "text") for text in ends], [0.0]
    for group in part.groups:
        name, kind, cost = head_texts(group)
        heads.append(min(760.0, text_width(name, "head") + text_width(kind, "kind") + 110))
        heads.append(text_width(cost, "small") + 100)
        for layer in group.pattern:
            for step in layer.steps:
                if step.kind in ("site", "excluded"):
                    blocks.append(text_width(step.label, "name"))
                    blocks.append(text_width(site_text(step, layer.name), "mono"))
                    blocks.append(text_width(block_text(step), "small"))
                else:
                    labels.append(min(300.0, text_width(step.label, "pill text")))
    return columns(part, heads, labels, blocks)


# -- painting ----------------------------------------------------------------------------------------------------------


class Painter:
    """Paints the rows of one stream; those that look the same once."""

    def __init__(self, part: Part) -> None:
        self.part, self.at = part, columns_of(part)
        self._painted: dict[Hashable, tuple[Marks, Marks]] = {}

    def paint(self, row: Row) -> tuple[Marks, Marks]:
        """The marks of a row before and after, each from the upper left corner of its panel."""
        known = self._painted.get(row.look)
        if known is None:
            before = tuple(_before(row, self.at.before, self.part))
            known = self._painted[row.look] = before, tuple(_after(row, self.at.after, self.part))
        return known


def _before(row: Row, at: Panel, part: Part) -> Iterator[Mark]:
    x, h = at.middle, row.height
    if row.kind in ("entry", "exit"):
        into = row.kind == "entry"
        yield line("trunk", (x, 0 if part.ahead or not into else 14), (x, h if into or part.behind else h - 14))
        yield from _arrow(x, h - 6 if into else h - 10)
        text = module_name(part.stream.entry if into else part.stream.exit)
        yield Label(at.block, 30, "entry" if into else "exit", "text")
        yield Label(at.block, 45, fitted(text, "mono", at.width - at.block - 4), "mono")
        return
    yield line("trunk", (x, 0), (x, h))
    step = row.step
    if step is None:
        return
    if step.kind in ("site", "excluded"):
        yield branch("read", x, 16, at.block, 42)
        yield branch("wrote", x, 84, at.block, 60)
        yield Dot(x, 16, 3, "dot trunk")
        yield Dot(x, 84, 8, "plus")
        yield line("sign", (x - 4, 84), (x + 4, 84))
        yield line("sign", (x, 80), (x, 88))
        yield from _block(at, step.label, block_text(step), "small", "block")
        if step.beside:
            yield from _pill(x, x, 50)
            yield Label(at.block, 104, fitted(", ".join(step.beside), "pill text", at.end - at.block), "pill text")
    elif step.kind == "operation":
        yield from _pill(x, x, h / 2)
        yield Label(x + 18, h / 2 + 4, fitted(step.label, "pill text", at.width - x - 22), "pill text")
    elif step.kind == "left alone":
        yield from _left_alone(step, at, at.block + 10, h / 2)


def _after(row: Row, at: Panel, part: Part) -> Iterator[Mark]:
    h, step = row.height, row.step
    xs = at.lanes(row.n)
    if row.kind == "entry" or row.kind == "exit":
        yield from _end(row, at, part)
    elif step is None:
        yield from _straight(xs, h)
    elif step.kind == "resize":
        yield from _resize(step, at, h)
    elif step.kind == "operation":
        yield from _straight(xs, h)
        yield from _pill(xs[0], xs[-1], h / 2)
        yield Label(xs[-1] + 18, h / 2 + 4, fitted(step.label, "pill text", at.width - xs[-1] - 22), "pill text")
    elif step.kind == "left alone":
        if row.group is None:
            yield line("trunk", (at.middle, 0), (at.middle, h))
        else:
            yield from _straight(xs, h)
        yield from _left_alone(step, at, at.block + 10, h / 2)
    elif step.kind == "excluded":
        yield from _excluded(step, at, xs, h)
    else:
        yield from _site(step, row.layer, at, xs)


def _straight(xs: tuple[float, ...], h: float) -> Iterator[Mark]:
    for k, x in enumerate(xs):
        yield line(lane(k), (x, 0), (x, h))


def _site(step: Step, layer: str, at: Panel, xs: tuple[float, ...]) -> Iterator[Mark]:
    first = 24 + (14 if step.beside else 0)
    for k, x in enumerate(xs):
        crossing = [curve("", x, first, other, 76).commands for other in xs if other != x]
        yield Path(tuple(itertools.chain(*crossing)), lane(k, "mix" if len(xs) <= 6 else "faint"))
    yield from _straight(xs, HEIGHTS["site"] + (BESIDE if step.beside else 0))
    if step.beside:
        yield from _pill(xs[0], xs[-1], 28)
    for k, x in enumerate(xs):
        yield branch(lane(k, "take"), x, 14, at.block, 42)
        yield branch(lane(k, "take"), x, 88, at.block, 60)
        yield Dot(x, 14, 3, lane(k, "dot"))
        yield Dot(x, 88, 3.6, lane(k, "dot"))
    if step.beside:
        text = f"beside the block: {', '.join(step.beside)}"
        yield Label(at.block, 104, fitted(text, "pill text", at.width - at.block - 4), "pill text")
    yield Label(xs[0] - 9, 54, "H_res", "map", "end")
    yield Label(at.block - 8, 34, "H_pre", "map", "end")
    yield Label(at.block - 8, 78, "H_post", "map", "end")
    yield from _block(at, step.label, site_text(step, layer), "mono", "block")


def _excluded(step: Step, at: Panel, xs: tuple[float, ...], h: float) -> Iterator[Mark]:
    yield from _straight(xs, h)
    for x in xs:
        yield branch("read", x, 14, at.block, 42)
        yield branch("wrote", x, 86, at.block, 60)
    for x in xs:
        yield Dot(x, 86, 4.5, "plus")
        yield line("sign", (x - 2.2, 86), (x + 2.2, 86))
        yield line("sign", (x, 83.8), (x, 88.2))
    yield Label(at.block - 8, 34, "mean", "map", "end")
    yield from _block(at, step.label, "excluded", "small", "excluded")


def _block(at: Panel, name: str, below: str, role: str, box: str) -> Iterator[Mark]:
    middle, room = (at.block + at.end) / 2, at.end - at.block - 16
    yield Box(at.block, 27, at.end - at.block, 48, box)
    yield Label(middle, 48 if below else 56, fitted(name, "name", room), "name", "middle")
    if below:
        yield Label(middle, 65, fitted(below, role, room), role, "middle")


def _resize(step: Step, at: Panel, h: float) -> Iterator[Mark]:
    into, out = at.lanes(step.n), at.lanes(step.out)
    for j, row in enumerate(shares(step.n, step.out)):
        for k, share in enumerate(row):
            if share:
                yield curve(lane(k), into[k], 4, out[j], h - 4)
    for k, x in enumerate(into):
        yield line(lane(k), (x, 0), (x, 4))
    for k, x in enumerate(out):
        yield line(lane(k), (x, h - 4), (x, h))
    yield Label(max(into[-1], out[-1]) + 18, h / 2 + 4, step.label, "text")


def _end(row: Row, at: Panel, part: Part) -> Iterator[Mark]:
    """The entry, where one becomes n, or the exit."""
    into, h, xs = row.kind == "entry", row.height, at.lanes(row.n)
    one, many = (18.0, h - 8) if into else (h - 34, 8.0)
    for k, x in enumerate(xs):
        yield line(lane(k), (x, many), (x, h if into else 0))
        yield curve(lane(k), at.middle, one, x, many)
    trunk = (0.0 if part.ahead else 8.0) if into else (h if part.behind else h - 14)
    yield line("trunk", (at.middle, one), (at.middle, trunk))
    yield Dot(at.middle, one, 4, "dot trunk")
    if not into:
        yield from _arrow(at.middle, h - 10)
    yield Label(xs[-1] + 18, 36, _end_text(row.kind, row.n, part), "text")


def _end_text(kind: str, n: int, part: Part) -> str:
    return f"expand: 1 to {n} equal streams" if kind == "entry" else f"collapse: {part.collapse} of {n} streams"


def _arrow(x: float, y: float) -> Iterator[Mark]:
    yield Path((("M", (x - 4.5, y - 7)), ("L", (x, y)), ("L", (x + 4.5, y - 7))), "trunk")


def _pill(first: float, last: float, y: float) -> Iterator[Mark]:
    yield Box(first - 10, y - 7, last - first + 20, 14, "pill", 7)


def _left_alone(step: Step, at: Panel, x: float, y: float) -> Iterator[Mark]:
    yield Dot(x, y, 8, "left")
    yield line("left sign", (x - 3.5, y - 3.5), (x + 3.5, y + 3.5))
    yield line("left sign", (x - 3.5, y + 3.5), (x + 3.5, y - 3.5))
    text = f"{step.number}  {step.rule}"
    yield Label(x + 14, y + 4, fitted(text, "left text", at.width - x - 18), "left text")


# -- the legend --------------------------------------------------------------------------------------------------------


def legend() -> list[tuple[Callable[[], list[Mark]], str]]:
    """Small pictures, 46 wide and 22 high, with what they mean."""
    xs = (12.0, 23.0, 34.0)

    def plus() -> list[Mark]:
        return [
            line("trunk", (23, 0), (23, 22)), Dot(23, 11, 7, "plus"), line("sign", (19, 11), (27, 11)),
            line("sign", (23, 7), (23, 15)),
        ]  # fmt: skip

    def lanes() -> list[Mark]:
        return list(_straight(xs, 22))

    def pre() -> list[Mark]:
        return [m for k, x in enumerate(xs) for m in (
            line(lane(k), (x, 0), (x, 22)), branch(lane(k, "take"), x, 4, 46, 16), Dot(x, 4, 3, lane(k, "dot"))
        )]  # fmt: skip

    def res() -> list[Mark]:
        crossed: list[Mark] = [curve(lane(k, "mix"), x, 1, y, 21) for k, x in enumerate(xs) for y in xs if x != y]
        return [*crossed, *_straight(xs, 22)]

    def post() -> list[Mark]:
        return [m for k, x in enumerate(xs) for m in (
            line(lane(k), (x, 0), (x, 22)), branch(lane(k, "take"), x, 18, 46, 6), Dot(x, 18, 3, lane(k, "dot"))
        )]  # fmt: skip

    def excluded() -> list[Mark]:
        return [Box(6, 3, 34, 16, "excluded", 4)]

    def operation() -> list[Mark]:
        return [*_straight(xs, 22), *_pill(xs[0], xs[-1], 11)]

    def left() -> list[Mark]:
        return [Dot(23, 11, 8, "left"), line("left sign", (19.5, 7.5), (26.5, 14.5)),
                line("left sign", (19.5, 14.5), (26.5, 7.5))]  # fmt: skip

    return [
        (plus, "a residual add, x + F(x)"),
        (lanes, "streams, a lane each"),
        (pre, "H_pre: what the block reads of each"),
        (res, "H_res: how they are mixed"),
        (post, "H_post: what each gets of its result"),
        (excluded, "excluded: reads the mean, adds to all, nothing to learn"),
        (operation, "an operation on the trunk, now on every stream"),
        (left, "an add that was left alone, by its number"),
    ]

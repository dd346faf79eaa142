"""A picture as one SVG: light and dark by the reader's own setting, without a font or a file of its own."""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape

from mhc_rewrite.insight.drawing import facts
from mhc_rewrite.insight.drawing.data import Part, Picture
from mhc_rewrite.insight.drawing.layout import MARGIN, Columns, Page, page, stacked
from mhc_rewrite.insight.drawing.marks import (
    STYLES,
    Box,
    Dot,
    Label,
    Mark,
    Path,
    colour,
    fitted,
    line,
    moved,
    text_width,
    wrapped,
)
from mhc_rewrite.insight.drawing.rows import Painter, Row, legend, rows_of
from mhc_rewrite.printing import module_name

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
LEGEND = 22.0  # height of a line


@dataclass(frozen=True)
class Block:
    """Marks that belong together.

    Attributes:
        marks: from the upper left corner of the block.
        x: where that is on the page.
        y: the same.
        told: what is said of them.
    """

    marks: tuple[Mark, ...]
    x: float = 0
    y: float = 0
    told: str = ""

    def placed(self) -> Iterator[Mark]:
        """The marks at their place on the page."""
        return (moved(mark, self.x, self.y) for mark in self.marks)


@dataclass(frozen=True)
class Sheet:
    """All of a picture at its place."""

    width: float
    height: float
    blocks: tuple[Block, ...]


# -- the sheet ---------------------------------------------------------------------------------------------------------


def sheet(picture: Picture) -> Sheet:
    """Head, streams, legend, and the list of what was left alone."""
    rows = [list(rows_of(part)) for part in picture.parts]
    painters = [Painter(part) for part in picture.parts]
    tops = [stacked([row.height for row in own]) for own in rows]
    above = 76.0  # a part's own head
    sizes = [(columns.width, above + top[-1]) for columns, top in zip([painter.at for painter in painters], tops)]
    about = wrapped(picture.about, "text", page(sizes, 0, 640).width - 2 * MARGIN)
    where = page(sizes, 76 + 16 * len(about), 640)
    blocks = [Block((Label(MARGIN, 40, picture.title, "title"),))]
    blocks += [Block((Label(MARGIN, 62 + 16 * k, text, "text"),)) for k, text in enumerate(about)]
    blocks += [Block(tuple(_links(picture, where, sizes)))]
    for painter, own, top, spot in zip(painters, rows, tops, where.spots):
        blocks.append(Block(tuple(_part_head(painter.part, painter.at)), spot.x, spot.y))
        blocks.append(Block(tuple(_cards(own, top, painter.at)), spot.x, spot.y + above))
        for row, y in zip(own, top):
            blocks += _row(row, painter, spot.x, spot.y + above + y)
    foot, end = _foot(picture, where)
    return Sheet(where.width, end, (*blocks, *foot))


def _moved(marks: Iterable[Mark], dx: float, dy: float) -> Iterator[Mark]:
    return (moved(mark, dx, dy) for mark in marks)


def _part_head(part: Part, at: Columns) -> Iterator[Mark]:
    yield Label(0, 16, fitted(part.title, "part", at.width), "part")
    yield Label(0, 34, fitted(part.about, "small", at.width), "small")
    yield Label(at.before.left + at.before.middle - 10, 66, "before", "column")
    yield Label(at.after.left + at.after.middle - 10, 66, "after", "column")


def _cards(rows: list[Row], tops: list[float], at: Columns) -> Iterator[Mark]:
    """The frame of each group; one that stands for several has others behind it."""
    placed = [(row, top, end) for row, top, end in zip(rows, tops, tops[1:]) if row.group is not None]
    for _, own in itertools.groupby(placed, key=lambda one: id(one[0].group)):
        cards = list(own)
        group = cards[0][0].group
        top, end = cards[0][1], cards[-1][2]
        if group is not None and group.count > 1:
            for k in (2, 1):
                yield Box(4.0 * k, top + 4 * k, at.width, end - top, "behind", 9)
        yield Box(0, top, at.width, end - top, "card", 9)


def _row(row: Row, painter: Painter, x: float, y: float) -> Iterator[Block]:
    at = painter.at
    if row.kind == "head":
        yield Block(tuple(group_head(row, at)), x, y)
        return
    before, after = painter.paint(row)
    told = facts.plain(row.step) if row.step is not None else ""
    yield Block(before, x + at.before.left, y, told)
    yield Block(after, x + at.after.left, y, told)
    if row.kind == "layer":
        name = fitted(module_name(row.layer), "mono", 260)
        yield Block((Label(at.width - 12, 16, name, "mono", "end"),), x, y)


def group_head(row: Row, at: Columns) -> Iterator[Mark]:
    """Name, class and cost of a group, and how often it comes."""
    group = row.group
    assert group is not None
    name, kind, cost = facts.head_texts(group)
    count = facts.count_text(group)
    room = at.width - 28 - (text_width(count, "count text") + 34 if count else 0)
    shown = fitted(name, "head", room)
    yield Label(14, 21, shown, "head")
    width = text_width(shown, "head") + 12
    if width < room - 30 and kind:
        yield Label(14 + width, 21, fitted(kind, "kind", room - width), "kind")
    yield Label(14, 38, fitted(cost, "small", at.width - 28 - (60 if count else 0)), "small")
    if count:
        wide = text_width(count, "count text") + 18
        yield Box(at.width - wide - 12, 9, wide, 21, "count", 10.5)
        yield Label(at.width - wide / 2 - 12, 24, count, "count text", "middle")


def _links(picture: Picture, where: Page, sizes: list[tuple[float, float]]) -> Iterator[Mark]:
    """Below a stream's exit the streams that read its result; with a line to the one beside it."""
    for number, (spot, (width, height)) in enumerate(zip(where.spots, sizes)):
        readers = [part.number for part in picture.parts if number in part.stream.reads]
        if not readers:
            continue
        x, y = spot.x + width - 60, spot.y + height - 8
        yield Label(x - 4, y + 4, f"to stream {' and '.join(map(str, readers))}", "link text", "end")
        following = where.spots[readers[0]]
        if readers[0] == number + 1 and following.y == spot.y:
            turn, top = following.x - 22, following.y + 12
            yield line("link", (x, y), (turn, y), (turn, top), (following.x - 8, top))
            yield line("link", (following.x - 14, top - 4), (following.x - 7, top), (following.x - 14, top + 4))
        else:
            yield line("link", (x, y), (x + 30, y))
            yield line("link", (x + 24, y - 4), (x + 31, y), (x + 24, y + 4))


def _foot(picture: Picture, where: Page) -> tuple[list[Block], float]:
    """The legend, then what was left alone; and where they end."""
    room = where.width - 2 * MARGIN
    y = where.foot + 34
    marks: list[Mark] = []
    x = MARGIN
    for draw, text in legend():
        wide = 58 + text_width(text, "small") + 14
        if x > MARGIN and x + wide > MARGIN + room:
            x, y = MARGIN, y + LEGEND + 10
        marks += [*_moved(draw(), x, y), Label(x + 58, y + 15, text, "small")]
        x += wide
    y += LEGEND + 26
    legends, marks = Block(tuple(marks)), []
    left = picture.left_alone()
    if left:
        marks.append(Label(MARGIN, y, "Left alone", "part"))
        y += 22
    for step in left:
        marks.append(Label(MARGIN, y, f"{step.number}  {step.rule}", "left text"))
        marks.append(Label(MARGIN + 150, y, fitted(module_name(step.name), "mono", room - 150), "mono"))
        for text in (*wrapped(step.reason, "text", room - 150), facts.source_text(step)):
            if text:
                y += 16
                role = "small" if text == facts.source_text(step) else "text"
                marks.append(Label(MARGIN + 150, y, fitted(text, role, room - 150), role))
        y += 24
    return [legends, Block(tuple(marks))], y + 10


# -- as SVG ------------------------------------------------------------------------------------------------------------


def svg(picture: Picture) -> str:
    """One picture, as it is put into a page or a file."""
    drawn = sheet(picture)
    often = collections.Counter(block.marks for block in drawn.blocks)
    names = {marks: _name(marks) for marks, count in often.items() if count > 1 and marks}
    defined = "".join(f'<g id="{name}">{"".join(map(element, marks))}</g>' for marks, name in names.items())
    body = "".join(_block(block, names) for block in drawn.blocks if block.marks)
    title = escape(f"{picture.title}: {picture.about}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mhc" role="img" aria-label="{title}" '
        f'width="{_number(drawn.width)}" height="{_number(drawn.height)}" '
        f'viewBox="0 0 {_number(drawn.width)} {_number(drawn.height)}"><style>{style()}</style>'
        f'<defs>{defined}</defs><rect class="mhc-paper" width="100%" height="100%"/>{body}</svg>'
    )


def _block(block: Block, names: dict[tuple[Mark, ...], str]) -> str:
    """A block at its place; what the page has often is drawn once, and used."""
    told = f"<title>{escape(block.told)}</title>" if block.told else ""
    x, y = _number(block.x), _number(block.y)
    if block.marks in names:
        return f'<g>{told}<use href="#{names[block.marks]}" x="{x}" y="{y}"/></g>'
    place = f' transform="translate({x} {y})"' if block.x or block.y else ""
    return f"<g{place}>{told}{''.join(map(element, block.marks))}</g>"


def _name(marks: tuple[Mark, ...]) -> str:
    """The same for the same marks alone: a page may hold several pictures."""
    drawn = "".join(map(element, marks))
    return "m" + hashlib.sha256(drawn.encode()).hexdigest()[:12]


def style() -> str:
    """The rules for all roles: in light, and on a dark screen. Classes alone, since what is used elsewhere in a page
    has no ancestors there.
    """
    rules, dark = ([f".mhc-paper{{fill:{colour('paper', night)}}}"] for night in (False, True))
    for role, look in STYLES.items():
        paint = [f"fill:{colour(look.fill) if look.fill else 'none'}"]
        night = [f"fill:{colour(look.fill, True)}"] if look.fill else []
        if look.stroke:
            paint += [f"stroke:{colour(look.stroke)}", f"stroke-width:{look.width}", "stroke-linecap:round"]
            night.append(f"stroke:{colour(look.stroke, True)}")
        if look.dash:
            paint.append(f"stroke-dasharray:{' '.join(map(str, look.dash))}")
        if look.opacity < 1:
            paint.append(f"opacity:{look.opacity}")
        if look.size:
            paint.append(f"font:{'italic ' if look.italic else ''}{600 if look.bold else 400} {look.size}px "
                         f"{MONO if look.mono else SANS}")  # fmt: skip
            if look.mono:
                paint.append("white-space:pre")
        rules.append(f".{css_class(role)}{{{';'.join(paint)}}}")
        dark.append(f".{css_class(role)}{{{';'.join(night)}}}")
    return f"{''.join(rules)}@media screen and (prefers-color-scheme:dark){{{''.join(dark)}}}"


def css_class(role: str) -> str:
    return "mhc-" + role.replace(" ", "-")


def element(mark: Mark) -> str:
    """A mark as SVG."""
    role = css_class(mark.role)
    if isinstance(mark, Path):
        d = "".join(letter + " ".join(map(_number, points)) for letter, points in mark.commands)
        return f'<path class="{role}" d="{d}"/>'
    if isinstance(mark, Box):
        x, y, w, h, r = map(_number, (mark.x, mark.y, mark.width, mark.height, mark.radius))
        return f'<rect class="{role}" x="{x}" y="{y}" width="{w}" height="{h}" rx="{r}"/>'
    if isinstance(mark, Dot):
        return f'<circle class="{role}" cx="{_number(mark.x)}" cy="{_number(mark.y)}" r="{_number(mark.radius)}"/>'
    anchor = f' text-anchor="{mark.anchor}"' if mark.anchor != "start" else ""
    return f'<text class="{role}" x="{_number(mark.x)}" y="{_number(mark.y)}"{anchor}>{escape(mark.text)}</text>'


def _number(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")

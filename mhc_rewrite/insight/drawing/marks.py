"""What a drawing is made of: marks with roles, which SVG, HTML and PNG show each in their own way; widths of texts."""

from __future__ import annotations

from dataclasses import dataclass, replace

# A path's commands: a letter, then its points.
Command = tuple[str, tuple[float, ...]]


@dataclass(frozen=True)
class Path:
    """A line, or curves. Its role says how it looks."""

    commands: tuple[Command, ...]
    role: str


@dataclass(frozen=True)
class Box:
    """A rectangle with round corners."""

    x: float
    y: float
    width: float
    height: float
    role: str
    radius: float = 6


@dataclass(frozen=True)
class Dot:
    """A filled circle, or a ring."""

    x: float
    y: float
    radius: float
    role: str


@dataclass(frozen=True)
class Label:
    """A line of text; `y` is its base line. `anchor` is `start`, `middle` or `end`."""

    x: float
    y: float
    text: str
    role: str
    anchor: str = "start"


Mark = Path | Box | Dot | Label


@dataclass(frozen=True)
class Style:
    """How a role looks: names of colours, of line widths in pixels, of type."""

    stroke: str = ""
    fill: str = ""
    width: float = 0
    opacity: float = 1
    dash: tuple[float, ...] = ()
    size: float = 0
    bold: bool = False
    mono: bool = False
    italic: bool = False


# Colours by name, in light and in dark.
COLOURS = {
    "paper": ("#ffffff", "#14171c"),
    "card": ("#f7f8fa", "#1b2027"),
    "block": ("#ffffff", "#262d37"),
    "edge": ("#c9ced6", "#3d4652"),
    "ink": ("#1c2330", "#e8ebf0"),
    "muted": ("#5b6575", "#9ea9b8"),
    "trunk": ("#4a5568", "#aab4c3"),
    "accent": ("#3b49c4", "#9fa8ff"),
    "pill": ("#e6e8fb", "#2c325c"),
    "warn": ("#a8500b", "#f0a35e"),
    "on": ("#ffffff", "#14171c"),
}
# Of streams: neighbours differ in hue and in lightness, so that they are told apart without colour vision too.
LANES = (
    ("#2f6fde", "#6ea2ff"), ("#d1661f", "#f39a5a"), ("#2a8f62", "#58c795"), ("#a9399b", "#e07fd3"),
    ("#0f8ea3", "#4cc9dd"), ("#b5352f", "#f2837d"), ("#7a6a12", "#cdb84a"), ("#6a4fcf", "#a794ff"),
)  # fmt: skip

STYLES = {
    "trunk": Style("trunk", width=2.5),
    "read": Style("trunk", width=1.5),
    "wrote": Style("trunk", width=1.5),
    "dot trunk": Style("", "trunk"),
    "plus": Style("trunk", "paper", 1.8),
    "sign": Style("trunk", width=1.8),
    "block": Style("edge", "block", 1.2),
    "excluded": Style("edge", "card", 1.2, dash=(4, 3)),
    "pill": Style("accent", "pill", 1),
    "card": Style("edge", "card", 1),
    "behind": Style("edge", "card", 1),
    "left": Style("warn", "paper", 1.6, dash=(3, 2.5)),
    "left sign": Style("warn", width=1.4),
    "count": Style("", "accent"),
    "title": Style("", "ink", size=20, bold=True),
    "part": Style("", "ink", size=15, bold=True),
    "head": Style("", "ink", size=12.5, bold=True, mono=True),
    "kind": Style("", "muted", size=12),
    "count text": Style("", "on", size=12, bold=True),
    "name": Style("", "ink", size=13, bold=True),
    "text": Style("", "ink", size=12),
    "pill text": Style("", "accent", size=11.5),
    "small": Style("", "muted", size=11),
    "mono": Style("", "muted", size=11, mono=True),
    "column": Style("", "muted", size=12, bold=True),
    "map": Style("", "muted", size=10.5, italic=True),
    "left text": Style("", "warn", size=11.5, bold=True),
    "link": Style("accent", width=1.6, dash=(5, 4)),
    "link text": Style("", "accent", size=11.5),
}
for _k, _ in enumerate(LANES):
    STYLES[f"lane {_k}"] = Style(f"lane {_k}", width=2.6)
    STYLES[f"mix {_k}"] = Style(f"lane {_k}", width=1.1, opacity=0.6)
    STYLES[f"faint {_k}"] = Style(f"lane {_k}", width=0.8, opacity=0.22)
    STYLES[f"take {_k}"] = Style(f"lane {_k}", width=1.3)
    STYLES[f"dot {_k}"] = Style("", f"lane {_k}")


def lane(stream: int, what: str = "lane") -> str:
    """The role of a stream; more streams than colours begin again."""
    return f"{what} {stream % len(LANES)}"


def colour(name: str, dark: bool = False) -> str:
    """Of a name."""
    pair = LANES[int(name[5:])] if name.startswith("lane ") else COLOURS[name]
    return pair[dark]


def text_width(text: str, role: str) -> float:
    """At most so wide, in pixels: widths of DejaVu, which is wider than what systems show, letter by letter."""
    style = STYLES[role]
    if style.mono:
        return len(text) * 0.62 * style.size
    wide = sum(
        0.4 if c in "iljtfrI.,:;|!'()[] " else 0.98 if c in "mwMW@%" else 0.78 if c.isupper() else 0.65 for c in text
    )
    return wide * style.size * (1.08 if style.bold else 1.0)


def fitted(text: str, role: str, width: float) -> str:
    """The text, or as much of its start and its end as is not wider than `width`."""
    if text_width(text, role) <= width:
        return text
    keep = len(text) - 1
    while keep > 1:
        short = f"{text[: keep // 2]}…{text[len(text) - (keep - keep // 2) :]}"
        if text_width(short, role) <= width:
            return short
        keep -= 1
    return "…"


def wrapped(text: str, role: str, width: float) -> list[str]:
    """The text in lines; words that are too long for one are cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and text_width(f"{lines[-1]} {word}", role) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(fitted(word, role, width))
    return lines


def moved(mark: Mark, dx: float, dy: float) -> Mark:
    """The same elsewhere."""
    if isinstance(mark, Path):
        return replace(mark, commands=tuple(
            (letter, tuple(p + (dy if k % 2 else dx) for k, p in enumerate(points))) for letter, points in mark.commands
        ))  # fmt: skip
    return replace(mark, x=mark.x + dx, y=mark.y + dy)


def line(role: str, *points: tuple[float, float]) -> Path:
    """Straight from point to point."""
    first, *rest = points
    return Path((("M", first), *(("L", point) for point in rest)), role)


def curve(role: str, x0: float, y0: float, x1: float, y1: float, bend: float = 0.5) -> Path:
    """From one point down to another, leaving and arriving upright."""
    middle = (y1 - y0) * bend
    return Path((("M", (x0, y0)), ("C", (x0, y0 + middle, x1, y1 - middle, x1, y1))), role)


def branch(role: str, x0: float, y0: float, x1: float, y1: float) -> Path:
    """From a trunk at (x0, y0), upright, to the side of a block at (x1, y1), level; or back, with the ends swapped."""
    return Path((("M", (x0, y0)), ("C", (x0, y1, x0 + (x1 - x0) * 0.35, y1, x1, y1))), role)

"""A picture as a page: one file that fetches nothing. It shows the folded picture without scripts too.

Layers that are alike share their drawings: the page holds each drawing once, and of each layer its names.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
from collections.abc import Iterator
from html import escape
from typing import Any

from mhc_rewrite.insight.drawing import facts
from mhc_rewrite.insight.drawing.data import Group, Layer, Part, Picture, Step
from mhc_rewrite.insight.drawing.marks import COLOURS, Mark
from mhc_rewrite.insight.drawing.rows import Painter, Row, layer_rows, legend, rows_of
from mhc_rewrite.insight.drawing.svg import element, style
from mhc_rewrite.printing import fold, module_name

LAYER_HEAD = 30


def html(picture: Picture, folded: bool = True) -> str:
    """The page. Where it is not folded, its script unfolds it when it opens."""
    page = _Page()
    body = "".join(page.part(part) for part in picture.parts)
    held = {"facts": list(page.facts), "groups": page.groups, "folded": folded}
    data = json.dumps(held, ensure_ascii=False).replace("<", "\\u003c")  # no name ends the script
    title = escape(picture.title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}: streams</title><style>{_colours()}{style()}
{_file("page.css")}</style></head><body>{page.defined()}
<header><h1>{title}</h1><p>{escape(picture.about)}</p></header>
<div class="tools">
<input type="search" id="q" placeholder="Search a name" aria-label="Search a name" autocomplete="off">
<fieldset class="side"><input type="radio" name="side" id="side-b" value="before"><label for="side-b">Before</label>
<input type="radio" name="side" id="side-a" value="after" checked><label for="side-a">After</label></fieldset>
<button type="button" id="all">Unfold all</button><output id="found" aria-live="polite"></output></div>
<main>{body}</main>
<div class="below"><h2>Legend</h2><ul class="legend">{"".join(_legend())}</ul>{_left_alone(picture)}
<p class="keys"><kbd>/</kbd> searches, <kbd>Enter</kbd> goes on and unfolds, <kbd>Tab</kbd> and arrows walk,
<kbd>Esc</kbd> closes. Costs are counted a token, not measured.</p></div>
<div id="tip" role="status" aria-live="polite"></div>
<script type="application/json" id="data">{data}</script>
<script>{_file("page.js")}</script></body></html>
"""


class _Page:
    """What rows share: each drawing and each list of facts once."""

    def __init__(self) -> None:
        self.drawings: dict[tuple[tuple[Mark, ...], int, float], int] = {}
        self.facts: dict[facts.Facts, int] = {}
        self.groups: list[list[Any]] = []

    def part(self, part: Part) -> str:
        painter = Painter(part)
        out = [
            f'<section class="part" id="stream-{part.number}"><h2>{escape(part.title)}</h2>'
            f'<p class="about">{escape(part.about)}</p><div class="sides" aria-hidden="true">'
            f'<span style="width:{painter.at.before.width:.0f}px">before</span><span>after</span></div>'
        ]
        for _, own in itertools.groupby(rows_of(part), key=lambda row: id(row.group)):
            rows = list(own)
            drawn = "".join(self.row(row, painter) for row in rows if row.kind != "head")
            out.append(self.card(rows[0].group, drawn, painter) if rows[0].group is not None else drawn)
        return "".join((*out, "</section>"))

    def card(self, group: Group, drawn: str, painter: Painter) -> str:
        name, kind, cost = facts.head_texts(group)
        many = group.count > 1
        tag = 'button type="button" aria-expanded="false"' if many else "div"
        count = f'<span class="count">{facts.count_text(group)}</span>' if many else ""
        if many:
            self.groups.append([self.layer(layer, group, painter) for layer in group.layers])
        number = f' data-g="{len(self.groups) - 1}"' if many else ""
        return (
            f'<div class="{"card many" if many else "card"}"{number} style="max-width:{painter.at.width:.0f}px">'
            f'<{tag} class="head"><span class="name mono">{escape(name)}</span>'
            f'<span class="kind">{escape(kind)}</span>{count}<span class="cost">{escape(cost)}</span>'
            f'</{tag.split()[0]}><div class="rows">{drawn}</div></div>'
        )

    def layer(self, layer: Layer, group: Group, painter: Painter) -> list[Any]:
        """What the page needs to draw one layer: its name, its rows, and how high it will be."""
        rows = [
            [*self.panels(row, painter), self.fact(row.step), module_name(row.step.name), _label(row.step)]
            for row in layer_rows(layer, group) if row.step is not None
        ]  # fmt: skip
        return [module_name(layer.name), rows, LAYER_HEAD + sum(row.height for row in layer_rows(layer, group))]

    def row(self, row: Row, painter: Painter) -> str:
        if row.kind == "layer":
            return f'<h3 class="lname mono">{escape(module_name(row.layer))}</h3>'
        drawn = "".join(
            f'<svg class="mhc {side}" width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}" '
            f'aria-hidden="true"><use href="#d{number}"/></svg>'
            for side, (number, width, height) in zip("ba", self.panels(row, painter))
        )
        step = row.step
        if step is None:
            return f'<div class="row" aria-hidden="true">{drawn}</div>'
        name = _folded_name(step, row.group)
        return (
            f'<div class="row" tabindex="0" role="img" aria-label="{escape(f"{name}: {_label(step)}")}" '
            f'data-f="{self.fact(step)}" data-n="{escape(name)}">{drawn}</div>'
        )

    def panels(self, row: Row, painter: Painter) -> list[tuple[int, int, float]]:
        """Number, width and height of the drawings before and after."""
        panels = []
        for marks, panel in zip(painter.paint(row), (painter.at.before, painter.at.after)):
            key = marks, round(panel.width), row.height
            panels.append((self.drawings.setdefault(key, len(self.drawings)), key[1], row.height))
        return panels

    def fact(self, step: Step) -> int:
        return self.facts.setdefault(facts.facts(step), len(self.facts))

    def defined(self) -> str:
        """All drawings, to be used by number."""
        drawn = (f'<g id="d{k}">{"".join(map(element, marks))}</g>' for (marks, *_), k in self.drawings.items())
        return f'<svg class="mhc" width="0" height="0" style="position:absolute"><defs>{"".join(drawn)}</defs></svg>'


def _folded_name(step: Step, group: Group | None) -> str:
    """A step's name with the numbers of all layers that have it."""
    if group is None or group.count == 1 or step.kind == "left alone":
        return module_name(step.name)
    period = len(group.pattern)
    for place, layer in enumerate(group.pattern):
        own = [k for k, other in enumerate(_drawn(layer.steps)) if other is step]
        if own:
            steps = (_drawn(same.steps)[own[0]] for same in group.layers[place::period])
            return ", ".join(fold(dict.fromkeys(module_name(other.name) for other in steps)))
    return module_name(step.name)


def _drawn(steps: tuple[Step, ...]) -> list[Step]:
    return [step for step in steps if step.kind != "left alone"]


def _label(step: Step) -> str:
    return " ".join(filter(None, (step.label, step.block)))


def _legend() -> Iterator[str]:
    for draw, text in legend():
        marks = "".join(map(element, draw()))
        yield (
            f'<li><svg class="mhc" width="46" height="22" viewBox="0 0 46 22" aria-hidden="true">{marks}</svg>'
            f"{escape(text)}</li>"
        )


def _left_alone(picture: Picture) -> str:
    left = picture.left_alone()
    if not left:
        return ""
    items = "".join(
        f'<li><span class="no">{step.number}</span><span class="rule">{escape(step.rule)}</span> '
        f'<span class="mono">{escape(module_name(step.name))}</span><br>{escape(step.reason)}'
        f'<br><span class="src mono">{escape(facts.source_text(step))}</span></li>'
        for step in left
    )
    return f'<h2>Left alone</h2><ol class="left">{items}</ol>'


def _colours() -> str:
    light, dark = (";".join(f"--{name}:{pair[k]}" for name, pair in COLOURS.items()) for k in (0, 1))
    return f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}"


@functools.cache
def _file(name: str) -> str:
    return (importlib.resources.files(__package__) / "page" / name).read_text(encoding="utf-8")

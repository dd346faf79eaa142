"""An SVG of a drawing, read back: what stands in it, with what is used elsewhere put in its place."""

from __future__ import annotations

import functools
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from families_text import BY_NAME as FAMILIES
from handmade import BY_NAME as HANDMADE
from mhc_rewrite import MHCConfig
from mhc_rewrite.insight.drawing import Drawing, draw
from mhc_rewrite.insight.drawing.marks import STYLES, Label, text_width
from mhc_rewrite.insight.drawing.svg import Sheet
from mhc_rewrite.plans import ResidualSite, ResidualStream, RewritePlan, SourceLine

# Text families and hand-made models that are drawn: pre- and post-norm, two streams, one layer called again, operations
# on the trunk and beside blocks.
MODELS = (
    "GPT-2", "BERT", "T5", "ALBERT", "DeepNorm", "cast on the trunk", "dropout on the trunk",
    "norm on the trunk",
)  # fmt: skip
SVG = "{http://www.w3.org/2000/svg}"


@dataclass
class Seen:
    """What a drawing shows, by its marks alone.

    Attributes:
        texts: every line of text, in order.
        told: every title that hovering shows.
        classes: how many marks of each class.
    """

    texts: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    classes: Counter[str] = field(default_factory=Counter)

    def count(self, pattern: str) -> int:
        """Marks whose class is of this form."""
        return sum(number for name, number in self.classes.items() if re.fullmatch(pattern, name))


def seen(svg: str) -> Seen:
    """Reads an SVG; its legend is left out."""
    root = ElementTree.fromstring(svg)
    defined = {g.attrib["id"]: g for g in root.iter(f"{SVG}g") if "id" in g.attrib}
    found = Seen()
    for block in root:
        if block.tag != f"{SVG}g":
            continue
        marks = list(_expanded(block, defined))
        if any(mark.text == "a residual add, x + F(x)" for mark in marks):
            continue
        for mark in marks:
            found.classes[mark.attrib.get("class", "")] += 1
            if mark.tag == f"{SVG}text":
                found.texts.append(mark.text or "")
            if mark.tag == f"{SVG}title":
                found.told.append(mark.text or "")
    return found


def _expanded(element: ElementTree.Element, defined: dict[str, ElementTree.Element]) -> Iterator[ElementTree.Element]:
    for child in element:
        if child.tag == f"{SVG}use":
            yield from defined[child.attrib["href"].removeprefix("#")]
        elif child.tag == f"{SVG}g":
            yield from _expanded(child, defined)
        else:
            yield child


def example(name: str) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model of the tables by its name, with its inputs and options."""
    if name in FAMILIES:
        family = FAMILIES[name]
        return family.model(torch.float32), family.example(torch.float32), {}
    kind = HANDMADE[name]
    return kind.model(), kind.inputs(), dict(kind.options)


@functools.cache
def drawing_of(name: str) -> Drawing:
    """The plan of a model of the tables, drawn once for all tests."""
    model, inputs, options = example(name)
    return draw(model, inputs, **options)


def deep_plan(layers: int, n: int = 4, **options: object) -> RewritePlan:
    """The plan of a decoder of any depth, without a model."""
    lines = (
        SourceLine("model.py", 12, "x = x + self.attn(self.norm_1(x))"),
        SourceLine("model.py", 13, "x = x + self.mlp(self.norm_2(x))"),
    )
    sites = tuple(
        ResidualSite(f"model.layers.{k}.mhc_{j}", f"model.layers.{k}", f"model.layers.{k}", branch, 64, -1,
                     "torch.bfloat16", lines[j])
        for k in range(layers) for j, branch in enumerate(("self_attn", "mlp"))
    )  # fmt: skip
    stream = ResidualStream(sites, sites[0].carrier, sites[-1].carrier, "model")
    return RewritePlan("Decoder", MHCConfig(n_streams=n, **options), (stream,))  # type: ignore[arg-type]


def boxes(drawn: Sheet) -> Iterator[tuple[float, float, float, float, str]]:
    """Left, top, right, bottom of every text, at least as large as it is shown."""
    for block in drawn.blocks:
        for mark in block.placed():
            if isinstance(mark, Label):
                width, size = text_width(mark.text, mark.role), STYLES[mark.role].size
                left = mark.x - {"start": 0, "middle": width / 2, "end": width}[mark.anchor]
                yield left, mark.y - 0.75 * size, left + width, mark.y + 0.2 * size, mark.text


def overlapping(drawn: Sheet) -> list[tuple[str, str]]:
    found, active = [], []
    for box in sorted(boxes(drawn), key=lambda box: box[1]):
        active = [other for other in active if other[3] > box[1]]
        found += [(other[4], box[4]) for other in active if other[0] < box[2] and box[0] < other[2]]
        active.append(box)
    return found

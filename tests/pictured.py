"""An SVG of a drawing, read back: what stands in it, with what is used elsewhere put in its place."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mhc_rewrite.plans import ResidualSite, ResidualStream, RewritePlan, SourceLine

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


def deep_plan(layers: int, n: int = 4, **options: object) -> RewritePlan:
    """The plan of a decoder of any depth, without a model."""
    from mhc_rewrite import MHCConfig

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

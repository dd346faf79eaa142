"""A picture as files for Model Explorer: its graphs, and for each figure of the sites one that colours nodes by it.

Its formats, as of ai-edge-model-explorer 0.1.34: a collection of graphs is an object with `label` and `graphs`; custom
node data has, by the id of a graph, `results` by the id of a node, and a `gradient` from the least to the largest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mhc_rewrite.insight.drawing.data import Figures, Part, Picture
from mhc_rewrite.insight.drawing.facts import facts
from mhc_rewrite.insight.drawing.marks import colour
from mhc_rewrite.printing import module_name

FIGURES = tuple(field.name for field in dataclasses.fields(Figures))


def save(picture: Picture, path: Path) -> None:
    """Writes `model.json` with the graphs, and `model.parameters.json` and so on with the figures of the sites."""
    path.write_text(json.dumps(graphs(picture), indent=1), encoding="utf-8")
    for figure in FIGURES:
        path.with_suffix(f".{figure}.json").write_text(json.dumps(overlay(picture, figure), indent=1), encoding="utf-8")


def graphs(picture: Picture) -> dict[str, Any]:
    """Two graphs, after the conversion and before; every layer by itself, since Model Explorer folds them."""
    made = [
        {"id": side, "nodes": [node for part in picture.parts for node in _nodes(part, side == "after")]}
        for side in ("after", "before")
    ]
    return {"label": picture.title, "graphs": made}


def overlay(picture: Picture, figure: str) -> dict[str, Any]:
    """A figure of all sites, by their names, which are the ids of their nodes."""
    results: dict[str, dict[str, int]] = {}
    for step in (step for part in picture.parts for step in part.steps() if step.kind == "site"):
        before = results.get(step.name, {"value": 0})["value"]  # a site that is called several times is one node
        results[step.name] = {"value": before + getattr(step.figures, figure)}
    gradient = [{"stop": 0, "bgColor": colour("pill")}, {"stop": 1, "bgColor": colour("lane 0")}]
    return {"after": {"results": results, "gradient": gradient}}


def _nodes(part: Part, after: bool) -> Iterator[dict[str, Any]]:
    space = part.title.replace("/", "|")
    entry, end = f"{part.number}: entry", f"{part.number}: exit"
    readers = [f"{other}: exit" for other in part.stream.reads]
    yield _node(entry, f"expand to {part.streams[0]}" if after else "entry", space, readers)
    last, seen = entry, {entry}
    for layer in (layer for group in part.groups for layer in group.layers):
        inner = f"{space}/{module_name(layer.name)}"
        for place, step in enumerate(layer.steps):
            told = facts(step)
            if step.kind == "left alone":
                yield _node(f"left alone {step.number}", f"left alone: {step.rule}", inner, [], told)
            elif step.name in seen:
                continue
            elif step.kind in ("site", "excluded"):
                seen.add(step.name)
                block = f"{step.name}: F"
                yield _node(block, step.label, inner, [last], told)
                label = step.name.rpartition(".")[2] if after and step.kind == "site" else "x + F(x)"
                yield _node(step.name, label, inner, [last, block], told)
                last = step.name
            elif after or step.kind == "operation":
                name = f"{layer.name}: {step.label} {place}"
                if name not in seen:
                    seen.add(name)
                    yield _node(name, step.label, inner, [last], told)
                    last = name
    yield _node(end, f"collapse: {part.collapse}" if after else "exit", space, [last])
    for step in (*part.ahead, *part.behind):
        yield _node(f"left alone {step.number}", f"left alone: {step.rule}", "", [], facts(step))


def _node(
    name: str, label: str, space: str, inputs: list[str], told: tuple[tuple[str, str], ...] = ()
) -> dict[str, Any]:
    return {
        "id": name, "label": label, "namespace": space,
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(k)}
            for k, source in enumerate(inputs)
        ],
        "attrs": [{"key": key, "value": value} for key, value in told],
    }  # fmt: skip

"""A picture as text for Graphviz, which people have who want to lay it out themselves."""

from __future__ import annotations

from collections.abc import Iterator

from mhc_rewrite.insight.drawing.data import Part, Picture, Step
from mhc_rewrite.insight.drawing.facts import count_text, head_texts
from mhc_rewrite.printing import module_name


def dot(picture: Picture) -> str:
    """A digraph with a cluster a stream, and one in it for each group of layers."""
    lines = [
        "digraph mhc_rewrite {",
        f"  label={quoted(f'{picture.title}: {picture.about}')}; labelloc=t; rankdir=TB; compound=true;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="sans-serif"];',
    ]
    for part in picture.parts:
        lines += _part(part)
    for part in picture.parts:
        lines += [f"  exit{other} -> entry{part.number} [style=dashed, label=reads];" for other in part.stream.reads]
    return "\n".join([*lines, "}"]) + "\n"


def _part(part: Part) -> Iterator[str]:
    number = part.number
    yield f"  subgraph cluster_{number} {{"
    yield f"    label={quoted(part.title, part.about)};"
    yield f"    entry{number} [label={quoted(f'expand: 1 to {part.streams[0]} streams')}, fillcolor=lightblue];"
    yield f"    exit{number} [label={quoted(f'collapse: {part.collapse} of {part.streams[1]}')}, fillcolor=lightblue];"
    last = f"entry{number}"
    for k, group in enumerate(part.groups):
        name, kind, cost = head_texts(group)
        yield f"    subgraph cluster_{number}_{k} {{"
        yield f"      label={quoted(' '.join(filter(None, (name, kind, count_text(group)))), cost)};"
        edges = []
        for place, step in enumerate(step for layer in group.pattern for step in layer.steps):
            node = f"s{number}_{k}_{place}"
            yield from (f"      {text}" for text in _nodes(step, node))
            if step.kind == "left alone":
                continue
            edges.append((last, node, step.n))
            last = node
        yield "    }"
        yield from (f"    {a} -> {b} [label={quoted(f'n = {n}')}];" for a, b, n in edges)
    yield f"    {last} -> exit{number} [label={quoted(f'n = {part.streams[1]}')}];"
    yield "  }"
    for step in (*part.ahead, *part.behind):
        yield from (f"  {text}" for text in _nodes(step, f"left{step.number}"))


def _nodes(step: Step, node: str) -> Iterator[str]:
    if step.kind in ("site", "excluded"):
        is_site = step.kind == "site"
        about = "H_res, H_post" if is_site else "excluded: a plain residual on every stream"
        yield f"{node} [label={quoted(step.name, about)}, fillcolor={'palegreen' if is_site else 'lightgrey'}];"
        yield f"{node}_F [label={quoted(' '.join(filter(None, (step.label, step.block))))}];"
        yield f"{node} -> {node}_F [label={'H_pre' if is_site else 'mean'}];"
        yield f"{node}_F -> {node} [label={'H_post' if is_site else 'add'}, constraint=false];"
    elif step.kind == "left alone":
        label = quoted(f"{step.number} {step.rule}: {module_name(step.name)}", step.reason)
        yield f'{node} [label={label}, style="dashed,rounded", color=darkorange];'
    else:
        yield f"{node} [label={quoted(step.label)}, fillcolor=lavender];"


def quoted(*lines: str) -> str:
    """As Graphviz has strings."""
    escaped = (line.replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'

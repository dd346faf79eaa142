"""Listed graphs as text, Rich tables, unified differences, JSON and graphviz."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.text import Text

from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.plans import ListedGraph, ListedNode, code_lines, short_source
from mhc_rewrite.printing import PROSE_WIDTH, fold, module_name, plain_table, without_numbers

Stage = Literal["original", "rewritten", "diff"]

# What stands out: the residual add in red, what it became in green.
STYLES = {
    "trunk": "cyan",
    "residual add": "bold red",
    "expand": "bold green",
    "resize": "bold green",
    "pre": "bold green",
    "post": "bold green",
    "boundary": "bold green",
    "collapse": "bold green",
}
COLOURS = {"trunk": "lightblue", "residual add": "salmon"} | dict.fromkeys(
    ("expand", "resize", "pre", "post", "boundary", "collapse"), "palegreen"
)


@dataclass(frozen=True)
class Listing:
    """A graph, and all carriers whose graph is the same."""

    modules: tuple[str, ...]
    graph: ListedGraph

    @property
    def title(self) -> str:
        """`transformer.h.{0..11}  GPT2Block x12  (eval)`."""
        names = ", ".join(fold(map(module_name, self.modules)))
        count = f" x{len(self.modules)}" if len(self.modules) > 1 else ""
        return f"{names}  {self.graph.kind}{count}" + (f"  {self.graph.call}" if self.graph.call else "")

    def nodes(self, stage: str) -> tuple[ListedNode, ...]:
        """The nodes of one stage."""
        return self.graph.original if stage == "original" else self.graph.rewritten


def merge(graphs: Iterable[ListedGraph], stage: Stage) -> list[Listing]:
    """Carriers whose graphs are the same in the stage that is shown as one, in the order of their first call."""
    groups: dict[Hashable, list[ListedGraph]] = {}
    for graph in graphs:
        nodes = (tuple(map(_common, graph.original)), tuple(map(_common, graph.rewritten)))
        shown = {"original": nodes[0], "rewritten": nodes[1], "diff": nodes}[stage]
        groups.setdefault((graph.kind, graph.call, shown), []).append(graph)
    return [Listing(tuple(graph.module for graph in same), _common_graph(same)) for same in groups.values()]


def _common_graph(same: Sequence[ListedGraph]) -> ListedGraph:
    """The graph to show for several: without layer numbers where these are what tells them apart."""
    first = same[0]
    if all((graph.original, graph.rewritten) == (first.original, first.rewritten) for graph in same):
        return first
    stages = {name: tuple(map(_common, getattr(first, name))) for name in ("original", "rewritten")}
    return dataclasses.replace(first, **stages)  # type: ignore[arg-type]


def _common(node: ListedNode) -> ListedNode:
    """A node without the number of its layer, which its texts may hold."""
    return dataclasses.replace(node, target=without_numbers(node.target), arguments=without_numbers(node.arguments))


def select(graphs: Sequence[ListedGraph], layer: str | None) -> list[ListedGraph]:
    """The graphs of the carriers that a name or pattern means.

    Raises:
        UsageError: it means none; near names are given.
    """
    if layer is None:
        return list(graphs)
    names = [module_name(graph.module) for graph in graphs]
    if chosen := [graph for graph, name in zip(graphs, names, strict=True) if fnmatch.fnmatchcase(name, layer)]:
        return chosen
    near = difflib.get_close_matches(layer, names, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"They are: {', '.join(fold(names))}."
    raise UsageError(f"No rewritten module is named {layer!r}. {hint}")


# Text -----------------------------------------------------------------------------------------------------------------


def inline_attributes(nodes: Sequence[ListedNode]) -> tuple[ListedNode, ...]:
    """Nodes without those that only fetch a parameter or a module: their readers name it instead."""
    fetched = {node.name: node.target for node in nodes if node.op == "get_attr"}
    if not fetched:
        return tuple(nodes)
    names = re.compile(rf"(?<![\w.'\"])({'|'.join(map(re.escape, fetched))})(?![\w'\"=])")
    return tuple(
        dataclasses.replace(
            node,
            arguments=names.sub(lambda match: fetched[match[1]], node.arguments),
            inputs=tuple(name for name in node.inputs if name not in fetched),
        )
        for node in nodes
        if node.name not in fetched
    )


def node_lines(nodes: Sequence[ListedNode], widths: tuple[int, int]) -> list[str]:
    """A line a node: a star where the residual connection is, name, result, operation, role and source."""
    return [
        " ".join(
            (
                "*" if node.role not in ("", "trunk") else " ",
                node.name.ljust(widths[0]),
                result_type(node).ljust(widths[1]),
                f"= {operation(node)}{_comment(node)}",
            )
        ).rstrip()
        for node in inline_attributes(nodes)
    ]


def _comment(node: ListedNode) -> str:
    parts = [node.role] if node.role else []
    if node.source is not None:
        parts.append(short_source(node.source) + (f" `{node.source.text.strip()}`" if node.source.text else ""))
    return "  # " + " | ".join(parts) if parts else ""


def result_type(node: ListedNode) -> str:
    """`(2, 16, 768) float32`, or `-` where the result is no tensor."""
    if node.shape is None:
        return "-"
    dtype = f" {node.dtype.removeprefix('torch.')}" if node.dtype else ""
    return f"({', '.join(map(str, node.shape))}){dtype}"


def operation(node: ListedNode) -> str:
    """`target(arguments)`, or `object.method(arguments)`; a placeholder has no arguments to show."""
    if node.op == "placeholder":
        return "placeholder"
    if node.op == "output":
        return f"return {node.arguments}"
    if node.op == "call_method":
        owner, _, arguments = node.arguments.partition(", ")
        return f"{owner}.{node.target}({arguments})"
    return f"{node.target}({node.arguments})"


def _widths(graph: ListedGraph) -> tuple[int, int]:
    """Column widths over both stages, so that a line that did not change is the same text in both."""
    nodes = [*inline_attributes(graph.original), *inline_attributes(graph.rewritten)]
    return max((len(n.name) for n in nodes), default=0), max((len(result_type(n)) for n in nodes), default=0)


def diff_lines(listing: Listing) -> list[str]:
    """The unified difference of the text listings before and after."""
    widths = _widths(listing.graph)
    before, after = (node_lines(listing.nodes(stage), widths) for stage in ("original", "rewritten"))
    name = ", ".join(fold(map(module_name, listing.modules)))
    return list(difflib.unified_diff(before, after, f"original {name}", f"rewritten {name}", n=1000, lineterm=""))


def text(listings: Sequence[Listing], stage: Stage) -> str:
    """All listings as plain text, each under its title."""
    blocks = []
    for listing in listings:
        lines = diff_lines(listing) if stage == "diff" else node_lines(listing.nodes(stage), _widths(listing.graph))
        blocks.append("\n".join([f"# {listing.title}", *lines]))
    return "\n\n".join(blocks)


# Rich -----------------------------------------------------------------------------------------------------------------


def rich(listings: Sequence[Listing], stage: Stage) -> RenderableType:
    """All listings as tables, or as coloured differences."""
    parts: list[RenderableType] = []
    for listing in listings:
        parts += [Text()] if parts else []
        parts.append(Text(listing.title, style="bold"))
        parts.append(_rich_diff(listing) if stage == "diff" else _rich_nodes(listing.nodes(stage)))
    return Group(*parts)


def _rich_nodes(nodes: Sequence[ListedNode]) -> RenderableType:
    table = plain_table("node", "result", "operation", "role", "source")
    table.columns[2].max_width = PROSE_WIDTH
    above = None
    for node in inline_attributes(nodes):
        style = STYLES.get(node.role, "")
        source = Text(overflow="fold")
        # Several operations of one line of code show it once, and where the streams are read or written.
        if node.source is not None and (node.role or node.source != above):
            source.append(short_source(node.source))
            source.append("".join(f"\n{line}" for line in code_lines(node.source)), style="dim")
        cells = (node.name, result_type(node), operation(node), node.role)
        table.add_row(*(Text(cell, style=style, overflow="fold") for cell in cells), source)
        above = node.source
    return table


def _rich_diff(listing: Listing) -> RenderableType:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    lines = diff_lines(listing) or ["  (unchanged)"]
    shown = [
        Text(
            line,
            style=("bold " if number < 2 or line[1:2] == "*" else "") + (styles.get(line[0], "") if number > 1 else ""),
        )
        for number, line in enumerate(lines)
    ]
    # A terminal breaks long lines by itself; broken here, their second halves would look like lines without a sign.
    return Text("\n", no_wrap=True, overflow="ignore").join(shown)


# JSON and graphviz ----------------------------------------------------------------------------------------------------


def as_json(listings: Sequence[Listing], stage: Stage, **about: Any) -> str:
    """One object; keys stay, and new ones may come. `about` says what is listed, and how it was made."""
    stages = ("original", "rewritten") if stage == "diff" else (stage,)
    graphs = []
    for listing in listings:
        entry: dict[str, Any] = {
            "modules": list(listing.modules),
            "count": len(listing.modules),
            "kind": listing.graph.kind,
            "call": listing.graph.call,
        }
        entry |= {name: [dataclasses.asdict(node) for node in listing.nodes(name)] for name in stages}
        if stage == "diff":
            entry["diff"] = diff_lines(listing)
        graphs.append(entry)
    return json.dumps({**about, "stage": stage, "graphs": graphs}, indent=2)


def dot(listings: Sequence[Listing], stage: Stage) -> str:
    """A digraph with a cluster a listing; for the difference, a cluster a stage."""
    lines = ["digraph mhc_rewrite {", "  rankdir=TB;", '  node [shape=box, style="rounded,filled", fillcolor=white];']
    for index, listing in enumerate(listings):
        for name in ("original", "rewritten") if stage == "diff" else (stage,):
            label = listing.title + (f"\n{name}" if stage == "diff" else "")
            lines += [f"  subgraph cluster_{index}_{name} {{", f"    label={_quoted(label)};"]
            nodes = inline_attributes(listing.nodes(name))
            ids = {node.name: _quoted(f"{index}.{name}.{node.name}") for node in nodes}
            for node in nodes:
                title = f"{node.name}: {node.target}" if node.target != node.name else node.name
                result = result_type(node) if node.shape is not None else ""
                text = "\n".join(filter(None, (title, result, node.role)))
                colour = COLOURS.get(node.role, "white")
                lines.append(f"    {ids[node.name]} [label={_quoted(text)}, fillcolor={colour}];")
            for node in nodes:
                lines += [f"    {ids[source]} -> {ids[node.name]};" for source in node.inputs if source in ids]
            lines.append("  }")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

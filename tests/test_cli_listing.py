"""Graphs as text, differences, graphviz; alike ones once. The graphs are made by hand."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from expecttest import TestCase
from rich.console import Console

from mhc_rewrite.cli import listing
from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.plans import ListedGraph, ListedNode, SourceLine

FILE = "/opt/env/lib/python3.11/site-packages/gpt/modeling_gpt.py"
ADD = SourceLine(FILE, 20, "x = x + self.mlp(h)")


def node(name: str, target: str, arguments: str = "", **fields: object) -> ListedNode:
    inputs = tuple(part for part in re.split(r"[ ,]+", arguments) if part.isidentifier())
    values = dict(op="call_module", inputs=inputs, shape=(2, 4, 8), dtype="torch.float32", source=None)
    return ListedNode(name=name, target=target, arguments=arguments, **{**values, **fields})  # type: ignore[arg-type]


def block(index: int, width: int = 8) -> ListedGraph:
    one, many = dict(shape=(2, 4, width)), dict(shape=(2, 4, 4, width))
    source = SourceLine(FILE, 19, "h = self.norm(x)")
    original = (
        node("x", "x", op="placeholder", role="trunk", **one),
        node("norm", "norm", "x", source=source, **one),
        node("mlp", f"h.{index}.mlp", "norm", source=ADD, **one),
        node("add", "operator.add", "x, mlp", op="call_function", role="residual add", source=ADD, **one),
        node("output", "output", "add", op="output", shape=None, dtype=None),
    )
    none = dict(shape=None, dtype=None)
    site = ListedNode("mhc_0", "get_attr", "mhc_0", (), "", None, None, None)
    rewritten = (
        node("x", "x", op="placeholder", role="trunk", **many),
        site,
        node("pre", "pre", "mhc_0, x", op="call_method", role="pre", source=ADD, **none),
        node("getitem", "operator.getitem", "pre, 0", op="call_function", **one),
        node("getitem_1", "operator.getitem", "pre, 1", op="call_function", **none),
        node("norm", "norm", "getitem", source=source, **one),
        node("mlp", f"h.{index}.mlp", "norm", source=ADD, **one),
        dataclasses.replace(site, name="mhc_1"),
        node("post", "post", "mhc_1, x, mlp, getitem_1", op="call_method", role="post", source=ADD, **many),
        node("output", "output", "post", op="output", **none),
    )
    return ListedGraph(f"h.{index}", "Block", "eval", original, rewritten)


BLOCKS = [block(0), block(1), block(2, width=16), block(3)]


class TestGolden(TestCase):
    def test_text(self) -> None:
        self.assertExpectedInline(
            listing.text(listing.merge(BLOCKS, "rewritten"), "rewritten"),
            """\
# h.{0,1,3}  Block x3  eval
  x         (2, 4, 4, 8) float32 = placeholder  # trunk
* pre       -                    = mhc_0.pre(x)  # pre | modeling_gpt.py:20 `x = x + self.mlp(h)`
  getitem   (2, 4, 8) float32    = operator.getitem(pre, 0)
  getitem_1 -                    = operator.getitem(pre, 1)
  norm      (2, 4, 8) float32    = norm(getitem)  # modeling_gpt.py:19 `h = self.norm(x)`
  mlp       (2, 4, 8) float32    = h.#.mlp(norm)  # modeling_gpt.py:20 `x = x + self.mlp(h)`
* post      (2, 4, 4, 8) float32 = mhc_0.post(x, mlp, getitem_1)  # post | modeling_gpt.py:20 `x = x + self.mlp(h)`
  output    -                    = return post

# h.2  Block  eval
  x         (2, 4, 4, 16) float32 = placeholder  # trunk
* pre       -                     = mhc_0.pre(x)  # pre | modeling_gpt.py:20 `x = x + self.mlp(h)`
  getitem   (2, 4, 16) float32    = operator.getitem(pre, 0)
  getitem_1 -                     = operator.getitem(pre, 1)
  norm      (2, 4, 16) float32    = norm(getitem)  # modeling_gpt.py:19 `h = self.norm(x)`
  mlp       (2, 4, 16) float32    = h.2.mlp(norm)  # modeling_gpt.py:20 `x = x + self.mlp(h)`
* post      (2, 4, 4, 16) float32 = mhc_0.post(x, mlp, getitem_1)  # post | modeling_gpt.py:20 `x = x + self.mlp(h)`
  output    -                     = return post""",
        )

    def test_diff(self) -> None:
        self.assertExpectedInline(
            listing.text(listing.merge(BLOCKS[:2], "diff"), "diff"),
            """\
# h.{0,1}  Block x2  eval
--- original h.{0,1}
+++ rewritten h.{0,1}
@@ -1,5 +1,8 @@
-  x         (2, 4, 8) float32    = placeholder  # trunk
-  norm      (2, 4, 8) float32    = norm(x)  # modeling_gpt.py:19 `h = self.norm(x)`
+  x         (2, 4, 4, 8) float32 = placeholder  # trunk
+* pre       -                    = mhc_0.pre(x)  # pre | modeling_gpt.py:20 `x = x + self.mlp(h)`
+  getitem   (2, 4, 8) float32    = operator.getitem(pre, 0)
+  getitem_1 -                    = operator.getitem(pre, 1)
+  norm      (2, 4, 8) float32    = norm(getitem)  # modeling_gpt.py:19 `h = self.norm(x)`
   mlp       (2, 4, 8) float32    = h.#.mlp(norm)  # modeling_gpt.py:20 `x = x + self.mlp(h)`
-* add       (2, 4, 8) float32    = operator.add(x, mlp)  # residual add | modeling_gpt.py:20 `x = x + self.mlp(h)`
-  output    -                    = return add
+* post      (2, 4, 4, 8) float32 = mhc_0.post(x, mlp, getitem_1)  # post | modeling_gpt.py:20 `x = x + self.mlp(h)`
+  output    -                    = return post""",
        )

    def test_dot(self) -> None:
        self.assertExpectedInline(
            listing.dot(listing.merge(BLOCKS[:1], "rewritten"), "rewritten"),
            """\
digraph mhc_rewrite {
  rankdir=TB;
  node [shape=box, style="rounded,filled", fillcolor=white];
  subgraph cluster_0_rewritten {
    label="h.0  Block  eval";
    "0.rewritten.x" [label="x\\n(2, 4, 4, 8) float32\\ntrunk", fillcolor=lightblue];
    "0.rewritten.pre" [label="pre\\npre", fillcolor=palegreen];
    "0.rewritten.getitem" [label="getitem: operator.getitem\\n(2, 4, 8) float32", fillcolor=white];
    "0.rewritten.getitem_1" [label="getitem_1: operator.getitem", fillcolor=white];
    "0.rewritten.norm" [label="norm\\n(2, 4, 8) float32", fillcolor=white];
    "0.rewritten.mlp" [label="mlp: h.0.mlp\\n(2, 4, 8) float32", fillcolor=white];
    "0.rewritten.post" [label="post\\n(2, 4, 4, 8) float32\\npost", fillcolor=palegreen];
    "0.rewritten.output" [label="output", fillcolor=white];
    "0.rewritten.x" -> "0.rewritten.pre";
    "0.rewritten.pre" -> "0.rewritten.getitem";
    "0.rewritten.pre" -> "0.rewritten.getitem_1";
    "0.rewritten.getitem" -> "0.rewritten.norm";
    "0.rewritten.norm" -> "0.rewritten.mlp";
    "0.rewritten.x" -> "0.rewritten.post";
    "0.rewritten.mlp" -> "0.rewritten.post";
    "0.rewritten.getitem_1" -> "0.rewritten.post";
    "0.rewritten.post" -> "0.rewritten.output";
  }
}""",
        )


def test_identical_layers_are_shown_once_with_their_count() -> None:
    assert [entry.title for entry in listing.merge(BLOCKS, "diff")] == [
        "h.{0,1,3}  Block x3  eval",
        "h.2  Block  eval",
    ]


CHANGES = {
    "kind": dict(kind="Other"),
    "call": dict(call="train"),
    "a node": dict(rewritten=block(0).rewritten[:-1]),
    "a role": dict(original=tuple(dataclasses.replace(n, role="") for n in block(0).original)),
    "an argument": dict(original=(*block(0).original[:-1], node("output", "output", "mlp", op="output"))),
}


@pytest.mark.parametrize("what", CHANGES)
def test_layers_that_differ_are_shown_apart(what: str) -> None:
    assert len(listing.merge([block(0), dataclasses.replace(block(1), **CHANGES[what])], "diff")) == 2


def test_layers_are_compared_in_the_stage_that_is_shown() -> None:
    graphs = [block(0), dataclasses.replace(block(1), rewritten=block(1).rewritten[1:])]
    assert [len(listing.merge(graphs, stage)) for stage in ("original", "rewritten", "diff")] == [1, 2, 2]


def test_what_only_fetches_a_module_is_named_where_it_is_used() -> None:
    def operations(*nodes: ListedNode) -> list[str]:
        return [listing.operation(node) for node in listing.inline_attributes(nodes)]

    weight = ListedNode("a", "get_attr", "head.weight", (), "", None, None, None)
    other = ListedNode("a_1", "get_attr", "head.bias", (), "", None, None, None)
    call = node("y", "f", "a, b.a, a_1, a_2, 'a', a=a, k=[a]", op="call_function")
    method = node("z", "view", "y", op="call_method")
    assert operations(weight, other, call, method) == [
        "f(head.weight, b.a, head.bias, a_2, 'a', a=head.weight, k=[head.weight])",
        "y.view()",
    ]


def test_a_listing_moves_nothing_between_the_stages() -> None:
    """Lines that are in both stages are the same text, or a difference would show them as changed."""
    (entry,) = listing.merge([block(0)], "diff")
    lines = listing.diff_lines(entry)
    unchanged = [line.split()[0] for line in lines if line.startswith(" ")]
    assert unchanged == ["mlp"]
    assert [line[0] for line in lines if "operator.add" in line] == ["-"]
    assert [line[0] for line in lines if " = mhc_0.p" in line] == ["+", "+"]


def test_dot_quotes_what_it_is_given() -> None:
    graph = ListedGraph("", 'K"ind\\', "eval", (), (node("a", 'f("x")'), node("b", "g", "a, gone")))
    text = listing.dot(listing.merge([graph], "rewritten"), "rewritten")
    assert r"K\"ind\\" in text and r"f(\"x\")" in text
    assert text.count("->") == 1  # the input that is no node of the graph has no edge
    assert len(re.findall(r'(?<!\\)"', text)) % 2 == 0


def test_select() -> None:
    graphs = [*BLOCKS, dataclasses.replace(block(0), module="")]
    assert [g.module for g in listing.select(graphs, "h.1")] == ["h.1"]
    assert [g.module for g in listing.select(graphs, "h.[12]")] == ["h.1", "h.2"]
    assert [g.module for g in listing.select(graphs, "(model)")] == [""]
    assert listing.select(graphs, None) == graphs
    with pytest.raises(UsageError, match=r"'h\.7'.*Did you mean h\."):
        listing.select(graphs, "h.7")
    with pytest.raises(UsageError, match=r"They are: h\.\{0\.\.3\}, \(model\)"):
        listing.select(graphs, "zzzz")


def test_what_the_residual_add_became_stands_out() -> None:
    def coloured(stage: str) -> set[str]:
        console = Console(file=io.StringIO(), force_terminal=True, width=200, color_system="standard")
        console.print(listing.rich(listing.merge([block(0)], stage), stage))
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
        return {match[1] for line in lines if (match := re.match(r"\x1b\[1;3[12]m(\w+)", line))}

    assert coloured("original") == {"add"}
    assert coloured("rewritten") == {"pre", "post"}

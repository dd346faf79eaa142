"""A random residual program as Python text, with the line of every planted add."""

from __future__ import annotations

import ast
from typing import Any

from program_ops import INTO_TOKENS, OPS
from program_tree import Alias, Aux, Body, Boundary, Expr, Layers, Lift, Site, Sum

HEADER = """\
import math

import torch
import torch.nn.functional as F
from torch import nn

P = {dropout}
"""
CHILD = """\


class {name}(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(C, C)
        self.norm = {norm}

    def forward(self, hidden, residual):
        hidden = self.dense(hidden)
        return {result}"""
CHILDREN = {
    "Out": ("None", "hidden + residual"),
    "OutFlipped": ("None", "residual + hidden"),
    "OutNorm": ("nn.LayerNorm(C)", "self.norm(hidden + residual)"),
    "OutNormFlipped": ("nn.LayerNorm(C)", "self.norm(residual + hidden)"),
}


def write(root: Body, dropout: float) -> tuple[str, dict[int, frozenset[int]]]:
    """(source, id of a Site -> its lines). The model's class is `Model`, its inputs are (x, e, mask)."""
    writer = Writer(dropout)
    layers = [item for item in root.items if isinstance(item, Layers)]
    bodies = [body for item in layers for body in item.bodies] + [root]
    for name in sorted({site.child_class for body in bodies for site in body.sites if site.child_class}):
        writer.child(name)
    for item in layers:
        for body in item.bodies:
            writer.module(body, style=item.style)
    writer.module(root, style="root")
    return "\n".join(writer.lines) + "\n", {site: frozenset(lines) for site, lines in writer.site_lines.items()}


class Writer:
    """Collects lines; knows the names of the trunk while it writes a forward."""

    def __init__(self, dropout: float) -> None:
        self.lines = HEADER.format(dropout=dropout).splitlines()
        self.site_lines: dict[int, set[int]] = {}
        self.child_lines: dict[str, int] = {}
        self.indent = 0

    def line(self, text: str) -> int:
        """Writes one line, and says which it is."""
        self.lines.append(("    " * self.indent + text) if text else "")
        return len(self.lines)

    def fresh(self, prefix: str) -> str:
        """A name that the forward has not used yet."""
        self.count += 1
        return f"{prefix}{self.count}"

    def child(self, name: str) -> None:
        norm, result = CHILDREN[name]
        self.lines += CHILD.format(name=name, norm=norm, result=result).splitlines()
        self.child_lines[name] = len(self.lines)

    def module(self, body: Body, style: str) -> None:
        """A class of its own. The body of an "inline" layer stands in its parent's forward instead."""
        self.indent = 0
        for text in ("", "", f"class {body.name}(nn.Module):"):
            self.line(text)
        self.indent = 1
        self.line("def __init__(self):")
        self.indent = 2
        self.line("super().__init__()")
        for k, constructor in enumerate(body.makes):
            self.line(f"self.m{k} = {constructor}")
        for item in body.items:
            if isinstance(item, Layers):
                self.make_layers(item)
        if style == "inline":
            return
        self.line("")
        self.indent = 1
        self.line(f"def forward(self, {'x' if style == 'sequential' else 'x, e, mask'}):")
        self.indent, self.count, self.prefix = 2, 0, "self"
        self.extra: list[str] = []
        self.names_of: dict[int, str] = {}
        names = self.items(body.items, ["x"])
        result = ", ".join([names[-1], *self.extra])
        self.line(f"return ({result},)" if style == "tuple" else f"return {result}")

    def make_layers(self, item: Layers) -> None:
        made = ", ".join(f"{item.bodies[index].name}()" for index in item.made_of)
        if item.style != "sequential":
            self.line(f"self.layers = nn.ModuleList([{made}])")
            return
        self.line(f"made = [{made}]")
        between = ", nn.ReLU()" if item.between is not None else ""
        self.line(f"self.layers = nn.Sequential({', '.join(f'made[{call}]{between}' for call in item.calls)})")

    def items(self, items: list[Any], names: list[str]) -> list[str]:
        """Writes statements; `names` are those of the trunk, before and after."""
        for item, following in zip(items, [*items[1:], None]):
            fused = isinstance(following, Lift) and following.fused
            if isinstance(item, Site):
                names = self.site(item, names, following if fused else None)
            elif isinstance(item, Lift) and not item.fused:
                names = self.lift(item, names)
            elif isinstance(item, Boundary):
                d, f = (self.expression(expr, names[0]) for expr in (item.d, item.f))
                self.line(f"x = {f} + {d}" if item.flipped else f"x = {d} + {f}")
                names = ["x"]
            elif isinstance(item, Alias):
                self.line(f"{item.name} = {names[-1]}")
                names = [*names, item.name]
            elif isinstance(item, Aux):
                self.extra.append(self.fresh("aux"))
                read = names[0] if item.probe is None else self.expression(item.probe, names[0])
                self.line(f"{self.extra[-1]} = {read}")
            elif isinstance(item, Layers):
                names = self.layers(item, names)
        return names

    def layers(self, item: Layers, names: list[str]) -> list[str]:
        if "x" not in names:
            self.line(f"x = {names[-1]}")
        if item.style == "sequential":
            self.line("x = self.layers(x)")
            return ["x"]
        if item.collect is not None:
            self.line("hidden = []")
            self.extra.append(f"hidden[{item.collect}]")
        if item.calls == tuple(range(len(item.made_of))):
            self.line("for layer in self.layers:")
        else:
            self.line(f"for layer in [self.layers[i] for i in {item.calls}]:")
        self.indent += 1
        if item.collect is not None:
            self.line("hidden.append(x)")
        if item.style == "inline":
            self.prefix = "layer"
            names = self.items(item.bodies[0].items, ["x"])
            self.prefix = "self"
            if "x" not in names:
                self.line(f"x = {names[-1]}")
        else:
            call = "layer(x, e, mask)" + ("[0]" if item.style == "tuple" else "")
            if item.between is not None:
                call = self.expression(item.between, call)
            self.line(f"x = {call}")
        self.indent -= 1
        return ["x"]

    def lift(self, item: Lift, names: list[str]) -> list[str]:
        if set(item.expr.ops()) & INTO_TOKENS:
            self.line(f"b, t, c = {names[0]}.shape")
        self.line(f"{item.target} = {bare(self.expression(item.expr, names[-1]))}")
        return [item.target]

    def expression(self, expr: Expr, x: str) -> str:
        """An expression that can stand in any other; what cannot be written in one is written before it."""
        if expr.op == "read":
            return x
        if id(expr) in self.names_of:
            return self.names_of[id(expr)]
        op, arguments = OPS[expr.op], {}
        for key, arg in zip("ab", expr.args):
            text = self.expression(arg, x)
            if not text.isidentifier() and (op.text.count(f"{{{key}}}") > 1 or not arg.inline):
                text = self.assign(text)
            arguments[key] = bare(text) if f"({{{key}}}" in op.text else text
        attributes = [f"{self.prefix}.{name}" for name in expr.attributes]
        *before, last = op.text.format(*attributes, **arguments, x=x, t=self.fresh("t")).split("\n")
        for text in before:
            self.line(text)
        whole = isinstance(ast.parse(last, mode="eval").body, (ast.Call, ast.Name))
        last = last if whole else f"({last})"
        if expr.once:
            last = self.names_of[id(expr)] = self.assign(last)
        return last

    def assign(self, text: str, name: str = "") -> str:
        name = name or self.fresh("h")
        self.line(f"{name} = {bare(text)}")
        return name

    def site(self, site: Site, names: list[str], fused: Lift | None) -> list[str]:
        lines = self.site_lines.setdefault(id(site), set())
        read, kept = (names[alias % len(names)] for alias in site.aliases)
        if site.naming == "overwrite":
            kept = self.assign(kept, self.fresh("kept"))
        leaves = [self.expression(site.trunk, kept)]
        for expr in site.branches:
            text = self.expression(expr, read)
            if site.naming == "overwrite":
                text = self.assign(text, "x")
            elif site.naming == "named" or site.form == "branch_iadd":
                text = self.assign(text)
            leaves.append(text)
        if site.form == "child":
            self.line(f"{site.target} = {self.prefix}.{site.child}({bare(leaves[1])}, {leaves[0]})")
            lines.add(self.child_lines[site.child_class])
            return [site.target]
        if site.form == "branch_iadd":
            lines.add(self.line(f"{leaves[1]} += {bare(leaves[0])}"))
            return [leaves[1]]
        total = bare(self.total(site.tree, leaves, lines))
        if site.form == "iadd":
            lines.add(self.line(f"{kept} += {total}"))
            return names
        if site.form == "add_":
            alpha = "" if site.alpha == 1 else f", alpha={site.alpha}"
            lines.add(self.line(f"{kept}.add_({total}{alpha})"))
            return names
        if fused is not None:
            total = self.expression(fused.expr, f"({total})")
        lines.add(self.line(f"{site.target} = {bare(total)}"))
        return [site.target]

    def total(self, tree: Sum | int, leaves: list[str], lines: set[int]) -> str:
        if isinstance(tree, int):
            return leaves[tree]
        left, right = (self.total(side, leaves, lines) for side in (tree.left, tree.right))
        alpha = "" if tree.alpha == 1 else f", alpha={tree.alpha}"
        if tree.style == "+":
            text = f"({left} + {right})"
        elif tree.style == "torch.add":
            text = f"torch.add({bare(left)}, {bare(right)}{alpha})"
        else:
            text = f"{left}.add({bare(right)}{alpha})"
        if tree.split:
            text = self.assign(text)
            if 0 in tree.weights():
                lines.add(len(self.lines))
        return text


def bare(text: str) -> str:
    """Without the outermost parentheses, where they are one pair."""
    if text.startswith("(") and text.endswith(")"):
        inner = text[1:-1]
        try:
            if ast.dump(ast.parse(inner, mode="eval")) == ast.dump(ast.parse(text, mode="eval")):
                return inner
        except SyntaxError:
            pass
    return text

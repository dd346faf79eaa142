"""Graphs as Python functions that take the live module as their first argument."""

from __future__ import annotations

import functools
import linecache
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from mhc_rewrite.capture.graph import ModuleGraph


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """A graph as a function `f(module, *leaves, *constants)`; graphs with the same text share one function."""
    code = graph.python_code("self")
    names = tuple(sorted(code.globals))
    return _compile(code.src, name, names, tuple(_ById(code.globals[n]) for n in names))


@dataclass(frozen=True)
class _ById:
    """A global of generated code, told apart by identity."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.value is self.value


@functools.lru_cache(maxsize=4096)
def _compile(source: str, name: str, names: tuple[str, ...], values: tuple[_ById, ...]) -> Callable[..., Any]:
    file = f"<mhc_rewrite {name} {abs(hash(source)):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {key: value.value for key, value in zip(names, values, strict=True)}
    exec(compile(source, file, "exec"), scope)
    forward = scope["forward"]
    weakref.finalize(forward, linecache.cache.pop, file, None)
    return forward


def guard_graph(captured: ModuleGraph) -> fx.Graph:
    """The conditions on sizes under which a captured forward holds, as a graph with the same placeholders."""
    graph = fx.Graph()
    needed: set[fx.Node] = set()
    todo = [guard.node for guard in captured.guards]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    copies: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[guard.node] for guard in captured.guards))
    return graph

"""A variant's graphs as plain data for display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from mhc_rewrite.conversion.roles import Variant
from mhc_rewrite.plans import ListedGraph, ListedNode


def list_graph(name: str, kind: str, call: str, variant: Variant) -> ListedGraph:
    """A carrier's forward before and after.

    Args:
        name: the carrier's name.
        kind: its class name.
        call: the variant, for a reader.
    """
    adds = {}
    for site in variant.sites:
        adds[site.add] = "residual add"
        for node in site.chain:
            adds.setdefault(node, "trunk")
    return ListedGraph(
        name, kind, call,
        tuple(_list_node(node, adds.get(node, "")) for node in variant.captured.graph.nodes),
        tuple(_list_node(node, node.meta.get("role", "")) for node in variant.rewrite.graph.nodes),
    )  # fmt: skip


def _list_node(node: fx.Node, role: str) -> ListedNode:
    dtype = node.meta.get("dtype")
    shape = node.meta.get("shape")
    return ListedNode(
        name=node.name, op=node.op, target=_target(node), inputs=tuple(n.name for n in node.all_input_nodes),
        arguments=_arguments(node.args, node.kwargs), shape=tuple(shape) if shape is not None else None,
        dtype=str(dtype).removeprefix("torch.") if dtype is not None else None,
        source=node.meta.get("source"), role=role,
    )  # fmt: skip


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    module = (getattr(node.target, "__module__", "") or "").removeprefix("_")
    name = getattr(node.target, "__name__", str(node.target))
    return name if module in ("", "builtins") else f"{module}.{name}"


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    return ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])

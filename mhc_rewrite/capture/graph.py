"""A captured forward, and what its nodes are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.reads import Read
from mhc_rewrite.capture.record import Frame


@dataclass
class Guard:
    """A condition on sizes under which a graph holds: `node`'s value is `expected`."""

    node: fx.Node
    expected: Any


@dataclass(frozen=True)
class InlinedCall:
    """A call of the carrier or of a module captured with it.

    Attributes:
        module: its path from the carrier.
        serial: when it began.
        frames: the Python frames from its forward to what is being looked at, outermost first.
    """

    module: str
    serial: int
    frames: tuple[Frame, ...]


@dataclass
class ModuleGraph:
    """A forward as captured.

    Node metadata: `shape`, `dtype` (of tensors), `source` (SourceLine), `holder` (the inlined module that ran it,
    relative to the carrier), `serial` (when it ran), `calls` (the calls of inlined modules that it ran in), `mixes` and
    `axes` (of child calls and opaque functions: what they do with each of their tensors), `gives_back` (the name of the
    node whose very tensor a child call returned), `storage`, `inplace`, `counted` (its size depends on what tensors
    contain).

    Attributes:
        module: the carrier's name.
        graph: its placeholders are the leaves of the call, then the constants.
        leaves: paths of the call's leaves, in the placeholders' order.
        constants: objects that the forward got from elsewhere.
        guards: conditions on sizes.
        outcomes: what its questions about the content of tensors came to, in order; see decisions.py.
        reads: plain values that its Python read, and where: it holds while they are the same.
        asks_dtype: whether the forward looked at a dtype.
        parameter_dtypes: the dtypes of parameters and buffers that it looked at, by path.
        pinned: whether it holds for inputs of the example's sizes only.
    """

    module: str
    graph: fx.Graph
    leaves: tuple[str, ...] = ()
    constants: tuple[Any, ...] = ()
    guards: list[Guard] = field(default_factory=list)
    outcomes: tuple[Any, ...] = ()
    reads: tuple[Read, ...] = ()
    asks_dtype: bool = False
    parameter_dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    pinned: bool = False


def origin(node: fx.Node) -> str:
    """What a size, or a condition on sizes, comes from: `"inputs"`, `"intermediate"` results or `"content"`."""
    found, todo = "inputs", [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            continue
        if node.meta.get("counted"):
            return "content"
        if "shape" in node.meta:
            found = "intermediate"
            continue
        reads_form = (node.op == "call_method" and node.target in vocabulary.FORM) or node.target is getattr
        arithmetic = node.op == "call_function" and getattr(node.target, "__module__", "") in (
            "_operator", "operator", "builtins", "math")  # fmt: skip
        if not (reads_form or arithmetic):
            return "content"
        todo.extend(node.all_input_nodes)
    return found


def is_structure(node: fx.Node) -> bool:
    """Whether a node puts results together: a dataclass, such as transformers' outputs, or a named tuple."""
    return node.op == "call_function" and isinstance(node.target, type)


def has_effects(node: fx.Node) -> bool:
    """Whether a node must stay although nobody reads it."""
    if node.op in ("placeholder", "output", "call_module") or any(map(node.meta.get, ("inplace", "guard", "effect"))):
        return True
    # A method of an object that is no tensor, a cache say, or a function that the call was given.
    return bool(node.meta.get("on_object")) and node.target not in vocabulary.FORM

"""Cuts one stage of a pipeline out of the captured forward of a model. Changes nothing that it is given.

A forward is a sequence of calls of modules with parameters, which the stages divide among them; what stands between two
of them belongs to the stage of the first. But what depends on the arguments of the model alone, a mask or a rotary
table, is nobody's: every stage that needs it makes it again. What passes between two stages are the values that are
made before the cut and read behind it, in the order in which they are made.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.graph import ModuleGraph, has_effects
from mhc_rewrite.passes.lineage import reads_form

Layers = Sequence[Sequence[str]]


@dataclass(frozen=True)
class ForwardFacts:
    """What a graph does not say of the forward.

    Attributes:
        weighted: paths of the modules with parameters that it calls, or reads.
        parameters: paths of the parameters that it reads itself.
        forms: (call, node that it reads), of modules that see nothing but the form of it, by the nodes' names.
        shapes: of the trunks: a value of another stage that has one is read for its form from what comes in.
    """

    weighted: frozenset[str]
    parameters: frozenset[str]
    forms: frozenset[tuple[str, str]]
    shapes: frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class StageGraph:
    """One stage.

    Attributes:
        graph: takes what arrives, then leaves and constants of the call; returns a tuple of what leaves, or what the
            forward returns if it is the last one.
        arriving, leaving: nodes of the whole graph.
        leaves: paths of the call's leaves that it takes.
        constants: as in `ModuleGraph`.
        first, last: whether it is.
    """

    graph: fx.Graph
    arriving: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]
    leaves: tuple[str, ...]
    constants: tuple[Any, ...]
    first: bool
    last: bool


class NoStages(ValueError):
    """The forward can't be divided so."""


def called(captured: ModuleGraph, weighted: frozenset[str]) -> list[str]:
    """The modules with parameters in the order in which they are called first."""
    return list(dict.fromkeys(str(node.target) for node in captured.graph.nodes if node.target in weighted))


def within(path: str, name: str) -> bool:
    """Whether a path is that of a named module, or of a part of it."""
    return path == name or path.startswith(name + ".")


def cut_stage(captured: ModuleGraph, layers: Layers, index: int, facts: ForwardFacts) -> StageGraph:
    """The stage of this index.

    Raises:
        NoStages: the forward does not call the layers one stage after another, or a stage can't have what it needs.
    """
    return _Cutter(captured, layers, index, facts).cut()


class _Cutter:
    def __init__(self, captured: ModuleGraph, layers: Layers, index: int, facts: ForwardFacts) -> None:
        self.captured, self.layers, self.index, self.facts = captured, layers, index, facts
        self.nodes: list[fx.Node] = [node for node in captured.graph.nodes if node.op != "output"]
        self.output: fx.Node = captured.graph.output_node()
        self.last = index == len(layers) - 1
        self.once: dict[str, fx.Node] = {}  # reads of one parameter, as one
        for node in self.nodes:
            if node.op == "get_attr":
                self.once.setdefault(str(node.target), node)
        self.stages = self._stages()

    # -- whose is what -----------------------------------------------------------------------------------------------

    def _stages(self) -> dict[fx.Node, int | None]:
        """The stage of each node; None where it is nobody's."""
        stages: dict[fx.Node, int | None] = {}
        latest, latest_call = 0, None
        for node in self.nodes:
            found = max((stage for one in self.content(node) if (stage := stages[one]) is not None), default=None)
            named = self._named(str(node.target)) if node.op in ("call_module", "get_attr") else None
            if named is not None:
                if node.op == "call_module" or node.target in self.facts.weighted:
                    if named < latest:
                        raise NoStages(
                            f"{node.target!r}, of stage {named}, is called behind {latest_call!r}, of stage {latest}"
                        )
                    latest, latest_call = named, node.target
                found = named
            elif self._stands(node) or (found is not None and not _takes_apart(node)):
                found = latest
            stages[node] = found
        return stages

    def _named(self, path: str) -> int | None:
        return next((k for k, names in enumerate(self.layers) if any(within(path, name) for name in names)), None)

    def _stands(self, node: fx.Node) -> bool:
        """Whether a node is somebody's whatever it reads."""
        return (node.op == "get_attr" and node.target in self.facts.parameters) or (
            node.op in ("call_function", "call_method") and vocabulary.is_random(node.target)
        )

    def content(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values a node reads, and not only their form."""
        return [
            self._one(x) for x in node.all_input_nodes
            if x.meta.get("shape") not in self.facts.shapes
            or not (reads_form(node) or (node.name, x.name) in self.facts.forms)
        ]  # fmt: skip

    def _one(self, node: fx.Node) -> fx.Node:
        return self.once[str(node.target)] if node.op == "get_attr" else node

    def _passing(self, cut: int) -> tuple[fx.Node, ...]:
        """What is made in the stages before `cut` and read in others."""
        readers = [node for node in self.nodes if (stage := self.stages[node]) is not None and stage >= cut]
        read = {one for node in (*readers, self.output) for one in self.content(node)}
        return tuple(
            node for node in self.nodes if node in read and (stage := self.stages[node]) is not None and stage < cut
        )

    # -- writing -----------------------------------------------------------------------------------------------------

    def cut(self) -> StageGraph:
        arriving = self._passing(self.index)
        leaving = () if self.last else self._passing(self.index + 1)
        needed = self._needed(arriving, leaving)
        graph = fx.Graph()
        made = {node: graph.placeholder(node.name) for node in arriving}
        leaves: list[str] = []
        constants: list[Any] = []
        values = iter(self.captured.constants)
        for node in self.nodes:
            if node.op == "placeholder":
                value = None if "leaf" in node.meta else next(values)
                if node not in needed:
                    continue
                made[node] = graph.placeholder(node.name)
                if "leaf" in node.meta:
                    leaves.append(node.meta["leaf"])
                else:
                    constants.append(value)
        for node in self.nodes:
            if node in needed and node not in made:
                made[node] = graph.node_copy(node, lambda one: self._source(one, made, arriving))
        if self.last:
            result = fx.node.map_arg(self.output.args[0], lambda one: made[self._one(one)])
        else:
            result = tuple(made[node] for node in leaving)
        graph.output(result)
        graph.lint()
        return StageGraph(graph, arriving, leaving, tuple(leaves), tuple(constants), self.index == 0, self.last)

    def _needed(self, arriving: tuple[fx.Node, ...], leaving: tuple[fx.Node, ...]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        todo = self.content(self.output) if self.last else list(leaving)
        # Questions about what is nobody's are asked in the first stage.
        asked = (self.index, None) if self.index == 0 else (self.index,)
        todo += [node for node in self.nodes if self._happens(node) and self.stages[node] in asked]
        while todo:
            while todo:
                node = todo.pop()
                if node not in needed and node not in arriving:
                    needed.add(node)
                    todo += [x for x in map(self._one, node.all_input_nodes) if self.stages[x] in (self.index, None)]
            # What is nobody's is made here as in the whole: with what is written to it.
            memory = {node.meta["storage"] for node in needed if "storage" in node.meta}
            todo = [n for n in self.nodes if self._happens(n) and n.meta.get("storage") in memory and n not in needed]
        return needed

    def _happens(self, node: fx.Node) -> bool:
        """Whether a node does something beside returning a value, and here."""
        if node.op == "placeholder" or node.meta.get("guard") or not has_effects(node):
            return False
        return self.stages[node] == self.index or (self.stages[node] is None and node.op != "call_module")

    def _source(self, node: fx.Node, made: Mapping[fx.Node, fx.Node], arriving: tuple[fx.Node, ...]) -> fx.Node:
        node = self._one(node)
        if node in made:
            return made[node]
        like = next((one for one in arriving if one.meta.get("shape") == node.meta.get("shape")), None)
        if like is None:
            raise NoStages(
                f"stage {self.index} needs the form of what {node.target!r} returns, and nothing of that form comes in"
            )
        return made[like]


def _takes_apart(node: fx.Node) -> bool:
    """Whether a node takes something out of what a call has returned, a tuple say."""
    return node.target in (operator.getitem, getattr) and "shape" not in node.args[0].meta  # type: ignore[union-attr]

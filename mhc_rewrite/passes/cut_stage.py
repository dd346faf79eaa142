"""Cuts one stage of a pipeline out of the captured forward of a model. Changes nothing that it is given.

The forward is a sequence of calls of modules with parameters; a stage has some that follow one another. What depends on
them alone, and on what came in, is the stage's too. What depends on the call's arguments alone, a mask or a rotary
table, is nobody's: every stage that needs it makes it again. What reads a parameter or draws random numbers beside the
modules is made once, where it stands. So each stage finds by itself what the others find: what passes between two of
them are the values that are made before a cut and read behind it, in the order in which they are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.graph import ModuleGraph, has_effects
from mhc_rewrite.passes.lineage import reads_form

_BEFORE, _OWN, _AFTER = -1, 0, 1


@dataclass(frozen=True)
class ForwardFacts:
    """What a graph does not say of the forward.

    Attributes:
        weighted: paths of the modules with parameters that it calls.
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


class NoStage(ValueError):
    """The named calls are no stage."""


def calls_of(captured: ModuleGraph, names: tuple[str, ...], weighted: frozenset[str]) -> list[fx.Node]:
    """The calls of named modules, or of modules inside them, and of all modules with parameters, as they come."""
    return [
        n for n in captured.graph.find_nodes(op="call_module", sort=True) if _named(n, names) or n.target in weighted
    ]


def cut_stage(captured: ModuleGraph, names: tuple[str, ...], facts: ForwardFacts) -> StageGraph:
    """The stage that calls the named modules.

    Raises:
        NoStage: other modules are called between them, or what it needs can't be had.
    """
    return _Cutter(captured, names, facts).cut()


class _Cutter:
    def __init__(self, captured: ModuleGraph, names: tuple[str, ...], facts: ForwardFacts) -> None:
        self.captured, self.names, self.facts = captured, names, facts
        self.nodes: list[fx.Node] = [n for n in captured.graph.nodes if n.op != "output"]
        self.output: fx.Node = captured.graph.output_node()
        self.at = {node: index for index, node in enumerate(captured.graph.nodes)}
        calls = calls_of(captured, names, facts.weighted)
        mine = [self.at[call] for call in calls if _named(call, names)]
        self.begin, self.end = mine[0], mine[-1]
        others = [call for call in calls if not _named(call, names)]
        between = next((call for call in others if self.begin < self.at[call] < self.end), None)
        if between is not None:
            raise NoStage(f"{between.target!r} is called between them")
        self.first = not any(self.at[call] < self.begin for call in others)
        self.follows = min((self.at[call] for call in others if self.at[call] > self.end), default=len(self.at))
        self.last = self.follows == len(self.at)
        self.once: dict[str, fx.Node] = {}  # reads of a parameter, as one
        for node in self.nodes:
            if node.op == "get_attr":
                self.once.setdefault(str(node.target), node)
        self.places = self._places()

    # -- whose is what -----------------------------------------------------------------------------------------------

    def _places(self) -> dict[fx.Node, int | None]:
        places: dict[fx.Node, int | None] = {}
        for node in self.nodes:
            found = [place for one in self.content(node) if (place := places[one]) is not None]
            if self._stands(node):
                found.append(self._place_at(self.at[node]))
            places[node] = max(found, default=None)
        return places

    def _stands(self, node: fx.Node) -> bool:
        """Whether a node is somebody's whatever it reads."""
        if node.op == "call_module":
            return _named(node, self.names) or node.target in self.facts.weighted
        if node.op == "get_attr":
            return node.target in self.facts.parameters
        return vocabulary.is_random(node.target)

    def _place_at(self, index: int) -> int:
        if index < self.begin and not self.first:
            return _BEFORE
        return _AFTER if index >= self.follows else _OWN

    def content(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values a node reads, and not only their form."""
        return [
            self._one(x) for x in node.all_input_nodes
            if x.meta.get("shape") not in self.facts.shapes
            or not (reads_form(node) or (node.name, x.name) in self.facts.forms)
        ]  # fmt: skip

    def _one(self, node: fx.Node) -> fx.Node:
        return self.once[str(node.target)] if node.op == "get_attr" else node

    def _passing(self, made: tuple[int, ...], read: tuple[int, ...]) -> tuple[fx.Node, ...]:
        """What is made at some places and read at others, the result of the whole being read at the last."""
        found = {one for node in self.nodes if self.places[node] in read for one in self.content(node)}
        if (_OWN if self.last else _AFTER) in read:
            found.update(self.content(self.output))
        return tuple(node for node in self.nodes if node in found and self.places[node] in made)

    # -- writing -----------------------------------------------------------------------------------------------------

    def cut(self) -> StageGraph:
        arriving = self._passing((_BEFORE,), (_OWN, _AFTER))
        leaving = () if self.last else self._passing((_BEFORE, _OWN), (_AFTER,))
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
        return StageGraph(graph, arriving, leaving, tuple(leaves), tuple(constants), self.first, self.last)

    def _needed(self, arriving: tuple[fx.Node, ...], leaving: tuple[fx.Node, ...]) -> set[fx.Node]:
        needed: set[fx.Node] = set()
        todo = self.content(self.output) if self.last else list(leaving)
        todo += [node for node in self.nodes if self._happens(node) and (self.places[node] == _OWN or self.first)]
        while todo:
            while todo:
                node = todo.pop()
                if node not in needed and node not in arriving:
                    needed.add(node)
                    todo += [self._one(x) for x in node.all_input_nodes if self.places[self._one(x)] in (_OWN, None)]
            # What is nobody's is made here as in the whole: with what is written to it. Questions about it are asked in
            # the first stage.
            memory = {node.meta["storage"] for node in needed if "storage" in node.meta}
            todo = [n for n in self.nodes if self._happens(n) and n.meta.get("storage") in memory and n not in needed]
        return needed

    def _happens(self, node: fx.Node) -> bool:
        """Whether a node does something beside returning a value, and here."""
        if node.op == "placeholder" or node.meta.get("guard") or not has_effects(node):
            return False
        return self.places[node] == _OWN or (self.places[node] is None and node.op != "call_module")

    def _source(self, node: fx.Node, made: Mapping[fx.Node, fx.Node], arriving: tuple[fx.Node, ...]) -> fx.Node:
        node = self._one(node)
        if node in made:
            return made[node]
        like = next((one for one in arriving if one.meta.get("shape") == node.meta.get("shape")), None)
        if like is None:
            raise NoStage(f"it needs the form of what {node.target!r} returns, and nothing of that form comes in")
        return made[like]


def _named(node: fx.Node, names: tuple[str, ...]) -> bool:
    return any(node.target == name or str(node.target).startswith(name + ".") for name in names)

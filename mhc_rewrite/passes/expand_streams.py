"""Rewrites a captured forward into n streams: the one pass that makes new graphs. It decides nothing.

Before (one site)                          After
    a = attn(ln(x))                            pre = mhc_0.pre(X);  u = pre[0];  mix = pre[1]
    y = x + a                                  a = attn(ln(u))
                                               Y = mhc_0.post(X, a, mix)

with `X = expand(x)` before the stream's first site and `y = collapse(Y)` after its last one. Everything else that reads
the trunk reads the mean of the streams; what reads its shape or dtype alone reads one stream's. Where sites have their
own n, a site resizes the streams where it reads them.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from mhc_rewrite.capture.graph import ModuleGraph, has_effects, is_structure
from mhc_rewrite.passes import lifting
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals, Trunk
from mhc_rewrite.passes.lifting import Lift
from mhc_rewrite.passes.lineage import reads_form
from mhc_rewrite.passes.same_site import SiteKey
from mhc_rewrite.sites import streams

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteTarget:
    """What becomes of one add: the site module's path from the carrier (None: a plain residual), and its stream.

    `n` is the site's number of streams, where they have several.
    """

    path: str | None
    stream: int
    n: int | None = None


@dataclass(frozen=True)
class Rewrite:
    """A rewritten forward.

    Attributes:
        graph: returns (what the original returns, the streams that go out and what comes out where one ends).
        outgoing: the stream numbers of the second result, in order.
        ended: those of them that end here.
    """

    graph: fx.Graph
    outgoing: tuple[int, ...]
    ended: frozenset[int] = frozenset()


@dataclass(eq=False)
class _Run:
    """Consecutive sites of one trunk that belong to one stream."""

    trunk: Trunk
    sites: list[FoundSite]
    stream: int
    arrives: bool
    leaves: bool
    ends: bool = False

    @property
    def channel_dim(self) -> int:
        return self.sites[0].channel_dim

    def lifts(self) -> list[Lift]:
        """All operations on this part of the trunk, in execution order per stretch."""
        first = self.sites[0]
        stretches = [first.lifts[: first.chain.index(first.read)], *(site.lifts for site in self.sites[1:])]
        if self.arrives:
            stretches.append(self.trunk.before)
        if self.leaves:
            stretches.append(self.trunk.after)
        return [lift for stretch in stretches for lift in stretch]


def expand_streams(
    captured: ModuleGraph,
    residuals: Residuals,
    targets: Mapping[SiteKey, SiteTarget],
    *,
    n: int | None,
    collapse: str,
    arriving: frozenset[int],
    leaving: frozenset[int],
    ending: frozenset[int] = frozenset(),
) -> Rewrite:
    """The forward on n streams.

    Args:
        captured, residuals: the forward and what was found in it; neither is changed.
        targets: the adds to rewrite; others stay.
        n: expansion rate; None where every site has its own.
        collapse: "mean" or "sum".
        arriving: streams that come in as streams; others are expanded before their first site here.
        leaving: streams that go out as streams; others are collapsed after their last site here.
        ending: of the others, those whose collapsed trunk is part of the second result.
    """
    runs = _runs(residuals, targets, arriving, leaving, ending)
    return _Writer(captured, runs, targets, n, collapse).write()


def _runs(
    residuals: Residuals, targets: Mapping[SiteKey, SiteTarget], arriving: frozenset[int], leaving: frozenset[int],
    ending: frozenset[int],
) -> list[_Run]:  # fmt: skip
    runs: list[_Run] = []
    for trunk in residuals.trunks:
        current: _Run | None = None
        for site in trunk.sites:
            target = targets.get(site.key)
            if target is None:
                current = None
            elif current is not None and current.stream == target.stream:
                current.sites.append(site)
            else:
                arrives = site is trunk.sites[0] and trunk.source is not None and target.stream in arriving
                current = _Run(trunk, [site], target.stream, arrives, False)
                runs.append(current)
        if current is not None and trunk.sinks and current.stream in leaving:
            current.leaves = True
        elif current is not None and trunk.sinks and current.stream in ending:
            current.ends = True
    return runs


class _Writer:
    def __init__(
        self, captured: ModuleGraph, runs: list[_Run], targets: Mapping[SiteKey, SiteTarget], n: int | None,
        collapse: str,
    ) -> None:  # fmt: skip
        self.captured, self.runs, self.targets, self.n, self.collapse = captured, runs, targets, n, collapse
        self.graph = fx.Graph()
        self.plain: dict[fx.Node, fx.Node] = {}  # node of the old graph -> its value, as in the original
        self.wide: dict[fx.Node, fx.Node] = {}  # trunk node of the old graph -> its streams
        self.numbers: dict[fx.Node, int | None] = {}  # how many they are, as far as it is known here
        self.means: dict[fx.Node, fx.Node] = {}
        self.inputs: dict[fx.Node, fx.Node] = {}  # site's add -> what its branch reads
        self.mixes: dict[fx.Node, fx.Node] = {}
        self.run_of: dict[fx.Node, _Run] = {}
        self.site_at = {site.add: (run, site) for run in runs for site in run.sites}
        self.lift_at = {lift.node: (run, lift) for run in runs for lift in run.lifts()}
        self.readers: dict[fx.Node, list[FoundSite]] = {}
        for run in runs:
            for site in run.sites:
                self.readers.setdefault(site.read, []).append(site)
        # Inner sums are not made; who reads the form of one reads the trunk's.
        self.absorbed = {node: site.chain[0] for run in runs for site in run.sites for node in site.absorbed}
        self.current: fx.Node | None = None

    def write(self) -> Rewrite:
        arriving = {run.trunk.source: run for run in self.runs if run.arrives}
        entering = {run.sites[0].read: run for run in self.runs if not run.arrives}
        for node in self.captured.graph.nodes:
            self.current = node
            if node.op == "output":
                self._output(node)
            elif node in arriving:
                # Where sites have their own n, what comes in is as many streams as the carrier before had.
                self._widen(node, arriving[node], self.graph.node_copy(node), "trunk", self.n)
            elif node in self.site_at:
                self._post(*self.site_at[node])
            elif node in self.lift_at:
                run, lift = self.lift_at[node]
                lifted = lifting.write(self.graph, lift, self.wide[lift.trunk], self._reader(node), run.channel_dim)
                self._widen(node, run, lifted, "trunk", self.numbers[lift.trunk])
            elif node not in self.absorbed and not node.meta.get("guard") and not _is_result(node):
                self.plain[node] = self.graph.node_copy(node, self._reader(node))
            if node in entering and node not in self.wide:
                run = entering[node]
                n = self.n or 1  # one stream stands for as many equal ones as the first site has
                expanded = self.graph.call_function(streams.expand, (self.plain[node], n, run.channel_dim))
                self._widen(node, run, expanded, "expand", n)
        self.graph.eliminate_dead_code(is_impure_node=has_effects)
        self.graph.lint()
        log.debug(
            "expand_streams %s: %d sites, %d operations lifted, nodes %d -> %d",
            self.captured.module or "model", len(self.site_at), len(self.lift_at),
            len(self.captured.graph.nodes), len(self.graph.nodes),
        )  # fmt: skip
        outgoing = tuple(run.stream for run in self.runs if run.leaves or run.ends)
        return Rewrite(self.graph, outgoing, frozenset(run.stream for run in self.runs if run.ends))

    def _widen(self, node: fx.Node, run: _Run, wide: fx.Node, role: str, n: int | None) -> None:
        """Notes the streams of a trunk node and makes what the sites that read it need."""
        self._mark(wide, role, run, node, n)
        self.wide[node], self.run_of[node], self.numbers[node] = wide, run, n
        for site in self.readers.get(node, []):
            target = self.targets[site.key]
            if target.path is None:
                self.inputs[site.add] = self._mean(node)
                continue
            module = self.graph.get_attr(target.path)
            self._resize(node, run, target.n or self.n)
            pre = self._mark(self.graph.call_method("pre", (module, self.wide[node])), "pre", None, site.add)
            self.inputs[site.add] = self.graph.call_function(operator.getitem, (pre, 0))
            self.inputs[site.add].meta.update(shape=node.meta["shape"], dtype=node.meta["dtype"])
            self.mixes[site.add] = self.graph.call_function(operator.getitem, (pre, 1))

    def _post(self, run: _Run, site: FoundSite) -> None:
        reader = self._reader(site.add)
        branch: fx.Node | None = None
        for term, factor in site.branches:
            value = reader(term)
            value = value if factor == 1 else self.graph.call_function(operator.mul, (value, factor))
            branch = value if branch is None else self.graph.call_function(operator.add, (branch, value))
        target, trunk = self.targets[site.key], site.chain[0]
        n = self.numbers[trunk] if target.path is None else target.n or self.n
        state = self.wide[trunk]
        if site.scale != 1:
            state = self.graph.call_function(operator.mul, (state, site.scale))
        if target.path is None:
            wide = self.graph.call_function(streams.plain_add, (state, branch, run.channel_dim))
        else:
            mix = self.mixes[site.add]
            if trunk.meta["shape"] != site.read.meta["shape"]:
                mix = self.graph.call_function(streams.in_layout_of, (mix, state, run.channel_dim))
            wide = self.graph.call_method("post", (self.graph.get_attr(target.path), state, branch, mix))
        if site is run.sites[-1] and not run.leaves:
            self._mark(wide, "post", run, site.add, n)
            end = self.graph.call_function(streams.collapse, (wide, run.channel_dim, self.collapse))
            self.plain[site.add] = self._mark(end, "collapse", None, site.add)
        else:
            self._widen(site.add, run, wide, "post", n)

    def _resize(self, node: fx.Node, run: _Run, n: int | None) -> None:
        """Makes the streams of a trunk node as many as a site has that reads them; from here on they are so many."""
        if self.numbers[node] not in (1, n):  # one stream stands for any number of equal ones
            sized = self.graph.call_function(streams.resized, (self.wide[node], n, run.channel_dim))
            self.wide[node], self.numbers[node] = self._mark(sized, "resize", run, node, n), n

    def _reader(self, consumer: fx.Node) -> Any:
        """How `consumer` reads nodes of the old graph."""

        def read(node: fx.Node) -> fx.Node:
            node = self.absorbed.get(node, node)
            for site in self.readers.get(node, []):
                if consumer in site.region or (consumer is site.add and any(node is b for b, _ in site.branches)):
                    return self.inputs[site.add]
            if node not in self.wide:
                return self.plain[node]
            if reads_form(consumer):
                return self.graph.call_function(streams.one_stream, (self.wide[node], self.run_of[node].channel_dim))
            return self.plain[node] if node in self.plain else self._mean(node)

        return read

    def _mean(self, node: fx.Node) -> fx.Node:
        if node not in self.means:
            mean = self.graph.call_function(streams.read_mean, (self.wide[node], self.run_of[node].channel_dim))
            self.means[node] = self._mark(mean, "", None, node)
        return self.means[node]

    def _output(self, node: fx.Node) -> None:
        outgoing = [run for run in self.runs if run.leaves or run.ends]
        sinks = {run: run.trunk.after[-1].node if run.trunk.after else run.sites[-1].add for run in outgoing}
        reader = self._reader(node)

        def read(source: fx.Node) -> fx.Node:
            wide = any(run.leaves and source is sink for run, sink in sinks.items())
            return self.wide[source] if wide else reader(source)

        def rebuild(source: fx.Node) -> fx.Node:
            if not _is_result(source):
                return read(source)
            args, kwargs = fx.node.map_arg((source.args, source.kwargs), rebuild)
            kind: Any = source.target
            return self.graph.call_function(kind, args, kwargs)

        result = fx.node.map_arg(node.args[0], rebuild)
        self.graph.output((result, tuple(read(sinks[run]) for run in outgoing)))

    def _mark(self, new: fx.Node, role: str, run: _Run | None, old: fx.Node, n: int | None = None) -> fx.Node:
        new.meta.update(role=role, source=old.meta.get("source"), dtype=old.meta.get("dtype"))
        shape = old.meta.get("shape")
        if run is not None and shape is not None and n is not None:
            at = len(shape) - 1 if run.channel_dim == -1 else 1
            new.meta["shape"] = (*shape[:at], n, *shape[at:])
        elif role in ("collapse", ""):
            new.meta["shape"] = shape
        else:
            new.meta.pop("shape", None)
        return new


def _is_result(node: fx.Node) -> bool:
    """Whether a node does nothing but put together what the graph returns."""
    return is_structure(node) and all(user.op == "output" or _is_result(user) for user in node.users)

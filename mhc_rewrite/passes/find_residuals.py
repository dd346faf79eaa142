"""Finds the residual adds in a captured forward, and the trunks that they form.

A site is an add `s + b` where the trunk `s`, perhaps behind operations that act per token, is an ancestor of the branch
`b`, both have the same shape, and the branch mixes features on the way. Nothing here changes a graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import fx, nn

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.graph import ModuleGraph, is_structure
from mhc_rewrite.passes import feature_axis, lifting, recurrence
from mhc_rewrite.passes.feature_axis import Votes
from mhc_rewrite.passes.find_carriers import DISCRETE, STAGE
from mhc_rewrite.passes.lifting import Lift
from mhc_rewrite.passes.lineage import ancestors, block_of, is_linear, lineage, mixes, operands, reads_form
from mhc_rewrite.passes.lineage import region as region_of
from mhc_rewrite.passes.same_site import Known, SiteKey, make_keys, matched
from mhc_rewrite.plans import Rejection


@dataclass(eq=False)
class FoundSite:
    """A residual add in one graph.

    Attributes:
        add: the node of the (last) sum.
        chain: the trunk's nodes from the add's operand back to where it comes from, latest first.
        lifts: how each node of `chain` but the last follows from the next.
        read: the node of `chain` that the branch reads.
        branches: the terms besides the trunk, each with its factor.
        scale: the trunk's own factor, `torch.add(f(x), x, alpha=scale)`.
        region: what is computed from `read` on the way to the branches.
        channel_dim: the axis that the branch mixes, -1 or 1.
        key: what names this add in every capture of the same forward.
        absorbed: inner sums that became part of this one.
        place: the add's number among the graph's nodes.
        votes: what shows which axis carries the features.
    """

    add: fx.Node
    chain: list[fx.Node]
    lifts: list[Lift]
    read: fx.Node
    branches: list[tuple[fx.Node, float | int]]
    scale: float | int
    region: set[fx.Node]
    channel_dim: int = -1
    key: SiteKey = field(default_factory=SiteKey)
    absorbed: set[fx.Node] = field(default_factory=set)
    place: int = 0
    votes: Votes = field(default_factory=Votes)

    @property
    def is_difference(self) -> bool:
        return min(self.scale, *(factor for _, factor in self.branches)) < 0


@dataclass(eq=False)
class Trunk:
    """Consecutive sites of one graph.

    Attributes:
        sites: in order.
        before: lifts from `source` to the first site's read, in execution order.
        source: the placeholder that the trunk comes in by, or None.
        after: lifts from the last add to the output, in execution order.
        sinks: positions among the output's leaves at which the trunk goes out.
        sources: all placeholders that the trunk may come in by: terms of a sum before the first site.
    """

    sites: list[FoundSite]
    before: list[Lift] = field(default_factory=list)
    source: fx.Node | None = None
    sources: tuple[fx.Node, ...] = ()
    after: list[Lift] = field(default_factory=list)
    sinks: tuple[int, ...] = ()


@dataclass(eq=False)
class Residuals:
    """All that was found in one graph. `refused`: adds that looked like sites, with rule and reason."""

    trunks: list[Trunk]
    rejections: list[Rejection]
    refused: dict[SiteKey, tuple[str, str]] = field(default_factory=dict)

    def sites(self) -> list[FoundSite]:
        """All sites, in execution order."""
        return sorted((site for trunk in self.trunks for site in trunk.sites), key=lambda site: site.place)


def find_residuals(
    captured: ModuleGraph, carrier: nn.Module, known: Mapping[SiteKey, Known] | None = None
) -> Residuals:
    """The trunks of a captured forward, in execution order, and the adds that are none, each with its reason.

    Args:
        captured: the forward.
        carrier: its module.
        known: what earlier captures of the same forward showed, and what was decided about it since.
    """
    barred: dict[fx.Node, tuple[str, str]] = {}
    refused: dict[SiteKey, tuple[str, str]] = {}
    while True:  # an add that turns out to be none changes what the others are
        finder = _Finder(captured, carrier, known or {}, barred, refused)
        finder.find_sites()
        further = finder.settle()
        trunks, forks = finder.trunks() if not further else ([], further)
        if not forks:
            return Residuals(trunks, finder.rejections, refused)
        barred |= forks
        refused |= {finder.sites[add].key: why for add, why in further.items()}


class _Finder:
    def __init__(
        self, captured: ModuleGraph, carrier: nn.Module, known: Mapping[SiteKey, Known],
        barred: Mapping[fx.Node, tuple[str, str]], refused: Mapping[SiteKey, tuple[str, str]],
    ) -> None:  # fmt: skip
        # Without some of its steps, a recurrence may look like something else: all at its place are steps.
        self.recurrent = {_place(key) for key, (rule, _) in refused.items() if rule == recurrence.RULE}
        self.captured, self.carrier, self.known, self.barred = captured, carrier, known, barred
        self.nodes = list(captured.graph.nodes)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self.sites: dict[fx.Node, FoundSite] = {}
        self.rejections: list[Rejection] = []
        self.lift_cache: dict[fx.Node, list[Lift]] = {}
        self.above_cache: dict[fx.Node, set[fx.Node]] = {}

    # -- sites -------------------------------------------------------------------------------------------------------

    def find_sites(self) -> None:
        for node in self.nodes:
            if node.op in ("call_function", "call_method") and vocabulary.name_of(node.target) in vocabulary.ADD:
                terms = _terms(node)
                if terms is not None and node in self.barred:
                    self._reject(node, *self.barred[node])
                elif terms is not None:
                    self._consider(node, *terms)
        self.parameters = feature_axis.parameters(self.nodes, self.carrier)
        for site in self.sites.values():
            site.place = self.order[site.add]
            site.votes = feature_axis.votes(site.read, self._in_order(site.region), site.lifts, self.parameters)
        for site, key in make_keys(self._groups(), self.carrier, self.parameters).items():
            site.key = key
        for site, key in matched(sorted(self.sites.values(), key=lambda site: site.place), self.known).items():
            site.key = key

    def settle(self) -> dict[fx.Node, tuple[str, str]]:
        """Gives the sites of each trunk one axis; returns the adds that can't be sites on it, with rule and reason."""
        barred: dict[fx.Node, tuple[str, str]] = {}
        for group in self._groups():
            steps = self._steps(group)
            barred |= {site.add: (recurrence.RULE, recurrence.REASON) for site in steps}
            skips = {site.add for site in group if self._is_inner_skip(site)}
            barred |= {add: ("inner-skip", "a skip inside a block, scaled feature by feature") for add in skips}
            group = [site for site in group if site.add not in barred]
            decided = [self.known[site.key] for site in group if site.key in self.known]
            decided = [known for known in decided if known.refused is None]
            axis = decided[0].channel_dim if decided else feature_axis.elected(sum((s.votes for s in group), Votes()))
            for site in group:
                known = self.known.get(site.key)
                failure = (known and known.refused) or self._on_axis(site, -1 if axis is None else axis)
                if failure is not None:
                    barred[site.add] = failure
        return barred

    def _groups(self) -> list[list[FoundSite]]:
        """Sites that follow one another on a trunk."""
        group_of: dict[fx.Node, list[FoundSite]] = {}
        for site in sorted(self.sites.values(), key=lambda site: site.place):
            group = group_of.get(site.chain[-1], [])
            group.append(site)
            group_of[site.add] = group
        return list({id(group): group for group in group_of.values()}.values())

    def _steps(self, group: list[FoundSite]) -> list[FoundSite]:
        """The sites that are steps of a recurrence over time."""
        reading = recurrence.reading_of_graph(self.order, self.parameters)
        places: dict[SiteKey, list[FoundSite]] = {}
        for site in group:
            places.setdefault(_place(site.key), []).append(site)
        steps = [site for place in self.recurrent for site in places.pop(place, [])]
        for sites in places.values():
            turns = [reading.turn(operands(site.add), site.chain[-1]) for site in sites] if len(sites) > 1 else []
            if recurrence.is_recurrence(turns):
                steps += sites
        return steps

    def _is_inner_skip(self, site: FoundSite) -> bool:
        """As `y + D * x` in the branch of another site, the direct path of a state space's input to its output."""
        gates = {gate for lift in site.lifts[: site.chain.index(site.read)] for gate in lift.operands}
        scaled = any(gate in self.parameters and max(gate.meta["shape"], default=1) > 1 for gate in gates)
        return scaled and any(site.add in other.region for other in self.sites.values() if other is not site)

    def _on_axis(self, site: FoundSite, axis: int) -> tuple[str, str] | None:
        """Puts a site on the axis, or says why it can't be there."""
        rank = len(site.read.meta["shape"])
        if axis not in (1, -1):
            return "axis", f"the branch mixes axis {axis} of {rank}; streams need the last one or axis 1"
        site.channel_dim = axis if rank > 2 else -1
        at = site.chain.index(site.read)
        if not all(site.channel_dim in lift.channel_dims for lift in site.lifts[:at]):
            return "not-per-token", "an operation between the branch's read and the add does not act per token"
        moved = next((lift for lift in site.lifts[:at] if not lift.in_order), None)
        if moved is not None:
            what = vocabulary.name_of(moved.node.target)
            return "moved-tokens", f"{what!r} between the branch's read and the add moves tokens or leaves some out"
        usable = next((i for i, lift in enumerate(site.lifts) if site.channel_dim not in lift.channel_dims), None)
        if usable is not None:
            site.lifts, site.chain = site.lifts[:usable], site.chain[: usable + 1]
        return None

    def _in_order(self, nodes: set[fx.Node]) -> list[fx.Node]:
        return sorted(nodes, key=self.order.__getitem__)

    def _consider(self, add: fx.Node, left: tuple[fx.Node, float], right: tuple[fx.Node, float]) -> None:
        if left[0].meta["shape"] != right[0].meta["shape"]:
            shapes = left[0].meta["shape"], right[0].meta["shape"]
            self._reject(add, "broadcast", f"the operands' shapes differ, {shapes[0]} and {shapes[1]}")
            return
        near: tuple[str, str] | None = None
        for (trunk, scale), (branch, factor) in ((left, right), (right, left)):
            for lifts in self._likely_chains(trunk):
                found = self._site(add, trunk, lifts, branch, scale, factor)
                if isinstance(found, FoundSite):
                    if self._drop_inner_differences(found):
                        return self._consider(add, left, right)  # its branch goes further back now
                    self.sites[add] = found
                    return
                near = near or found
            if self._merge(add, trunk, branch, scale, factor):
                return
        if any(self._is_modulated(node) for node, _ in (left, right)):
            near = "modulation", "an operand is scaled by what is computed from it: a gate, and no residual stream"
        self._reject(add, *(near or ("no-ancestor", "neither operand is computed from the other's trunk")))

    def _site(
        self, add: fx.Node, trunk: fx.Node, lifts: list[Lift], branch: fx.Node, scale: float, factor: float
    ) -> FoundSite | tuple[str, str] | None:
        """The site, or the rule and reason for which it is none; None where nothing hints at one."""
        chain = [trunk, *(lift.trunk for lift in lifts)]
        above = lineage(branch, self.sites)
        if branch in chain:
            return None
        reads = [
            node for node in chain
            if any(user in above for user in node.users if user not in chain and not reads_form(user))
        ]  # fmt: skip
        if not reads:
            return None
        read = reads[0]
        region = region_of(read, above, set(chain))
        if self._sites_between(branch, read) >= STAGE:
            return "long-skip", "the skip closes over a whole stage of residual adds"
        if not any(mixes(node) or node in self.sites for node in region):
            return "no-mixing", "no operation between trunk and add mixes features: an activation or a rotation"
        features = region_of(read, lineage(branch, self.sites, of_features=True), set(chain))
        if not any(mixes(node) or node in self.sites for node in features):
            return DISCRETE
        if all(node in self.sites or is_linear(node) for node in region):
            return "long-skip", "two states of one trunk are added, without a block between"
        if min(scale, factor) < 0 and not self._learns(region):
            return "filter", "a difference to what has no parameters: a filter, such as x - avg_pool(x), not a block"
        if len(reads) > 1:
            return "two-reads", f"the branch reads the trunk at two points, {reads[0].name!r} and {reads[1].name!r}"
        if add.meta.get("inplace") and (alias := self._alias(add, chain)) is not None:
            return "alias", f"the add is in place and {alias.name!r} reads the same memory afterwards"
        region = block_of(branch, read, set(chain), self.sites)
        return FoundSite(add, chain, lifts, read, [(branch, factor)], scale, region)

    def _merge(self, add: fx.Node, trunk: fx.Node, branch: fx.Node, scale: float, factor: float) -> bool:
        """`(x + a(x)) + b(x)` is one site with two branches: the inner sum is read by nobody but the outer."""
        inner = self.sites.get(trunk)
        if inner is None or scale != 1 or any(user is not add and not reads_form(user) for user in trunk.users):
            return False
        region = region_of(inner.read, lineage(branch, self.sites), set(inner.chain))
        if not any(mixes(node) or node in self.sites for node in region):
            return False
        if all(node in self.sites or is_linear(node) for node in region):
            return False
        del self.sites[trunk]
        branches = [*inner.branches, (branch, factor)]
        self.sites[add] = FoundSite(add, inner.chain, inner.lifts, inner.read, branches, inner.scale,
                                    inner.region | block_of(branch, inner.read, set(inner.chain), self.sites),
                                    absorbed=inner.absorbed | {trunk})  # fmt: skip
        return True

    def _likely_chains(self, node: fx.Node) -> list[list[Lift]]:
        """The ways back: first those that go on from an earlier site, from the latest; of a sum of states one is it."""

        def end(lifts: list[Lift]) -> int:
            start = lifts[-1].trunk if lifts else node
            return self.order[start] if start in self.sites else -1

        return sorted(self._chains(node), key=end, reverse=True)

    def _chains(self, node: fx.Node, operands: tuple[fx.Node, ...] = ()) -> Iterator[list[Lift]]:
        """The ways back from `node` along the trunk, longest first, each up to and with an earlier add."""
        if node not in self.sites:
            for lift in self._lifts(node):
                gates = (*operands, *lift.operands)
                if any(lift.trunk is gate or lift.trunk in self._above(gate) for gate in gates):
                    continue  # a gate that depends on the trunk: that is modulation, not a residual
                for further in self._chains(lift.trunk, gates):
                    yield [lift, *further]
        yield []

    def _is_modulated(self, node: fx.Node) -> bool:
        lifts = self._lifts(node) if vocabulary.name_of(node.target) in vocabulary.SCALING else []
        return any(lift.trunk in self._above(gate) for lift in lifts for gate in lift.operands)

    def _above(self, node: fx.Node) -> set[fx.Node]:
        """Its ancestors; a gate is asked for them on every way back."""
        if node not in self.above_cache:
            self.above_cache[node] = ancestors(node)
        return self.above_cache[node]

    def _lifts(self, node: fx.Node) -> list[Lift]:
        if node not in self.lift_cache:
            lifts = lifting.carried(node, self.carrier)
            # Streams have memory of their own: what is in place on the trunk may not be read by another name.
            seen = bool(lifts) and node.meta.get("inplace") and self._alias(node, node.all_input_nodes) is not None
            self.lift_cache[node] = [] if seen else lifts
        return self.lift_cache[node]

    def _sites_between(self, branch: fx.Node, read: fx.Node) -> int:
        """How many sites lie on the lineage from `read` to `branch`."""
        count, node = 0, branch
        while True:
            ends = [[node, *(lift.trunk for lift in lifts)] for lifts in self._chains(node)]
            if any(read in chain for chain in ends):
                return count
            earlier = next((chain[-1] for chain in ends if chain[-1] in self.sites), None)
            if earlier is None or self.order[earlier] < self.order[read]:
                return 0
            count += 1
            node = self.sites[earlier].chain[0]
            if node is read:
                return count

    def _alias(self, add: fx.Node, chain: list[fx.Node]) -> fx.Node | None:
        """A later reader of the memory that an in-place add wrote to, by another name than the sum's."""
        storage = add.meta.get("storage")
        for node in self.nodes[: self.order[add]]:
            if node.meta.get("storage") == storage and node not in chain:
                for user in node.users:
                    if self.order[user] > self.order[add] and not reads_form(user):
                        return user
        return None

    def _learns(self, region: set[fx.Node]) -> bool:
        """Whether parameters take part in what a branch computes."""
        for node in region:
            module = self.carrier.get_submodule(str(node.target)) if node.op == "call_module" else None
            if module is not None and next(module.parameters(), None) is not None:
                return True
            if any(source.op == "get_attr" for source in node.all_input_nodes) or node.meta.get("on_object"):
                return True
        return False

    def _drop_inner_differences(self, site: FoundSite) -> bool:
        """`x + g(x - f(x))` is one site: a difference inside of a branch does not take the trunk from it."""
        inner = [
            self.sites.pop(node) for node in list(site.region)
            if node in self.sites and self.sites[node].is_difference and site.read in self.sites[node].chain
        ]  # fmt: skip
        for other in inner:
            self._reject(other.add, "fork", "a difference inside of the branch of another residual add on its trunk")
        return bool(inner)

    def _reject(self, add: fx.Node, rule: str, reason: str) -> None:
        holder = ".".join(filter(None, (self.captured.module, add.meta.get("holder", ""))))
        self.rejections.append(Rejection(holder, add.meta.get("source"), rule, reason))

    # -- trunks ------------------------------------------------------------------------------------------------------

    def trunks(self) -> tuple[list[Trunk], dict[fx.Node, tuple[str, str]]]:
        """The trunks, and the adds that go on from where another trunk does, with rule and reason."""
        ordered = sorted(self.sites.values(), key=lambda site: self.order[site.add])
        trunk_of: dict[fx.Node, Trunk] = {}
        trunks: list[Trunk] = []
        forks: dict[fx.Node, tuple[str, str]] = {}
        claimed: set[fx.Node] = set()
        for site in ordered:
            previous = trunk_of.get(site.chain[-1])
            if previous is not None and (
                previous.sites[-1].add is not site.chain[-1] or previous.sites[-1].channel_dim != site.channel_dim
            ):
                previous = None
            whole = True  # or a part of it, on its own
            if previous is not None and self._in_a_block(site):
                previous, whole = None, False
                self._cut(site)
            on_trunk = site.chain[: site.chain.index(site.read) + 1] if previous is None else site.chain[:-1]
            if not claimed.isdisjoint(on_trunk) and previous is not None and site.read not in claimed:
                previous, whole, on_trunk = None, False, site.chain[: site.chain.index(site.read) + 1]
                self._cut(site)
            if not claimed.isdisjoint(on_trunk):
                forks[site.add] = "fork", "another residual add continues the same trunk"
                continue
            claimed.update(on_trunk, [site.add])
            if previous is None:
                if whole:
                    self._note_end(site)
                previous = Trunk([])
                trunks.append(previous)
            previous.sites.append(site)
            trunk_of[site.add] = previous
        taken: set[fx.Node] = set()
        leaves = output_leaves(self.captured.graph)
        for trunk in trunks:
            self._find_source(trunk, taken)
            self._find_sinks(trunk, leaves)
        return trunks, forks

    def _in_a_block(self, site: FoundSite) -> bool:
        """As `h + g(h)` in `x + (h + g(h))` with `h = norm(x)`: what goes on is x, and the skip begins in its block."""
        others = (other for other in self.sites.values() if other.chain[-1] is site.chain[-1])
        return any(site.read in other.region and site.add in other.region for other in others)

    @staticmethod
    def _cut(site: FoundSite) -> None:
        """Lets a site's trunk begin where its branch reads."""
        at = site.chain.index(site.read)
        site.chain, site.lifts = site.chain[: at + 1], site.lifts[:at]

    def _note_end(self, site: FoundSite) -> None:
        """Says why the stream of an earlier site ends here, where an operation that mixes nothing comes between."""
        node = site.chain[-1]
        sources = [source for source in node.all_input_nodes if "shape" in source.meta]
        if node in self.sites or mixes(node) or reads_form(node):
            return
        if any(chain[-1] in self.sites for source in sources for chain in self._ways_back(source)):
            what = vocabulary.name_of(node.target) if node.op != "call_module" else str(node.target)
            reason = f"{what!r} stands on the trunk and does not act on every stream alone; the stream ends there"
            self._reject(node, "trunk-operation", reason)

    def _ways_back(self, node: fx.Node) -> Iterator[list[fx.Node]]:
        for lifts in self._chains(node):
            yield [node, *(lift.trunk for lift in lifts)]

    def _find_source(self, trunk: Trunk, taken: set[fx.Node]) -> None:
        first = trunk.sites[0]
        at = first.chain.index(first.read)
        nested = any(
            any(node in site.region for node in first.chain[at:]) or first.add in site.region
            for site in self.sites.values() if site is not first
        )  # fmt: skip
        if nested or first.chain[-1] in self.sites:
            return
        ways: dict[fx.Node, list[Lift]] = {}
        for lifts in self._chains(first.read):
            start = lifts[-1].trunk if lifts else first.read
            if start.op == "placeholder" and "leaf" in start.meta and start not in taken:
                if all(first.channel_dim in lift.channel_dims for lift in lifts):
                    ways.setdefault(start, lifts)
        trunk.sources = tuple(ways)
        if ways:
            known = self.known.get(first.key)
            asked = [start for start in ways if known is not None and start.meta["leaf"] == known.source]
            trunk.source = [*asked, *ways][0]
            trunk.before = ways[trunk.source][::-1]
            taken.add(trunk.source)

    def _find_sinks(self, trunk: Trunk, leaves: list[object]) -> None:
        """Follows the trunk behind its last add to the output, if it gets there by lifted operations alone."""
        channel_dim = trunk.sites[-1].channel_dim
        todo: list[tuple[fx.Node, list[Lift]]] = [(trunk.sites[-1].add, [])]
        while todo:
            node, lifts = todo.pop(0)
            if positions := tuple(i for i, leaf in enumerate(leaves) if leaf is node):
                trunk.sinks, trunk.after = positions, lifts
                return
            for user in node.users:
                for lift in self._lifts(user):
                    if lift.trunk is node and channel_dim in lift.channel_dims and user not in self.sites:
                        todo.append((user, [*lifts, lift]))


def output_leaves(graph: fx.Graph) -> list[object]:
    """What a graph returns, flat, in the order of the returned structure's leaves. A dataclass counts as structure."""
    leaves: list[object] = []

    def visit(value: object) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, fx.Node) and is_structure(value):
            visit((*value.args, *value.kwargs.values()))
        elif value is not None:
            leaves.append(value)

    visit(graph.output_node().args[0])
    return leaves


def _place(key: SiteKey) -> SiteKey:
    """A key without what tells the turns of a loop apart."""
    return replace(key, parts=frozenset(), occurrence=0)


def _terms(node: fx.Node) -> tuple[tuple[fx.Node, float], tuple[fx.Node, float]] | None:
    """The two tensors of an add, each with its factor; None where it adds no two floating tensors."""
    operands = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    alpha = node.kwargs.get("alpha", 1)
    if len(operands) != 2 or not all(isinstance(item, fx.Node) and "shape" in item.meta for item in operands):
        return None
    left, right = operands
    floating = all(item.meta["dtype"].is_floating_point or item.meta["dtype"].is_complex for item in operands)  # type: ignore[union-attr]
    if left is right or not floating or not isinstance(alpha, (int, float)):
        return None
    return (left, 1), (right, alpha)  # type: ignore[return-value]

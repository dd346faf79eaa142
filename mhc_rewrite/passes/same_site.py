"""Which add of one capture is which of another: a forward that is captured again, in another mode or for another call,
has the same sites.

An add is named by where it stands, the whole way of Python calls down to it, and by the parameters in its branch. Where
another capture has it on another line, or with another module in its branch, it is told by what is the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import fx, nn

from mhc_rewrite.capture.record import Frame

if TYPE_CHECKING:
    from mhc_rewrite.passes.find_residuals import FoundSite


@dataclass(frozen=True)
class SiteKey:
    """What names an add in every capture of the same forward.

    Attributes:
        holder: the module whose forward holds it, relative to the carrier.
        home: the innermost module whose call has the whole branch in it.
        frames: the Python frames from the home's forward to the add, outermost first.
        parts: the parameters in its branch, relative to the carrier.
        occurrence: how many like it came before in one call of the home: turns of a loop that share their parameters.
    """

    holder: str = ""
    home: str = ""
    frames: tuple[Frame, ...] = ()
    parts: frozenset[str] = frozenset()
    occurrence: int = 0


@dataclass(frozen=True)
class Known:
    """What is settled about a site of earlier captures.

    Attributes:
        channel_dim: its trunk's axis.
        refused: rule and reason, where it was found to be none after all.
        source: the leaf of the call by which its trunk comes in, where it might be another.
    """

    channel_dim: int
    refused: tuple[str, str] | None = None
    source: str | None = None


def make_keys(
    groups: Sequence[Sequence[FoundSite]], carrier: nn.Module, parameters: set[Hashable]
) -> dict[FoundSite, SiteKey]:
    """The keys of sites; a group are those that follow one another on a trunk, in execution order.

    A module that is called again with trunk and branch in it has the same sites again, and so has a whole trunk that
    the same code runs again, for the next step of a sequence say. Turns of a loop on one trunk, and calls of a module
    that does nothing but the add, are other sites.
    """
    keys: dict[FoundSite, SiteKey] = {}
    seen: Counter[tuple[int, SiteKey]] = Counter()
    trunks: dict[tuple[tuple[int, SiteKey], ...], list[SiteKey]] = {}
    for group in groups:
        bare = tuple(_bare_key(site, carrier, parameters) for site in group)
        if bare not in trunks:
            trunks[bare] = []
            for began, key in bare:
                trunks[bare].append(replace(key, occurrence=seen[began, key]))
                seen[began, key] += 1
        keys.update(zip(group, trunks[bare], strict=True))
    return keys


def _bare_key(site: FoundSite, carrier: nn.Module, parameters: set[Hashable]) -> tuple[int, SiteKey]:
    """When its home's call began, and the key but for the occurrence."""
    calls = site.add.meta["calls"]
    began = min((node.meta["serial"] for node in site.region if "serial" in node.meta), default=0)
    level = max(i for i, call in enumerate(calls) if call.serial <= began or i == 0)
    frames = tuple(frame for call in calls[level:] for frame in call.frames)
    parts = _parts(site.region, carrier, parameters)
    return calls[level].serial, SiteKey(site.add.meta.get("holder", ""), calls[level].module, frames, parts)


def _parts(region: set[fx.Node], carrier: nn.Module, parameters: set[Hashable]) -> frozenset[str]:
    names: set[str] = set()
    todo = list(region)
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "get_attr":
            names.add(str(node.target))
        if node.op == "call_module":
            child = carrier.get_submodule(str(node.target))
            names.update(f"{node.target}.{name}" for name, _ in child.named_parameters())
        further = [source for source in node.all_input_nodes if source in parameters and source not in seen]
        seen.update(further)
        todo += further
    return frozenset(names)


def matched(sites: Sequence[FoundSite], known: Mapping[SiteKey, Known]) -> dict[FoundSite, SiteKey]:
    """The sites that are known by another key, with that key. Both in execution order.

    A site that is not known as it is may be one whose branch has the same parameters, one at the same place whose
    branch shares some, or, without parameters, one between the same neighbours.
    """
    new: dict[SiteKey, list[FoundSite]] = defaultdict(list)  # a module that is called again has its sites again
    for site in sites:
        new[site.key].append(site)
    same = {key: key for key in new if key in known}
    places = {key: i for i, key in enumerate(known)}

    def pair(alike: Callable[[SiteKey, SiteKey], bool], all_or_none: bool = False) -> None:
        """Pairs what is left between neighbours that are paired, in order."""
        left: list[SiteKey] = []
        after = -1
        for key in [*new, None]:
            if key is not None and key not in same:
                left.append(key)
                continue
            until = len(known) if key is None else places[same[key]]
            taken = set(same.values())
            free = [other for other in list(known)[after + 1 : until] if other not in taken]
            if all_or_none:
                left, free = ([key for key in keys if not key.parts] for keys in (left, free))
                left = left if len(left) == len(free) else []
            for mine in left:
                found = next((other for other in free if alike(mine, other)), None)
                if found is not None:
                    same[mine] = found
                    free = free[free.index(found) + 1 :]
            left, after = [], until

    pair(lambda a, b: bool(a.parts) and a.parts == b.parts)
    pair(lambda a, b: a.frames == b.frames and bool(a.parts & b.parts))
    pair(lambda a, b: a.holder == b.holder and not a.parts and not b.parts, all_or_none=True)
    return {site: same[key] for key in new if key in same for site in new[key] if key != same[key]}


def learned(
    known: Mapping[SiteKey, Known], sites: Sequence[FoundSite], refused: Mapping[SiteKey, tuple[str, str]]
) -> dict[SiteKey, Known]:
    """What is known after a further capture; a new site stands behind the one before it there."""
    keys = list(known)
    before: SiteKey | None = None
    for site in sites:
        if site.key not in keys:
            keys.insert(keys.index(before) + 1 if before is not None else 0, site.key)
        before = site.key
    found = {site.key: Known(site.channel_dim) for site in sites}
    found |= {key: Known(-1, why) for key, why in refused.items()}
    return {key: known.get(key) or found[key] for key in dict.fromkeys((*keys, *refused))}

"""What was found in both modes as one: names of sites, streams that both agree on, and what each carrier is to do."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from mhc_rewrite.capture.record import ModuleCall, Recording
from mhc_rewrite.conversion.captures import Captures
from mhc_rewrite.passes.expand_streams import SiteTarget
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals
from mhc_rewrite.passes.lineage import mixes
from mhc_rewrite.passes.link_streams import Ending, LinkedStream, SiteRef, site_ref
from mhc_rewrite.passes.same_site import Known, SiteKey
from mhc_rewrite.plans import Rejection, ResidualSite, ResidualStream, SourceLine

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class CarrierWiring:
    """What installing needs to know of one carrier.

    Attributes:
        inlined: names of the modules captured as part of it.
        targets: adds to rewrite, by key.
        known: what is settled about all residual adds that the example showed, by key.
        entries: leaf path -> (rank of the trunk, stream number).
        leaves: stream number -> for each call in one run of the scope, whether the stream goes on afterwards.
    """

    inlined: set[str] = field(default_factory=set)
    targets: dict[SiteKey, SiteTarget] = field(default_factory=dict)
    known: dict[SiteKey, Known] = field(default_factory=dict)
    entries: dict[str, tuple[int, int]] = field(default_factory=dict)
    leaves: dict[int, list[bool]] = field(default_factory=dict)


@dataclass
class Mode:
    """One run of the model, in training or evaluation mode."""

    training: bool
    recording: Recording
    chosen: list[ModuleCall]
    rejected: list[Rejection]  # by the recording alone
    calls: list[tuple[ModuleCall, Residuals]]
    streams: list[LinkedStream]
    rejections: list[Rejection]
    endings: list[Ending]


def name_sites(model: nn.Module, modes: list[Mode]) -> dict[SiteRef, ResidualSite]:
    """All sites by reference, in execution order; `mhc_<k>` counts within the module that holds the add."""
    sites: dict[SiteRef, ResidualSite] = {}
    counts: dict[str, int] = defaultdict(int)
    for mode in modes:
        for call, residuals in mode.calls:
            for site in residuals.sites():
                ref = site_ref(call, site)
                if ref not in sites:
                    name = ".".join(filter(None, (ref.holder, f"mhc_{counts[ref.holder]}")))
                    counts[ref.holder] += 1
                    sites[ref] = _describe(name, ref, site)
    return sites


def _describe(name: str, ref: SiteRef, site: FoundSite) -> ResidualSite:
    mixing = [node for node in site.add.graph.nodes if node in site.region and mixes(node)]
    shape = site.read.meta["shape"]
    return ResidualSite(
        name=name, holder=ref.holder, carrier=ref.carrier,
        branch=str(mixing[0].target) if mixing[0].op == "call_module" else mixing[0].name,
        width=shape[site.channel_dim], channel_dim=site.channel_dim, dtype=str(_trunk_dtype(site)),
        source=site.add.meta.get("source") or SourceLine("", 0, ""),
    )  # fmt: skip


def _trunk_dtype(site: FoundSite) -> torch.dtype:
    """The sum's dtype, which the streams have; what the branch reads where that can't be one."""
    read: torch.dtype = site.read.meta["dtype"]
    return site.add.meta["dtype"] if read in DTYPES else read


def agreed_chains(modes: list[Mode]) -> list[tuple[tuple[SiteRef, ...], LinkedStream]]:
    """The streams of evaluation mode, cut wherever training mode shows another way.

    A layer that ran in one mode only (LayerDrop) cuts nothing; one that ran in training only has its place too.
    """
    first, *others = modes
    chains = []
    for stream in first.streams:
        refs = list(stream.refs)
        for mode in others:
            for other in mode.streams:
                refs = _with_missing(refs, other.refs, known={ref for s in first.streams for ref in s.refs})
        homes = [{ref: number for number, s in enumerate(mode.streams) for ref in s.refs} for mode in others]
        part = refs[:1]
        for before, ref in pairwise(refs):
            if any(home.get(before, -1) != home.get(ref, -1) for home in homes if before in home and ref in home):
                chains.append((tuple(part), stream))
                part = []
            part.append(ref)
        chains.append((tuple(part), stream))
    return chains


def _with_missing(refs: list[SiteRef], other: tuple[SiteRef, ...], known: set[SiteRef]) -> list[SiteRef]:
    """`refs` with the sites of the same stream that only the other mode ran, each behind the one before it there."""
    if set(refs).isdisjoint(other):
        return refs
    merged = list(refs)
    for before, ref in pairwise(other):
        if ref not in known and ref not in merged and before in merged:
            merged.insert(len(merged) - merged[::-1].index(before), ref)
    return merged


def wire(
    modes: list[Mode],
    streams: list[ResidualStream],
    kept: list[tuple[SiteRef, ...]],
    repeated: list[set[str]],
    captures: Captures,
) -> dict[str, CarrierWiring]:
    carriers: dict[str, CarrierWiring] = {}
    for number, (stream, refs) in enumerate(zip(streams, kept, strict=True)):
        for site, ref in zip(stream.sites, refs, strict=True):
            if ref.carrier not in carriers:
                known = captures.known_of(ref.carrier)
                carriers[ref.carrier] = CarrierWiring(captures.inlined[ref.carrier], known=known)
            wiring = carriers[ref.carrier]
            path = None if site.excluded else site.name[len(ref.carrier) :].lstrip(".")
            wiring.targets[ref.key] = SiteTarget(path, number, site.n_streams)
    for call, residuals in (pair for mode in modes for pair in mode.calls if pair[0].name in carriers):
        for trunk in residuals.trunks:
            target = carriers[call.name].targets.get(trunk.sites[0].key)
            if target is not None and trunk.source is not None:
                entry = len(trunk.source.meta["shape"]), target.stream
                carriers[call.name].entries[trunk.source.meta["leaf"]] = entry
    for number, (refs, again) in enumerate(zip(kept, repeated, strict=True)):
        calls: list[tuple[str, int]] = []
        for position, ref in enumerate(refs):
            # A carrier that comes again is called again: its first site marks the new call.
            new = not calls or calls[-1][0] != ref.carrier
            if new or (ref.carrier in again and ref in refs[calls[-1][1] : position]):
                calls.append((ref.carrier, position))
        for index, (carrier, _) in enumerate(calls):
            carriers[carrier].leaves.setdefault(number, []).append(index < len(calls) - 1)
    return carriers

"""From a model and an example to a plan: record, choose carriers, capture, find, link, name, filter.

Nothing here changes the model.
"""

from __future__ import annotations

import contextlib
import difflib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mhc_rewrite.capture.call import flatten
from mhc_rewrite.capture.example import further_calls
from mhc_rewrite.capture.record import ModuleCall, Recording, record
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.conversion.captures import CallKind, Captures
from mhc_rewrite.errors import CaptureError, ConfigError, ExampleInputsError, NoResidualError, UnsupportedModelError
from mhc_rewrite.passes.expand_streams import SiteTarget
from mhc_rewrite.passes.find_carriers import find_carriers, too_short
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals, SiteKey, mixes
from mhc_rewrite.passes.link_streams import Ending, LinkedStream, SiteRef, link_streams, site_ref
from mhc_rewrite.plans import Rejection, ResidualSite, ResidualStream, RewritePlan, SourceLine

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class CarrierWiring:
    """What installing needs to know of one carrier.

    Attributes:
        inlined: names of the modules captured as part of it.
        targets: adds to rewrite, by key.
        known: all residual adds that the example showed, by key.
        entries: leaf path -> (rank of the trunk, stream number, whether it may come in as streams).
        leaves: stream number -> for each call in one run of the scope, whether the stream goes on afterwards.
    """

    inlined: set[str] = field(default_factory=set)
    targets: dict[SiteKey, SiteTarget] = field(default_factory=dict)
    known: set[SiteKey] = field(default_factory=set)
    entries: dict[str, tuple[int, int, bool]] = field(default_factory=dict)
    leaves: dict[int, list[bool]] = field(default_factory=dict)


@dataclass
class Analysis:
    """A plan, and what carrying it out needs.

    Attributes:
        plan: the plan.
        carriers: wiring by carrier name.
        captures: the captured forwards, by kind of call.
        readers: stream number -> modules that read the mean of its trunk.
        may_end_early: streams whose last layers may be skipped.
        results: what the model returned on the example, per mode.
    """

    plan: RewritePlan
    carriers: dict[str, CarrierWiring]
    captures: Captures
    readers: dict[int, set[str]]
    may_end_early: set[int]
    results: dict[bool, Any]


@dataclass
class _Mode:
    """One run of the model, in training or evaluation mode."""

    training: bool
    recording: Recording
    calls: list[tuple[ModuleCall, Residuals]]
    streams: list[LinkedStream]
    rejections: list[Rejection]
    endings: list[Ending]
    result: Any


def analyse(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: MHCConfig,
    filter_fn: Callable[[ResidualSite], bool] | None,
) -> Analysis:
    """Runs the model on the example in both modes and plans the conversion.

    Raises:
        ExampleInputsError: the model does not take the example.
        CaptureError: a module with residual adds can't be captured.
        NoResidualError: nothing to convert.
        ConfigError: a pattern matches nothing.
        UnsupportedModelError: a trunk whose dtype has no streams.
    """
    notes: list[str] = []
    runs = [_run(model, args, kwargs, training=False)]
    try:
        runs.append(_run(model, args, kwargs, training=True))
    except ExampleInputsError as error:
        why = str(error.__cause__).splitlines()[0]
        notes.append(f"The example can't be run in training mode ({why}); that variant is captured at its first call.")
    captures, modes = _capture_and_link(model, args, kwargs, config, runs)
    rejections = list(dict.fromkeys(r for mode in modes for r in mode.rejections))
    sites = _name_sites(model, modes)
    _check_patterns(config, sites.values(), modes)
    chains = _agreed_chains(modes)
    streams: list[ResidualStream] = []
    kept: list[tuple[SiteRef, ...]] = []
    repeated: list[set[str]] = []
    readers: dict[int, set[str]] = {}
    may_end_early: set[int] = set()
    for chain, linked in chains:
        chosen = [replace(sites[ref], excluded=not _wanted(sites[ref], config, filter_fn)) for ref in chain]
        included = [i for i, site in enumerate(chosen) if not site.excluded]
        distinct = {chosen[i].name for i in included}
        if len(included) < config.min_sites:
            rejections.append(_too_short(chosen, len(distinct), config))
            continue
        part = slice(included[0], included[-1] + 1)
        outside = [*chosen[: part.start], *chosen[part.stop :]]
        rejections += [Rejection(s.holder, s.source, "excluded", "excluded, at the end of a stream") for s in outside]
        number = len(streams)
        kept.append(chain[part])
        called = [segment.call.name for segment in linked.segments]
        repeated.append({name for name in called if called.count(name) > 1})
        streams.append(_stream(tuple(chosen[part]), linked))
        readers[number] = linked.readers
        if linked.may_end_early and chain[part] == linked.refs:
            may_end_early.add(number)
    # The recording and a graph may both have seen an add: one reason a line.
    once = {(r.source, r.rule) if r.source else r: r for r in reversed(rejections)}
    plan = RewritePlan(type(model).__name__, config, tuple(streams), tuple(reversed(once.values())), tuple(notes))
    if not streams:
        raise NoResidualError(_nothing_found(model, plan, sites.values()))
    _check_dtypes(plan)
    for more_args, more_kwargs in further_calls(model, args, kwargs):
        for mode in modes:
            # What the model does not take is no call that a user makes; a user's own of that kind is captured then.
            with contextlib.suppress(Exception):
                captures.collect(more_args, more_kwargs, mode.training)
    wiring = _wire(modes, streams, kept, repeated, captures.inlined)
    return Analysis(plan, wiring, captures, readers, may_end_early, {mode.training: mode.result for mode in modes})


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> tuple[Recording, Any]:
    with undisturbed(model):
        model.train(training)
        try:
            return record(model, args, kwargs)
        except Exception as error:
            given = ", ".join([type(a).__name__ for a in args] + [f"{k}={type(v).__name__}" for k, v in kwargs.items()])
            raise ExampleInputsError(
                f"{type(model).__name__} can't be called with the example inputs ({given}): "
                f"{type(error).__name__}: {error}. Pass example_inputs as a dict of keyword arguments, or a tuple of "
                f"positional ones, that {type(model).__name__}.forward accepts."
            ) from error


def _capture_and_link(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    config: MHCConfig,
    runs: list[tuple[Recording, Any]],
) -> tuple[Captures, list[_Mode]]:
    """Captures the carriers and links their streams; a parent whose own code reads a trunk is captured with them."""
    parents: frozenset[str] = frozenset()
    while True:
        chosen = [find_carriers(recording, config.min_sites, parents) for recording, _ in runs]
        inlined: dict[str, set[str]] = {}
        for (recording, _), (carriers, _) in zip(runs, chosen, strict=True):
            for carrier in carriers:
                inlined.setdefault(recording.calls[carrier.call].name, set()).update(carrier.inlined)
        captures = Captures(model, inlined)
        modes = []
        for training, (recording, result), (carriers, rejected) in zip((False, True), runs, chosen, strict=False):
            captures.collect(args, kwargs, training)
            calls = [recording.calls[carrier.call] for carrier in carriers]
            modes.append(_link(recording, calls, captures, rejected, config, training, result))
        further = frozenset(ending.parent for mode in modes for ending in mode.endings) - parents
        if not further or not _can_capture(captures, args, kwargs, further, inlined, modes):
            return captures, modes
        parents |= further


def _can_capture(
    captures: Captures, args: tuple[Any, ...], kwargs: dict[str, Any], parents: frozenset[str],
    inlined: dict[str, set[str]], modes: list[_Mode],
) -> bool:  # fmt: skip
    """Whether the parents' forwards can be captured with all carriers in them. If not, streams end there."""
    trial = Captures(captures.model, {
        parent: {
            part for name, parts in inlined.items() if _inside(name, parent) for part in (*_path(parent, name), *parts)
        }
        for parent in parents
    })  # fmt: skip
    for mode in modes:
        trial.collect(args, kwargs, mode.training)
    return not any(isinstance(captured, CaptureError) for captured in trial.by_kind.values())


def _inside(name: str, parent: str) -> bool:
    return parent == "" or name.startswith(parent + ".")


def _path(parent: str, name: str) -> list[str]:
    """The modules from below `parent` down to `name`, `name` with them."""
    parts = name[len(parent) :].lstrip(".").split(".")
    prefix = parent + "." if parent else ""
    return [prefix + ".".join(parts[: i + 1]) for i in range(len(parts))]


def _link(
    recording: Recording, chosen: list[ModuleCall], captures: Captures, rejections: list[Rejection], config: MHCConfig,
    training: bool, result: Any,
) -> _Mode:  # fmt: skip
    calls = []
    for call in chosen:
        captured = captures.by_kind[CallKind(call.name, training, flatten(call.bound)[0])]
        if isinstance(captured, CaptureError):
            if not _matches_module(call.name, config.exclude):
                raise captured
            rejections.append(Rejection(call.name, None, "excluded", f"excluded, and it can't be captured: {captured}"))
            continue
        calls.append((call, captured[1]))
    found = {id(residuals): residuals for _, residuals in calls}  # layers that are alike share one
    streams, endings = link_streams(recording, calls)
    rejected = [*rejections, *(r for residuals in found.values() for r in residuals.rejections)]
    rejected += [ending.rejection for ending in endings]
    return _Mode(training, recording, calls, streams, rejected, endings, result)


# -- naming and choosing ---------------------------------------------------------------------------------------------


def _name_sites(model: nn.Module, modes: list[_Mode]) -> dict[SiteRef, ResidualSite]:
    """All sites by reference, in execution order; `mhc_<k>` counts within the module that holds the add."""
    sites: dict[SiteRef, ResidualSite] = {}
    counts: dict[str, int] = defaultdict(int)
    for mode in modes:
        for call, residuals in mode.calls:
            for site in sorted(
                (site for trunk in residuals.trunks for site in trunk.sites), key=lambda site: site.place
            ):
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
        source=site.add.meta.get("source") or SourceLine(ref.file, ref.line, ""),
    )  # fmt: skip


def _trunk_dtype(site: FoundSite) -> torch.dtype:
    """The sum's dtype, which the streams have; what the branch reads where that can't be one."""
    read: torch.dtype = site.read.meta["dtype"]
    return site.add.meta["dtype"] if read in _DTYPES else read


def _agreed_chains(modes: list[_Mode]) -> list[tuple[tuple[SiteRef, ...], LinkedStream]]:
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


def _matches_module(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) or name.startswith(pattern + ".") for pattern in patterns)


def _matches(site: ResidualSite, patterns: tuple[str, ...]) -> bool:
    return any(_matches_module(name, patterns) for name in (site.name, site.holder, site.carrier))


def _wanted(site: ResidualSite, config: MHCConfig, filter_fn: Callable[[ResidualSite], bool] | None) -> bool:
    included = not config.include or _matches(site, config.include)
    return included and not _matches(site, config.exclude) and (filter_fn is None or bool(filter_fn(site)))


def _check_patterns(config: MHCConfig, sites: Any, modes: list[_Mode]) -> None:
    sites = list(sites)
    modules = {call.name for mode in modes for call in mode.recording.calls}
    for option in ("include", "exclude"):
        for pattern in getattr(config, option):
            uncaptured = option == "exclude" and any(_matches_module(name, (pattern,)) for name in modules)
            if not any(_matches(site, (pattern,)) for site in sites) and not uncaptured:
                names = [name for site in sites for name in (site.name, site.holder)]
                near = difflib.get_close_matches(pattern, dict.fromkeys(names), 3, 0.4) or names[:3]
                raise ConfigError(f"{option}={pattern!r} matches no site. Near: {', '.join(map(repr, near))}.")


def _too_short(sites: list[ResidualSite], count: int, config: MHCConfig) -> Rejection:
    first = next((site for site in sites if not site.excluded), sites[0])
    if count == 0:
        return Rejection(first.holder, first.source, "excluded", "every site of this stream was excluded")
    return Rejection(first.holder, first.source, *too_short(count, config.min_sites))


def _stream(sites: tuple[ResidualSite, ...], linked: LinkedStream) -> ResidualStream:
    lifted: list[str] = []
    for before, segment in zip((None, *linked.segments), linked.segments, strict=False):
        name = segment.call.name or "model"
        first, *rest = segment.trunk.sites
        if before is not None:
            lifted += [f"{before.call.name or 'model'}: {lift.node.name}" for lift in before.trunk.after]
            lifted += [f"{name}: {lift.node.name}" for lift in segment.trunk.before]
        for stretch in (first.lifts[: first.chain.index(first.read)], *(site.lifts for site in rest)):
            lifted += [f"{name}: {lift.node.name}" for lift in reversed(stretch)]
    return ResidualStream(sites, sites[0].carrier, sites[-1].carrier, linked.scope, tuple(dict.fromkeys(lifted)))


def _check_dtypes(plan: RewritePlan) -> None:
    supported = {str(dtype) for dtype in _DTYPES}
    for site in plan.sites:
        if site.dtype not in supported:
            raise UnsupportedModelError(
                f"The trunk at {site.name!r} ({site.source}) is {site.dtype}; streams can be "
                f"{', '.join(sorted(supported))}. Convert the model to one of these first."
            )


def _nothing_found(model: nn.Module, plan: RewritePlan, sites: Any) -> str:
    sites = list(sites)
    misses = "".join(
        f"\n  {r.module or 'the model'}: {r.source or ''} {r.rule}: {r.reason}" for r in plan.rejections[:6]
    )
    if any(r.rule == "excluded" for r in plan.rejections):
        kind = type(model).__name__
        return f"include, exclude and filter_fn leave no residual stream of {kind}: all {len(sites)} sites are out."
    what = (
        "has no residual stream" if not sites else f"has no residual stream of at least {plan.config.min_sites} sites"
    )
    return f"{type(model).__name__} {what}." + (
        f" The nearest misses:{misses}" if misses else " It has no residual adds."
    )


# -- wiring ----------------------------------------------------------------------------------------------------------


def _wire(
    modes: list[_Mode],
    streams: list[ResidualStream],
    kept: list[tuple[SiteRef, ...]],
    repeated: list[set[str]],
    inlined: dict[str, set[str]],
) -> dict[str, CarrierWiring]:
    carriers: dict[str, CarrierWiring] = {}
    for number, (stream, refs) in enumerate(zip(streams, kept, strict=True)):
        for site, ref in zip(stream.sites, refs, strict=True):
            wiring = carriers.setdefault(ref.carrier, CarrierWiring(inlined[ref.carrier]))
            path = None if site.excluded else site.name[len(ref.carrier) :].lstrip(".")
            holder = ref.holder[len(ref.carrier) :].lstrip(".")
            wiring.targets[holder, ref.file, ref.line, ref.occurrence] = SiteTarget(path, number)
    # A carrier that only ever begins a stream never gets one: an axis more is a mistake there.
    opening = {refs[0].carrier for refs in kept} - {
        ref.carrier
        for refs in kept
        for before, ref in pairwise(refs)
        if before.carrier != ref.carrier or ref == refs[0]
    }
    for call, residuals in (pair for mode in modes for pair in mode.calls if pair[0].name in carriers):
        for trunk in residuals.trunks:
            carriers[call.name].known.update(site.key for site in trunk.sites)
            target = carriers[call.name].targets.get(trunk.sites[0].key)
            if target is not None and trunk.source is not None:
                entry = (len(trunk.source.meta["shape"]), target.stream, call.name not in opening)
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

"""From a model and an example to a plan: record, choose carriers, capture, find, link, name, filter.

Nothing here changes the model.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mhc_rewrite.capture.examples import further_calls
from mhc_rewrite.capture.record import ModuleCall, Recording, record
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.conversion.captures import CallKind, Captures
from mhc_rewrite.conversion.naming import DTYPES, CarrierWiring, Mode, agreed_chains, name_sites, wire
from mhc_rewrite.conversion.patterns import check_patterns, matches_module, streams_at, wanted
from mhc_rewrite.errors import (
    CaptureError,
    ExampleInputsError,
    MHCError,
    NoResidualError,
    UnsupportedModelError,
)
from mhc_rewrite.passes.find_carriers import find_carriers, too_short
from mhc_rewrite.passes.lifting import Lift
from mhc_rewrite.passes.link_streams import (
    LinkedStream,
    SiteRef,
    decided_axes,
    decided_shared,
    decided_sources,
    link_streams,
    reads_of,
)
from mhc_rewrite.passes.same_site import Known, SiteKey
from mhc_rewrite.plans import Rejection, ResidualSite, ResidualStream, RewritePlan, TrunkOperation
from mhc_rewrite.torch_private import has_hooks

# How many modules an error proposes to exclude.
_MANY = 8

# How many misses the error for a model without streams tells, and the rules that say of an add that it is nothing like.
_TOLD, _FAR = 6, ("broadcast", "no-mixing", "no-ancestor")


@dataclass
class Analysis:
    """A plan, and what carrying it out needs.

    Attributes:
        plan: the plan.
        carriers: wiring by carrier name.
        captures: the captured forwards, by kind of call.
    """

    plan: RewritePlan
    carriers: dict[str, CarrierWiring]
    captures: Captures


def unheard(model: nn.Module, carriers: dict[str, CarrierWiring]) -> str | None:
    """The forward hooks that do not run since their module is captured as a part of another, as a sentence."""
    for name, wiring in carriers.items():
        hooked = next((part for part in sorted(wiring.inlined) if has_hooks(model.get_submodule(part))), None)
        if hooked is not None:
            out = f" Leave these residual adds out, with exclude=({name!r},)." if name and len(carriers) > 1 else ""
            return (
                f"Forward hooks on {hooked!r} do not run: it is captured as a part of {name or 'the model'!r}, whose "
                f"own forward adds to the same residual stream. What they collect stays empty, hidden states say.{out}"
            )
    return None


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
    try:
        return _planned(model, args, kwargs, config, filter_fn, runs, notes)
    except CaptureError as error:
        out = _way_out(error, lambda names: _planned(
            model, args, kwargs, replace(config, exclude=(*config.exclude, *names)), filter_fn, runs, notes
        ))  # fmt: skip
        if not out:
            raise
        raise CaptureError(f"{error} Or leave out what can't be captured, with exclude={out}.", error.module) from error


def _way_out(error: CaptureError, planned: Callable[[tuple[str, ...]], Analysis]) -> tuple[str, ...]:
    """The modules to exclude so that a plan has sites; () where that does not help, or takes more than a few."""
    names: tuple[str, ...] = ()
    while error.module and error.module not in names and len(names) < _MANY:
        names = (*names, error.module)
        try:
            planned(names)
        except CaptureError as further:
            error = further
        except MHCError:
            return ()
        else:
            return names
    return ()


def _planned(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], config: MHCConfig,
    filter_fn: Callable[[ResidualSite], bool] | None, runs: list[Recording], notes: list[str],
) -> Analysis:  # fmt: skip
    """The analysis of recorded runs."""
    captures, modes = _capture_and_link(model, args, kwargs, config, runs)
    rejections = list(dict.fromkeys(r for mode in modes for r in mode.rejections))
    sites = name_sites(model, modes)
    check_patterns(config, list(sites.values()), {call.name for mode in modes for call in mode.recording.calls})
    chains = agreed_chains(modes)
    streams: list[ResidualStream] = []
    kept: list[tuple[SiteRef, ...]] = []
    repeated: list[set[str]] = []
    found: list[LinkedStream] = []
    for chain, linked in chains:
        chosen = [replace(sites[ref], excluded=not wanted(sites[ref], config, filter_fn)) for ref in chain]
        included = [i for i, site in enumerate(chosen) if not site.excluded]
        distinct = {chosen[i].name for i in included}
        if len(included) < config.min_sites:
            rejections.append(_too_short(chosen, len(distinct), config))
            continue
        part = slice(included[0], included[-1] + 1)
        chosen[part] = [replace(site, n_streams=streams_at(site, config)) for site in chosen[part]]
        outside = [*chosen[: part.start], *chosen[part.stop :]]
        rejections += [Rejection(s.holder, s.source, "excluded", "excluded, at the end of a stream") for s in outside]
        kept.append(chain[part])
        called = [segment.call.name for segment in linked.segments]
        repeated.append({name for name in called if called.count(name) > 1})
        streams.append(_stream(tuple(chosen[part]), chain[part], linked))
        found.append(linked)
    if not streams and not rejections:
        rejections = [Rejection(call.name, None, *_OUT_OF_SIGHT) for call in modes[0].chosen[:1]]
    reads = reads_of(modes[0].recording, found)
    streams = [replace(stream, reads=others) for stream, others in zip(streams, reads, strict=True)]
    # The recording and a graph may both have seen an add: one reason a line.
    once = {(r.source, r.rule) if r.source else r: r for r in reversed(rejections)}
    plan = RewritePlan(type(model).__name__, config, tuple(streams), tuple(reversed(once.values())), tuple(notes))
    if not streams:
        raise NoResidualError(_nothing_found(model, plan, sites.values()))
    _check_dtypes(plan)
    for more_args, more_kwargs in further_calls(model, args, kwargs):
        for mode in modes:
            with contextlib.suppress(Exception):  # this model is not called so, or not on this device
                captures.collect(more_args, more_kwargs, mode.training)
    wiring = wire(modes, streams, kept, repeated, captures)
    return Analysis(plan, wiring, captures)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Recording:
    with undisturbed(model):
        model.train(training)
        try:
            return record(model, args, kwargs)[0]
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
    runs: list[Recording],
) -> tuple[Captures, list[Mode]]:
    """Captures the carriers and links their streams; a parent whose own code changes a trunk is captured with them.

    Where a forward can't be captured, the carriers inside it are, without the adds whose blocks run through it.
    """
    parents: frozenset[str] = frozenset()
    barred: dict[str, str] = {}
    while True:
        chosen = [find_carriers(recording, config.min_sites, parents, barred) for recording in runs]
        names = [
            {recording.calls[carrier.call].name for carrier in carriers}
            for recording, (carriers, _) in zip(runs, chosen, strict=True)
        ]
        # What holds the adds in one mode is captured in the other too, or they could not be told to be the same.
        outer = {a for a in set().union(*names) for b in set().union(*names) if a != b and _inside(b, a)} - parents
        if outer:
            parents |= outer
            continue
        inlined: dict[str, set[str]] = {}
        for recording, (carriers, _) in zip(runs, chosen, strict=True):
            for carrier in carriers:
                inlined.setdefault(recording.calls[carrier.call].name, set()).update(carrier.inlined)
        captures = Captures(model, inlined)
        modes = []
        try:
            for training, recording, (carriers, rejected) in zip((False, True), runs, chosen, strict=False):
                captures.collect(args, kwargs, training)
                calls = [recording.calls[carrier.call] for carrier in carriers]
                modes.append(_link(recording, calls, captures, rejected, config, training))
        except CaptureError as error:
            without = {**barred, error.module: str(error)}
            inside = [find_carriers(recording, config.min_sites, parents, without)[0] for recording in runs]
            if not any(
                recording.calls[carrier.call].name.startswith(error.module + "." if error.module else "")
                for recording, carriers in zip(runs, inside, strict=True) for carrier in carriers
            ) or error.module in parents or error.module in barred:  # fmt: skip
                raise
            barred = without
            continue
        modes = _settle(modes, captures, config)
        further = frozenset(ending.parent for mode in modes for ending in mode.endings) - parents
        if not further or not _can_capture(captures, args, kwargs, further, inlined, modes):
            return captures, modes
        parents |= further


def _settle(modes: list[Mode], captures: Captures, config: MHCConfig) -> list[Mode]:
    """Decides what one forward alone does not show: the axis of a stream, and by which argument it comes in."""
    settled: set[tuple[SiteRef, str]] = set()
    while True:
        decided: dict[str, dict[SiteKey, Known]] = defaultdict(dict)
        now: set[tuple[SiteRef, str]] = set()
        for mode in modes:
            for ref, change in (
                *decided_shared(mode.streams), *decided_sources(mode.streams),
                *decided_axes(mode.streams, config.min_sites),
            ):  # fmt: skip
                kind = "source" if "source" in change else "axis"
                earlier = decided[ref.carrier].get(ref.key)
                known = replace(earlier or captures.known_of(ref.carrier)[ref.key], **change)
                if (ref, kind) in settled or ((ref, kind) in now and known != earlier):
                    if kind == "source":
                        continue
                    known = replace(known, refused=("axis", "its streams do not agree on the axis of features"))
                decided[ref.carrier][ref.key] = known
                now.add((ref, kind))
        if not any(decided.values()):
            return modes
        settled |= now
        captures.settle(decided)
        modes = [_link(mode.recording, mode.chosen, captures, mode.rejected, config, mode.training) for mode in modes]


def _can_capture(
    captures: Captures, args: tuple[Any, ...], kwargs: dict[str, Any], parents: frozenset[str],
    inlined: dict[str, set[str]], modes: list[Mode],
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
    training: bool,
) -> Mode:  # fmt: skip
    calls = []
    rejected = list(rejections)
    for call in chosen:
        captured = captures.by_kind[CallKind(call.name, training, call.key)]
        if call.inside:
            captured = CaptureError(
                f"{call.name!r} ({type(call.module).__name__}) is called inside {call.inside}, a "
                "torch.autograd.Function with a backward of its own, which knows nothing of streams. That of a "
                "reversible network computes what came into a layer from what left it, which several do not allow.",
                call.name,
            )
        if isinstance(captured, CaptureError):
            if not matches_module(call.name, config.exclude):
                raise captured
            rejected.append(Rejection(call.name, None, "excluded", f"excluded, and it can't be captured: {captured}"))
            continue
        calls.append((call, captured[1]))
    found = {id(residuals): residuals for _, residuals in calls}  # layers that are alike share one
    streams, endings = link_streams(recording, calls)
    rejected += [r for residuals in found.values() for r in residuals.rejections]
    rejected += [ending.rejection for ending in endings]
    return Mode(training, recording, chosen, rejections, calls, streams, rejected, endings)


# -- naming and choosing ---------------------------------------------------------------------------------------------


def _too_short(sites: list[ResidualSite], count: int, config: MHCConfig) -> Rejection:
    first = next((site for site in sites if not site.excluded), sites[0])
    if count == 0:
        return Rejection(first.holder, first.source, "excluded", "every site of this stream was excluded")
    return Rejection(first.holder, first.source, *too_short(count, config.min_sites))


def _stream(sites: tuple[ResidualSite, ...], chain: tuple[SiteRef, ...], linked: LinkedStream) -> ResidualStream:
    """A stream of the plan; `chain` are its sites as references, of which `linked` may hold more at its ends."""
    lifts: list[tuple[str, Lift, int, bool]] = []
    at = 0
    for before, segment in zip((None, *linked.segments), linked.segments, strict=False):
        name = segment.call.name or "model"
        if before is not None:
            lifts += [(before.call.name or "model", lift, at, False) for lift in before.trunk.after]
            lifts += [(name, lift, at, False) for lift in segment.trunk.before]
        for ref, site in zip(segment.refs, segment.trunk.sites, strict=True):
            read = site.chain.index(site.read)
            earlier = [] if site is segment.trunk.sites[0] else site.lifts[read:]
            lifts += [(name, lift, at, False) for lift in reversed(earlier)]
            lifts += [(name, lift, at, True) for lift in reversed(site.lifts[:read])]
            at = chain.index(ref, at) + 1 if ref in chain[at:] else at
    lifted = {f"{name}: {lift.node.name}": lift.linear for name, lift, *_ in lifts}
    nonlinear = tuple(text for text, linear in lifted.items() if not linear)
    operations = tuple(
        TrunkOperation(f"{name}: {lift.node.name}", site, beside)
        for name, lift, site, beside in lifts if site < len(sites) and (site or beside)
    )  # fmt: skip
    entry, end = sites[0].carrier, sites[-1].carrier
    return ResidualStream(sites, entry, end, linked.scope, tuple(lifted), nonlinear, operations)


def _check_dtypes(plan: RewritePlan) -> None:
    supported = {str(dtype) for dtype in DTYPES}
    for site in plan.sites:
        if site.dtype not in supported:
            raise UnsupportedModelError(
                f"The trunk at {site.name!r} ({site.source}) is {site.dtype}; streams can be "
                f"{', '.join(sorted(supported))}. Convert the model to one of these first."
            )


_OUT_OF_SIGHT = (
    "out-of-sight",
    "it adds to a trunk that comes in or goes out as an attribute of some object; only what a module is given and "
    "returns is followed: tensors, tuples, dicts",
)


def _nothing_found(model: nn.Module, plan: RewritePlan, sites: Any) -> str:
    sites = list(sites)
    nearest = sorted(plan.rejections, key=lambda r: r.rule in _FAR)
    misses = "".join(f"\n  {r.module or 'the model'}: {r.source or ''} {r.rule}: {r.reason}" for r in nearest[:_TOLD])
    if any(r.rule == "excluded" for r in plan.rejections):
        kind = type(model).__name__
        return f"include, exclude and filter_fn leave no residual stream of {kind}: all {len(sites)} sites are out."
    what = (
        "has no residual stream" if not sites else f"has no residual stream of at least {plan.config.min_sites} sites"
    )
    return f"{type(model).__name__} {what}." + (
        f" The nearest misses:{misses}" if misses else " It has no residual adds."
    )

"""Links trunks across modules: carrier after carrier, through code that is never traced.

What one carrier returns and another receives is the same tensor object; a recording of the run shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mhc_rewrite.capture.record import ModuleCall, Operation, Recording, innermost_common
from mhc_rewrite.passes.feature_axis import MIN_WIDTH, Votes, elected
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals, Trunk
from mhc_rewrite.passes.same_site import SiteKey
from mhc_rewrite.plans import Rejection


@dataclass(frozen=True)
class SiteRef:
    """A site by name of its carrier, and its key in there: the same in every mode."""

    carrier: str
    key: SiteKey

    @property
    def holder(self) -> str:
        """The module whose forward holds the add."""
        return ".".join(filter(None, (self.carrier, self.key.holder)))


@dataclass(eq=False)
class Segment:
    """One trunk in one call of a carrier."""

    call: ModuleCall
    trunk: Trunk
    refs: tuple[SiteRef, ...]
    came_in: int | None
    went_out: frozenset[int]
    might: dict[int, str] = field(default_factory=dict)  # what else might be its trunk, and the leaf that it comes by


@dataclass(eq=False)
class LinkedStream:
    """Segments that pass a trunk on, in execution order.

    Attributes:
        segments: at least one.
        scope: name of the innermost module whose call runs all of it.
    """

    segments: list[Segment]
    scope: str = ""

    @property
    def refs(self) -> tuple[SiteRef, ...]:
        """All site references in order; a carrier that is called again appears again."""
        return tuple(ref for segment in self.segments for ref in segment.refs)


@dataclass
class Ending:
    """A place where a stream ends that might have gone on: code of `parent` changes the trunk there."""

    parent: str
    rejection: Rejection


def link_streams(
    recording: Recording, found: list[tuple[ModuleCall, Residuals]]
) -> tuple[list[LinkedStream], list[Ending]]:
    """The streams of one run, each once, and the places where one ends that might have gone on."""
    segments = [_segment(call, trunk) for call, residuals in found for trunk in residuals.trunks]
    taker: dict[int, Segment] = {}
    for segment in segments:
        if segment.came_in is not None:
            taker.setdefault(segment.came_in, segment)
    streams, endings, linked = [], [], set()
    for segment in segments:
        if id(segment) in linked:
            continue
        stream = LinkedStream([segment])
        while (following := _next(stream.segments[-1], taker)) is not None and id(following) not in linked:
            stream.segments.append(following)
            linked.add(id(following))
        if id(segment) not in linked and (trouble := _lost_between(recording, segment, segments)) is not None:
            endings.append(trouble)
        stream.scope = _scope(recording, stream)
        streams.append(stream)
    return _each_once(streams), endings


def site_ref(call: ModuleCall, site: FoundSite) -> SiteRef:
    """What names a site across calls and modes."""
    return SiteRef(call.name, site.key)


def _segment(call: ModuleCall, trunk: Trunk) -> Segment:
    refs = tuple(site_ref(call, site) for site in trunk.sites)
    source = trunk.source.meta["leaf"] if trunk.source is not None else None
    out = frozenset(value for i in trunk.sinks if i < len(call.outputs) and (value := call.outputs[i]) is not None)
    others = [start.meta["leaf"] for start in trunk.sources if start is not trunk.source]
    might = {call.leaf_values[leaf]: leaf for leaf in others if leaf in call.leaf_values}
    return Segment(call, trunk, refs, call.leaf_values.get(source) if source else None, out, might)


def _next(segment: Segment, taker: dict[int, Segment]) -> Segment | None:
    for value in sorted(segment.went_out):
        following = taker.get(value)
        if following is not None and following.call.index > segment.call.index:
            return following
    return None


def _lost_between(recording: Recording, segment: Segment, segments: list[Segment]) -> Ending | None:
    """Code between two carriers, if the trunk of an earlier one comes to this one by operations that do not mix."""
    out = {value: other for other in segments for value in other.went_out if other.call.index < segment.call.index}
    todo = [] if segment.came_in is None else [segment.came_in]
    last: Operation | None = None
    seen = set(todo)
    while todo:
        value = todo.pop()
        if value in out and last is not None:
            calls = [out[value].call, segment.call]
            common = innermost_common([recording.ancestry(call.index)[:-1] for call in calls])
            where = recording.calls[last.call].name
            reason = (f"{last.name!r} in {where or 'the model'!r} stands on the trunk between {calls[0].name!r} and "
                      f"{calls[1].name!r}, in code that is not captured; the stream ends there")  # fmt: skip
            return Ending(recording.calls[common].name, Rejection(where, last.source, "operation-between", reason))
        operation = recording.producer.get(value)
        if operation is None or operation.mixing:
            continue
        last = operation
        for source in operation.inputs:
            if source not in seen and recording.shapes[source].numel() == recording.shapes[value].numel():
                seen.add(source)
                todo.append(source)
    return None


def _scope(recording: Recording, stream: LinkedStream) -> str:
    chains = [recording.ancestry(segment.call.index) for segment in stream.segments]
    if len(chains) > 1:
        chains = [chain[:-1] for chain in chains]
    return recording.calls[innermost_common(chains)].name


def reads_of(recording: Recording, streams: list[LinkedStream]) -> list[tuple[int, ...]]:
    """For each stream those before it whose results come to one of its carriers, without those that come by way of
    another of them: a decoder reads its encoder, the third stage of a pyramid the second.
    """
    reach: list[set[int]] = []  # values that depend on what the stream hands on at its end
    for stream in streams:
        values = set(stream.segments[-1].went_out)
        for operation in recording.operations:
            if not values.isdisjoint(operation.inputs):
                values.update(operation.outputs)
        reach.append(values)
    read = [
        {
            other for other in range(number)
            if any(not reach[other].isdisjoint(segment.call.leaf_values.values()) for segment in own.segments)
        }
        for number, own in enumerate(streams)
    ]  # fmt: skip
    return [tuple(sorted(others - {far for near in others for far in read[near]})) for others in read]


def _each_once(streams: list[LinkedStream]) -> list[LinkedStream]:
    """A stream that runs twice, say through an encoder that is called twice, is one stream."""
    seen: dict[tuple[SiteRef, ...], LinkedStream] = {}
    for stream in streams:
        seen.setdefault(stream.refs, stream)
    return list(seen.values())


def decided_sources(streams: list[LinkedStream]) -> Iterator[tuple[SiteRef, dict[str, Any]]]:
    """Segments whose trunk comes in by one argument while another stream ends in another one."""
    segments = [segment for stream in streams for segment in stream.segments]
    out = {value: segment for segment in segments for value in segment.went_out}
    for segment in segments:
        if segment.came_in in out:
            continue
        for value, leaf in segment.might.items():
            if value in out and out[value].call.index < segment.call.index:
                yield segment.refs[0], {"source": leaf}


def decided_shared(streams: list[LinkedStream]) -> Iterator[tuple[SiteRef, dict[str, Any]]]:
    """A site that one call runs on two trunks, of streams that are otherwise not alike, is of neither."""
    seen: dict[tuple[int, SiteRef], int] = {}
    for number, stream in enumerate(streams):
        for segment in stream.segments:
            for ref in segment.refs:
                if seen.setdefault((segment.call.index, ref), number) != number:
                    yield ref, {"refused": ("shared", "the same module adds to two trunks in one call")}


def decided_axes(streams: list[LinkedStream], min_sites: int) -> Iterator[tuple[SiteRef, dict[str, Any]]]:
    """All sites of a stream get one axis, by a vote of all of them; a stream without one is none."""
    for stream in streams:
        if len(stream.refs) < min_sites:
            continue
        sites = [(ref, site) for seg in stream.segments for ref, site in zip(seg.refs, seg.trunk.sites, strict=True)]
        votes = sum((site.votes for _, site in sites), Votes())
        axis = elected(votes)
        width = MIN_WIDTH if axis is None else sites[0][1].read.meta["shape"][axis]
        refused = None
        if axis is None and not any(strength for _, strength in votes):
            refused = "axis", "no parameter in the branches acts along one axis of it alone: coordinates, say"
        elif axis is None:
            refused = "axis", "as much shows that one axis carries the features as another"
        elif width < MIN_WIDTH:
            refused = "width", f"its axis of features has size {width}: coordinates, say, which are not to be projected"
        if refused or any(site.channel_dim != axis for _, site in sites):
            for ref, _ in sites:
                yield ref, {"channel_dim": -1 if axis is None else axis, "refused": refused}

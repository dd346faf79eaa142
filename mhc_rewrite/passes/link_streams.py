"""Links trunks across modules: carrier after carrier, through code that is never traced.

What one carrier returns and another receives is the same tensor object; a recording of the run shows it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from mhc_rewrite.capture.record import ModuleCall, Operation, Recording
from mhc_rewrite.model import Rejection
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals, Trunk

# Reads of a tensor's form that the extra axis of the streams does not change.
_HARMLESS = frozenset({"dtype", "device", "layout", "is_cuda", "requires_grad", "is_floating_point", "is_leaf",
                       "get_device", "is_complex"})  # fmt: skip


@dataclass(frozen=True)
class SiteRef:
    """A site by name of its carrier, holder (absolute), and place in the source: the same in every mode."""

    carrier: str
    holder: str
    file: str
    line: int
    occurrence: int


@dataclass(eq=False)
class Segment:
    """One trunk in one call of a carrier."""

    call: ModuleCall
    trunk: Trunk
    refs: tuple[SiteRef, ...]
    came_in: int | None
    went_out: frozenset[int]


@dataclass(eq=False)
class LinkedStream:
    """Segments that pass a trunk on, in execution order.

    Attributes:
        segments: at least one.
        scope: name of the innermost module whose call runs all of it.
        readers: modules that read the trunk between segments; they get the mean.
    """

    segments: list[Segment]
    scope: str = ""
    readers: set[str] = field(default_factory=set)

    @property
    def refs(self) -> tuple[SiteRef, ...]:
        """All site references in order; a carrier that is called again appears again."""
        return tuple(ref for segment in self.segments for ref in segment.refs)


def link_streams(
    recording: Recording, found: list[tuple[ModuleCall, Residuals]]
) -> tuple[list[LinkedStream], list[Rejection]]:
    """The streams of one run, each once, and the places where one ends that might have gone on."""
    segments = [_segment(call, trunk) for call, residuals in found for trunk in residuals.trunks]
    readers = defaultdict(list)
    for operation in recording.operations:
        for value in operation.inputs:
            readers[value].append(operation)
    taker: dict[int, Segment] = {}
    for segment in segments:
        if segment.came_in is not None:
            taker.setdefault(segment.came_in, segment)
    streams, rejections, linked = [], [], set()
    for segment in segments:
        if id(segment) in linked:
            continue
        stream = LinkedStream([segment])
        while (following := _next(stream.segments[-1], taker)) is not None and id(following) not in linked:
            last = stream.segments[-1]
            modules, trouble = _readers_between(recording, readers, last, following)
            if trouble is not None:
                rejections.append(trouble)
                break
            stream.readers |= modules
            stream.segments.append(following)
            linked.add(id(following))
        stream.scope = _scope(recording, stream)
        streams.append(stream)
    return _each_once(streams), rejections


def site_ref(call: ModuleCall, site: FoundSite) -> SiteRef:
    """What names a site across calls and modes."""
    return SiteRef(call.name, ".".join(filter(None, (call.name, site.key[0]))), *site.key[1:])


def _segment(call: ModuleCall, trunk: Trunk) -> Segment:
    refs = tuple(site_ref(call, site) for site in trunk.sites)
    source = trunk.source.meta["leaf"] if trunk.source is not None else None
    out = frozenset(value for i in trunk.sinks if i < len(call.outputs) and (value := call.outputs[i]) is not None)
    return Segment(call, trunk, refs, call.leaf_values.get(source) if source else None, out)


def _next(segment: Segment, taker: dict[int, Segment]) -> Segment | None:
    for value in sorted(segment.went_out):
        following = taker.get(value)
        if following is not None and following.call.index > segment.call.index:
            same_layout = following.trunk.sites[0].channel_dim == segment.trunk.sites[0].channel_dim
            return following if same_layout else None
    return None


def _readers_between(
    recording: Recording, readers: dict[int, list[Operation]], last: Segment, following: Segment
) -> tuple[set[str], Rejection | None]:
    """Modules that read the trunk between two segments, or why it can't stay n streams there."""
    modules: set[str] = set()
    common = _common([recording.ancestry(last.call.index)[:-1], recording.ancestry(following.call.index)[:-1]])
    assert following.came_in is not None
    for operation in readers[following.came_in]:
        inside = any(recording.within(operation.call, segment.call.index) for segment in (last, following))
        if inside or operation.name in _HARMLESS:
            continue
        module = _module_that_took(recording, operation, following.came_in, common)
        if module is None:
            source = operation.source
            where = recording.calls[operation.call].name
            return modules, Rejection(where, source, "read-between", f"{operation.name!r} in {where or 'the model'!r} reads "
                f"the trunk between {last.call.name!r} and {following.call.name!r}, in code that is not captured; the "
                "stream ends there")  # fmt: skip
        modules.add(module)
    return modules, None


def _module_that_took(recording: Recording, operation: Operation, value: int, common: int) -> str | None:
    """The outermost module below the common call that received the trunk as an argument and ran the operation."""
    for index in recording.ancestry(operation.call):
        call = recording.calls[index]
        if index > common and value in call.inputs.values() and call.name:
            return call.name
    return None


def _scope(recording: Recording, stream: LinkedStream) -> str:
    chains = [recording.ancestry(segment.call.index) for segment in stream.segments]
    if len(chains) > 1:
        chains = [chain[:-1] for chain in chains]
    return recording.calls[_common(chains)].name


def _common(chains: list[list[int]]) -> int:
    common = 0
    for depth in zip(*chains, strict=False):
        if len(set(depth)) > 1:
            break
        common = depth[0]
    return common


def _each_once(streams: list[LinkedStream]) -> list[LinkedStream]:
    """A stream that runs twice, say through an encoder that is called twice, is one stream."""
    seen: dict[tuple[SiteRef, ...], LinkedStream] = {}
    for stream in streams:
        known = seen.setdefault(stream.refs, stream)
        known.readers |= stream.readers
    return list(seen.values())


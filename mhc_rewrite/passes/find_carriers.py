"""Which modules' forwards must be captured: those in whose calls a trunk and its branch part and meet again.

Works on a recording of the whole run, so nothing has to be traceable here. It is generous: the exact rules are those
of find_residuals, on the graphs of the modules that this pass names.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.record import Operation, Recording, innermost_common
from mhc_rewrite.passes import recurrence
from mhc_rewrite.plans import Rejection

# A branch that runs through this many adds of the same lineage is a whole stage, and its add a long skip over it.
STAGE = 2
# Nearest first, so many values of one trunk are looked at; a recurrence over time goes back further.
_FAR = 500

DISCRETE = (
    "discrete",
    "what is added depends on the trunk by integers or conditions alone, as a quantizer's entry by its code",
)


@dataclass(eq=False)
class Carrier:
    """A module call whose forward is to be captured.

    Attributes:
        call: its number in the recording.
        inlined: modules between it and the adds; captured as part of it.
    """

    call: int
    inlined: set[str] = field(default_factory=set)


@dataclass
class _Candidate:
    operation: Operation
    trunk: int
    reach: set[int]  # values that the trunk side comes from without mixing
    fork: int  # the value at which trunk and branch part
    branch: int
    before: set[int]  # candidates that the trunk comes from


def find_carriers(
    recording: Recording, min_sites: int, parents: frozenset[str] = frozenset(), barred: Mapping[str, str] | None = None
) -> tuple[list[Carrier], list[Rejection]]:
    """The carriers, outermost only and in the order of their calls, and the adds that can't be sites.

    Modules named in `parents` are captured with all carriers inside them; those in `barred` can't be, for a reason.
    """
    candidates, rejections = _find_candidates(recording)
    for number in _recurrences(recording, candidates):
        rejections.append(_reject(recording, candidates.pop(number).operation, recurrence.RULE, recurrence.REASON))
    chains = _chains(candidates)
    carriers: dict[int, Carrier] = {}
    homes: list[tuple[int, int]] = []
    passing = {call.index: set(call.leaf_values.values()) & set(call.outputs) for call in recording.calls
               if len(call.outputs) > 1}  # fmt: skip
    for number, candidate in candidates.items():
        if len(chains[number]) < min_sites:
            rejections.append(_reject(recording, candidate.operation, *too_short(len(chains[number]), min_sites)))
            continue
        home = _home(recording, candidate)
        if barred and (why := barred.get(recording.calls[home].name)) is not None:
            rejections.append(_reject(recording, candidate.operation, "block-not-captured",
                f"its block runs through a forward that can't be captured: {why}"))  # fmt: skip
            continue
        # A block that hands its trunk on beside its result, to be added by the next block, hides it in a tuple.
        handing = [call for call, values in passing.items() if values & candidate.reach and call > home]
        homes += [(home, call) for call in (candidate.operation.call, *handing) if home in recording.ancestry(call)]
    outer = {home for home, _ in homes} | {call.index for call in recording.calls if call.name in parents}
    for home, holder in homes:
        top = next(call for call in recording.ancestry(home) if call in outer)
        carrier = carriers.setdefault(top, Carrier(top))
        chain = recording.ancestry(holder)
        carrier.inlined.update(recording.calls[c].name for c in chain[chain.index(top) + 1 :])
    for carrier in carriers.values():
        carrier.inlined.discard(recording.calls[carrier.call].name)
    return [carriers[call] for call in sorted(carriers)], _unique(rejections)


def too_short(count: int, min_sites: int) -> tuple[str, str]:
    """Rule and reason for leaving a stream of `count` sites alone."""
    if count == 1:
        alone = "one site alone has nothing to mix"
        return "single-site", f"the stream has 1 site, fewer than min_sites={min_sites}: {alone}"
    return "min-sites", f"the stream has {count} sites, fewer than min_sites={min_sites}"


def _find_candidates(recording: Recording) -> tuple[dict[int, _Candidate], list[Rejection]]:
    candidates: dict[int, _Candidate] = {}  # by the value of the sum
    rejections = []
    additions, branches = _parts(recording)
    for operation in recording.operations:
        part = branches.get(operation.index)
        if part is None and (operation.name not in vocabulary.ADD or operation.index in additions):
            continue
        if part is None and (len(operation.inputs) != 2 or len(operation.outputs) != 1):
            continue
        left, right = (operation.inputs[0], part) if part is not None else operation.inputs
        if left == right or any(not _is_feature(recording.dtypes[value]) for value in (left, right)):
            continue
        if part is None and recording.shapes[left] != recording.shapes[right]:
            rejections.append(_reject(recording, operation, "broadcast",
                f"the operands' shapes differ, {tuple(recording.shapes[left])} and {tuple(recording.shapes[right])}: "
                "a bias, a position or a mask"))  # fmt: skip
            continue
        near = ("no-ancestor", "neither operand is computed from the other's trunk")
        for trunk, branch in ((left, right), (right, left))[: 1 if part is not None else 2]:
            reach, before = _reach(recording, candidates, trunk)
            fork, mixes = _fork(recording, candidates, reach, branch)
            if fork is None:
                continue
            if mixes and not _fork(recording, candidates, reach, branch, of_features=True)[1]:
                near = DISCRETE
                continue
            if _adds_between(recording, candidates, branch, fork) >= STAGE:
                near = ("long-skip", "the skip closes over a whole stage of residual adds")
                continue
            if _adds_between(recording, candidates, branch, fork, linear=True) > 0:
                near = ("long-skip", "two states of one trunk are added, without a block between")
                continue
            if not mixes:
                near = ("no-mixing", "no operation between trunk and add mixes features: an activation or a rotation")
                continue
            candidates[operation.outputs[0]] = _Candidate(operation, trunk, reach, fork, branch, before)
            break
        else:
            rejections.append(_reject(recording, operation, *near))
    return candidates, rejections


def _is_feature(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _reach(
    recording: Recording, candidates: dict[int, _Candidate], start: int, linear: bool = False
) -> tuple[set[int], set[int]]:
    """Values that `start` comes from without mixing and in the same size, up to and with earlier candidates.

    The candidates may have been of another size: a stream goes on behind `x[:, :k]`. With `linear` by operations alone
    that scale, add or reshape.
    """
    seen, todo, before = {start}, deque([(start, True)]), set()
    same_size = {start}
    while todo and len(seen) < _FAR:
        value, same = todo.popleft()
        if value in candidates:
            before.add(value)
            continue
        operation = recording.producer.get(value)
        if operation is None or operation.mixing or (linear and operation.name not in vocabulary.LINEAR):
            continue
        resizes = operation.name in vocabulary.RESIZING
        for source in operation.inputs[:1] if resizes else operation.inputs:
            kept = same and recording.shapes[source].numel() == recording.shapes[start].numel()
            if source not in seen and (kept or resizes or recording.shapes[source] == recording.shapes[value]):
                seen.add(source)
                todo.append((source, kept))
                same_size.update({source} if kept else ())
    return same_size, before


def _parts(recording: Recording) -> tuple[set[int], dict[int, int]]:
    """Sums that are written back into what one of their operands was taken from, as in `x[rows] += f(x[rows])`.

    Returns the numbers of the additions, and by the number of each such write what it adds.
    """
    additions, branches = set(), {}
    for write in recording.operations:
        total = recording.producer.get(write.inputs[-1]) if write.name == "setitem" else None
        if total is None or total.name not in vocabulary.ADD or len(total.inputs) != 2 or len(write.outputs) != 1:
            continue
        for part, branch in (total.inputs, total.inputs[::-1]):
            taken = recording.producer.get(part)
            if taken is not None and taken.name == "getitem" and taken.inputs[0] == write.inputs[0]:
                additions.add(total.index)
                branches[write.index] = branch
    return additions, branches


def _fork(
    recording: Recording, candidates: dict[int, _Candidate], reach: set[int], branch: int, of_features: bool = False
) -> tuple[int | None, bool]:
    """The latest value of `reach` that the branch is computed from, and whether anything mixes on the way.

    Where an earlier sum lies on the way, only its trunk is followed: what entered it by its branch has a nearer trunk.
    With `of_features` no way by integers or conditions counts, as by a quantizer's codes.
    """
    oldest = min(reach)
    seen = {(branch, False)}
    todo = [(branch, False)]
    found: dict[bool, int] = {}
    while todo:
        value, mixed = todo.pop()
        if value in reach:
            found[mixed] = max(found.get(mixed, -1), value)
        operation = recording.producer.get(value)
        if operation is None or value < oldest:
            continue
        earlier = candidates.get(value)
        for source in operation.inputs if earlier is None else (earlier.trunk,):
            state = (source, mixed or operation.mixing or earlier is not None)
            if of_features and not _is_feature(recording.dtypes[source]):
                continue
            if source >= oldest and state not in seen:
                seen.add(state)
                todo.append(state)
    if True in found:
        return found[True], True
    return found.get(False), False


def _adds_between(
    recording: Recording, candidates: dict[int, _Candidate], branch: int, fork: int, linear: bool = False
) -> int:
    """How many candidates lie on the lineage from `fork` to `branch`, 0 if it is no lineage.

    With `linear` 0 as well where something else than scaling follows the last of them.
    """
    reach, before = _reach(recording, candidates, branch, linear)
    count = 0
    while fork not in reach and before:
        last = max(before)
        if last < fork:
            return 0
        count += 1
        reach, before = candidates[last].reach, candidates[last].before
    return count if fork in reach else 0


def _chains(candidates: dict[int, _Candidate]) -> dict[int, set[int]]:
    """For each candidate all that share its lineage."""
    chain_of: dict[int, set[int]] = {}
    for number, candidate in candidates.items():
        merged = {number}.union(*(chain_of[earlier] for earlier in candidate.before))
        for member in merged:
            chain_of[member] = merged
    return chain_of


def _recurrences(recording: Recording, candidates: dict[int, _Candidate]) -> list[int]:
    """The candidates that are steps of a recurrence over time."""

    def sources(value: int) -> tuple[int, ...]:
        operation = recording.producer.get(value)
        return operation.inputs if operation is not None else ()

    def slice_of(value: int) -> tuple[int, Hashable] | None:
        operation = recording.producer.get(value)
        if operation is None or operation.name not in vocabulary.SLICING:
            return None
        return operation.inputs[0], (operation.name, operation.where, operation.outputs.index(value))

    def parameters(value: int) -> tuple[Hashable, ...]:
        return (value,) if value in recording.parameters else ()

    reading = recurrence.Reading(sources, slice_of, parameters, lambda value: value)
    found = []
    for chain in {id(chain): chain for chain in _chains(candidates).values()}.values():
        places = defaultdict(list)
        for number in sorted(chain):
            operation = candidates[number].operation
            places[recording.calls[operation.call].name, operation.source].append(number)
        for numbers in places.values():
            turns = [
                reading.turn(candidates[n].operation.inputs, max(candidates[n].before, default=candidates[n].fork))
                for n in numbers
            ]
            if recurrence.is_recurrence(turns):
                found += numbers
    return found


def _home(recording: Recording, candidate: _Candidate) -> int:
    """The innermost call that runs the add and everything between the fork and it, and gets the fork once."""
    forward = {candidate.fork}
    start = recording.producer[candidate.fork].index + 1 if candidate.fork in recording.producer else 0
    between = []
    for operation in recording.operations[start : candidate.operation.index]:
        if any(value in forward for value in operation.inputs):
            forward.update(operation.outputs)
            between.append(operation)
    needed, calls = {candidate.branch}, [candidate.operation.call]
    for operation in reversed(between):
        if any(value in needed for value in operation.outputs):
            needed.update(value for value in operation.inputs if value in forward)
            calls.append(operation.call)
    home = innermost_common([recording.ancestry(call) for call in set(calls)])
    # A call that was given the fork twice, to read and to add to, can't tell that both are one.
    while home > 0 and list(recording.calls[home].leaf_values.values()).count(candidate.fork) > 1:
        home = recording.calls[home].parent
    return home


def _reject(recording: Recording, operation: Operation, rule: str, reason: str) -> Rejection:
    return Rejection(recording.calls[operation.call].name, operation.source, rule, reason)


def _unique(rejections: list[Rejection]) -> list[Rejection]:
    """One rejection a source line: layers repeat."""
    by_line: dict[object, Rejection] = {}
    for rejection in rejections:
        by_line.setdefault((rejection.source, rejection.rule), rejection)
    return list(by_line.values())

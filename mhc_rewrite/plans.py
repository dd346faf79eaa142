"""The plain data that flows between the rooms: sites, rejections, streams, plans, reports, listed graphs.

Plans and reports print themselves as tables; how is at the end of this file.
"""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mhc_rewrite.config import MAPPINGS, MHCConfig
from mhc_rewrite.printing import (
    PROSE_WIDTH,
    as_text,
    fold,
    folded_names,
    groups,
    module_name,
    plain_table,
    plural,
    times,
    without_numbers,
)


@dataclass(frozen=True)
class SourceLine:
    """A line of the user's source."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" `{self.text}`" if self.text else "")


@dataclass(frozen=True)
class ResidualSite:
    """One residual add `x + F(x)`.

    Attributes:
        name: `<holder>.mhc_<k>`, the name of the site's own module after conversion.
        holder: module whose forward holds the add ("" is the model itself).
        carrier: module whose forward is rewritten for it: the holder, or the parent in which trunk and branch part.
        branch: the first mixing operation of the branch, for a reader: a child's name or a function.
        width: C, the size of the axis that the branch mixes.
        channel_dim: that axis: -1, or 1 in a channels-first trunk.
        dtype: dtype of the trunk, as in `str(torch.float32)`.
        source: where the add stands.
        excluded: the user left this site out; on the streams it stays a plain residual, without parameters.
        n_streams: n here, where the plan has several; None elsewhere, and at excluded sites.
    """

    name: str
    holder: str
    carrier: str
    branch: str
    width: int
    channel_dim: int
    dtype: str
    source: SourceLine
    excluded: bool = False
    n_streams: int | None = None


@dataclass(frozen=True)
class Rejection:
    """An add, or a stream, that was left alone.

    Attributes:
        module: where it stands.
        source: the line, where one is known.
        rule: short name of the rule that refused it, e.g. `"no-mixing"`.
        reason: the same for a person.
    """

    module: str
    source: SourceLine | None
    rule: str
    reason: str


@dataclass(frozen=True)
class TrunkOperation:
    """One call of an operation on the trunk that acts on every stream.

    Attributes:
        name: `<module>: <operation>`, as in `ResidualStream.lifted`.
        site: number, among the calls of the stream's sites, of the one that comes next, or that it stands beside.
        beside: it stands between what this site reads and what it writes, so beside the block.
    """

    name: str
    site: int
    beside: bool = False


@dataclass(frozen=True)
class ResidualStream:
    """Sites that pass one trunk from each to the next, in execution order.

    Attributes:
        sites: the sites, first to last.
        entry: where one stream becomes n: `<carrier>` of the first site.
        exit: where n become one: `<carrier>` of the last site.
        scope: the innermost module whose call runs the whole stream.
        lifted: operations on the trunk that act on every stream, `<module>: <operation>`.
        nonlinear: those of `lifted` that do not keep the mean of the streams: with `init="preserve"` these start equal.
        operations: where those of `lifted` stand, call by call.
        reads: numbers of the streams whose results go into this one, those alone that no other of them hands on.
    """

    sites: tuple[ResidualSite, ...]
    entry: str
    exit: str
    scope: str
    lifted: tuple[str, ...] = ()
    nonlinear: tuple[str, ...] = ()
    operations: tuple[TrunkOperation, ...] = ()
    reads: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """C of the stream."""
        return self.sites[0].width

    @property
    def stretches(self) -> tuple[tuple[ResidualSite, ...], ...]:
        """The sites that are not excluded, call by call, cut where n changes: at least one stretch."""
        sites = (site for site in self.sites if not site.excluded)
        return tuple(tuple(group) for _, group in itertools.groupby(sites, key=lambda site: site.n_streams))

    def start(self, init: str) -> str:
        """How its sites start where a conversion was given `init`."""
        return "equal" if init == "preserve" and self.nonlinear else init


@dataclass(frozen=True)
class RewritePlan:
    """What a conversion would do: pure data, the same for a dry run and for the real one.

    Attributes:
        model: class name of the model.
        config: the options it was made with.
        streams: the residual streams to be rewritten, in execution order.
        rejections: adds and streams left alone, each with its reason.
        notes: other things a user should know, e.g. a mode that could not be run.
    """

    model: str
    config: MHCConfig
    streams: tuple[ResidualStream, ...]
    rejections: tuple[Rejection, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sites(self) -> tuple[ResidualSite, ...]:
        """All sites of all streams, in execution order, each once."""
        return tuple(dict.fromkeys(site for stream in self.streams for site in stream.sites))

    def streams_at(self, site: ResidualSite) -> int:
        """n of a site that is not excluded."""
        return site.n_streams or self.config.n

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data."""
        data = dataclasses.asdict(dataclasses.replace(self, config=None))  # type: ignore[arg-type]
        return {**data, "config": self.config.to_dict()}

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        return plan_table(self)


@dataclass(frozen=True)
class RewriteReport:
    """What a conversion did.

    Attributes:
        plan: the plan that was carried out.
        parameters_before: number of the model's own parameters.
        parameters_added: number of parameters in the sites, per stream.
        calls: call variants captured so far, as text, per carrier.
        compared: what was held against the original on the example before the conversion was kept, mode by mode.
    """

    plan: RewritePlan
    parameters_before: int
    parameters_added: tuple[int, ...]
    calls: dict[str, tuple[str, ...]]
    compared: tuple[str, ...] = ()

    def __str__(self) -> str:
        return as_text(self)

    def __rich__(self) -> RenderableType:
        return report_table(self)


@dataclass(frozen=True)
class ListedNode:
    """One node of a graph, for display.

    Attributes:
        name: unique in its graph.
        op: FX opcode.
        target: operator or module as text.
        inputs: names of the nodes it reads.
        arguments: its arguments as text.
        shape: of its result, streams included, or None where it is no tensor.
        dtype: of its result, or None.
        source: line of the user's code that it comes from.
        role: `"trunk"`, `"residual add"`, `"expand"`, `"resize"`, `"pre"`, `"post"`, `"boundary"`, `"collapse"`, or "".
    """

    name: str
    op: str
    target: str
    inputs: tuple[str, ...]
    arguments: str
    shape: tuple[int, ...] | None
    dtype: str | None
    source: SourceLine | None
    role: str = ""


@dataclass(frozen=True)
class ListedGraph:
    """A carrier's forward before and after the rewrite, for display.

    Attributes:
        module: the carrier's name.
        kind: its class name.
        call: the variant shown, e.g. `"eval"`.
        original: nodes before.
        rewritten: nodes after.
    """

    module: str
    kind: str
    call: str
    original: tuple[ListedNode, ...]
    rewritten: tuple[ListedNode, ...]


# How plans and reports read -------------------------------------------------------------------------------------------


def short_source(source: SourceLine) -> str:
    """`file:line`: a file of an installed package by its name alone, the user's own from the current folder."""
    path = Path(source.file)
    if {"site-packages", "dist-packages"} & set(path.parts):
        path = Path(path.name)
    elif path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return f"{path}:{source.line}"


def _source_cell(source: SourceLine | None) -> Text:
    if source is None:
        return Text("-", style="dim")
    return Text(short_source(source)).append("".join(f"\n{line}" for line in code_lines(source)), style="dim")


def code_lines(source: SourceLine) -> list[str]:
    """The line of code, broken where it is too long for a table."""
    return textwrap.wrap(source.text, PROSE_WIDTH, break_long_words=False, break_on_hyphens=False)


def plan_table(plan: RewritePlan) -> RenderableType:
    """What a conversion would do: its streams with their sites, what was left alone and why, notes."""
    return _plan_group(plan, Text(_headline(plan), style="bold"), [None] * len(plan.streams))


def report_table(report: RewriteReport) -> RenderableType:
    """What a conversion did: as its plan, with the parameters that each stream added and the calls that were seen."""
    before, added = report.parameters_before, sum(report.parameters_added)
    share = f" ({100 * added / before:.2f} % of its own {before:,})" if before else ""
    head = Text(f"{_headline(report.plan)}: converted", style="bold")
    head.append(f"\n{plural(added, 'parameter')} added{share}", style="not bold")
    calls = _calls_table(report.calls)
    compared = [Text("compared with the original", style="bold"), *(Text(f"  - {text}") for text in report.compared)]
    return _plan_group(
        report.plan,
        head,
        list(report.parameters_added),
        *([calls] if calls else []),
        *([Group(*compared)] if report.compared else []),
    )


def _headline(plan: RewritePlan) -> str:
    config = plan.config
    how = f"n = {config.streams_as_text()}, {config.connection}, init {config.init}" + ", static" * (not config.dynamic)
    if len(config.learn) < len(MAPPINGS):
        how += f", of which {' and '.join(f'H_{name}' for name in config.learn)} learn"
    return f"{plan.model}: {_site_count(plan.sites)} in {plural(len(plan.streams), 'stream')} ({how})"


def _site_count(sites: Sequence[ResidualSite]) -> str:
    """`5 sites and 1 excluded`; `2 sites in 6 calls` where a module is called several times."""
    distinct = set(sites)
    excluded = sum(site.excluded for site in distinct)
    text = plural(len(distinct) - excluded, "site") + (f" and {excluded} excluded" if excluded else "")
    return text if len(distinct) == len(sites) else f"{text} in {len(sites)} calls"


def _plan_group(plan: RewritePlan, head: Text, added: Sequence[int | None], *more: RenderableType) -> RenderableType:
    parts: list[RenderableType] = [head]
    for index, (stream, parameters) in enumerate(itertools.zip_longest(plan.streams, added[: len(plan.streams)])):
        parts += [
            Text(),
            _stream_head(index, stream, plan.config.init, parameters),
            Padding(_sites_table(stream), (0, 0, 0, 2)),
        ]
    if plan.rejections:
        parts += [Text(), Text(f"left alone: {plural(len(plan.rejections), 'place')}", style="bold")]
        parts.append(Padding(_rejections_table(plan.rejections), (0, 0, 0, 2)))
    for part in more:
        parts += [Text(), part]
    if plan.notes:
        parts += [Text(), Text("notes", style="bold"), *(Text(f"  - {note}") for note in plan.notes)]
    return Group(*parts)


def _stream_head(index: int, stream: ResidualStream, init: str, parameters: int | None) -> Text:
    """Its size, where it begins and ends, and what acts on it between sites."""
    first = stream.sites[0]
    channels = "" if first.channel_dim == -1 else f" (dim {first.channel_dim})"
    dtypes = ", ".join(dict.fromkeys(site.dtype.removeprefix("torch.") for site in stream.sites))
    head = Text.assemble(
        (f"stream {index}", "bold cyan"),
        f": {_site_count(stream.sites)}, C = {stream.width}{channels}, {dtypes}",
    )
    if parameters is not None:
        head.append(f", {plural(parameters, 'parameter')} added")
    if len(stream.stretches) > 1:
        numbers = [f"{sites[0].n_streams} at {plural(len(sites), 'site')}" for sites in stream.stretches]
        head.append(f"\n  n = {', then '.join(numbers)}")
    head.append(f"\n  entry {module_name(stream.entry)}, exit {module_name(stream.exit)}")
    if stream.scope not in (stream.entry, stream.exit):
        head.append(f", within {module_name(stream.scope)}")
    if stream.lifted:
        head.append("\n  lifted to every stream: " + _operations(stream.lifted))
    if stream.start(init) != init:
        head.append(f"\n  starts with equal streams, since not linear: {_operations(stream.nonlinear)}")
    return head


def _operations(named: Sequence[str]) -> str:
    """`layers.{0..3}: relu, layers.{0..3}.norm: layer_norm` of texts `<module>: <operation>`."""
    operations = groups((tuple(text.partition(": ")) for text in named), key=lambda parts: parts[2])
    return ", ".join("; ".join(fold(m for m, _, _ in g)) + (f": {g[0][2]}" if g[0][2] else "") for g in operations)


def _sites_table(stream: ResidualStream) -> Table:
    n_of_its_own = any(site.n_streams for site in stream.sites)
    table = plain_table("site", "", "branch", *(["n"] if n_of_its_own else []), "C", "source")
    for column in table.columns[3:-1]:
        column.justify = "right"
    for sites in groups(stream.sites, key=_site_key):
        site = sites[0]
        for name, covered in fold(site.name for site in sites).items():
            own = [site for site in sites if site.name in covered]
            cell = Text().append(name, style="yellow" if site.excluded else "green")
            cell.append("\nin " + folded_names(site.carrier for site in own), style="dim")
            if site.excluded:
                cell.append("\nexcluded: stays a plain residual", style="italic")
            branch = Text(folded_names(site.branch for site in own))
            n = [str(site.n_streams or "")] if n_of_its_own else []
            table.add_row(cell, times(len(own)), branch, *n, str(site.width), _source_cell(site.source))
    return table


def _site_key(site: ResidualSite) -> Hashable:
    names = (without_numbers(name) for name in (site.name, site.carrier, site.branch))
    return (*names, site.width, site.channel_dim, site.dtype, site.source, site.excluded, site.n_streams)


def _rejections_table(rejections: Sequence[Rejection]) -> Table:
    table = plain_table("rule", "", "place", "reason")
    table.columns[3].max_width = PROSE_WIDTH
    for group in groups(rejections, key=_rejection_key):
        reasons = {rejection.reason for rejection in group}
        reason = reasons.pop() if len(reasons) == 1 else without_numbers(group[0].reason)
        place = Text(folded_names(rejection.module for rejection in group) + "\n")
        place.append_text(_source_cell(group[0].source))
        table.add_row(Text(group[0].rule, style="yellow"), times(len(group)), place, Text(reason))
    return table


def _rejection_key(rejection: Rejection) -> Hashable:
    return rejection.rule, rejection.source, without_numbers(rejection.reason), without_numbers(rejection.module)


def _calls_table(calls: dict[str, tuple[str, ...]]) -> Table | None:
    if not any(calls.values()):
        return None
    table = plain_table("carrier", "calls captured")
    for carriers in groups(calls, key=lambda name: (without_numbers(name), calls[name])):
        table.add_row(Text(folded_names(carriers)), Text("\n".join(calls[carriers[0]])))
    return table

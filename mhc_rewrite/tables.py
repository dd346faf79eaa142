"""Plans and reports for a reader: Rich tables, and the same as plain text."""

from __future__ import annotations

import io
import itertools
import re
import textwrap
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich import box
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mhc_rewrite.model import Rejection, ResidualSite, ResidualStream, RewritePlan, RewriteReport, SourceLine

if TYPE_CHECKING:
    from mhc_rewrite.bench import Measured

T = TypeVar("T")
PROSE_WIDTH = 72
# A rule under the header and no other lines, in ASCII, which every pipe and log takes.
BOX = box.Box("\n".join(["    ", "    ", " -- ", *["    "] * 5]), ascii=True)


def as_text(renderable: Any) -> str:
    """A renderable as plain text: no colour codes, as wide as its names need, no trailing blanks."""
    console = Console(file=io.StringIO(), width=100_000, color_system=None, force_terminal=False, legacy_windows=False)
    console.width = max(1, Measurement.get(console, console.options, renderable).maximum)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")


# Names that differ by number only ------------------------------------------------------------------------------------


def fold(names: Iterable[str]) -> dict[str, list[str]]:
    """Dotted names grouped where they differ by number only, under one name as a shell would write it.

    `["h.0.mlp", "h.1.mlp", "h.2.mlp", "norm"]` -> `{"h.{0..2}.mlp": [...], "norm": ["norm"]}`.
    """
    shapes: dict[tuple[str, ...], dict[tuple[int, ...], str]] = {}
    for name in names:
        parts = name.split(".")
        shape = tuple("#" if _is_number(part) else part for part in parts)
        shapes.setdefault(shape, {})[tuple(int(part) for part in parts if _is_number(part))] = name
    folded = {}
    for shape, rows in shapes.items():
        for sets in _fold_numbers(list(rows)):
            texts = iter([_number_set(values) for values in sets])
            pattern = ".".join(next(texts) if part == "#" else part for part in shape)
            covered = [row for row in rows if all(n in values for n, values in zip(row, sets, strict=True))]
            folded[pattern] = [rows[row] for row in covered]
    return folded


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and str(int(part)) == part


def _fold_numbers(rows: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """Rows of numbers as products of sets: one where they fill it, else split at the first number that varies."""
    sets = tuple(tuple(sorted(set(column))) for column in zip(*rows, strict=True))
    if len(list(itertools.product(*sets))) == len(rows):
        return [sets]
    split = next(i for i, values in enumerate(sets) if len(values) > 1)
    # Halves that hold the same in every other place are one again: stages 0, 1 and 3 of a pyramid, say.
    merged: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for value in sets[split]:
        for part in _fold_numbers([row for row in rows if row[split] == value]):
            merged.setdefault((*part[:split], *part[split + 1 :]), []).append(value)
    return [(*rest[:split], tuple(values), *rest[split:]) for rest, values in merged.items()]


def _number_set(values: Sequence[int]) -> str:
    """`(0, 1, 2, 5)` -> `{0..2,5}`; `(0, 2, 4, 6)` -> `{0..6..2}`; `(3,)` -> `3`."""
    if len(values) == 1:
        return str(values[0])
    steps = {b - a for a, b in itertools.pairwise(values)}
    if len(values) > 3 and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{{{values[0]}..{values[-1]}..{step}}}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = (f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)
    return "{" + ",".join(texts) + "}"


def without_numbers(text: str) -> str:
    """Text with `#` for the numbers in dotted names: what layers of one kind have in common."""
    return re.sub(r"(?<=[A-Za-z_]\.)\d+\b|^\d+(?=\.)", "#", text)


def _groups(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


# Pieces ---------------------------------------------------------------------------------------------------------------


def module_name(name: str) -> str:
    """A module's qualified name; the model itself has the empty one."""
    return name or "(model)"


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


def _names(names: Iterable[str]) -> str:
    return "\n".join(fold(map(module_name, names)))


def _count(count: int) -> str:
    return f"x{count}" if count > 1 else ""


def plain_table(*headers: str) -> Table:
    table = Table(box=BOX, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for header in headers:
        # The count under the empty header stays whole; names break anywhere rather than lose their end.
        table.add_column(header, overflow="fold", no_wrap=not header)
    return table


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


# Measurements ---------------------------------------------------------------------------------------------------------


def bench_table(measured: Sequence[Measured]) -> Table:
    """One row for each way to run a model; bytes as MB of 10^6, and what is not measured as -."""
    columns: dict[str, Callable[[Measured], str | None]] = {
        "step, s": lambda one: f"{one.seconds:.4g}",
        "ratio": lambda one: f"{one.ratio:.3f}",
        "compilation, s": lambda one: None if one.compilation is None else f"{one.compilation:.1f}",
        "kept, MB": lambda one: None if one.kept is None else f"{one.kept / 1e6:,.0f}",
        "peak, MB": lambda one: None if one.peak is None else f"{one.peak / 1e6:,.0f}",
        "launches": lambda one: None if one.launches is None else f"{one.launches:,}",
    }
    rows = [[cell(one) for cell in columns.values()] for one in measured]
    shown = [k for k in range(len(columns)) if any(row[k] is not None for row in rows)]
    table = plain_table("model", "run by", *(list(columns)[k] for k in shown))
    for column in table.columns[2:]:
        column.justify = "right"
    for one, row in zip(measured, rows):
        table.add_row(one.model, one.backend, *(row[k] or "-" for k in shown))
    return table


# Plans ----------------------------------------------------------------------------------------------------------------


def plan_table(plan: RewritePlan) -> RenderableType:
    """What a conversion would do: its streams with their sites, what was left alone and why, notes."""
    return _plan_group(plan, Text(_headline(plan), style="bold"), [None] * len(plan.streams))


def report_table(report: RewriteReport) -> RenderableType:
    """What a conversion did: as its plan, with the parameters that each stream added and the calls that were seen."""
    before, added = report.parameters_before, sum(report.parameters_added)
    share = f" ({100 * added / before:.2f} % of its own {before:,})" if before else ""
    head = Text(f"{_headline(report.plan)}: converted", style="bold")
    head.append(f"\n{_plural(added, 'parameter')} added{share}", style="not bold")
    calls = _calls_table(report.calls)
    return _plan_group(report.plan, head, list(report.parameters_added), *([calls] if calls else []))


def _headline(plan: RewritePlan) -> str:
    config = plan.config
    how = f"n = {config.n_streams}, {config.connection}, init {config.init}"
    return f"{plan.model}: {_site_count(plan.sites)} in {_plural(len(plan.streams), 'stream')} ({how})"


def _site_count(sites: Sequence[ResidualSite]) -> str:
    """`5 sites and 1 excluded`; `2 sites in 6 calls` where a module is called several times."""
    distinct = set(sites)
    excluded = sum(site.excluded for site in distinct)
    text = _plural(len(distinct) - excluded, "site") + (f" and {excluded} excluded" if excluded else "")
    return text if len(distinct) == len(sites) else f"{text} in {len(sites)} calls"


def _plan_group(plan: RewritePlan, head: Text, added: Sequence[int | None], *more: RenderableType) -> RenderableType:
    parts: list[RenderableType] = [head]
    for index, (stream, parameters) in enumerate(itertools.zip_longest(plan.streams, added[: len(plan.streams)])):
        parts += [Text(), _stream_head(index, stream, parameters), Padding(_sites_table(stream), (0, 0, 0, 2))]
    if plan.rejections:
        parts += [Text(), Text(f"left alone: {_plural(len(plan.rejections), 'place')}", style="bold")]
        parts.append(Padding(_rejections_table(plan.rejections), (0, 0, 0, 2)))
    for part in more:
        parts += [Text(), part]
    if plan.notes:
        parts += [Text(), Text("notes", style="bold"), *(Text(f"  - {note}") for note in plan.notes)]
    return Group(*parts)


def _stream_head(index: int, stream: ResidualStream, parameters: int | None) -> Text:
    """Its size, where it begins and ends, and what acts on it between sites."""
    first = stream.sites[0]
    channels = "" if first.channel_dim == -1 else f" (dim {first.channel_dim})"
    dtypes = ", ".join(dict.fromkeys(site.dtype.removeprefix("torch.") for site in stream.sites))
    head = Text.assemble(
        (f"stream {index}", "bold cyan"),
        f": {_site_count(stream.sites)}, C = {stream.width}{channels}, {dtypes}",
    )
    if parameters is not None:
        head.append(f", {_plural(parameters, 'parameter')} added")
    head.append(f"\n  entry {module_name(stream.entry)}, exit {module_name(stream.exit)}")
    if stream.scope not in (stream.entry, stream.exit):
        head.append(f", within {module_name(stream.scope)}")
    if stream.lifted:
        lifted = _groups((tuple(text.partition(": ")) for text in stream.lifted), key=lambda parts: parts[2])
        texts = ("; ".join(fold(m for m, _, _ in g)) + (f": {g[0][2]}" if g[0][2] else "") for g in lifted)
        head.append("\n  lifted to every stream: " + ", ".join(texts))
    return head


def _sites_table(stream: ResidualStream) -> Table:
    table = plain_table("site", "", "branch", "C", "source")
    table.columns[3].justify = "right"
    for sites in _groups(stream.sites, key=_site_key):
        site = sites[0]
        for name, covered in fold(site.name for site in sites).items():
            own = [site for site in sites if site.name in covered]
            cell = Text().append(name, style="yellow" if site.excluded else "green")
            cell.append("\nin " + _names(site.carrier for site in own), style="dim")
            if site.excluded:
                cell.append("\nexcluded: stays a plain residual", style="italic")
            branch = Text(_names(site.branch for site in own))
            table.add_row(cell, _count(len(own)), branch, str(site.width), _source_cell(site.source))
    return table


def _site_key(site: ResidualSite) -> Hashable:
    names = (without_numbers(name) for name in (site.name, site.carrier, site.branch))
    return (*names, site.width, site.channel_dim, site.dtype, site.source, site.excluded)


def _rejections_table(rejections: Sequence[Rejection]) -> Table:
    table = plain_table("rule", "", "place", "reason")
    table.columns[3].max_width = PROSE_WIDTH
    for group in _groups(rejections, key=_rejection_key):
        reasons = {rejection.reason for rejection in group}
        reason = reasons.pop() if len(reasons) == 1 else without_numbers(group[0].reason)
        place = Text(_names(rejection.module for rejection in group) + "\n")
        place.append_text(_source_cell(group[0].source))
        table.add_row(Text(group[0].rule, style="yellow"), _count(len(group)), place, Text(reason))
    return table


def _rejection_key(rejection: Rejection) -> Hashable:
    return rejection.rule, rejection.source, without_numbers(rejection.reason), without_numbers(rejection.module)


def _calls_table(calls: dict[str, tuple[str, ...]]) -> Table | None:
    if not any(calls.values()):
        return None
    table = plain_table("carrier", "calls captured")
    for carriers in _groups(calls, key=lambda name: (without_numbers(name), calls[name])):
        table.add_row(Text(_names(carriers)), Text("\n".join(calls[carriers[0]])))
    return table

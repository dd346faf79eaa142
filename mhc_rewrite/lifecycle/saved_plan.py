"""A conversion as JSON: what was converted and how, so that it can be done again without an example and without a run.

Forwards are not saved. Roles without rewritten forwards capture them at the first call of each kind, as those of a
pickled model do; what they need to know for that (which adds, which streams, who reads them) is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mhc_rewrite.conversion.analysis import Analysis
from mhc_rewrite.conversion.captures import Captures
from mhc_rewrite.conversion.converted import Conversion, find_converted, remember, site_at
from mhc_rewrite.conversion.install import install
from mhc_rewrite.conversion.naming import CarrierWiring
from mhc_rewrite.conversion.sharded import refuse_sharded
from mhc_rewrite.errors import SitesError
from mhc_rewrite.lifecycle.data import from_data, to_data
from mhc_rewrite.lifecycle.source_lines import SavedLine, find_line, package_versions, saved_line, short_path
from mhc_rewrite.passes.same_site import SiteKey
from mhc_rewrite.plans import RewritePlan, SourceLine
from mhc_rewrite.sites.hyper_connection import HyperConnection
from mhc_rewrite.version import VERSION

FORMAT = 1


@dataclass(frozen=True)
class SavedSite:
    """One site, for a reader and for what can be checked before anything is changed.

    Attributes:
        name, holder, width, channel_dim, dtype: as in `ResidualSite`.
        index: its place in its stream.
        line: where its add stands.
        beside: a parameter of the module that holds the add in which the width shows, and its shape.
    """

    name: str
    holder: str
    width: int
    channel_dim: int
    dtype: str
    index: int
    line: str
    beside: dict[str, list[int]]


@dataclass(frozen=True)
class SavedPlan:
    """A conversion, with source files by their short paths.

    Attributes:
        kind: class name of the converted model; `base` is what that model is called, if it says.
        versions: of the packages in whose source the adds stand.
        sites: the sites that have parameters.
        plan, carriers: as in `Conversion`.
        lines: the lines of the adds, and those of the calls down to them.
    """

    kind: str
    base: str
    versions: dict[str, str]
    sites: list[SavedSite]
    plan: RewritePlan
    carriers: dict[str, CarrierWiring]
    lines: list[SavedLine]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data, with the number of its format and this package's version."""
        return {"format": FORMAT, "mhc_rewrite": VERSION, **to_data(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SavedPlan:
        """The inverse.

        Raises:
            SitesError: another format, or something else altogether.
        """
        made_by = data.get("mhc_rewrite")
        if data.get("format") != FORMAT:
            raise SitesError(
                f"This conversion was saved by mhc_rewrite {made_by} in format {data.get('format')!r}; format {FORMAT} "
                "is understood. Load it with the version that wrote it."
            )
        try:
            return from_data(cls, {key: item for key, item in data.items() if key not in ("format", "mhc_rewrite")})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise SitesError(f"The saved conversion can't be read, the file is damaged: {error}.") from error


# -- from a model ------------------------------------------------------------------------------------------------------


def saved_plan(model: nn.Module) -> SavedPlan:
    """The conversion of the converted model in `model`, by the names that modules have in it.

    Raises:
        MHCError: it holds none, or several.
    """
    _, part, conversion = find_converted(model)
    return _saved(part, conversion)


def _saved(part: nn.Module, conversion: Conversion) -> SavedPlan:
    plan = conversion.plan
    keys = {key for wiring in conversion.carriers.values() for key in (*wiring.targets, *wiring.known)}
    places = {(site.source.file, site.source.line) for site in plan.sites}
    places |= {(file, line) for key in keys for file, _, line, _ in key.frames}
    lines = {place: saved_line(*place) for place in sorted(places)}
    sites = []
    for name, site in {s.name: s for s in plan.sites if not s.excluded}.items():
        own = site_at(part, name)
        line = f"{short_path(site.source.file)}:{site.source.line} {site.source.text}"
        beside = _beside(part.get_submodule(site.holder), site.width)
        sites.append(SavedSite(name, site.holder, own.width, own.channel_dim, site.dtype, own.index, line, beside))

    def short(file: str, line: int) -> tuple[str, int]:
        return short_path(file), line

    made = SavedPlan(
        kind=plan.model, base=_called(part), versions=package_versions(line.file for line in lines.values()),
        sites=sites, plan=plan, carriers=conversion.carriers, lines=list(lines.values()),
    )  # fmt: skip
    return _with_lines(made, short)


def _called(model: nn.Module) -> str:
    """What the model is called where it comes from, if it says so; a folder's name is nobody else's business."""
    timm = getattr(model, "pretrained_cfg", None)
    name = getattr(model, "name_or_path", None) or (timm.get("architecture") if isinstance(timm, dict) else None)
    return name if isinstance(name, str) and name.count("/") <= 1 and name[0] not in "./~\\" else ""


def _beside(holder: nn.Module, width: int) -> dict[str, list[int]]:
    for name, parameter in holder.named_parameters():
        inside_site = any(part.startswith("mhc_") for part in name.split("."))
        if not inside_site and width in parameter.shape:
            return {name: list(parameter.shape)}
    return {}


# -- onto a model ------------------------------------------------------------------------------------------------------


def install_saved(model: nn.Module, saved: SavedPlan) -> None:
    """Converts an unconverted model as another one was, in place, without running it; all or nothing.

    The model may be on the meta device. Its sites are as a conversion starts them.

    Raises:
        SitesError: the model is not built as the one that was converted, or its source is another.
    """
    refuse_sharded(model)
    check_fits(model, saved)
    found = {(line.file, line.line): (line, find_line(line, model)) for line in saved.lines}
    adds = {(site.source.file, site.source.line) for site in saved.plan.sites}
    for key, (line, place) in found.items():
        if place is None and key in adds:
            then = _listed(saved.versions)
            now = _listed(package_versions(saved.versions))
            raise SitesError(
                f"`{line.text}` in {line.function or 'the code'} of {line.file}, a residual add of the saved "
                f"conversion, is not in the source of this {type(model).__name__}"
                + (f" (saved with {then}; here {now})" if now != then else "")
                + ". Convert it by an example instead: mhc_rewrite.load_sites(model, folder, example_inputs)."
            )

    def absolute(file: str, line: int) -> tuple[str, int]:
        place = found.get((file, line), (None, None))[1]
        return place or (file, line)

    here = _with_lines(replace(saved, plan=replace(saved.plan, model=type(model).__name__)), absolute)
    analysis = Analysis(here.plan, here.carriers, Captures(model, {}))
    install(model, analysis)
    note = "not compared: converted as a saved model was, without an example"
    remember(model, Conversion(here.plan, here.carriers, (note,)))


def check_fits(model: nn.Module, saved: SavedPlan) -> None:
    """Whether a model has the modules and the widths that a saved conversion needs.

    Raises:
        SitesError: it has not.
    """
    modules = dict(model.named_modules())
    needed = [*saved.carriers]
    needed += [name for stream in saved.plan.streams for name in (stream.scope, *(s.holder for s in stream.sites))]
    missing = [name for name in dict.fromkeys(needed) if name not in modules]
    if missing:
        raise SitesError(
            f"{type(model).__name__} has no module {missing[0]!r}, where {saved.kind} was converted"
            + (f"; nor {len(missing) - 1} others" if len(missing) > 1 else "")
            + ". The sites belong to a model with other modules, or another number of layers."
        )
    for site in saved.sites:
        parameters = dict(modules[site.holder].named_parameters())
        for name, shape in site.beside.items():
            if name in parameters and list(parameters[name].shape) != shape:
                raise SitesError(
                    f"Site {site.name!r} was made for a width of {site.width}, where "
                    f"{'.'.join(filter(None, (site.holder, name)))!r} has shape {tuple(shape)}; in this model it has "
                    f"{tuple(parameters[name].shape)}."
                )


def check_same_sites(model: nn.Module, conversion: Conversion, saved: SavedPlan) -> dict[str, HyperConnection]:
    """The sites of a converted model by name, if they are those that were saved.

    Raises:
        SitesError: other names, branches, widths or options.
    """
    here = {site.name: site_at(model, site.name) for site in conversion.plan.sites if not site.excluded}
    there = {site.name: site for site in saved.sites}
    more, fewer = [name for name in here if name not in there], [name for name in there if name not in here]
    if more or fewer:
        lists = (("has", more), ("lacks", fewer))
        said = [f"{verb} {len(names)} of them ({', '.join(names[:3])})" for verb, names in lists if names]
        raise SitesError(
            f"The saved sites are not those of this {type(model).__name__}: it {' and '.join(said)}. Load them into "
            "the original, or into a conversion with the same include and exclude."
        )
    planned = {site.name: site for site in saved.plan.sites}
    for site in conversion.plan.sites:
        then = planned.get(site.name, site).branch
        # A site's name counts the adds of its module: with an add more before it, it would be another's.
        if then != site.branch and then in dict(model.get_submodule(site.carrier).named_modules()):
            raise SitesError(
                f"Site {site.name!r} was saved at the add of {then!r} and is at that of {site.branch!r} here "
                f"({site.source}): the adds of {site.holder or 'the model'!r} are others."
            )
    for name, own in here.items():
        mine = {**own.options(), "width": own.width}
        config = replace(saved.plan.config, n_streams=saved.plan.streams_at(planned[name]))
        theirs = {**config.function(), "channel_dim": there[name].channel_dim, "width": there[name].width}
        other = [key for key in theirs if theirs[key] != mine[key]]
        if other:
            raise SitesError(
                f"Site {name!r} was saved with {', '.join(f'{key}={theirs[key]!r}' for key in other)} and has "
                f"{', '.join(f'{key}={mine[key]!r}' for key in other)} here: it would compute another function. "
                "unmhcify(model) first, and load the sites into the original."
            )
    return here


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# -- other names and other lines ---------------------------------------------------------------------------------------


def renamed(saved: SavedPlan, rename: Callable[[str], str | None]) -> SavedPlan:
    """With other names for the modules. Streams whose modules have none (None) are left out.

    Raises:
        SitesError: nothing is left, or a stream has lost part of its modules.
    """
    kept = []
    for number, stream in enumerate(saved.plan.streams):
        holders = [name for site in stream.sites for name in (site.holder, site.carrier)]
        gone = [name for name in holders if rename(name) is None]
        if gone and len(gone) < len(holders):
            raise SitesError(f"A residual stream of {saved.kind} runs through {gone[0]!r}, which is not there.")
        if not gone:
            kept.append(number)
    if not kept:
        raise SitesError(f"None of the residual streams of {saved.kind} is there.")
    numbers = {number: index for index, number in enumerate(kept)}

    def new(name: str) -> str:
        return rename(name) or ""

    def wired(wiring: CarrierWiring) -> CarrierWiring:
        return replace(
            wiring,
            inlined={new(name) for name in wiring.inlined},  # inside its carrier, so it has a name if that has
            targets={
                key: replace(t, stream=numbers[t.stream]) for key, t in wiring.targets.items() if t.stream in numbers
            },
            entries={
                path: (rank, numbers[number])
                for path, (rank, number) in wiring.entries.items() if number in numbers
            },
            leaves={numbers[number]: goes_on for number, goes_on in wiring.leaves.items() if number in numbers},
        )  # fmt: skip

    streams = []
    for number in kept:
        stream = saved.plan.streams[number]
        sites = tuple(
            replace(s, name=_site_name(s.name, s.holder, new), holder=new(s.holder), carrier=new(s.carrier))
            for s in stream.sites
        )
        entry, end, scope = map(new, (stream.entry, stream.exit, stream.scope))
        reads = tuple(numbers[other] for other in stream.reads if other in numbers)
        streams.append(replace(stream, sites=sites, entry=entry, exit=end, scope=scope, reads=reads))
    names = {site.name for stream in streams for site in stream.sites}
    saved_sites = [
        replace(site, name=name, holder=new(site.holder))
        for site in saved.sites if (name := _site_name(site.name, site.holder, new)) in names
    ]  # fmt: skip
    carriers = {new(name): wired(w) for name, w in saved.carriers.items() if rename(name) is not None}
    rejections = tuple(replace(r, module=new(r.module)) for r in saved.plan.rejections if rename(r.module) is not None)
    return replace(
        saved,
        sites=saved_sites,
        plan=replace(saved.plan, streams=tuple(streams), rejections=rejections),
        carriers={name: wiring for name, wiring in carriers.items() if wiring.targets},
    )


def _site_name(name: str, holder: str, new: Callable[[str], str]) -> str:
    return ".".join(filter(None, (new(holder), name[len(holder) :].lstrip("."))))


def _with_lines(saved: SavedPlan, place: Callable[[str, int], tuple[str, int]]) -> SavedPlan:
    """With another place for each line: file and number."""

    def moved(source: SourceLine) -> SourceLine:
        return SourceLine(*place(source.file, source.line), source.text)

    def named(key: SiteKey) -> SiteKey:
        frames = []
        for file, function, line, operation in key.frames:
            there, number = place(file, line)
            frames.append((there, function, number, operation))
        return replace(key, frames=tuple(frames))

    streams = tuple(
        replace(stream, sites=tuple(replace(site, source=moved(site.source)) for site in stream.sites))
        for stream in saved.plan.streams
    )
    rejections = tuple(replace(r, source=moved(r.source) if r.source else None) for r in saved.plan.rejections)
    carriers = {
        name: dataclasses.replace(
            wiring,
            targets={named(key): target for key, target in wiring.targets.items()},
            known={named(key): what for key, what in wiring.known.items()},
        )
        for name, wiring in saved.carriers.items()
    }
    return replace(saved, plan=replace(saved.plan, streams=streams, rejections=rejections), carriers=carriers)

"""From a plan, and the model where there is one, to what is drawn: steps with their costs, layers, folded groups."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import nn

from mhc_rewrite.config import MHCConfig
from mhc_rewrite.cost import Cost, L, Stream
from mhc_rewrite.insight.drawing.data import Figures, Group, Layer, Part, Picture, Step
from mhc_rewrite.plans import Rejection, ResidualSite, ResidualStream, RewritePlan, TrunkOperation
from mhc_rewrite.printing import without_numbers

LONGEST_PERIOD = 16  # layers of a pattern that repeats: of hybrid models, say


def picture(plan: RewritePlan, model: nn.Module | None = None, converted: bool = False) -> Picture:
    """What to draw of a plan.

    Args:
        model: what was planned, or converted, for the classes and sizes of its blocks.
        converted: whether the plan has been carried out.
    """
    modules = {name: module for name, module in model.named_modules()} if model is not None else {}
    order = {name: place for place, name in enumerate(modules)}
    seen: set[str] = set()
    layers = [_layers(plan, stream, modules, seen) for stream in plan.streams]
    left = [_left_alone(number, rejection) for number, rejection in enumerate(plan.rejections, 1)]
    ahead, behind = _put(left, layers, plan, order)
    parts = []
    for number, (stream, own) in enumerate(zip(plan.streams, layers)):
        ends = own[0].steps[0].n, own[-1].steps[-1].out
        around = tuple(_with_n(ahead[number], 1)), tuple(_with_n(behind[number], 1))
        parts.append(Part(number, stream, around[0], tuple(_fold(own)), around[1], ends, plan.config.collapse))
    return Picture(plan, converted, tuple(parts))


# -- steps and layers --------------------------------------------------------------------------------------------------


def _layers(plan: RewritePlan, stream: ResidualStream, modules: dict[str, nn.Module], seen: set[str]) -> list[Layer]:
    """The stream's steps, cut into layers. `seen` are the sites whose parameters were counted already."""
    names = _layer_names([site.holder for site in stream.sites])
    operations: dict[tuple[int, bool], list[TrunkOperation]] = defaultdict(list)
    for operation in stream.operations:
        operations[operation.site, operation.beside].append(operation)
    itemsize = max(_itemsize(site) for site in stream.sites)
    layers: list[tuple[str, list[Step]]] = []
    called: set[str] = set()
    n = plan.streams_at(stream.sites[0])
    for number, site in enumerate(stream.sites):
        own = site.name not in seen and not site.excluded
        if not layers or layers[-1][0] != names[site.holder] or site.name in called:
            layers.append((names[site.holder], []))
            called = set()
        called.add(site.name)
        for operation in operations[number, False]:
            module, _, label = operation.name.partition(": ")
            # What stands behind the last site of a layer is that layer's, a post-norm say.
            last = len(layers) > 1 and not layers[-1][1] and _inside(module, layers[-2][0])
            layers[-2 if last else -1][1].append(Step("operation", module, label, n, n, _shape(site, n)))
        here = layers[-1][1]
        now = n if site.excluded else plan.streams_at(site)
        if now != n:
            here.append(Step("resize", site.name, f"{n} to {now} streams", n, now, _shape(site, now),
                             figures=_resize_figures(plan.config, site, itemsize, n, now)))  # fmt: skip
        n = now
        kind, parameters = _block(modules, site)
        figures = Figures() if site.excluded else _site_figures(
            plan.config, site.width, itemsize, site.n_streams, number == 0, own
        )  # fmt: skip
        seen |= {site.name} if own else set()
        beside = tuple(operation.name.partition(": ")[2] for operation in operations[number, True])
        here.append(Step(
            "excluded" if site.excluded else "site", site.name, site.branch, n, n, _shape(site, n), kind, parameters,
            beside, site.source if site.source.file else None, figures,
        ))  # fmt: skip
    return [
        Layer(name, type(modules[name]).__name__ if name in modules else "", tuple(steps)) for name, steps in layers
    ]


def _layer_names(holders: Sequence[str]) -> dict[str, str]:
    """The layer of each holder: its name up to the first number that other holders have otherwise."""
    numbers: dict[str, set[str]] = defaultdict(set)
    for holder in holders:
        parts = holder.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                numbers[".".join(parts[:place])].add(part)
    names = {}
    for holder in holders:
        parts = holder.split(".")
        ends = (k for k, part in enumerate(parts) if part.isdecimal() and len(numbers[".".join(parts[:k])]) > 1)
        end = next(ends, None)
        names[holder] = holder if end is None else ".".join(parts[: end + 1])
    outer = sorted(set(filter(None, names.values())), key=len)
    return {holder: next((o for o in outer if _inside(name, o)), name) for holder, name in names.items()}


def _itemsize(site: ResidualSite) -> int:
    size: int = getattr(torch, site.dtype.removeprefix("torch.")).itemsize
    return size


def _shape(site: ResidualSite, n: int) -> str:
    """Of the state, with the axis of streams before that of features."""
    return f"(..., {n}, {site.width})" if site.channel_dim == -1 else f"(batch, {n}, {site.width}, ...)"


def _block(modules: dict[str, nn.Module], site: ResidualSite) -> tuple[str, int | None]:
    """Class and parameters of the block's first module that mixes; nothing where it is a function."""
    module = modules.get(".".join(filter(None, (site.carrier, site.branch))))
    if module is None:
        return "", None
    own = (p.numel() for name, p in module.named_parameters() if ".mhc_" not in f".{name}")
    return type(module).__name__, sum(own)


@functools.lru_cache(maxsize=1024)
def _site_figures(
    config: MHCConfig, width: int, itemsize: int, n: int | None, first: bool, own: bool
) -> Figures:  # fmt: skip
    """One call of a site; added up over a stream, what cost.py has for the stream."""
    of = Cost(config, (Stream(width, 1, 1, itemsize, n),))
    kept = of.kept.bytes
    forward, backward = of.moved("boundary")
    later = 0 if first else of.evaluate(kept.subs(L, 2)) - of.evaluate(kept)
    return Figures(
        forward, backward, of.evaluate(kept) if first else later, of.evaluate(of.parameters) if own else 0
    )  # fmt: skip


def _resize_figures(config: MHCConfig, site: ResidualSite, itemsize: int, before: int, n: int) -> Figures:
    """What a stretch moves more than one that begins with its n."""
    resized, plain = (
        Cost(config, (Stream(site.width, 1, 1, itemsize, n, k),)).moved("boundary") for k in (before, 1)
    )  # fmt: skip
    return Figures(*(more - less for more, less in zip(resized, plain)))


# -- what was left alone -----------------------------------------------------------------------------------------------


def _left_alone(number: int, rejection: Rejection) -> Step:
    return Step(
        "left alone", rejection.module, rejection.rule, 1, 1,
        source=rejection.source, rule=rejection.rule, reason=rejection.reason, number=number,
    )  # fmt: skip


def _with_n(steps: Sequence[Step], n: int) -> Iterator[Step]:
    return (dataclasses.replace(step, n=n, out=n) for step in steps)


def _put(
    left: Sequence[Step], layers: list[list[Layer]], plan: RewritePlan, order: dict[str, int]
) -> tuple[dict[int, list[Step]], dict[int, list[Step]]]:
    """Puts what was left alone into the layers that hold it; returns what stands before and behind each stream."""
    ahead: dict[int, list[Step]] = defaultdict(list)
    behind: dict[int, list[Step]] = defaultdict(list)
    for step in left:
        place = next(
            ((s, k) for s, own in enumerate(layers) for k, layer in enumerate(own) if _inside(step.name, layer.name)),
            None,
        )
        if place is not None and layers[place[0]][place[1]].name:
            stream, k = place
            layers[stream][k] = _with_left_alone(layers[stream][k], step, plan)
        elif step.rule == "operation-between":  # code of a parent between two streams: the first one ends there
            inside = [k for k, stream in enumerate(plan.streams) if _inside(stream.scope, step.name)]
            behind[inside[min(len(behind), max(0, len(inside) - 2))] if inside else 0].append(step)
        else:
            later = [k for k, own in enumerate(layers) if _stands_before(step.name, own[0].name, order)]
            if later:
                ahead[later[0]].append(step)
            else:
                behind[len(layers) - 1].append(step)
    return ahead, behind


def _with_left_alone(layer: Layer, left: Step, plan: RewritePlan) -> Layer:
    """Before the site whose block it stands in, else behind all."""
    carriers = {site.name: site.carrier for site in plan.sites}
    steps = list(layer.steps)
    blocks = [
        ".".join(filter(None, (carriers.get(step.name, ""), step.label))) if step.kind != "operation" else None
        for step in steps
    ]
    at = next((k for k, block in enumerate(blocks) if block and _inside(left.name, block)), len(steps))
    n = steps[at].n if at < len(steps) else steps[-1].out
    steps[at:at] = _with_n([left], n)
    return dataclasses.replace(layer, steps=tuple(steps))


def _inside(name: str, module: str) -> bool:
    return name == module or not module or name.startswith(module + ".")


def _stands_before(name: str, layer: str, order: dict[str, int]) -> bool:
    """Whether a module comes before a layer: by the model's order, else by numbers; a parent comes first."""
    if name in order and layer in order:
        return order[name] < order[layer]
    for mine, theirs in zip(name.split("."), layer.split(".")):
        if mine != theirs:
            return int(mine) < int(theirs) if mine.isdecimal() and theirs.isdecimal() else True
    return True


# -- folding -----------------------------------------------------------------------------------------------------------


def _fold(layers: Sequence[Layer]) -> list[Group]:
    """Runs of layers that repeat, alone or in a pattern, as groups; of several ways the one that takes in most."""
    keys = [_layer_key(layer) for layer in layers]
    groups, at = [], 0
    while at < len(layers):
        period, count = 1, 1
        for p in range(1, min(LONGEST_PERIOD, (len(layers) - at) // 2) + 1):
            repeated = 1
            while keys[at + repeated * p : at + (repeated + 1) * p] == keys[at : at + p]:
                repeated += 1
            if repeated > 1 and repeated * p > period * count:
                period, count = p, repeated
        run = tuple(layers[at : at + period * count])
        groups.append(Group(_pattern(run, period), run))
        at += period * count
    return groups


def _layer_key(layer: Layer) -> Hashable:
    steps = tuple(
        dataclasses.replace(
            step, name=without_numbers(step.name), label=without_numbers(step.label), figures=Figures(),
            block_parameters=None,  # of layers that are alike but for one embedding, say
        )
        for step in layer.steps if step.kind != "left alone"
    )  # fmt: skip
    return layer.kind, without_numbers(f"{layer.name}."), steps  # a number alone is a name only before a dot


def _pattern(run: tuple[Layer, ...], period: int) -> tuple[Layer, ...]:
    """What repeats, with the figures of the last of them (the first site of a stream keeps less), and with all that was
    left alone anywhere in the run, each in its place.
    """
    pattern = []
    for place in range(period):
        alike = run[place::period]
        left: dict[int, list[Step]] = defaultdict(list)  # by the number of steps before it
        for layer in alike:
            at = 0
            for step in layer.steps:
                if step.kind == "left alone":
                    left[at].append(step)
                else:
                    at += 1
        own = [step for step in alike[0].steps if step.kind != "left alone"]
        last = [step for step in alike[-1].steps if step.kind != "left alone"]
        steps = [step for at in range(len(own) + 1) for step in (
            *left[at], *(dataclasses.replace(own[k], figures=last[k].figures) for k in range(at, len(own))[:1])
        )]  # fmt: skip
        pattern.append(dataclasses.replace(alike[0], steps=tuple(steps)))
    return tuple(pattern)

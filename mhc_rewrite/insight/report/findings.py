"""What stands out in a run, in words. Each rule looks at one thing, and says nothing where there is nothing to say."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mhc_rewrite.insight.report.reading import Array, Shown
from mhc_rewrite.insight.watching.format import DIGITS, MAPPINGS
from mhc_rewrite.printing import fold, plural

GAIN = 10.0  # of the product of H_res over depth
SUM_ERROR = 0.1  # of a row or column of H_res
AVERAGED = 0.05  # second singular value of H_res below which one site leaves nothing of what tells streams apart
PART = 0.25  # of a run, that something has to last to be said
FEWEST = 5  # samples, below which nothing is said of movement
EQUAL = 1e-3  # rms of the streams' differences from their mean, over the mean's
DOMINANT = 0.9  # share of one stream
ONE_READ = 0.1  # entropy of H_pre, over log n
GRADIENTS = 100.0  # between the ends of a stream
LONGEST = 70  # characters of names in a sentence


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Attributes:
        text: names of modules in backticks.
        card: the key of the card of the page that shows it.
        bad: whether it may harm; else it is worth knowing.
    """

    text: str
    card: str
    bad: bool = True


def findings(run: Shown) -> list[Finding]:
    """What harms first."""
    found = list(itertools.chain.from_iterable(rule(run) for rule in RULES))
    if not any(one.bad for one in found):
        found.append(Finding(_calm(run), "composite_forward", bad=False))
    return sorted(found, key=lambda one: not one.bad)


def _calm(run: Shown) -> str:
    gain = [run.over_sites[name][2] for name in ("composite_forward", "composite_backward") if name in run.over_sites]
    largest = f" The composite gain stays at {_number(np.nanmax(gain))} and below." if gain else ""
    return f"No figure is beyond its bounds.{largest}"


# -- rules -------------------------------------------------------------------------------------------------------------


def _end(run: Shown) -> Iterator[Finding]:
    if run.end not in (None, "finished"):
        yield Finding(f"The run ended after step {run.steps[-1]:,} with an error: {run.end}", "loss")


def _loss(run: Shown) -> Iterator[Finding]:
    there = np.flatnonzero(np.isfinite(run.loss))
    if not len(there):
        return
    first, last = run.loss[there[0]], run.loss[there[-1]]
    if len(there) == 1:
        yield Finding(f"The loss is {_number(first, 4)} at step {run.steps[there[0]]:,}.", "loss", bad=False)
        return
    way = "falls" if last < first else "rises" if last > first else "stays"
    text = f"The loss {way} from {_number(first, 4)} at step {run.steps[there[0]]:,} to {_number(last, 4)} at step "
    yield Finding(f"{text}{run.steps[there[-1]]:,}.", "loss", bad=bool(last > first))
    gaps = np.flatnonzero(~np.isfinite(run.loss))
    if len(gaps := gaps[gaps > there[0]]):
        when = f"at step {run.steps[gaps[0]]:,}" + (
            f" and in {plural(len(gaps) - 1, 'later sample')}" if len(gaps) > 1 else ""
        )
        if there[-1] < gaps[0]:
            when = f"from step {run.steps[gaps[0]]:,} to the end"
        yield Finding(f"The loss is no finite number {when}.", "loss")
    best = np.fmin.accumulate(run.loss)
    fallen = first - best
    jumps = np.flatnonzero((run.loss - best > 0.5 * fallen) & (fallen > 0.1 * abs(first)))
    if len(jumps):
        at = jumps[0]
        yield Finding(f"The loss jumps to {_number(run.loss[at])} at step {run.steps[at]:,}, after "
                      f"{_number(best[at])}.", "loss")  # fmt: skip


def _gains(run: Shown) -> Iterator[Finding]:
    for way in ("forward", "backward"):
        name = next((name for name in (f"composite_{way}_99", f"composite_{way}") if name in run.over_sites), None)
        if name is None:
            continue
        largest = run.over_sites[name][2]
        above = np.flatnonzero(largest > GAIN)
        if len(above):
            tokens = ", in 1 % of the tokens" if name.endswith("_99") else ""
            begins = above[0] == 0
            says = f"is above {GAIN:g} from the start" if begins else f"passes {GAIN:g} at step {run.steps[above[0]]:,}"
            yield Finding(
                f"The composite gain {says}, {way}{tokens}; at the end it is {_number(largest[-1])}.",
                f"composite_{way}",
            )


def _sums(run: Shown) -> Iterator[Finding]:
    for what in ("row", "column"):
        name = f"{what}_error_99"
        for sites, since, value in _at_end(run, name, lambda grid: grid > SUM_ERROR, np.nanmax):
            yield Finding(
                f"The {what}s of H_res of {in_words(run, sites)} do not sum to 1{_since(run, since)}: off by up to "
                f"{_number(value)}.", "errors", bad=run.header.config.get("connection") not in ("hc", "cayley"),
            )  # fmt: skip


def _averaged(run: Shown) -> Iterator[Finding]:
    for sites, since, value in _at_end(run, "second_singular", lambda grid: grid < AVERAGED, np.nanmax):
        yield Finding(
            f"H_res of {in_words(run, sites)} averages the streams away{_since(run, since)}: its second singular value "
            f"is {_number(value)} or less.", "second_singular",
        )  # fmt: skip


def _streams(run: Shown) -> Iterator[Finding]:
    for sites, since, value in _at_end(run, "spread", lambda grid: grid < EQUAL, np.nanmax):
        yield Finding(
            f"The streams are all but equal after {in_words(run, sites)}{_since(run, since)}: apart by "
            f"{_number(value)} of their mean or less.", "spread",
        )  # fmt: skip
    for sites, since, value in _at_end(run, "dominant", lambda grid: grid > DOMINANT, np.nanmin):
        yield Finding(
            f"One stream is nearly all of the state after {in_words(run, sites)}{_since(run, since)}: "
            f"{value:.0%} of its squares or more.", "dominant",
        )  # fmt: skip
    for sites, since, _ in _at_end(run, "pre_entropy", lambda grid: grid < ONE_READ, np.nanmax):
        yield Finding(
            f"The blocks of {in_words(run, sites)} read one stream alone{_since(run, since)}.", "pre_entropy", bad=False
        )


def _depth(run: Shown) -> Iterator[Finding]:
    if "state_gradient" not in run.grids:
        return
    last = run.grids["state_gradient"][-1]
    for number, stream in enumerate(run.header.streams):
        values = [(site, last[site]) for site in stream if np.isfinite(last[site]) and last[site] > 0]
        if len(values) < 2:
            continue
        (early, first), (late, second) = values[0], values[-1]
        ratio = max(first, second) / min(first, second)
        if ratio > GRADIENTS:
            where = "" if len(run.header.streams) == 1 else f" of stream {number + 1}"
            large, small = (early, late) if first > second else (late, early)
            yield Finding(
                f"The gradient of the state{where} is {_number(ratio)} times as large at {in_words(run, [large])} as "
                f"at {in_words(run, [small])}, at step {run.steps[-1]:,}.", "state_gradient",
            )  # fmt: skip


def _unmoved(run: Shown) -> Iterator[Finding]:
    """Mappings that stay as they are, with their gradients; mappings without gradients that move all the same are moved
    by weight decay alone."""
    for mapping in MAPPINGS:
        learned = mapping in run.header.config.get("learn", MAPPINGS)
        if not learned or (mapping == "res" and run.header.config.get("connection") == "identity"):
            continue
        # H_res of a stream's first site mixes streams that are equal: it never has a gradient, and need not move.
        begin = {stream[0] for stream in run.header.streams} if mapping == "res" else set()
        dead = {site: since for site, since in _lasting(run.dead[mapping]).items() if site not in begin}
        still = {site: since for site, since in _still(run, mapping).items() if site not in begin}
        told: set[int] = set()
        for since, sites in _grouped(still):
            without = all(site in dead for site in sites)
            why = f": its gradient is below {run.header.settings.get('epsilon', 0):g}" if without else ""
            when = "at all" if since == 0 else f"since step {run.moments[since]:,}"
            yield Finding(f"H_{mapping} of {in_words(run, sites)} has not moved {when}{why}.", f"map_{mapping}")
            told |= set(sites)
        for since, sites in _grouped({site: span for site, span in dead.items() if site not in told}):
            when = "in the whole run" if since == 0 else f"since step {run.spans[since]:,}"
            yield Finding(
                f"H_{mapping} of {in_words(run, sites)} has had no gradient above "
                f"{run.header.settings.get('epsilon', 0):g} {when}.", "bias_gradient",
            )  # fmt: skip


RULES: tuple[Callable[[Shown], Iterable[Finding]], ...] = (
    _end, _loss, _gains, _unmoved, _averaged, _streams, _sums, _depth,
)  # fmt: skip


# -- what rules are made of --------------------------------------------------------------------------------------------


def _at_end(
    run: Shown, name: str, beyond: Callable[[Array], Array], worst: Callable[[Array], float]
) -> Iterator[tuple[list[int], int, float]]:
    """The sites where a figure is beyond its bound at the end, since when all of them are, and its worst value."""
    if name not in run.grids:
        return
    grid = run.grids[name]
    sites = np.flatnonzero(beyond(grid[-1])).tolist()
    if sites:
        inside = np.flatnonzero(~beyond(grid[:, sites]).all(axis=1))
        yield sites, int(inside[-1]) + 1 if len(inside) else 0, float(worst(grid[-1, sites]))


def _since(run: Shown, span: int) -> str:
    return f" since step {run.spans[span]:,}" if span else ""


def _still(run: Shown, mapping: str) -> dict[int, int]:
    """site -> the moment since which it has not moved, of those that have stayed for a good part of the run."""
    found: dict[int, int] = {}
    moments = run.maps[mapping]
    if len(moments) < FEWEST:
        return found
    for site in range(len(run.header.sites)):
        there = [moment[site] for moment in moments]
        values = [value for value in there if value is not None]
        if len(values) < len(there):
            continue
        stack = np.stack(values)
        # Beyond rounding: by more than one in the last digit. nan, where a mean was not finite, is a change.
        same = np.abs(stack - stack[-1]) <= 1.01 * _last_digit(stack[-1])
        moved = np.flatnonzero(~same.reshape(len(stack), -1).all(axis=1))
        since = int(moved[-1]) + 1 if len(moved) else 0
        if _lasts(np.array(run.moments), since):
            found[site] = since
    return found


def _last_digit(values: Array) -> Array:
    """One in the last digit that a file has of these."""
    size = np.maximum(np.abs(values), 1e-6)
    return 10.0 ** (np.floor(np.log10(size)) + 1 - DIGITS)


def _lasting(dead: Array) -> dict[int, int]:
    """site -> the span since which it has been dead, of those that are for a good part of the run."""
    found, spans = {}, len(dead)
    for site in range(dead.shape[1]):
        alive = np.flatnonzero(~dead[:, site])
        since = int(alive[-1]) + 1 if len(alive) else 0
        if spans >= FEWEST and spans - since >= max(FEWEST - 1, PART * spans):
            found[site] = since
    return found


def _lasts(steps: Array, since: int) -> bool:
    return len(steps) - since >= FEWEST - 1 and steps[-1] - steps[since] >= PART * (steps[-1] - steps[0])


def _grouped(since: dict[int, int]) -> Iterator[tuple[int, list[int]]]:
    """Those that never did, and those that have stopped, with the time since which all of these have."""
    never = [site for site, when in since.items() if when == 0]
    stopped = [site for site, when in since.items() if when > 0]
    if never:
        yield 0, never
    if stopped:
        yield max(since[site] for site in stopped), stopped


def in_words(run: Shown, numbers: Sequence[int]) -> str:
    """Sites by their layers, where a layer is a number in their names: `layers 9 to 12`; else by their names."""
    sites = run.header.sites
    if len(numbers) == len(sites) > 1:
        return "all sites"
    layers = [_layer(site.name) for site in sites]
    chosen = dict.fromkeys(layers[k] for k in numbers)
    whole = all(layers.count(layer) == sum(layers[k] == layer for k in numbers) for layer in chosen)
    if None not in layers and whole:
        texts = []
        groups: dict[str, list[int]] = {}
        for prefix, number in filter(None, chosen):
            groups.setdefault(prefix, []).append(number)
        several = len({layer[0] for layer in layers if layer}) > 1
        for prefix, values in groups.items():
            word = "layer" if len(values) == 1 else "layers"
            texts.append(f"{word} {ranges(values)}" + (f" of `{prefix}`" if several else ""))
        return " and ".join(texts)
    names = list(fold(dict.fromkeys(sites[k].name for k in numbers)))
    if sum(map(len, names)) > LONGEST:
        return f"{len(numbers)} of {len(sites)} sites, `{sites[numbers[0]].name}` the first,"
    return ", ".join(f"`{name}`" for name in names)


def _layer(name: str) -> tuple[str, int] | None:
    """`model.layers.9.mhc_0` -> ("model.layers", 9); None where not exactly one part of the name is a number."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    if len(numbers) != 1:
        return None
    prefix = re.split(r"(?:^|\.)\d+(?=\.|$)", name)[0]
    return prefix, int(numbers[0])


def ranges(values: Sequence[int]) -> str:
    """`[2, 9, 10, 11, 15]` -> `2, 9 to 11 and 15`."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]} {'to' if len(run) > 2 else 'and'} {run[-1]}" for run in runs]
    return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " and " + texts[-1]


def _number(value: float, digits: int = 3) -> str:
    """Three digits, and thousands set apart."""
    short = float(f"{value:.{digits}g}")
    return f"{short:,.0f}" if 1000 <= abs(short) < 1e7 else f"{short:g}"


# -- two runs ----------------------------------------------------------------------------------------------------------


def differences(run: Shown, other: Shown, names: tuple[str, str]) -> list[Finding]:
    """What differs between two runs; first, whether they can be compared site by site."""
    found = []
    if run.header.model != other.header.model or run.header.sites != other.header.sites:
        what = "different models" if run.header.model != other.header.model else "the same model with other sites"
        found.append(Finding(
            f"The runs are of {what}: {run.header.model} with {len(run.header.sites)} sites, {other.header.model} with "
            f"{len(other.header.sites)}. What is over all sites is compared; what is by site stands side by side, each "
            "with its own sites.", "loss", bad=False,
        ))  # fmt: skip
    changed = [
        f"{key} {run.header.config.get(key)} and {other.header.config.get(key)}"
        for key in dict.fromkeys([*run.header.config, *other.header.config])
        if run.header.config.get(key) != other.header.config.get(key)
    ]
    if changed:
        found.append(Finding(f"Their options differ: {'; '.join(changed)}.", "loss", bad=False))
    until = min(run.steps[-1], other.steps[-1])
    mine, others = _late_loss(run, until), _late_loss(other, until)
    if mine is not None and others is not None:
        less = f"{_number(abs(mine - others))} less in {names[mine > others]}" if mine != others else "no difference"
        found.append(Finding(
            f"Up to step {until:,}, the last that both have, the loss comes to {_number(mine, 4)} in {names[0]} and to "
            f"{_number(others, 4)} in {names[1]}: {less}.", "loss", bad=False,
        ))  # fmt: skip
    for way in ("forward", "backward"):
        gains = [one.over_sites[name] for one in (run, other) if (name := f"composite_{way}_99") in one.over_sites]
        if len(gains) == 2:
            a, b = (float(np.nanmax(gain[2])) for gain in gains)
            if max(a, b) > 2 * min(a, b):
                found.append(Finding(
                    f"The composite gain {way} comes to {_number(a)} in {names[0]} and to {_number(b)} in {names[1]}.",
                    f"composite_{way}", bad=False,
                ))  # fmt: skip
    return found


def _late_loss(run: Shown, until: int) -> float | None:
    """The mean over the last tenth of the steps up to this one."""
    late = run.loss[(run.steps <= until) & (run.steps >= until - 0.1 * (until - run.steps[0]))]
    late = late[np.isfinite(late)]
    return float(late.mean()) if len(late) else None

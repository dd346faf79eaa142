"""A run as a report needs it: few enough numbers for a page, however long the run was, and no extreme left out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mhc_rewrite.errors import RunFileError
from mhc_rewrite.insight.watching.format import FIGURES, MAPPINGS, Header, Scan

Array = NDArray[Any]

SPANS = 300  # of steps, in which samples lie together: columns of a heat map
CELLS = 48_000  # of a heat map, at most
KEPT = 200  # times at which the matrices of all sites are kept, at most
NUMBERS = 6_000_000  # in the matrices that are kept, at most
AT_ONCE = 256  # samples that are taken up together

# Of the samples of a span the largest is kept of these, as it is what harms; of all others the mean.
_LARGEST = ("error", "gain", "composite", "gradient", "dominant")


@dataclass(frozen=True)
class Shown:
    """A run.

    Attributes:
        name: of its file.
        steps: of all samples.
        loss: at each of them; nan where there is none.
        known: whether a loss was written at all.
        over_sites: figure -> (3, samples): the smallest, the median and the largest over sites.
        spans: the first step of each span of samples; each has its own where there are few.
        grids: figure -> (spans, sites).
        dead: mapping -> (spans, sites): whether its gradient was below epsilon in all samples of the span.
        moments: steps at which the matrices were kept, the first and the last among them.
        maps: mapping -> at each moment, for each site, n numbers, H_res (n, n); or None.
        composites: at each moment, for each stream, a matrix or None.
        notes: what was not as usual -> its first step and the number of samples that say so.
    """

    name: str
    header: Header
    end: str | None
    steps: Array
    loss: Array
    over_sites: dict[str, Array]
    spans: Array
    grids: dict[str, Array]
    dead: dict[str, Array]
    moments: list[int]
    maps: dict[str, list[list[Array | None]]]
    composites: list[list[Array | None]]
    notes: dict[str, tuple[int, int]]

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.loss).any())


def shown(file: str | os.PathLike[str]) -> Shown:
    """The run in a file, in memory that does not grow with its length but for a few numbers a sample.

    Raises:
        RunFileError: the file can't be read, is none of a run, or has no sample yet.
    """
    scan = Scan(file)
    if not scan.steps:
        went_on = "" if scan.run.end is None else f" It ended: {scan.run.end}."
        raise RunFileError(
            f"{scan.file} has no sample yet: its run was watched at every {scan.run.header.settings.get('every', '?')} "
            f"steps.{went_on} Report it when the first one is there."
        )
    return _Taken(scan).shown()


class _Taken:
    """Takes up samples, a few hundred at once."""

    def __init__(self, scan: Scan) -> None:
        self.scan, self.sites, count = scan, scan.run.header.sites, len(scan.steps)
        self.names = list(FIGURES)
        spans = max(1, min(count, SPANS, CELLS // max(1, len(self.sites))))
        self.span_of = np.arange(count) * spans // count
        sizes = sum(site.n**2 + 2 * site.n for site in self.sites) or 1
        kept = max(2, min(count, KEPT, NUMBERS // sizes))
        self.kept = set(np.linspace(0, count - 1, kept).round().astype(int).tolist())
        shape = (len(self.names), spans, len(self.sites))
        self.largest, self.sum, self.count = np.full(shape, np.nan, "f4"), np.zeros(shape, "f4"), np.zeros(shape, "i4")
        self.over_sites = np.full((len(self.names), 3, count), np.nan)
        self.alive = {mapping: np.zeros(shape[1:], bool) for mapping in MAPPINGS}
        self.seen = np.zeros(spans, bool)
        self.loss = np.full(count, np.nan)
        self.moments: list[int] = []
        self.maps: dict[str, list[list[Array | None]]] = {mapping: [] for mapping in MAPPINGS}
        self.composites: list[list[Array | None]] = []
        self.notes: dict[str, tuple[int, int]] = {}

    def shown(self) -> Shown:
        for first, samples in self._some():
            self._figures(first, samples)
            for number, sample in enumerate(samples, first):
                self._others(number, sample)
        scan, mean = self.scan, np.where(self.count > 0, self.sum / np.maximum(1, self.count), np.nan)
        there = {name: k for k, name in enumerate(self.names) if self.count[k].any()}
        grid = {name: self.largest[k] if any(part in name for part in _LARGEST) else mean[k]
                for name, k in there.items()}  # fmt: skip
        steps = np.array(scan.steps)
        starts = steps[np.unique(self.span_of, return_index=True)[1]]
        return Shown(
            scan.file.name, scan.run.header, scan.run.end, steps, self.loss,
            {name: self.over_sites[k] for name, k in there.items()}, starts, grid,
            {mapping: ~alive for mapping, alive in self.alive.items()},
            self.moments, self.maps, self.composites, self.notes,
        )  # fmt: skip

    def _some(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        samples, first = self.scan.samples(), 0
        while some := list(itertools.islice(samples, AT_ONCE)):
            yield first, some
            first += len(some)

    def _figures(self, first: int, samples: list[dict[str, Any]]) -> None:
        nothing = [None] * len(self.sites)
        rows = [[sample["figures"].get(name, nothing) for name in self.names] for sample in samples]
        values = np.array(rows, dtype="f8").swapaxes(0, 1)  # (figures, samples, sites); nan for None
        here = slice(first, first + len(samples))
        known = np.isfinite(values)
        self.over_sites[..., here] = _over_sites(values, known.sum(axis=-1))
        spans, starts = np.unique(self.span_of[here], return_index=True)
        self.largest[:, spans] = np.fmax(self.largest[:, spans], np.fmax.reduceat(values, starts, axis=1))
        self.sum[:, spans] += np.add.reduceat(np.where(known, values, 0), starts, axis=1)
        self.count[:, spans] += np.add.reduceat(known.astype("i4"), starts, axis=1)

    def _others(self, number: int, sample: dict[str, Any]) -> None:
        step, span = sample["step"], self.span_of[number]
        if sample.get("loss") is not None:
            self.loss[number] = sample["loss"]
        for mapping, alive in self.alive.items():
            living = np.ones(len(self.sites), bool)
            living[sample.get("dead", {}).get(mapping, [])] = False
            alive[span] |= living
        for note in sample.get("notes", []):
            since, count = self.notes.get(note, (step, 0))
            self.notes[note] = since, count + 1
        if number in self.kept and "maps" in sample:
            self.moments.append(step)
            for mapping, moments in self.maps.items():
                moments.append([self._map(mapping, site.n, value)
                                for site, value in zip(self.sites, sample["maps"][mapping])])  # fmt: skip
            self.composites.append([_matrix(found) for found in sample.get("composite", [])])

    @staticmethod
    def _map(mapping: str, n: int, value: list[float | None] | None) -> Array | None:
        if value is None:
            return None
        return np.array(value, "f4").reshape((n, n) if mapping == "res" else (n,))


def _over_sites(values: Array, count: Array) -> Array:
    """The smallest, the median and the largest of what is known, (figures, 3, samples); numpy's is slow with nan."""
    ordered = np.sort(values, axis=-1)  # nan at the end

    def at(place: Array) -> Array:
        return np.take_along_axis(ordered, np.maximum(place, 0)[..., None], axis=-1)[..., 0]

    return np.stack([at(0 * count), (at((count - 1) // 2) + at(count // 2)) / 2, at(count - 1)], axis=1)


def _matrix(found: dict[str, Any] | None) -> Array | None:
    return None if found is None else np.array(found["map"], "f4").reshape(found["shape"])


def thin(steps: Array, values: Array, spans: int = 400) -> tuple[Array, Array]:
    """Both ends, and no more than twice as many points as spans: the smallest and the largest of each."""
    if len(steps) <= 2 * spans:
        return steps, values
    chosen: set[int] = {0, len(steps) - 1}
    for part in np.array_split(np.arange(len(steps)), spans):
        finite = part[np.isfinite(values[part])]
        # A span of nothing but gaps stays a gap.
        chosen |= (
            {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
            if len(finite)
            else {int(part[0])}
        )
    places = np.array(sorted(chosen))
    return steps[places], values[places]

"""The file of a watched run: lines of JSON, of which the first says what the others hold. Writer and reader.

**The header**, the first line:

    mhc_rewrite  "run", by which the file is known
    format       1
    version      of this package
    model        the class of the converted model
    config       its options, as `MHCConfig.to_dict` gives them
    settings     `every`: a sample at every so many steps; `tokens`: how many tokens each figure is taken from, at most,
                 of each process; `epsilon`: below it the gradient of a mapping is dead
    drawing      the model as an SVG, as text; left out where there is none
    sites        one entry a call of a site, stream after stream, in each in the order of calls; a site that is called
                 several times stands there as often. `stream` (number), `name`, `call` (0, or 1, 2, ... where the
                 name is called again), `branch`, `n`, `width`

**A sample**, one line each. An array over sites has an entry for each of the header's `sites`, in their order. `null`
is what is not known at that site and step, or is not finite.

    step         optimizer steps made before this one, from 0
    loss         or null
    figures      name -> array over sites; the names are those of `FIGURES`
    dead         "pre", "post", "res" -> numbers of the sites whose mapping has no gradient above epsilon
    maps         "pre", "post", "res" -> array over sites of the mean over tokens of that mapping, n or n * n numbers,
                 H_res row-major as [out, in]
    composite    one entry a stream: `map`, the mean over tokens of the product of H_res over all its sites, row-major
                 as [out, in], and its `shape`; null where there is none
    notes        what was not as usual at this step, as sentences; left out where there is nothing

**The end**, where the run came to it: `{"end": "finished"}`, or the error that ended it. A file without it is of a run
that goes on, or that was killed.

A run that goes on from a checkpoint writes to the same file. So a sample whose step is not above that of the samples
before it takes the place of all that are not below it, and an end in the middle is none. Numbers have four digits, the
loss six: a sample is about 500 bytes a site for four streams.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mhc_rewrite.errors import RunFileError

FORMAT = 1
MAPPINGS = ("pre", "post", "res")
DIGITS, LOSS_DIGITS = 4, 6

# Those of tokens are means over them, or quantiles where the name says so.
FIGURES = {
    "row_error": "H_res: the largest difference of a row's sum from 1, median over tokens",
    "row_error_99": "the same, 99 % quantile over tokens",
    "column_error": "H_res: the largest difference of a column's sum from 1, median over tokens",
    "column_error_99": "the same, 99 % quantile over tokens",
    "from_identity": "H_res: Frobenius norm of its difference from I",
    "from_uniform": "H_res: Frobenius norm of its difference from the matrix of 1/n",
    "second_singular": "H_res: its second singular value, of at most 32 tokens",
    "forward_gain": "H_res: the largest absolute row sum, median over tokens",
    "forward_gain_99": "the same, 99 % quantile over tokens",
    "backward_gain": "H_res: the largest absolute column sum, median over tokens",
    "backward_gain_99": "the same, 99 % quantile over tokens",
    "composite_forward": "the largest absolute row sum of the product of H_res from the stream's first site to this "
    "one, median over tokens: how much a signal can grow on the way here",
    "composite_forward_99": "the same, 99 % quantile over tokens",
    "composite_backward": "the largest absolute column sum of the product of H_res from this site to the stream's last "
    "one, median over tokens: how much a gradient can grow on the way back to here",
    "composite_backward_99": "the same, 99 % quantile over tokens",
    "pre_entropy": "entropy of the shares of H_pre, by size, over log n: 1 where all streams are read alike, 0 where "
    "one is",
    "pre_argmax": "the stream that most tokens read most of",
    "pre_argmax_share": "the share of tokens that do",
    "post_spread": "standard deviation of H_post over the streams",
    "spread": "how far streams are apart after the site: rms of their differences from their mean, over the mean's rms",
    "dominant": "the largest stream's share of the sum of squares after the site: 1/n where all are as large",
    "rank": "effective rank of the streams after the site, the exponential of the entropy of their singular values' "
    "shares: 1 where all are equal, n where they are orthogonal and as large; of at most 32 tokens",
    "state_gradient": "norm of the gradient of the state that the site reads, over all streams and tokens; null "
    "at a stream's entry, where the streams are one tensor",
    "trunk_gradient": "norm of the sum of that gradient over the streams: the trunk's",
    **{
        f"{parameter}_{mapping}_gradient": f"norm of the gradient of {parameter}, the part that makes H_{mapping}"
        for parameter in ("phi", "alpha", "bias")
        for mapping in MAPPINGS
    },
}  # fmt: skip


@dataclass(frozen=True)
class SiteCall:
    """A call of a site: an entry of the header's `sites`."""

    stream: int
    name: str
    call: int
    branch: str
    n: int
    width: int

    def __str__(self) -> str:
        return f"{self.name} (call {self.call + 1})" if self.call else self.name


@dataclass(frozen=True)
class Header:
    """The first line."""

    model: str
    config: dict[str, Any]
    settings: dict[str, Any]
    sites: tuple[SiteCall, ...]
    version: str = ""
    drawing: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "mhc_rewrite": "run", "format": FORMAT, "version": self.version, "model": self.model,
            "config": self.config, "settings": self.settings, "sites": [vars(site) for site in self.sites],
            **({"drawing": self.drawing} if self.drawing else {}),
        }  # fmt: skip

    def same_run(self, other: Header) -> bool:
        """Whether samples of the other fit behind this header."""
        return (self.model, self.sites) == (other.model, other.sites)

    @property
    def streams(self) -> list[list[int]]:
        """The numbers of the sites of each stream."""
        found: dict[int, list[int]] = {}
        for number, site in enumerate(self.sites):
            found.setdefault(site.stream, []).append(number)
        return list(found.values())


@dataclass
class Run:
    """A file that was read.

    Attributes:
        samples: as the lines are, in the order of their steps.
        end: "finished", the error that ended the run, or None.
    """

    header: Header
    samples: list[dict[str, Any]] = field(default_factory=list)
    end: str | None = None

    @property
    def steps(self) -> list[int]:
        return [sample["step"] for sample in self.samples]

    def figure(self, name: str) -> list[list[float | None]]:
        """One of `FIGURES` by sample and site."""
        nothing = [None] * len(self.header.sites)
        return [sample["figures"].get(name, nothing) for sample in self.samples]


class Reader:
    """Reads a file that may still be written to.

        reader = Reader("run.jsonl")
        while not reader.run.end:
            new = reader.more()

    Raises:
        RunFileError: the file can't be read, is empty, or is none of a run.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        self._place = 0
        self._number = 0
        lines = iter(self._lines())
        if (first := next(lines, None)) is None:
            raise RunFileError(
                f"{self.file} holds no line yet. A run that is watched writes the first one when watching begins."
            )
        self.run = Run(self._header(first))
        self._add(lines)

    def more(self) -> list[dict[str, Any]]:
        """The samples that have come since the last call; they are in `run` too."""
        return self._add(self._lines())

    def _lines(self) -> Iterable[str]:
        """Whole lines from the last place on: one that is cut off may be on its way still."""
        try:
            with self.file.open("rb") as file:
                if self._place > os.fstat(file.fileno()).st_size:
                    raise RunFileError(f"{self.file} has become shorter while it was read: read it again.")
                file.seek(self._place)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._place += len(line)
                    self._number += 1
                    yield line.decode("utf-8", "replace")
        except OSError as error:
            raise RunFileError(f"{self.file} can't be read: {error.strerror or error}.") from error

    def _header(self, line: str) -> Header:
        try:
            data = json.loads(line)
        except ValueError:
            data = None
        if not isinstance(data, dict) or data.get("mhc_rewrite") != "run":
            raise RunFileError(
                f"{self.file} is no file of a watched run: its first line would say so. "
                "mhc_rewrite.watch(model, to=...) writes such files."
            )
        if data.get("format") != FORMAT:
            raise RunFileError(f"{self.file} has format {data.get('format')!r}; format {FORMAT} is understood.")
        try:
            sites = tuple(SiteCall(**site) for site in data["sites"])
            return Header(data["model"], data["config"], data["settings"], sites, data.get("version", ""),
                          data.get("drawing", ""))  # fmt: skip
        except (KeyError, TypeError) as error:
            raise RunFileError(f"The first line of {self.file} is no header of format {FORMAT}: {error}.") from error

    def _add(self, lines: Iterable[str]) -> list[dict[str, Any]]:
        new = []
        for line in lines:
            sample = self._sample(line, self._number)
            self.run.end = sample.get("end")
            if self.run.end is None:
                while self.run.samples and self.run.samples[-1]["step"] >= sample["step"]:
                    self.run.samples.pop()
                self.run.samples.append(sample)
                new.append(sample)
        return new

    def _sample(self, line: str, number: int) -> dict[str, Any]:
        try:
            sample = json.loads(line)
        except ValueError:
            sample = None
        if isinstance(sample, dict):
            if isinstance(sample.get("end"), str):
                return sample
            if isinstance(sample.get("step"), int) and isinstance(sample.get("figures"), dict):
                count = len(self.run.header.sites)
                if all(isinstance(values, list) and len(values) == count for values in sample["figures"].values()):
                    return sample
        raise RunFileError(
            f"Line {number} of {self.file} is no sample of its run. Was something else written to the file?"
        )


class Scan(Reader):
    """The samples of a file one after another, as often as they are asked for: of files too large to be held.

    Attributes:
        run: without samples.
        steps: of the samples, in their order.
        fresh: the number of the first sample that is another since the last call of `more`.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self._places: list[tuple[int, int]] = []  # of samples: the line's place and number
        self.steps: list[int] = []
        self.fresh = 0
        super().__init__(file)

    def more(self) -> list[dict[str, Any]]:
        """The samples from `fresh` on."""
        self.fresh = len(self.steps)
        self._add(self._lines())
        return list(self.samples(self.fresh))

    def samples(self, first: int = 0) -> Iterator[dict[str, Any]]:
        with self.file.open("rb") as file:
            for place, number in self._places[first:]:
                file.seek(place)
                yield self._sample(file.readline().decode("utf-8", "replace"), number)

    def _add(self, lines: Iterable[str]) -> list[dict[str, Any]]:
        place = self._place
        for line in lines:
            found = re.match(r'\{"step": ?(\d+),', line)
            sample: dict[str, Any] = {"step": int(found[1])} if found else self._sample(line, self._number)
            self.run.end = sample.get("end")
            if self.run.end is None:
                while self.steps and self.steps[-1] >= sample["step"]:
                    self.steps.pop()
                    self._places.pop()
                self.fresh = min(self.fresh, len(self.steps))
                self.steps.append(sample["step"])
                self._places.append((place, self._number))
            place = self._place
        return []


def read(file: str | os.PathLike[str]) -> Run:
    """The run in a file; a last line that is cut off is left out.

    Raises:
        RunFileError: the file can't be read, is empty, or is none of a run.
    """
    return Reader(file).run


class Writer:
    """Writes a file, each line at once.

    Args:
        file: to be made; with its folder.
        header: the first line, written when the second one is.
        resume: go on in a file that is there, if it is of the same model with the same sites.

    Raises:
        RunFileError: the file is there and not to be gone on with, is another run's, or can't be written.
    """

    def __init__(self, file: str | os.PathLike[str], header: Header, resume: bool = False) -> None:
        self.file = Path(file)
        there = self._check(self.file, header, resume)
        self._header: Header | None = None if there else header  # to be written before the first line
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if there:
                _cut_last_line(self.file)
            self._open = self.file.open("a", encoding="utf-8")
        except OSError as error:
            raise RunFileError(f"{self.file} can't be written: {error.strerror or error}.") from error

    @staticmethod
    def _check(file: Path, header: Header, resume: bool) -> bool:
        """Whether a run is there that this one goes on with."""
        there = file.exists() and (file.is_dir() or file.stat().st_size > 0)
        if there and not resume:
            raise RunFileError(
                f"{file} is there already. Take another name, remove it, or go on in it with "
                "watch(..., resume=True) where this run continues that one."
            )
        if there and not read(file).header.same_run(header):
            raise RunFileError(f"{file} is of another model, or of other sites: take another name for this run.")
        return there

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
            RunFileError: the run has ended.
        """
        if self._open.closed:
            raise RunFileError(f"{self.file} has its end: to go on, watch anew with resume=True.")
        if self._header is not None:
            header, self._header = self._header, None
            self.write(header.to_dict())
        self._open.write(json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n")
        self._open.flush()

    def close(self, end: str) -> None:
        """Says how the run ended."""
        if not self._open.closed:
            self.write({"end": end})
            self._open.close()


def _cut_last_line(file: Path) -> None:
    """Removes what stands behind the last whole line."""
    with file.open("rb+") as opened:
        place = opened.seek(0, os.SEEK_END)
        while place:
            start = max(0, place - 65536)
            opened.seek(start)
            found = opened.read(place - start).rfind(b"\n")
            if found >= 0:
                opened.truncate(start + found + 1)
                return
            place = start


def short(value: float | None, digits: int = DIGITS) -> float | None:
    """Few digits; None for what is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def shorts(values: Sequence[float | None]) -> list[float | None]:
    return [short(value) for value in values]

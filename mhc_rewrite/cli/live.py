"""`mhc-rewrite watch`: a run in progress as a table of its figures over sites, with their way so far."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from mhc_rewrite.insight.watching.format import MAPPINGS, Header, Scan
from mhc_rewrite.printing import as_text, plain_table, plural

PAUSE = 1.0  # seconds between looks at the file
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 32  # of the way so far
# Figure, what it is called, and which of the sites is told of: the one where it is worst.
ROWS = (
    ("composite_forward_99", "composite gain, forward", max),
    ("composite_backward_99", "composite gain, backward", max),
    ("column_error_99", "error of H_res's column sums", max),
    ("second_singular", "second singular value of H_res", min),
    ("pre_entropy", "entropy of H_pre", min),
    ("post_spread", "spread of H_post", min),
    ("spread", "streams apart", min),
    ("dominant", "largest stream's share", max),
    ("state_gradient", "gradient of the state", max),
    ("bias_pre_gradient", "gradient of the bias of H_pre", min),
    ("bias_post_gradient", "gradient of the bias of H_post", min),
    ("bias_res_gradient", "gradient of the bias of H_res", min),
)


def follow(scan: Scan, once: bool) -> None:
    """Shows a run until it ends: on a terminal as a table that stays in its place, elsewhere as a line a sample.

    Raises:
        RunFileError: the file is cut or overwritten meanwhile.
    """
    console, seen = Console(), _Seen(scan)
    if once:
        shown = seen.shown(console.width if console.is_terminal else 100)
        console.print(shown) if console.is_terminal else print(as_text(shown))
        return
    with contextlib.suppress(KeyboardInterrupt):
        if console.is_terminal:
            with Live(seen.shown(console.width), console=console, auto_refresh=False) as live:
                while scan.run.end is None:
                    time.sleep(PAUSE)
                    seen.look()
                    live.update(seen.shown(console.width), refresh=True)
        else:
            said = seen.say(0)
            while scan.run.end is None:
                time.sleep(PAUSE)
                seen.look()
                said = seen.say(min(said, scan.fresh))
            print(_state(scan.run.end), flush=True)


class _Seen:
    """Of each sample its step, its loss and a value of each row; of the last one all."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.values: dict[str, list[float]] = {figure: [] for figure, _, _ in ROWS}
        self.last: dict[str, Any] | None = None
        self._take(scan.samples())

    def look(self) -> None:
        """Takes up what has been written since."""
        new = self.scan.more()
        del self.steps[self.scan.fresh :]
        for values in (self.losses, *self.values.values()):
            del values[self.scan.fresh :]
        self._take(new)

    def _take(self, samples: Iterable[dict[str, Any]]) -> None:
        for sample in samples:
            self.last = sample
            self.steps.append(sample["step"])
            self.losses.append(_known(sample.get("loss")))
            for figure, _, worst in ROWS:
                self.values[figure].append(_worst(sample["figures"].get(figure, ()), worst)[0])

    def say(self, first: int) -> int:
        """A line for each sample from this one on; returns how many have been said."""
        for k in range(first, len(self.steps)):
            parts = [f"step {self.steps[k]:,}", f"loss {_short(self.losses[k])}"]
            parts += [f"{name} {_short(self.values[figure][k])}" for figure, name, _ in ROWS[:2] + ROWS[6:7]]
            print("  ".join(parts), flush=True)
        return len(self.steps)

    def shown(self, width: int) -> RenderableType:
        header = self.scan.run.header
        head = Text(f"{header.model}, {plural(len(header.sites), 'site')}, {self.scan.file}", style="bold")
        if self.last is None:
            return Group(head, Text(f"No sample yet: one is taken at every {header.settings.get('every', '?')} steps."),
                         Text(_state(self.scan.run.end), style="dim"))  # fmt: skip
        return Group(
            head,
            Text(f"step {self.steps[-1]:,}, {plural(len(self.steps), 'sample')}, {_state(self.scan.run.end)}"),
            Text(),
            self._table(max(8, min(WIDTH, width - 78))),
            *[Text(text, style="yellow") for text in _remarks(header, self.last)],
        )

    def _table(self, width: int) -> RenderableType:
        assert self.last is not None
        table = plain_table("figure", "first", "now", "so far", "at site")
        for column in table.columns[1:3]:
            column.justify = "right"
        table.columns[3].no_wrap = True
        table.add_row("loss", _short(self.losses[0]), _short(self.losses[-1]), spark(self.losses, width), "")
        for figure, name, worst in ROWS:
            values = self.values[figure]
            if any(math.isfinite(value) for value in values):
                _, site = _worst(self.last["figures"].get(figure, ()), worst)
                where = "" if site is None else str(self.scan.run.header.sites[site])
                table.add_row(name, _short(values[0]), _short(values[-1]), spark(values, width), where)
        return table


def _state(end: str | None) -> str:
    return {None: "running", "finished": "finished"}.get(end, f"failed: {end}")


def _remarks(header: Header, sample: dict[str, Any]) -> list[str]:
    dead = [f"H_{mapping} of {plural(len(sites), 'site')}" for mapping in MAPPINGS
            if (sites := sample.get("dead", {}).get(mapping))]  # fmt: skip
    epsilon = header.settings.get("epsilon", 0)
    return ([f"No gradient above {epsilon:g}: {', '.join(dead)}."] if dead else []) + sample.get("notes", [])


def _known(value: float | None) -> float:
    return math.nan if value is None else value


def _worst(values: Sequence[float | None], worst: Callable[..., float]) -> tuple[float, int | None]:
    """The value that is worst, and where it is."""
    known = [(value, site) for site, value in enumerate(values) if value is not None]
    return worst(known) if known else (math.nan, None)  # type: ignore[return-value]


def spark(values: Sequence[float], width: int) -> str:
    """Their way in one line, of logarithms where they span much; a gap is blank."""
    count = min(width, len(values))
    parts = [values[k * len(values) // count : (k + 1) * len(values) // count] for k in range(count)]
    means = [
        statistics.fmean(known) if (known := [v for v in part if math.isfinite(v)]) else math.nan for part in parts
    ]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return " " * count
    if min(finite) > 0 and max(finite) > 50 * min(finite):
        means = [math.log(value) if math.isfinite(value) else value for value in means]
        finite = [math.log(value) for value in finite]
    low, reach = min(finite), max(finite) - min(finite)
    return "".join(
        " " if not math.isfinite(value) else BLOCKS[round((value - low) / reach * (len(BLOCKS) - 1)) if reach else 0]
        for value in means
    )


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"

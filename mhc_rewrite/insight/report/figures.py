"""A run's pictures for a paper, as .svg and .pdf: small, with text as text, and the same each time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mhc_rewrite.insight.report.cards import CARDS, Card
from mhc_rewrite.insight.report.page import short_names
from mhc_rewrite.insight.report.reading import Array, Shown, thin

KINDS = ("svg", "pdf")
WIDTH = 5.5  # inches: a column of text
_COLOURS = ("#2257c4", "#c2570c")
_STYLES = ("-", ":", "--")
_LOOK: dict[Any, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.alpha": 0.3, "lines.linewidth": 1.0, "font.sans-serif": ["DejaVu Sans"], "svg.fonttype": "none",
    "pdf.fonttype": 42, "legend.frameon": False, "svg.hashsalt": "mhc_rewrite", "legend.fontsize": 7,
}  # fmt: skip
Drawn = Iterator[tuple[str, Figure]]


def write(folder: Path, run: Shown, other: Shown | None = None, names: tuple[str, str] = ("", "")) -> list[Path]:
    """The loss, each figure over the steps and over depth, and the matrices at the end; the files that were written."""
    runs = [run] if other is None else [run, other]
    names = (names[0] or run.name, names[1] or (other.name if other else ""))
    written = []
    with matplotlib.rc_context(_LOOK):
        for name, figure in (*_curves(runs, names), *_matrices(runs, names)):
            FigureCanvasAgg(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # it is laid out, and need not be for each file
            for kind in KINDS:
                file = folder / f"{name}.{kind}"
                figure.savefig(file, metadata={"Date" if kind == "svg" else "CreationDate": None})
                written.append(file)
    return written


def _figure(rows: int, columns: int, height: float, **more: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def _curves(runs: list[Shown], names: tuple[str, str]) -> Drawn:
    if any(run.known for run in runs):
        figure, ((axis,),) = _figure(1, 1, 2.2)
        for run, name, colour in zip(runs, names, _COLOURS):
            axis.plot(*thin(run.steps, run.loss), color=colour, label=name)
        axis.set(xlabel="step", ylabel="loss")
        if len(runs) == 2:
            axis.legend()
        yield "loss", figure
    for card in CARDS:
        shown = [run for run in runs if set(card.lines) & set(run.over_sites)]
        if shown:
            yield card.key, _card(card, runs, names)


def _card(card: Card, runs: list[Shown], names: tuple[str, str]) -> Figure:
    """Lines and a heat map beside each other; with two runs, both heat maps below the lines."""
    grids = [(run, name) for run, name in zip(runs, names) if card.grid in run.grids]
    figure = Figure(figsize=(WIDTH, 2.2 if len(runs) == 1 else 4.2), layout="constrained")
    below = len(runs) == 2 and len(grids) > 0
    places = figure.add_gridspec(1 + below, max(1, len(grids)) if below else 1 + len(grids))
    lines = figure.add_subplot(places[0, :] if below else places[0, 0])
    row = {"median": 1, "largest": 2}[card.of]
    for run, name, colour in zip(runs, names, _COLOURS):
        for (figure_name, label), style in zip(card.lines.items(), _STYLES):
            if figure_name in run.over_sites:
                values = run.over_sites[figure_name]
                label = f"{label}, {name}" if len(runs) == 2 else label
                lines.plot(*thin(run.steps, values[row]), style, color=colour, label=label)
                if len(card.lines) == 1 and card.of == "median":
                    for edge in (values[0], values[2]):
                        lines.plot(*thin(run.steps, edge), color=colour, alpha=0.35, linewidth=0.6)
    lines.set(title=card.title, xlabel="step", ylabel=f"{card.of} over sites")
    if card.log and any(np.nanmax(np.asarray(line.get_ydata()), initial=0) > 0 for line in lines.get_lines()):
        lines.set_yscale("log")
        lines.yaxis.set_major_formatter(_plainly)
        lines.yaxis.set_minor_formatter(_plainly if _reach(lines.get_ylim()) < 10 else NullFormatter())
    if len(runs) == 2:
        figure.legend(*lines.get_legend_handles_labels(), loc="outside upper center", ncols=len(card.lines))
    elif len(card.lines) > 1:
        lines.legend()
    norm = _norm([run.grids[card.grid or ""] for run, _ in grids], card.log)
    for k, (run, name) in enumerate(grids):
        axis = figure.add_subplot(places[1, k] if below else places[0, 1 + k])
        _depth(figure, axis, card, run, name if len(runs) == 2 else "", norm)
    return figure


def _reach(limits: tuple[float, float]) -> float:
    return limits[1] / limits[0]


def _plainly(value: float, place: float = 0) -> str:
    return f"{value:g}"


def _norm(grids: list[Array], log: bool) -> Normalize:
    """The same colours for the same numbers of all runs."""
    values = np.concatenate([grid.ravel() for grid in grids]) if grids else np.zeros(0)
    values = values[np.isfinite(values) & (values > (0 if log else -np.inf))]
    low, high = (values.min(), values.max()) if values.size else (0, 1)
    return LogNorm(low, high) if log and low < high else Normalize(low, high)


def _depth(figure: Figure, axis: Any, card: Card, run: Shown, name: str, norm: Normalize) -> None:
    values = run.grids[card.grid or ""].T
    edges = np.append(run.spans, run.steps[-1] + 1) - 0.5
    places = np.arange(len(run.header.sites) + 1) - 0.5
    mesh = axis.pcolormesh(edges, places, values, norm=norm, cmap="Blues", rasterized=True)
    _sites(axis.set_yticks, run, 12)
    axis.set(xlabel="step", title=name)
    axis.invert_yaxis()
    axis.grid(False)
    bar = figure.colorbar(mesh, ax=axis)
    if isinstance(norm, LogNorm):
        bar.ax.yaxis.set_major_formatter(_plainly)
        bar.ax.yaxis.set_minor_formatter(_plainly if _reach((norm.vmin or 1, norm.vmax or 1)) < 10 else NullFormatter())


def _sites(ticks: Callable[..., Any], run: Shown, most: int) -> None:
    shorts = short_names(run.header.sites)
    at = list(range(0, len(shorts), -(-len(shorts) // most)))
    ticks(at, [shorts[k] for k in at], fontsize=6)


def _matrices(runs: list[Shown], names: tuple[str, str]) -> Drawn:
    """At the last step that has them: H_res of all sites as tiles, the composite map, H_pre and H_post over depth."""
    for run, name, number in zip(runs, names, ("", "_other")):
        if not run.moments:
            continue
        title = f"{name}, step {run.moments[-1]:,}" if len(runs) == 2 else f"step {run.moments[-1]:,}"
        yield f"map_res{number}", _tiles(run, title)
        composites = [found for found in run.composites[-1] if found is not None]
        if composites:
            figure, axes = _figure(1, len(composites), 1.9)
            for axis, found in zip(axes[0], composites):
                _matrix(axis, found, max(1.0, float(np.abs(found).max())))
                for (out, of), value in np.ndenumerate(found) if max(found.shape) <= 6 else ():
                    dark = value > 0.6 * max(1.0, found.max())
                    axis.text(of, out, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black")
                axis.spines[:].set_visible(False)
            figure.suptitle(f"product of H_res over depth, {title}")
            yield f"map_composite{number}", figure
        figure, axes = _figure(2, 1, 2.6, sharex=True)
        for (axis,), mapping, most in zip(axes, ("pre", "post"), (1, 2)):
            n = max(site.n for site in run.header.sites)
            rows = np.full((n, len(run.header.sites)), np.nan)
            for k, value in enumerate(run.maps[mapping][-1]):
                if value is not None:
                    rows[: len(value), k] = value
            drawn = axis.imshow(rows, aspect="auto", cmap="Blues", vmin=0, vmax=max(most, np.nanmax(rows, initial=0)))
            axis.set(title=f"H_{mapping}, {title}", ylabel="stream")
            axis.set_yticks(range(n), [str(k + 1) for k in range(n)])
            axis.grid(False)
            figure.colorbar(drawn, ax=axis)
        _sites(axes[1, 0].set_xticks, run, 8)
        yield f"map_read_write{number}", figure


def _tiles(run: Shown, title: str) -> Figure:
    """All of them in one picture, with a row and a column of nothing between them."""
    found, most = run.maps["res"][-1], max(site.n for site in run.header.sites)
    across = min(len(found), 8 if len(found) <= 48 else 20)
    down, size = -(-len(found) // across), most + 1
    whole = np.full((down * size, across * size), np.nan)
    for k, one in enumerate(found):
        if one is not None:
            top, left = k // across * size, k % across * size
            whole[top : top + len(one), left : left + len(one)] = one
    figure, ((axis,),) = _figure(1, 1, WIDTH * down / across + 0.5)
    _matrix(axis, whole, max(1.0, float(np.nanmax(np.abs(whole), initial=0))))
    for k, name in enumerate(short_names(run.header.sites) if len(found) <= 48 else ()):
        axis.text(k % across * size - 0.5, k // across * size - 0.6, name, fontsize=5, va="bottom")
    axis.set_axis_off()
    figure.suptitle(f"H_res, {title}")
    return figure


def _matrix(axis: Any, values: Any, most: float) -> None:
    negative = bool((values < 0).any())
    axis.imshow(values, cmap="RdBu" if negative else "Blues", vmin=-most if negative else 0, vmax=most)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)

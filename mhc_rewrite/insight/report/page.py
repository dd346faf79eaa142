"""The page of a report: one file that asks nothing of the network. Its look is in page.css, its drawing in page.js."""

from __future__ import annotations

import base64
import functools
import html
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from mhc_rewrite.insight.report.cards import CARDS, Card
from mhc_rewrite.insight.report.findings import Finding, differences, findings
from mhc_rewrite.insight.report.reading import Array, Shown, thin
from mhc_rewrite.insight.watching.format import MAPPINGS, SiteCall
from mhc_rewrite.printing import plural

MOMENTS = 60  # places of the slider, at most
NUMBERS = 600_000  # in the matrices of a page, at most
# Scripts and styles of the page itself and pictures inside it, and nothing from anywhere.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_OPTIONS = ("connection", "init", "dynamic", "learn", "collapse", "recompute")
_MAPS = {
    "res": ("H_res by site", "How each site mixes the streams, in the order of calls: rows are the streams written, "
            "columns those read."),
    "composite": ("The composite map", "The product of H_res over all sites: what the streams at the end have of those "
                  "at the start."),
    "pre": ("H_pre over depth", "How much of each stream a site's block reads."),
    "post": ("H_post over depth", "How much of a block's result is written to each stream."),
}  # fmt: skip


def page(run: Shown, other: Shown | None = None, names: tuple[str, str] = ("", "")) -> str:
    """The report of a run, or of two beside each other, as HTML.

    Args:
        names: by which two runs of files of one name are told apart.
    """
    runs = [run] if other is None else [run, other]
    names = (names[0] or run.name, names[1] or (other.name if other else ""))
    cards = [card for card in CARDS if any(set(card.lines) & set(one.over_sites) for one in runs)]
    data = {"runs": [_data(one, name, cards) for one, name in zip(runs, names)], "cards": [_card(one) for one in cards]}
    title = f"{run.header.model}: {names[0]}" + (f" and {names[1]}" if other else "")
    body = "\n".join([_heading(runs, names), _said(runs, names), _model(runs, names), _loss(), *_sections(cards, runs)])
    return _PAGE.format(
        title=html.escape(title), policy=_POLICY, style=_file("page.css"), body=body, plotly=get_plotlyjs(),
        data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"), script=_file("page.js"),
    )  # fmt: skip


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


@functools.cache
def _file(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


# -- what is text ------------------------------------------------------------------------------------------------------


def _heading(runs: Sequence[Shown], names: Sequence[str]) -> str:
    head = runs[0].header
    chips = "".join(f'<span class="run run{k}">{html.escape(name)}</span>' for k, name in zip(range(len(runs)), names))
    links = {"said": "What stands out", "model": "Model", "loss": "Loss", "maps": "Maps"}
    links |= {_anchor(card.section): card.section.split(":")[0].removeprefix("The ") for card in CARDS}
    nav = "".join(f'<a href="#{key}">{text[0].upper()}{text[1:]}</a>' for key, text in links.items())
    what = f"{head.model}, {plural(len(head.sites), 'site')}, n = {_streams(head.sites)}"
    return f"<header><h1>{html.escape(what)}</h1><p>{chips}</p></header>\n<nav>{nav}</nav>\n<main>"


def _streams(sites: Sequence[SiteCall]) -> str:
    return ", ".join(map(str, sorted({site.n for site in sites}))) or "-"


def _said(runs: Sequence[Shown], names: tuple[str, str]) -> str:
    lists = []
    if len(runs) == 2:
        lists.append(_list("Between the two", differences(runs[0], runs[1], names), ""))
    for k, run in enumerate(runs):
        title = html.escape(names[k]) if len(runs) == 2 else ""
        lists.append(_list(title, findings(run), f"run run{k}" if title else ""))
    return f'<section id="said"><h2>What stands out</h2><div class="lists">{"".join(lists)}</div></section>'


def _list(title: str, found: Iterable[Finding], kind: str) -> str:
    rows = "".join(
        f'<li class="{"bad" if one.bad else "note"}"><a href="#{one.card}">{_marked(one.text)}</a></li>'
        for one in found
    )
    heading = f'<h3><span class="{kind}">{title}</span></h3>' if title else ""
    return f"<div>{heading}<ul>{rows}</ul></div>"


def _marked(text: str) -> str:
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _model(runs: Sequence[Shown], names: Sequence[str]) -> str:
    facts = [_facts(run) for run in runs]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names[: len(runs)]) if len(runs) == 2 else ""
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th>"
        + "".join(f"<td>{_marked(one.get(key, '-'))}</td>" for one in facts)
        + "</tr>"
        for key in dict.fromkeys(key for one in facts for key in one)
    )
    table = f"<table>{f'<tr><th></th>{head}</tr>' if head else ''}{rows}</table>"
    pictures = "".join(_drawing(run) for run in runs[: 1 if _same_drawing(runs) else 2])
    inside = f'<div class="beside"><div class="facts">{table}</div><div>{pictures}</div></div>'
    return f'<section id="model"><h2>The model</h2>{inside}</section>'


def _same_drawing(runs: Sequence[Shown]) -> bool:
    return len({run.header.drawing for run in runs}) == 1


def _drawing(run: Shown) -> str:
    if not run.header.drawing:
        return '<p class="none">The run holds no drawing of its model. <code>mhc-rewrite draw</code> makes one.</p>'
    picture = base64.b64encode(run.header.drawing.encode()).decode()
    source = f"data:image/svg+xml;base64,{picture}"
    return f'<figure class="drawing"><img alt="{html.escape(run.header.model)}, drawn" src="{source}"></figure>'


def _facts(run: Shown) -> dict[str, str]:
    head, config = run.header, run.header.config
    options = {key: ", ".join(map(str, value)) if isinstance(value, list) else str(value)
               for key, value in config.items() if key in _OPTIONS and value is not None}  # fmt: skip
    ended = {"finished": "finished", None: "not ended: it goes on, or was killed"}.get(run.end, f"failed: {run.end}")
    notes = {f"note, {plural(count, 'sample')} from step {since:,}": text for text, (since, count) in run.notes.items()}
    return {
        "model": head.model,
        "sites": f"{len(head.sites)} in {plural(len(head.streams), 'stream')}, n = {_streams(head.sites)}, "
        f"C = {', '.join(map(str, sorted({site.width for site in head.sites})))}",
        **options,
        "steps": f"{run.steps[0]:,} to {run.steps[-1]:,}; {plural(len(run.steps), 'sample')}, "
        f"every {head.settings.get('every', '?')} steps",
        "figures": f"of at most {head.settings.get('tokens', '?')} tokens",
        "run": ended,
        "written by": f"mhc-rewrite {head.version}" if head.version else "-",
        **notes,
    }  # fmt: skip


def _loss() -> str:
    return (
        '<section id="loss"><h2>Loss</h2><article><div class="plot" data-lines="loss" '
        'role="img" aria-label="Loss over the steps"></div></article></section>'
    )


def _sections(cards: Sequence[Card], runs: Sequence[Shown]) -> list[str]:
    parts, section = [_maps(runs)], ""
    for card in cards:
        if card.section != section:
            parts.append(("</div></section>" if section else "") + _opened(card.section))
            section = card.section
        label = html.escape(f"{card.title}, over the steps", quote=True)
        grids = "".join(
            f'<div class="plot" data-grid="{card.key}" data-run="{k}" role="img" '
            f'aria-label="{html.escape(card.title)}, by site and step"></div>'
            for k, run in enumerate(runs) if card.grid in run.grids
        )  # fmt: skip
        parts.append(
            f'<article id="{card.key}"><h3>{html.escape(card.title)}</h3><p>{html.escape(card.what)}</p>'
            f'<div class="plot" data-lines="{card.key}" role="img" aria-label="{label}"></div>{grids}</article>'
        )
    return [*parts, "</div></section>" if section else "", "</main>"]


def _anchor(section: str) -> str:
    return re.sub("[^a-z]+", "-", section.split(":")[0].lower()).strip("-")


def _opened(section: str) -> str:
    return f'<section id="{_anchor(section)}"><h2>{html.escape(section)}</h2><div class="cards">'


def _maps(runs: Sequence[Shown]) -> str:
    if not any(run.moments for run in runs):
        return '<section id="maps"><h2>The maps</h2><p class="none">The run holds no matrices.</p></section>'
    parts = []
    for key, (title, what) in _MAPS.items():
        plots = "".join(f'<div class="plot" data-map="{key}" data-run="{k}" role="img" '
                        f'aria-label="{title}"></div>' for k in range(len(runs)))  # fmt: skip
        parts.append(
            f'<article id="map_{key}"><h3>{title}</h3><p>{what}</p><div class="key" data-key="{key}"></div>'
            f'<div class="pair">{plots}</div></article>'
        )
    return (
        '<section id="maps"><h2>The maps</h2><div class="slider"><label for="moment">step</label>'
        '<input id="moment" type="range" min="0" value="0" step="1"><output id="step" for="moment"></output></div>'
        f'<div class="maps">{"".join(parts)}</div></section>'
    )


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _card(card: Card) -> dict[str, Any]:
    return {
        "key": card.key,
        "title": card.title,
        "lines": card.lines,
        "of": card.of,
        "grid": card.grid,
        "log": card.log,
    }


def _data(run: Shown, name: str, cards: Sequence[Card]) -> dict[str, Any]:
    row = {"smallest": 0, "median": 1, "largest": 2}
    lines = {}
    for card in cards:
        for figure in set(card.lines) & set(run.over_sites):
            values = run.over_sites[figure]
            alone = len(card.lines) == 1
            kinds = ["smallest", card.of, "largest"] if alone else [card.of]
            lines[figure] = {kind: _line(run.steps, values[row[kind]]) for kind in dict.fromkeys(kinds)}
    logs = {card.grid: card.log for card in cards if card.grid}
    return {
        "name": name,
        "sites": [{"name": str(site), "short": short, "stream": site.stream, "n": site.n}
                  for site, short in zip(run.header.sites, short_names(run.header.sites))],
        "loss": _line(run.steps, run.loss) if run.known else None,
        "lines": lines,
        "spans": run.spans.tolist(),
        "last": int(run.steps[-1]),
        "grids": {name: packed(run.grids[name], log) for name, log in logs.items() if name in run.grids},
        **_matrices(run),
    }  # fmt: skip


def _line(steps: Array, values: Array) -> list[list[Any]]:
    x, y = thin(steps, values)
    return [x.tolist(), [float(f"{value:.5g}") if np.isfinite(value) else None for value in y.tolist()]]


def _matrices(run: Shown) -> dict[str, Any]:
    sizes = sum(site.n**2 + 2 * site.n for site in run.header.sites) or 1
    count = max(2, min(MOMENTS, NUMBERS // sizes))
    chosen = (
        sorted(set(np.linspace(0, len(run.moments) - 1, count).round().astype(int).tolist())) if run.moments else []
    )
    maps = {}
    for mapping in MAPPINGS:
        sizes_of = [site.n**2 if mapping == "res" else site.n for site in run.header.sites]
        flat = [_flat(run.maps[mapping][k], sizes_of) for k in chosen]
        maps[mapping] = packed(np.stack(flat) if flat else np.zeros((0, 0)), False)
    composites = [
        [None if found is None else {"shape": list(found.shape), "map": _rounded(found)} for found in run.composites[k]]
        for k in chosen
    ]
    return {"moments": [run.moments[k] for k in chosen], "maps": maps, "composites": composites}


def _flat(found: Sequence[Array | None], sizes: Sequence[int]) -> Array:
    return np.concatenate(
        [np.full(size, np.nan) if one is None else one.reshape(-1) for one, size in zip(found, sizes)]
    )


def _rounded(values: Array) -> list[float | None]:
    return [float(f"{value:.3g}") if np.isfinite(value) else None for value in values.reshape(-1).tolist()]


def packed(values: Array, log: bool) -> dict[str, Any]:
    """(rows, columns) as 16-bit numbers from the smallest to the largest, of logarithms if `log`; 65535 is nan."""
    values = np.asarray(values, "f8")
    if log:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.where(values > 0, np.log10(values), np.nan)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    codes = np.full(values.shape, 65535, "<u2")
    there = np.isfinite(values)
    codes[there] = np.round((values[there] - low) / ((high - low) or 1.0) * 65534)
    return {"low": low, "high": high, "log": log, "rows": values.shape[0],
            "codes": base64.b64encode(codes.tobytes()).decode()}  # fmt: skip


def short_names(sites: Sequence[SiteCall]) -> list[str]:
    """Of a name the parts in which sites differ, and the block in place of the site's number."""
    parts = [site.name.split(".") for site in sites]
    at_place: dict[int, set[str]] = {}
    for name in parts:
        for place, part in enumerate(name[:-1]):
            at_place.setdefault(place, set()).add(part)
    texts = []
    for site, name in zip(sites, parts):
        *rest, own = name
        kept = [part for place, part in enumerate(rest) if len(at_place[place]) > 1]
        last = site.branch if site.branch and re.fullmatch(r"mhc_\d+", own) else own
        texts.append(".".join([*kept, last]) + (f" ({site.call + 1})" if site.call else ""))
    return texts

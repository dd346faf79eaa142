"""Runs that no training has written, as one in good health would be, and changes that make them something to report.

    write(file, layers=4, samples=60, change=still)

`change(sample, k, of)` is handed every sample with its number, to alter it in place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mhc_rewrite import MHCConfig
from mhc_rewrite.insight.watching.format import FIGURES, Header, SiteCall, Writer, short, shorts

N, EVERY, EPSILON = 4, 10, 1e-8
WAYS = ("forward", "backward")
Change = Callable[[dict[str, Any], int, int], None]


def header(layers: int, n: int = N, name: str = "model.layers", **config: Any) -> Header:
    sites = tuple(
        SiteCall(0, f"{name}.{layer}.mhc_{k}", 0, branch, n, 64)
        for layer in range(layers) for k, branch in enumerate(("self_attn", "mlp"))
    )  # fmt: skip
    options = {**MHCConfig(n).to_dict(), **config}
    return Header("LlamaForCausalLM", options, {"every": EVERY, "tokens": 1024, "epsilon": EPSILON}, sites, "0.1.0")


def sample(k: int, of: int, sites: int, n: int = N) -> dict[str, Any]:
    """The k-th of so many: everything moves all the time, and nothing by much."""
    t = k / max(1, of - 1)
    place = [site / max(1, sites - 1) for site in range(sites)]
    mix = [0.2 + 0.35 * t * (0.6 + 0.4 * math.sin(1.7 * site)) for site in range(sites)]
    wobble = [1 + 0.06 * math.sin(0.9 * k + site) for site in range(sites)]
    figures: dict[str, list[float]] = {
        "row_error": [1e-7] * sites,
        "row_error_99": [2e-7] * sites,
        "column_error": [2e-4 * (1 + 20 * t * p) for p in place],
        "column_error_99": [1e-3 * (1 + 20 * t * p) * w for p, w in zip(place, wobble)],
        "from_identity": [m * math.sqrt(n - 1) for m in mix],
        "from_uniform": [(1 - m) * math.sqrt(n - 1) for m in mix],
        "second_singular": [1 - m for m in mix],
        **{f"{way}_gain": [1.0 + 1e-3 * t * p for p in place] for way in WAYS},
        **{f"{way}_gain_99": [1.0 + 2e-2 * t * p * w for p, w in zip(place, wobble)] for way in WAYS},
        **{name: [1.0 + 0.02 * t * p for p in place] for name in ("composite_forward", "composite_forward_99")},
        **{name: [1.0 + 0.3 * t * (1 - p) for p in place] for name in ("composite_backward", "composite_backward_99")},
        "pre_entropy": [0.93 - 0.3 * t * p for p in place],
        "pre_argmax": [float(site % n) for site in range(sites)],
        "pre_argmax_share": [0.5 + 0.4 * t * p for p in place],
        "post_spread": [0.5 + 0.2 * t * math.sin(site) for site in range(sites)],
        "spread": [0.15 + 0.5 * t * p for p in place],
        "dominant": [0.3 + 0.1 * t * p for p in place],
        "rank": [1.2 + (n - 2) * t * p for p in place],
        "state_gradient": [0.02 * (1.5 - p) * w / (1 + t) for p, w in zip(place, wobble)],
        "trunk_gradient": [0.018 * (1.5 - p) * w / (1 + t) for p, w in zip(place, wobble)],
    }  # fmt: skip
    for number, name in enumerate(name for name in FIGURES if name.endswith("_gradient") and name not in figures):
        figures[name] = [10 ** (-2 - number % 3) * (1.2 - p) * w / (1 + 2 * t) for p, w in zip(place, wobble)]
    rows = [[[1 - m + m / n if i == j else m / n for j in range(n)] for i in range(n)] for m in mix]
    return {
        "step": k * EVERY,
        "loss": short(2 + 4 * math.exp(-4 * t) + 0.05 * math.sin(k), 6),
        "figures": {name: shorts(values) for name, values in figures.items()},
        "dead": {"pre": [], "post": [], "res": []},
        "maps": {
            "pre": [
                shorts([1 / n + 0.15 * (0.2 + t) * math.sin(site + 2 * j) for j in range(n)]) for site in range(sites)
            ],
            "post": [shorts([1 + 0.4 * (0.2 + t) * (-1) ** (site + j) for j in range(n)]) for site in range(sites)],
            "res": [shorts([value for row in matrix for value in row]) for matrix in rows],
        },
        "composite": [{"map": shorts([1 / n + (0.2 * (1 - t) if i == j else 0) for i in range(n) for j in range(n)]),
                       "shape": [n, n]}],
    }  # fmt: skip


def write(
    file: Path, layers: int = 4, samples: int = 60, change: Change | None = None, end: str | None = "finished",
    head: Header | None = None, n: int = N,
) -> Path:  # fmt: skip
    head = head or header(layers, n)
    writer = Writer(file, head)
    for k in range(samples):
        one = sample(k, samples, len(head.sites), n)
        if change is not None:
            change(one, k, samples)
        writer.write(one)
    if end is not None:
        writer.close(end)
    return file


def write_many(file: Path, samples: int, layers: int = 2) -> Path:
    """As many samples as are wished, quickly: all alike but for their step and their loss, and of few figures."""
    writer = Writer(file, header(layers))
    first, second = (sample(k, 2, 2 * layers) for k in range(2))
    for one in (first, second):
        one["figures"] = {
            name: one["figures"][name] for name in ("composite_forward_99", "spread", "bias_res_gradient")
        }
    writer.write(first)
    rest = json.dumps(second, separators=(",", ":")).split(",", 2)[2]
    with file.open("a", encoding="utf-8") as opened:
        for k in range(1, samples):
            loss = 99.0 if k == samples // 3 else round(2 + 4 * math.exp(-4 * k / samples) + 0.3 * math.sin(k), 4)
            opened.write(f'{{"step":{k * EVERY},"loss":{loss},{rest}\n')
    writer.close("finished")
    return file

"""Files of watched runs that no training has written: of any depth and length, with what a report has to find in them.

python tests/watched_runs.py run.jsonl 48 1000    # 48 layers of two sites, 1000 samples
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from mhc_rewrite import MHCConfig
from mhc_rewrite.insight.watching.format import FIGURES, Header, SiteCall, Writer, short

N, EVERY = 4, 10


def header(layers: int) -> Header:
    sites = tuple(
        SiteCall(0, f"transformer.h.{layer}.mhc_{k}", 0, branch, N, 128)
        for layer in range(layers) for k, branch in enumerate(("attn", "mlp"))
    )  # fmt: skip
    settings = {"every": EVERY, "tokens": 256, "epsilon": 1e-8}
    return Header("GPT2LMHeadModel", MHCConfig().to_dict(), settings, sites, "0.1.0")


def sample(step: int, of: int, sites: int) -> dict[str, Any]:
    """Gains grow with depth and time; a third of the sites, in the middle, have an H_res that never moves."""
    t = step / max(1, of)
    figures: dict[str, list[float | None]] = {}
    for number, name in enumerate(FIGURES):
        wave = [0.5 + 0.3 * math.sin(k / 7 + number) + 0.2 * t * math.cos(k / 3 + number) for k in range(sites)]
        figures[name] = [short(value) for value in wave]
    for name in ("composite_forward", "composite_backward", "composite_forward_99", "composite_backward_99"):
        figures[name] = [short((1 + 0.08 * t) ** (k if "forward" in name else sites - 1 - k)) for k in range(sites)]
    figures["pre_argmax"] = [k % N for k in range(sites)]
    figures["state_gradient"][0] = None
    still = range(sites // 3, 2 * sites // 3)
    res = []
    for k in range(sites):
        mix = 0.05 if k in still else 0.05 + 0.4 * t * (0.5 + 0.5 * math.sin(k))
        rows = [[1 - mix + mix / N if i == j else mix / N for j in range(N)] for i in range(N)]
        res.append([short(value) for row in rows for value in row])
    return {
        "step": step,
        "loss": short(2 + 4 * math.exp(-4 * t) + 0.1 * math.sin(step), 6),
        "figures": figures,
        "dead": {"pre": [], "post": [], "res": list(still)},
        "maps": {
            "pre": [[short(1 / N + 0.2 * t * math.sin(k + j)) for j in range(N)] for k in range(sites)],
            "post": [[short(1 + 0.5 * (-1) ** (k + j) * t) for j in range(N)] for k in range(sites)],
            "res": res,
        },
        "composite": [{"map": [short(1 / N)] * (N * N), "shape": [N, N]}],
    }


def write(file: Path, layers: int, samples: int, end: str | None = "finished") -> Path:
    writer = Writer(file, header(layers))
    for k in range(samples):
        writer.write(sample(k * EVERY, samples * EVERY, 2 * layers))
    if end is not None:
        writer.close(end)
    return file


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""How long a conversion takes as a model gets deeper: it should grow linearly.

    python demos/conversion_time.py [--rounds 3]

Llama from transformers with tiny widths and random weights, 6 to 96 layers; both modes are captured. Depths are
interleaved and the medians printed, beside the time of one forward of the same model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mhc_rewrite import mhcify

DEPTHS = (6, 12, 24, 48, 96)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="conversions of each depth (default: 3)")
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS, help="numbers of layers")
    options = parser.parse_args()
    # A text model needs no torchvision, and a torchvision made for another build of torch stops transformers' import.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers import LlamaConfig, LlamaForCausalLM

    warnings.simplefilter("ignore")
    tokens = torch.ones(2, 8, dtype=torch.long)
    forward: dict[int, list[float]] = {depth: [] for depth in options.depths}
    convert: dict[int, list[float]] = {depth: [] for depth in options.depths}
    rounds = [depth for _ in range(options.rounds) for depth in options.depths]
    for depth in track(rounds, "converting", console=Console(stderr=True), transient=True):
        config = LlamaConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=4
        )
        model = LlamaForCausalLM(config).eval()
        start = time.perf_counter()
        with torch.no_grad():
            model(tokens)
        forward[depth].append(time.perf_counter() - start)
        start = time.perf_counter()
        mhcify(model)
        convert[depth].append(time.perf_counter() - start)
    table = Table(
        title=f"mhcify, median of {options.rounds}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for column in ("layers", "one forward, s", "conversion, s", "ms a layer"):
        table.add_column(column, justify="right")
    for depth in options.depths:
        taken = statistics.median(convert[depth])
        once = statistics.median(forward[depth])
        table.add_row(str(depth), f"{once:.3f}", f"{taken:.2f}", f"{1e3 * taken / depth:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()

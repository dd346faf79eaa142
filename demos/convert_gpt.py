"""A GPT-2-shaped model becomes an mHC model, computes the same function, and trains beside the original.

1. A GPT-2 of transformers with random weights is converted by `mhcify(model)`; plan and one rewritten layer are shown.
2. Both models' logits are compared: they must be equal to `TOLERANCE`, or the demo fails.
3. Both are trained from that same start, on the same batches of Python's standard library, read as bytes.

Writes `loss.png` and `loss.csv` to the output folder, the model drawn, `model.png` and `model.html`, and the training
as it was watched, `run.jsonl` and `watched.png`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import csv
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from torch import Tensor, nn

from mhc_rewrite import MHCConfig, draw, graphs, mhcify, parameter_groups, report, watch
from mhc_rewrite.cli import listing
from mhc_rewrite.insight.watching.format import Run as WatchedRun
from mhc_rewrite.insight.watching.format import read
from mhc_rewrite.printing import as_text
from mhc_rewrite.sites.state import is_state, streams_of

TOLERANCE = 1e-5
BATCH, LENGTH = 8, 64
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 1e-3, 0.1, 20
SMOOTHING = 20
WATCH_EVERY = 10
EVERY_NTH_FILE_HELD_OUT = 10
HELD_OUT_BATCHES = 8


@dataclass
class Run:
    """One model in training, and what was seen of it."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    seen: Any = None  # what watches it

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        warm = min(1.0, (len(self.losses) + 1) / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm
        loss = loss_of(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.seen is not None:
            self.seen.step(loss)
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        self.losses.append(loss.item())

    def smoothed(self) -> list[float]:
        """At each step the mean of the last `SMOOTHING` losses, or of as many as there are."""
        windows = (self.losses[max(0, end - SMOOTHING) : end] for end in range(1, len(self.losses) + 1))
        return [sum(window) / len(window) for window in windows]


def main() -> int:
    options = arguments()
    console = Console()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    train_text, held_out_text = standard_library()

    original = small_gpt2()
    start_section(console, "Settings")
    console.print(settings_table(options, original, train_text, held_out_text))

    start_section(console, "Conversion: mhcify(model)")
    before = time.perf_counter()
    converted = mhcify(copy.deepcopy(original))
    console.print(f"converted in {time.perf_counter() - before:.2f} s")
    show(console, report(converted))

    start_section(console, "One rewritten layer")
    listings = listing.merge(graphs(converted), "rewritten")
    show(console, listing.rich([max(listings, key=lambda same: len(same.modules))], "rewritten"))

    start_section(console, "Equality with the original at the start")
    error = largest_relative_error(original, converted, next(batches(held_out_text, options.seed)))
    console.print(f"largest relative error of the logits, fp32: {error:.2e} (allowed: {TOLERANCE:.0e})")
    if not error <= TOLERANCE:
        console.print("The converted model does not compute the original's function: the demo stops here.")
        return 1

    start_section(console, "Training, both from this start, on the same batches")
    watched = options.output / "run.jsonl"
    watched.unlink(missing_ok=True)
    with watch(converted, every=WATCH_EVERY, to=watched) as seen:
        runs = [Run("original", original, optimizer(original)), Run("mHC", converted, optimizer(converted), seen=seen)]
        train(console, runs, batches(train_text, options.seed), options.steps)

    start_section(console, "Result")
    write_csv(runs, options.output / "loss.csv")
    write_picture(runs, options.output / "loss.png")
    print(terminal_plot(runs, colour=console.is_terminal, width=min(console.width, 100)))
    console.print(result_table(runs, held_out_text, options.seed))
    console.print(
        "What this shows: the converted model starts as the same function and trains.\n"
        "What it does not show: whether mHC is better, or what it costs elsewhere. This is one run of a small model on "
        "a CPU, where Python takes more time than the sites; other seeds, sizes and step counts give other figures.",
        highlight=False,
    )
    console.print(f"loss curves: {options.output / 'loss.png'}, {options.output / 'loss.csv'}", highlight=False)

    start_section(console, "Pictures")
    drawing = draw(converted)
    for name in ("model.png", "model.html"):
        console.print(f"the model, before and after: {drawing.save(options.output / name)}", highlight=False)
    write_watched_picture(read(watched), options.output / "watched.png")
    console.print(f"what its sites did in training: {options.output / 'watched.png'}, from {watched}", highlight=False)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--steps", type=positive, default=400, help="training steps of each model (default: 400)")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for curves and pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, default=1, help="of PyTorch on the CPU (default: 1)")
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def small_gpt2(layers: int = 4, width: int = 128, length: int = LENGTH) -> nn.Module:
    """GPT-2's layout over bytes, with random weights and without dropout."""
    # A text model needs no torchvision, whose wheel does not load beside every build of torch: transformers, which
    # imports it wherever it is installed, is told that there is none.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_layer=layers,
        n_embd=width,
        n_head=4,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def standard_library() -> tuple[Tensor, Tensor]:
    """Python's own sources as bytes: those to train on, and those held out (every tenth file)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    held_out = b"\n".join(texts[::EVERY_NTH_FILE_HELD_OUT])
    train_on = b"\n".join(text for i, text in enumerate(texts) if i % EVERY_NTH_FILE_HELD_OUT)
    if min(len(held_out), len(train_on)) <= LENGTH:
        raise SystemExit(f"{folder} holds no Python sources to train on.")
    return as_bytes(train_on), as_bytes(held_out)


def as_bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def batches(text: Tensor, seed: int) -> Iterator[Tensor]:
    """(BATCH, LENGTH) pieces from random places, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(LENGTH)
    while True:
        starts = torch.randint(len(text) - LENGTH + 1, (BATCH, 1), generator=generator)
        yield text[starts + offsets].long()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of each byte given those before it, in nats."""
    logits = model(input_ids=batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, weight_decay=WEIGHT_DECAY), lr=LEARNING_RATE, betas=(0.9, 0.95))


@torch.no_grad()
def largest_relative_error(original: nn.Module, converted: nn.Module, batch: Tensor) -> float:
    """max |difference| over max |original|, of the logits in eval mode."""
    expected, actual = (model.eval()(input_ids=batch).logits for model in (original, converted))
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def train(console: Console, runs: list[Run], data: Iterator[Tensor], steps: int) -> None:
    for run in runs:
        run.model.train()
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=steps)
        for _ in range(steps):
            batch = next(data)
            for run in runs:
                run.step(batch)
            losses = "  ".join(f"{run.name} {run.losses[-1]:.3f}" for run in runs)
            progress.update(bar, advance=1, description=losses)


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor, seed: int) -> float:
    model.eval()
    data = batches(text, seed)
    losses = [loss_of(model, batch).item() for batch, _ in zip(data, range(HELD_OUT_BATCHES))]
    return sum(losses) / len(losses)


@torch.no_grad()
def stream_spread(converted: nn.Module, layer: str, **inputs: Tensor) -> float | None:
    """How far the streams have parted after that layer: their rms distance from their mean, over the mean's rms.
    0 at the start, where all streams are equal. None where the model carries one stream only."""
    seen: list[Tensor] = []
    hook = converted.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output))
    converted.eval()(**inputs)
    hook.remove()
    if not is_state(seen[0]):
        return None
    streams = streams_of(seen[0])  # (batch, tokens, n, C)
    mean = streams.mean(dim=-2, keepdim=True)
    return ((streams - mean).square().mean().sqrt() / mean.square().mean().sqrt()).item()


def show(console: Console, renderable: RenderableType) -> None:
    """To a terminal in its width, else as plain text in the width that it needs."""
    if console.is_terminal:
        console.print(renderable)
    else:
        print(as_text(renderable))


def start_section(console: Console, title: str) -> None:
    console.print()
    console.print(Rule(title, align="left"))


def settings_table(options: argparse.Namespace, model: nn.Module, train_text: Tensor, held_out_text: Tensor) -> Table:
    config = model.config
    table = Table(show_header=False, box=None)
    rows = {
        "model": f"GPT-2 layout, random weights: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads",
        "text": f"Python {sys.version_info.major}.{sys.version_info.minor} standard library as bytes: "
        f"{len(train_text):,} to train on, {len(held_out_text):,} held out",
        "training": f"{options.steps} steps of {BATCH} x {LENGTH} bytes, AdamW, learning rate {LEARNING_RATE:g} "
        f"after {WARM_UP} steps, weight decay {WEIGHT_DECAY:g} (none on the sites)",
        "machine": f"CPU, {options.threads} threads, torch {torch.__version__}, fp32, seed {options.seed}",
        "streams": f"{MHCConfig().n_streams}",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def result_table(runs: list[Run], held_out_text: Tensor, seed: int) -> Table:
    table = Table("", *(run.name for run in runs))
    for column in table.columns[1:]:
        column.justify = "right"
    steps = len(runs[0].losses)
    last = f"mean of the last {min(SMOOTHING, steps)} steps"
    table.add_row("parameters", *(f"{sum(p.numel() for p in run.model.parameters()):,}" for run in runs))
    table.add_row("loss at step 1", *(f"{run.losses[0]:.4f}" for run in runs))
    table.add_row(f"loss, {last}", *(f"{run.smoothed()[-1]:.4f}" for run in runs))
    table.add_row("loss on held-out files", *(f"{held_out_loss(run.model, held_out_text, seed):.4f}" for run in runs))
    table.add_row("seconds per step", *(f"{run.seconds / steps:.3f}" for run in runs))
    batch, before_last = next(batches(held_out_text, seed)), f"transformer.h.{len(runs[0].model.transformer.h) - 2}"
    spreads = [stream_spread(run.model, before_last, input_ids=batch) for run in runs]
    table.add_row("spread of the streams", *("-" if spread is None else f"{spread:.2g}" for spread in spreads))
    table.caption = "losses in nats per byte; spread: rms distance of the streams from their mean, over the mean's rms"
    return table


def write_csv(runs: list[Run], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *(run.name for run in runs)])
        writer.writerows(zip(range(1, len(runs[0].losses) + 1), *(run.losses for run in runs)))


def write_picture(runs: list[Run], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(8, 6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    steps = range(1, len(runs[0].losses) + 1)
    for run, style in zip(runs, ("-", "--")):
        (line,) = upper.plot(steps, run.smoothed(), style, label=run.name)
        upper.plot(steps, run.losses, color=line.get_color(), alpha=0.25, linewidth=0.8)
    original, converted = (run.smoothed() for run in runs)
    lower.plot(steps, [after - before for before, after in zip(original, converted)], color="black")
    upper.set(
        ylabel="training loss, nats per byte", title=f"Loss, mean of the last {SMOOTHING} steps (faint: each step)"
    )
    lower.set(xlabel="step", ylabel="mHC - original")
    upper.legend()
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_watched_picture(run: WatchedRun, path: Path) -> None:
    """The converted model's sites over the training: what the streams carry, and what is made of them."""
    from matplotlib.figure import Figure

    names = [site.name.removeprefix("transformer.") for site in run.header.sites]
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 3)
    gains, apart, uneven = axes[0]
    for name, label in (("composite_forward_99", "forward"), ("composite_backward_99", "backward")):
        gains.plot(run.steps, [max(filter(None, row), default=None) for row in run.figure(name)], label=label)
    gains.set(title="Largest composite gain (99 % of tokens)", xlabel="step", ylim=(0, None))
    gains.legend()
    heat_maps = (
        (apart, "spread", "How far streams are apart"),
        (uneven, "pre_entropy", "Evenness of H_pre"),
        (axes[1][0], "from_identity", "Distance of H_res from the identity"),
    )
    extent = (run.steps[0], max(run.steps[-1], 1), len(names) - 0.5, -0.5)
    for axis, name, title in heat_maps:
        values = [[float("nan") if value is None else value for value in row] for row in run.figure(name)]
        image = axis.imshow([*zip(*values)], aspect="auto", interpolation="nearest", extent=extent)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(title=title, xlabel="step")
        figure.colorbar(image, ax=axis)
    last = run.samples[-1]
    n = run.header.sites[-1].n
    res = last["maps"]["res"][len(names) // 2]
    for axis, matrix, title in (
        (axes[1][1], res, f"H_res of {names[len(names) // 2]}, step {last['step']}"),
        (axes[1][2], last["composite"][0]["map"], "The product of all H_res"),
    ):
        rows = [matrix[k : k + n] for k in range(0, n * n, n)]
        axis.imshow(rows, vmin=0, vmax=1)
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                axis.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
        axis.set(title=title, xlabel="from stream", ylabel="to stream", xticks=range(n), yticks=range(n))
    figure.savefig(path, dpi=120)


def terminal_plot(runs: list[Run], *, colour: bool, width: int) -> str:
    """The smoothed losses as text; without colour the curves differ by their marks."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("simple")
    for run, mark in zip(runs, ("o", "+")):
        signal = figure.signal(range(1, len(run.losses) + 1), run.smoothed(), marker="braille" if colour else mark)
        signal.label(run.name)
        if colour:
            signal.lines()
        figure.draw(signal)
    figure.plot_size(width, 18)
    figure.title(f"training loss, mean of {SMOOTHING} steps")
    figure.label("step", "x")
    last = len(runs[0].losses)
    figure.legend(x=last, y=max(runs[0].losses), ha="right", va="top", relative=True)
    figure.ruler("x").ticks([1, *(last * quarter // 4 for quarter in range(1, 5))])
    text = figure.build().string()
    return text if colour else plotext.uncolorize(text)


if __name__ == "__main__":
    sys.exit(main())

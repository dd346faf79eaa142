"""A small byte-level decoder written by hand, trained three times from one function: as it is, as mHC and as hc.

    python demos/train_bytes.py
    python demos/train_bytes.py --quick --output /tmp/curves

All three start from the same weights and see the same batches of Python's own sources; `hc` are the unconstrained
hyper-connections that mHC constrains. Prints losses, seconds a step and what each model writes. Writes
`train_bytes.csv` and, where matplotlib is installed, `train_bytes.png` to the output folder. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from convert_gpt import (
    BATCH,
    LEARNING_RATE,
    LENGTH,
    SMOOTHING,
    TOLERANCE,
    WARM_UP,
    WEIGHT_DECAY,
    Run,
    batches,
    largest_relative_error,
    optimizer,
    result_table,
    show,
    standard_library,
    start_section,
    train,
    write_csv,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mhc_rewrite import mhcify, plan

LAYERS, WIDTH, HEADS = 4, 128, 4
STREAMS = 4
CONNECTIONS = {"mHC": "mhc", "hc": "hc"}
QUICK_STEPS = 6
LOSS_ROWS = 8
PROMPT, TEMPERATURE = b"def ", 0.7


# -- the model --------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """logits (batch, length, 256)."""

    logits: Tensor


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """The two residual adds that mhcify rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.norm_2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """Reads bytes (batch, length) and gives the logits of each next one; names and signature as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(256, WIDTH), "wpe": nn.Embedding(LENGTH, WIDTH),
            "h": nn.ModuleList(Block() for _ in range(LAYERS)), "ln_f": nn.LayerNorm(WIDTH),
        })  # fmt: skip
        self.head = nn.Linear(WIDTH, 256, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, input_ids: Tensor) -> Output:
        parts = self.transformer
        x = parts["wte"](input_ids) + parts["wpe"](torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in parts["h"]:
            x = block(x)
        return Output(self.head(parts["ln_f"](x)))


# -- the demo ---------------------------------------------------------------------------------------------------------


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 400,
    output: Annotated[Path, typer.Option(help="Folder for the loss curves.")] = Path("demo-output"),
    seed: Annotated[int, typer.Option(help="Of the weights, the batches and the samples.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help=f"At most {QUICK_STEPS} steps: shows that it runs.")] = False,
) -> None:
    """Train a small byte-level decoder beside its mHC and hc conversions."""
    console = Console()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    steps = min(steps, QUICK_STEPS) if quick else steps
    train_text, held_out_text = standard_library()
    original = Decoder()
    example = {"input_ids": next(batches(held_out_text, seed))}

    start_section(console, "Settings")
    console.print(settings_table(steps, threads, seed, train_text, held_out_text))

    start_section(console, "What will be rewritten: plan(model)")
    show(console, plan(original, example, n_streams=STREAMS))

    start_section(console, "Conversion, and equality with the original at the start")
    models = {"original": original}
    for name, connection in CONNECTIONS.items():
        models[name] = mhcify(copy.deepcopy(original), example, n_streams=STREAMS, connection=connection)
        error = largest_relative_error(original, models[name], example["input_ids"])
        console.print(
            f"{name}: largest relative error of the logits, fp32: {error:.2e} (allowed: {TOLERANCE:.0e})",
            highlight=False,
        )
        if not error <= TOLERANCE:
            console.print(f"{name} does not compute the original's function: the demo stops here.")
            raise typer.Exit(1)

    start_section(console, "Training, all from this start, on the same batches")
    runs = [Run(name, model, optimizer(model)) for name, model in models.items()]
    train(console, runs, batches(train_text, seed), steps)
    console.print(loss_table(runs))

    start_section(console, f"What they write after {PROMPT.decode()!r}")
    for run in runs:
        console.print(f"[bold]{run.name}[/bold]")
        console.print(sample(run.model, 48 if quick else 240, seed), markup=False, highlight=False)

    start_section(console, "Result")
    console.print(result_table(runs, held_out_text, seed))
    console.print(
        "What this shows: both conversions start as the same function and train.\n"
        "What it does not show: which of the three is better. This is one run of a small model; other seeds, sizes and "
        "step counts give other figures.",
        highlight=False,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_csv(runs, output / "train_bytes.csv")
    console.print(f"losses: {output / 'train_bytes.csv'}", highlight=False)
    if importlib.util.find_spec("matplotlib"):
        write_picture(runs, output / "train_bytes.png")
        console.print(f"curves: {output / 'train_bytes.png'}", highlight=False)
    else:
        console.print("No picture: matplotlib is not installed.")


@torch.no_grad()
def sample(model: nn.Module, count: int, seed: int) -> str:
    """`count` bytes that the model writes after the prompt; what is not printable is escaped."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.tensor([list(PROMPT)])
    model.eval()
    for _ in range(count):
        logits = model(input_ids=text[:, -LENGTH:]).logits[:, -1]
        text = torch.cat([text, torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator)], dim=1)
    written = bytes(text[0].tolist()).decode("ascii", errors="backslashreplace")
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in written)


def settings_table(steps: int, threads: int, seed: int, train_text: Tensor, held_out_text: Tensor) -> Table:
    table = Table(show_header=False, box=None)
    rows = {
        "model": f"decoder over bytes, random weights: {LAYERS} layers, width {WIDTH}, {HEADS} heads; "
        f"{STREAMS} streams once converted",
        "text": f"Python's standard library: {len(train_text):,} bytes to train on, {len(held_out_text):,} held out",
        "training": f"{steps} steps of {BATCH} x {LENGTH} bytes, AdamW, learning rate {LEARNING_RATE:g} "
        f"after {WARM_UP} steps, weight decay {WEIGHT_DECAY:g} (none on the sites)",
        "machine": f"CPU, threads: {threads}, torch {torch.__version__}, fp32, seed {seed}",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def loss_table(runs: list[Run]) -> Table:
    """The smoothed losses at a few steps."""
    table = Table("step", *(run.name for run in runs))
    for column in table.columns:
        column.justify = "right"
    curves = [run.smoothed() for run in runs]
    last = len(curves[0])
    for step in sorted({1, *(max(1, last * part // LOSS_ROWS) for part in range(1, LOSS_ROWS + 1))}):
        table.add_row(str(step), *(f"{curve[step - 1]:.4f}" for curve in curves))
    table.caption = f"training loss in nats per byte, mean of up to {SMOOTHING} steps"
    return table


def write_picture(runs: list[Run], path: Path) -> None:
    """The smoothed losses, and below how far the conversions are from the original."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(8, 6), layout="constrained", sharex=True, height_ratios=(3, 1)
    )
    original = runs[0].smoothed()
    steps = range(1, len(original) + 1)
    for run, style in zip(runs, ("-", "--", ":")):
        (line,) = upper.plot(steps, run.smoothed(), style, label=run.name)
        if run is not runs[0]:
            apart = [after - before for before, after in zip(original, run.smoothed())]
            lower.plot(steps, apart, style, color=line.get_color())
    upper.set(ylabel="training loss, nats per byte", title=f"Loss, mean of the last {SMOOTHING} steps")
    lower.set(xlabel="step", ylabel="less the original's")
    upper.legend()
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)

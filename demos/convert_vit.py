"""A ViT becomes an mHC model, computes the same function, and learns to tell shapes apart beside the original.

    python demos/convert_vit.py
    python demos/convert_vit.py --quick

A ViT of transformers with random weights; the images are drawn here: discs, rings, squares and crosses of any place,
size, angle and brightness, under noise. Both models start from the same function and see the same batches. Nothing is
downloaded.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterator
from typing import Annotated, TypeAlias

import convert_gpt
import torch
import torch.nn.functional as F
import typer
from convert_gpt import (
    LEARNING_RATE,
    SMOOTHING,
    TOLERANCE,
    WARM_UP,
    WEIGHT_DECAY,
    optimizer,
    show,
    start_section,
    stream_spread,
)
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mhc_rewrite import mhcify, plan

# Images (batch, 1, SIZE, SIZE), and which of SHAPES each one shows.
Batch: TypeAlias = tuple[Tensor, Tensor]

SHAPES = ("disc", "ring", "square", "cross")
SIZE, PATCH = 32, 8
BATCH, HELD_OUT = 64, 1000
NOISE = 0.2
QUICK_STEPS = 6


class Run(convert_gpt.Run):
    """A classifier in training."""

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (len(self.losses) + 1) / WARM_UP)
        images, labels = batch
        loss = F.cross_entropy(self.model(pixel_values=images).logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        self.losses.append(loss.item())


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each model.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the weights and the images.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help=f"At most {QUICK_STEPS} steps: shows that it runs.")] = False,
) -> None:
    """Convert a small ViT and train it beside the original on images of shapes."""
    console = Console()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    steps = min(steps, QUICK_STEPS) if quick else steps
    original = small_vit()
    # A seed of their own: none of these images is trained on.
    held_out = next(batches(seed + 1, HELD_OUT))

    start_section(console, "Settings")
    console.print(settings_table(steps, threads, seed, original))
    console.print(pictures(), markup=False, highlight=False)

    start_section(console, "What will be rewritten: plan(model)")
    planned = plan(original)
    show(console, planned)
    *_, last_but_one, _ = dict.fromkeys(site.carrier for site in planned.sites)

    start_section(console, "Conversion: mhcify(model), and equality at the start")
    before = time.perf_counter()
    converted = mhcify(copy.deepcopy(original))
    console.print(f"converted in {time.perf_counter() - before:.2f} s", highlight=False)
    expected, actual = (logits_of(model, held_out[0]) for model in (original, converted))
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    console.print(
        f"largest relative error of the logits, fp32: {error:.2e} (allowed: {TOLERANCE:.0e})", highlight=False
    )
    if not error <= TOLERANCE:
        console.print("The converted model does not compute the original's function: the demo stops here.")
        raise typer.Exit(1)

    start_section(console, "Training, both from this start, on the same batches")
    runs = [Run("original", original, optimizer(original)), Run("mHC", converted, optimizer(converted))]
    convert_gpt.train(console, runs, batches(seed, BATCH), steps)

    start_section(console, "Result")
    console.print(result_table(runs, held_out, last_but_one))
    console.print(
        "What this shows: the converted model starts as the same function and trains.\n"
        "What it does not show: whether mHC is better. This is one run of a small model; other seeds, sizes and step "
        "counts give other figures.",
        highlight=False,
    )


def small_vit() -> nn.Module:
    """ViT's layout over small grey images, with random weights; transformers' default has no dropout."""
    # The images are tensors already: no torchvision is needed, and one made for another build of torch stops
    # transformers' import.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        num_labels=len(SHAPES),
    )
    return ViTForImageClassification(config)


def batches(seed: int, size: int) -> Iterator[Batch]:
    """Noisy images, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        labels = torch.randint(len(SHAPES), (size,), generator=generator)
        place, scale, angle, brightness = torch.rand(4, size, 2, generator=generator)
        images = drawn(labels, place, scale[:, 0], angle[:, 0]) * (0.6 + 0.4 * brightness[:, :1, None])
        noise = torch.randn(images.shape, generator=generator)
        yield (images + NOISE * noise)[:, None], labels


def drawn(labels: Tensor, place: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
    """Shapes of brightness 1 on 0, (batch, SIZE, SIZE); place (batch, 2), scale and angle (batch,) within 0 to 1."""
    radius = ((0.2 + 0.1 * scale) * SIZE)[:, None, None]
    angle = (angle * torch.pi / 2)[:, None, None]
    centre = (0.4 + 0.2 * place) * SIZE
    pixels = torch.arange(SIZE)
    down, right = (pixels[:, None] - centre[:, 0, None, None]), (pixels - centre[:, 1, None, None])
    x, y = angle.cos() * right - angle.sin() * down, angle.sin() * right + angle.cos() * down
    distance, far, near = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    disc = distance < radius
    shapes = torch.stack([
        disc, disc & (distance > 0.5 * radius), far < 0.85 * radius, (far < radius) & (near < 0.35 * radius),
    ])  # fmt: skip
    return shapes[labels, torch.arange(len(labels))].float()


def pictures() -> str:
    """One shape of each kind without noise, as text: every second row, as letters are twice as high as wide."""
    count = len(SHAPES)
    middle = torch.full((count, 2), 0.5)
    shapes = drawn(torch.arange(count), middle, middle[:, 0], torch.full((count,), 0.1))[:, 6:-6:2, 7:-7]
    rows = ["  ".join(name.center(shapes.shape[-1]) for name in SHAPES)]
    for row in shapes.unbind(1):
        rows.append("  ".join("".join("#" if pixel else "." for pixel in shape) for shape in row))
    return "\n".join(rows)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    return model.eval()(pixel_values=images).logits


def settings_table(steps: int, threads: int, seed: int, model: nn.Module) -> Table:
    config = model.config
    table = Table(show_header=False, box=None)
    rows = {
        "model": f"ViT layout, random weights: {config.num_hidden_layers} layers, width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, patches of {PATCH} x {PATCH}",
        "images": f"{SIZE} x {SIZE}, grey, drawn anew for each batch: {', '.join(SHAPES)}; noise of {NOISE}",
        "training": f"{steps} steps of {BATCH} images, AdamW, learning rate {LEARNING_RATE:g} after {WARM_UP} steps, "
        f"weight decay {WEIGHT_DECAY:g} (none on the sites)",
        "machine": f"CPU, threads: {threads}, torch {torch.__version__}, fp32, seed {seed}",
    }
    for name, value in rows.items():
        table.add_row(f"[bold]{name}[/bold]", value)
    return table


def result_table(runs: list[Run], held_out: Batch, layer: str) -> Table:
    images, labels = held_out
    table = Table("", *(run.name for run in runs))
    for column in table.columns[1:]:
        column.justify = "right"
    steps = len(runs[0].losses)
    right = [(logits_of(run.model, images).argmax(-1) == labels).float().mean().item() for run in runs]
    spreads = [stream_spread(run.model, layer, pixel_values=images[:BATCH]) for run in runs]
    table.add_row("parameters", *(f"{sum(p.numel() for p in run.model.parameters()):,}" for run in runs))
    table.add_row("loss at step 1", *(f"{run.losses[0]:.4f}" for run in runs))
    table.add_row(
        f"loss, mean of the last {min(SMOOTHING, steps)} steps", *(f"{run.smoothed()[-1]:.4f}" for run in runs)
    )
    table.add_row(f"accuracy on {len(labels)} held-out images", *(f"{share:.1%}" for share in right))
    table.add_row("seconds per step", *(f"{run.seconds / steps:.3f}" for run in runs))
    table.add_row("spread of the streams", *("-" if spread is None else f"{spread:.2g}" for spread in spreads))
    table.caption = (
        f"guessing is right in {1 / len(SHAPES):.0%}; losses in nats; "
        "spread: rms distance of the streams from their mean, over the mean's rms"
    )
    return table


if __name__ == "__main__":
    typer.run(main)

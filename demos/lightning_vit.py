"""A vision transformer of timm's is converted and trained by Lightning, stopped, resumed and loaded again.

    python demos/lightning_vit.py
    python demos/lightning_vit.py --quick

What a LightningModule needs for a converted model is in `Classifier`: `mhcify` where the model is made, and
`parameter_groups` in `configure_optimizers`. A run that stops in the middle and goes on from its checkpoint is held
against one that does not stop. The images are those of convert_vit.py. On the CPU; nothing is downloaded.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from convert_vit import PATCH, SHAPES, SIZE, batches
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision_operators import define_torchvision_operators

define_torchvision_operators()  # Lightning and timm import torchvision, and use none of its operators here

import pytorch_lightning as lightning  # noqa: E402
from pytorch_lightning.callbacks import ModelCheckpoint  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from mhc_rewrite import mhcify, parameter_groups, report  # noqa: E402

BATCH, HELD_OUT, EPOCHS = 64, 1000, 2
RATE, SITE_RATE, WEIGHT_DECAY = 1e-3, 1e-2, 0.05


class Classifier(lightning.LightningModule):
    """timm's ViT, with plain residuals or as mHC."""

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = small_vit()
        if streams:  # before the optimizer is made, and before a checkpoint is loaded
            mhcify(self.model, (torch.zeros(2, 1, SIZE, SIZE),), n_streams=streams)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.model, weight_decay=WEIGHT_DECAY, lr=RATE, site_lr=SITE_RATE)
        return torch.optim.AdamW(groups)


def main(
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each model.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the weights and the images.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="At most 4 steps: shows that it runs.")] = False,
) -> None:
    """Train a converted ViT with Lightning, stop it, go on from its checkpoint, and load it."""
    console = Console()
    quieten()
    torch.set_num_threads(threads)
    steps = min(steps, 4) if quick else steps
    made = batches(seed, BATCH)
    data = [next(made) for _ in range(steps // EPOCHS)]
    images, labels = next(batches(seed + 1, HELD_OUT))
    console.print(
        f"timm's VisionTransformer, 4 layers, width 64, over {SIZE} x {SIZE} images of {', '.join(SHAPES)}; {steps} "
        f"steps of {BATCH} in {EPOCHS} epochs, AdamW, learning rate {RATE:g}, of the sites {SITE_RATE:g}; CPU, "
        f"threads: {threads}, torch {torch.__version__}, Lightning {lightning.__version__}, seed {seed}",
        highlight=False,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = {"original": fitted(0, data, folder / "original", seed), "mHC": fitted(4, data, folder / "mhc", seed)}
        console.print(str(report(trained["mHC"])).splitlines()[0], highlight=False)

        fitted(4, data, folder / "half", seed, epochs=EPOCHS // 2)
        resumed = fitted(4, data, folder / "resumed", seed, checkpoint=folder / "half" / "last.ckpt")
        loaded = Classifier.load_from_checkpoint(folder / "mhc" / "last.ckpt")
        with torch.no_grad():
            logits = {name: model.eval()(images) for name, model in trained.items()}
            checks = {
                "stopped in the middle and resumed": torch.equal(resumed.eval()(images), logits["mHC"]),
                "load_from_checkpoint": torch.equal(loaded.eval()(images), logits["mHC"]),
            }
    table = Table("", *trained)
    right = [f"{(logits[name].argmax(-1) == labels).float().mean().item():.1%}" for name in trained]
    table.add_row("parameters", *(f"{sum(p.numel() for p in model.parameters()):,}" for model in trained.values()))
    table.add_row(f"accuracy on {HELD_OUT} held-out images", *right)
    table.caption = f"guessing is right in {1 / len(SHAPES):.0%}; one run of a small model: it shows that both train"
    console.print(table)
    for name, same in checks.items():
        console.print(f"{name}: equal to the model of the whole run, to the last bit: {same}", highlight=False)
    raise typer.Exit(0 if all(checks.values()) else 1)


def quieten() -> None:
    """Lightning's advice about loggers, workers and devices; progress stays where there is a terminal."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def small_vit() -> nn.Module:
    return VisionTransformer(
        img_size=SIZE, patch_size=PATCH, in_chans=1, num_classes=len(SHAPES), embed_dim=64, depth=4, num_heads=4
    )


def fitted(
    streams: int, data: Any, folder: Path, seed: int, epochs: int = EPOCHS, checkpoint: Path | None = None
) -> Classifier:
    """A new model, trained on `data` in its order, or further from where a checkpoint was; `last.ckpt` in `folder`."""
    lightning.seed_everything(seed, verbose=False)
    model = Classifier(streams)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, logger=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_last=True)], enable_progress_bar=sys.stderr.isatty(),
    )  # fmt: skip
    trainer.fit(model, DataLoader(data, batch_size=None), ckpt_path=checkpoint)
    return model


if __name__ == "__main__":
    typer.run(main)

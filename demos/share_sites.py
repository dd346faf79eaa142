"""The sites of a trained conversion are shared as adapters are: two files, loaded onto the base model somewhere else.

    python demos/share_sites.py
    python demos/share_sites.py --quick

A decoder written by hand (that of train_bytes.py), trained, converted, trained on with its own weights frozen, so that
the sites alone learn. `save_sites` writes them; `load_sites` puts them onto a fresh copy of the base model in another
process, without an example and without a run. Then what must not happen: sites of other options. And the way back. On
the CPU; nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from convert_gpt import (
    BATCH,
    LENGTH,
    Run,
    batches,
    held_out_loss,
    loss_of,
    optimizer,
    standard_library,
    start_section,
    train,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from train_bytes import Decoder

from mhc_rewrite import load_sites, mhcify, parameter_groups, report, save_sites, site_parameters, unmhcify
from mhc_rewrite.errors import SitesError

SITE_RATE = 1e-2
LOADING = """\
import sys
import torch
from train_bytes import Decoder
from mhc_rewrite import load_sites

base, sites, tokens, out = sys.argv[1:]
model = Decoder()
model.load_state_dict(torch.load(base))
load_sites(model, sites)
with torch.no_grad():
    torch.save(model.eval()(torch.load(tokens)).logits, out)
"""


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the sites, half as many as before.")] = 150,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="At most 4 steps: shows that it runs.")] = False,
) -> None:
    """Train sites on a frozen model, save them, load them in a fresh process, and convert back."""
    console = Console()
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    steps = min(steps, 4) if quick else steps
    train_text, held_out_text = standard_library()
    data = batches(train_text, seed)
    console.print(
        f"Decoder over bytes, 4 layers, width 128: {2 * steps} steps of {BATCH} x {LENGTH} bytes of Python's modules, "
        f"then {steps} steps of the sites alone, learning rate {SITE_RATE:g}; CPU, threads: {threads}, torch "
        f"{torch.__version__}, seed {seed}",
        highlight=False,
    )

    start_section(console, "The base model, trained")
    base = Decoder()
    train(console, [Run("base", base, optimizer(base))], data, 2 * steps)

    start_section(console, "mhcify, and training of the sites alone")
    model = mhcify(copy.deepcopy(base), {"input_ids": next(data)})
    for parameter in set(model.parameters()) - set(site_parameters(model).values()):
        parameter.requires_grad_(False)
    on_sites = torch.optim.AdamW(parameter_groups(model, weight_decay=0.0, lr=SITE_RATE))
    for _ in track(range(steps), "sites", console=console):
        loss = loss_of(model, next(data))
        on_sites.zero_grad()
        loss.backward()
        on_sites.step()
    console.print(losses_table({"base": base, "base with these sites": model}, held_out_text, seed))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start_section(console, "save_sites(model, folder)")
        save_sites(model, folder / "sites")
        torch.save(base.state_dict(), folder / "base.pt")
        tokens = next(batches(held_out_text, seed))
        torch.save(tokens, folder / "tokens.pt")
        console.print(files_table(folder))

        start_section(console, "load_sites(model, folder), in a fresh process")
        console.print(LOADING, markup=False, highlight=False, soft_wrap=True)
        with torch.no_grad():
            here = model.eval()(tokens).logits
        same = torch.equal(here, in_a_fresh_process(folder, threads))
        console.print(f"its logits are equal to those of this process, to the last bit: {same}", highlight=False)

        start_section(console, "Sites of other options are refused")
        other = mhcify(copy.deepcopy(base), {"input_ids": tokens}, sinkhorn_iterations=5)
        try:
            load_sites(other, folder / "sites")
            refused = False
        except SitesError as error:
            console.print(str(error), markup=False, highlight=False)
            refused = True

    start_section(console, "The way back: unmhcify(model)")
    console.print(str(report(model)).splitlines()[0], highlight=False)
    unmhcify(model)
    with torch.no_grad():
        back = torch.equal(model(tokens).logits, base.eval()(tokens).logits)
    console.print(f"its logits are the base model's, to the last bit: {back}", highlight=False)
    raise typer.Exit(0 if same and refused and back else 1)


def losses_table(models: dict[str, nn.Module], text: Tensor, seed: int) -> Table:
    table = Table("", "held-out loss")
    for name, model in models.items():
        table.add_row(name, f"{held_out_loss(model, text, seed):.4f}")
    table.caption = "nats per byte of files not trained on; one run of a small model"
    return table


def files_table(folder: Path) -> Table:
    """What was written, and what stands in the config beside the sites."""
    table = Table("file", "bytes", "holds")
    config = json.loads((folder / "sites" / "mhc_config.json").read_text())
    holds = {"mhc_config.json": ", ".join(config), "mhc_model.safetensors": "phi, alpha and bias of every site"}
    for path in sorted((folder / "sites").iterdir()):
        table.add_row(path.name, f"{path.stat().st_size:,}", holds[path.name])
    table.add_row("the base model's weights", f"{(folder / 'base.pt').stat().st_size:,}", "stay where they are")
    return table


def in_a_fresh_process(folder: Path, threads: int) -> Tensor:
    """What LOADING computes, with as many threads: matrix products over other parts differ in the last bit."""
    arguments = [str(folder / name) for name in ("base.pt", "sites", "tokens.pt", "there.pt")]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-c", LOADING, *arguments], check=True, env=environment)
    there: Tensor = torch.load(folder / "there.pt")
    return there


if __name__ == "__main__":
    typer.run(main)

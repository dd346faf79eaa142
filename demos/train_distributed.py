"""A byte-level decoder is converted, spread over processes in one of several ways, trained, saved, and resumed.

    torchrun --nproc-per-node 2 demos/train_distributed.py --parallel fsdp
    torchrun --nproc-per-node 1 demos/train_distributed.py --parallel fsdp --resume

It trains on Python's own sources. For the first steps every process also trains the whole model by itself, on all of
the batch, and holds loss and gradients against that: what goes wrong between processes is not seen in the loss alone.
Checkpoints are sharded (torch.distributed.checkpoint); `--resume` goes on from the last one, in as many processes as
there are then and in whichever way. On gloo and CPUs, or on NCCL where every process has a GPU.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import typer
from convert_gpt import BATCH, LENGTH, standard_library, start_section
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from mhc_rewrite import mhcify, parameter_groups
from mhc_rewrite.distributed import SiteParallel, check_sites, pipeline_stage, shard_sites

LAYERS, WIDTH, HEADS = 4, 64, 4
RATE, SITE_RATE, WEIGHT_DECAY, LARGEST_NORM = 2e-3, 1e-2, 0.1, 1.0
MICROBATCHES = 4
CHECKED = 3  # steps
TOLERANCES = {False: (1e-5, 1e-4), True: (1e-2, 0.2)}  # --bf16: of the loss, of gradients
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # by names: parameter groups may differ between processes
Step = Callable[[Tensor], Tensor | None]  # a process's tokens -> their loss, where it has it; gradients are there then


class Way(str, Enum):
    """How the model is spread."""

    ddp = "ddp"
    fsdp = "fsdp"
    tp = "tp"
    pp = "pp"
    fsdp_pp = "fsdp+pp"


# -- the model: nothing in it knows of streams or of processes ---------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention, of as many heads as its projections have."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(nn.Module):
    """The two residual adds that mhcify rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Decoder(nn.Module):
    """Reads bytes (batch, length) and gives the logits of each next one."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of each byte given those before it, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


# -- the ways ----------------------------------------------------------------------------------------------------------


def ddp(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> tuple[nn.Module, Step]:
    """Every process has the model, and a part of the batch."""
    wrapped = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    return model, in_one_call(wrapped, bf16)


def fsdp(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> tuple[nn.Module, Step]:
    """Every process keeps a part of each parameter, and has a part of the batch."""
    shard(model, mesh, bf16)
    return model, in_one_call(model, bf16=False)


def shard(model: Any, mesh: DeviceMesh, bf16: bool) -> None:
    """The sites, the layers, and the rest."""
    # torch's advice not to write to a view that a sharded module returns: nothing does.
    warnings.filterwarnings("ignore", message=".*returned a view tensor")
    dtypes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if bf16 else {}
    policy = MixedPrecisionPolicy(**dtypes)
    shard_sites(model, mesh["dp"])  # before the layers: they stay in fp32
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)


def tp(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> tuple[nn.Module, Step]:
    """Every process has some of the heads and of each MLP, and between them a part of the tokens."""
    gathered = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    column, row = ColwiseParallel(), RowwiseParallel(output_layouts=Shard(1))
    in_layers: dict[str, ParallelStyle] = {
        "norm_1": SequenceParallel(), "norm_2": SequenceParallel(), "attention": gathered, "mlp": gathered,
        "attention.q": column, "attention.k": column, "attention.v": column, "attention.out": row,
        "mlp.up": column, "mlp.down": row,
    }  # fmt: skip
    styles = {
        **{f"layers.*.{name}": style for name, style in in_layers.items()},
        "bytes": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "places": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        "": SiteParallel(),  # of all sites: their gradients are sums over all tokens
    }
    parallelize_module(model, mesh["tp"], styles)
    return model, in_one_call(model, bf16)


def pp(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> tuple[nn.Module, Step]:
    """Every process has some of the layers, and all of the batch goes through them in microbatches."""
    stage = stage_of(model, mesh)
    return stage, through_stages(stage, mesh, bf16)


def fsdp_pp(model: nn.Module, mesh: DeviceMesh, bf16: bool) -> tuple[nn.Module, Step]:
    """Two stages, each sharded over half of the processes."""
    stage = stage_of(model, mesh)
    shard(stage, mesh, bf16)
    return stage, through_stages(stage, mesh, bf16=False)


def stage_of(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Between stages pass the n streams."""
    count, mine = mesh["pp"].size(), mesh["pp"].get_local_rank()
    layers = torch.arange(LAYERS).chunk(count)
    stages = [[f"layers.{number}" for number in some.tolist()] for some in layers]
    stages = [["bytes", "places", *stages[0]], *stages[1:]]
    stages = [*stages[:-1], [*stages[-1], "norm", "head"]]
    microbatch = BATCH // mesh["dp"].size() // MICROBATCHES
    example = torch.zeros(microbatch, LENGTH, dtype=torch.long, device=mesh.device_type)
    return pipeline_stage(model, stages, mine, (example,))


def through_stages(stage: nn.Module, mesh: DeviceMesh, bf16: bool) -> Step:
    """A step of what is called microbatch by microbatch."""
    mine, last = mesh["pp"].get_local_rank(), mesh["pp"].size() - 1
    device = torch.device(mesh.device_type, torch.cuda.current_device() if mesh.device_type == "cuda" else None)
    run = PipelineStage(stage, mine, last + 1, device, group=mesh["pp"].get_group())
    schedule = Schedule1F1B(run, MICROBATCHES, loss_fn=loss_of)

    def step(tokens: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        with autocast(tokens.device, bf16):
            schedule.step(*[tokens] * (mine == 0), target=tokens if mine == last else None, losses=losses)
        return torch.stack(losses).mean().detach() if mine == last else None

    return step


def in_one_call(model: nn.Module, bf16: bool) -> Step:
    """A step of what is called as a whole."""

    def step(tokens: Tensor) -> Tensor | None:
        with autocast(tokens.device, bf16):
            loss = loss_of(model(tokens), tokens)
        loss.backward()
        return loss.detach()

    return step


# How many stages, parts of the batch and parts of each layer there are, of so many processes; and what makes them.
WAYS = {
    Way.ddp: (lambda world: (1, world, 1), ddp),
    Way.fsdp: (lambda world: (1, world, 1), fsdp),
    Way.tp: (lambda world: (1, 1, world), tp),
    Way.pp: (lambda world: (world, 1, 1), pp),
    Way.fsdp_pp: (lambda world: (2, world // 2, 1), fsdp_pp),
}


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def mesh_of(sizes: tuple[int, int, int], device: torch.device) -> DeviceMesh:
    if dist.get_world_size() not in (1, 2, 4) or math.prod(sizes) != dist.get_world_size():
        raise typer.BadParameter("This model is made for 2 or 4 processes, or for 1 but with fsdp+pp.")
    return init_device_mesh(device.type, sizes, mesh_dim_names=("pp", "dp", "tp"))


# -- training ----------------------------------------------------------------------------------------------------------


def batch(text: Tensor, seed: int, step: int, device: torch.device) -> Tensor:
    """(BATCH, LENGTH) pieces from random places: those of a step, whoever asks."""
    starts = torch.randint(len(text) - LENGTH + 1, (BATCH, 1), generator=torch.Generator().manual_seed(seed + step))
    return text[starts + torch.arange(LENGTH)].long().to(device)


def share(tokens: Tensor, mesh: DeviceMesh) -> Tensor:
    """This process's part of the batch."""
    return tokens.chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(module, WEIGHT_DECAY, lr=RATE, site_lr=SITE_RATE))


def mean_of_all(loss: Tensor | None, device: torch.device) -> float:
    """The mean over the processes that have a loss."""
    both = torch.zeros(2, device=device) if loss is None else torch.stack([loss.float(), torch.ones_like(loss.float())])
    dist.all_reduce(both)
    return (both[0] / both[1]).item()


def clip(module: nn.Module, mesh: DeviceMesh) -> None:
    """Clips by the norm of all gradients, those of the other stages among them."""
    parameters = list(module.parameters())
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    squared = norm.square()
    dist.all_reduce(squared, group=mesh["pp"].get_group())
    nn.utils.clip_grads_with_norm_(parameters, LARGEST_NORM, squared.sqrt())


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gradient_error(module: nn.Module, alone: nn.Module) -> float:
    """The largest difference of a parameter's gradients, over the largest element; tiny gradients count less."""
    want = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    floor = 1e-2 * max(float(its.abs().max()) for its in want.values())
    errors = [
        math.inf
        if p.grad is None
        else float((whole(p.grad) - want[name]).abs().max() / want[name].abs().max().clamp(min=floor))
        for name, p in module.named_parameters()
    ]
    return max(errors)


def saved(module: nn.Module, adam: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint holds, by names of parameters."""
    weights, states = get_state_dict(module, adam, options=FLAT)
    return {"model": weights, "optimizer": states}


def load(module: nn.Module, adam: torch.optim.Optimizer, folder: Path) -> None:
    state = saved(module, adam)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(module, adam, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=FLAT)


def last_checkpoint(folder: Path) -> tuple[int, Path]:
    """How many steps it has seen, and where it is; one that was not written to its end has no metadata."""
    steps = [int(path.parent.name) for path in folder.glob("*/.metadata")]
    if not steps:
        raise typer.BadParameter(f"There is no checkpoint in {folder}: train without --resume first.")
    return max(steps), folder / str(max(steps))


@contextlib.contextmanager
def processes() -> Iterator[torch.device]:
    """The group of all processes that torchrun started, and this one's device."""
    if "RANK" not in os.environ:
        raise typer.BadParameter("Start it by torchrun: torchrun --nproc-per-node 2 demos/train_distributed.py")
    here = int(os.environ["LOCAL_RANK"])
    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", here) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def main(
    parallel: Annotated[Way, typer.Option(help="How the model is spread.")] = Way.fsdp,
    bf16: Annotated[bool, typer.Option("--bf16", help="Blocks in bf16; sites stay in fp32.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of this run.")] = 200,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    every: Annotated[int, typer.Option(min=1, help="Steps from checkpoint to checkpoint.")] = 50,
    folder: Annotated[Path, typer.Option(help="Of the checkpoints.")] = Path("demo-output/distributed"),
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="At most 4 steps: shows that it runs.")] = False,
) -> None:
    """Train a small converted decoder in several processes, held against one."""
    torch.set_num_threads(1)
    with processes() as device:
        train(parallel, bf16, min(steps, 4) if quick else steps, resume, every, folder, seed, device)


def train(
    way: Way, bf16: bool, steps: int, resume: bool, every: int, folder: Path, seed: int, device: torch.device
) -> None:
    console = Console(quiet=dist.get_rank() != 0)
    sizes, spread = WAYS[way]
    mesh = mesh_of(sizes(dist.get_world_size()), device)
    text, _ = standard_library()
    torch.manual_seed(seed)
    model = mhcify(Decoder(), (batch(text, seed, 0, torch.device("cpu")),)).to(device)  # the same on all processes
    alone = copy.deepcopy(model)
    module, step_here = spread(model, mesh, bf16)
    trained, trained_alone = optimizer(module), optimizer(alone)
    first = 0
    if resume:
        first, checkpoint = last_checkpoint(folder)
        load(module, trained, checkpoint)
        load(alone, trained_alone, checkpoint)
    elif dist.get_rank() == 0:
        for earlier in folder.glob("[0-9]*/.metadata"):  # of another run
            shutil.rmtree(earlier.parent)
    step_alone = in_one_call(alone, bf16)

    processes = f"{dist.get_world_size()} process{'es' * (dist.get_world_size() > 1)}"
    start_section(console, f"{way.value}{', bf16' if bf16 else ''}: {processes} on {device.type}")
    console.print(settings(first, steps, seed), highlight=False)
    losses, errors, began = [], [], time.perf_counter()
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("loss {task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=steps)
        for step in range(first, first + steps):
            tokens = batch(text, seed, step, device)
            losses.append(mean_of_all(step_here(share(tokens, mesh)), device))
            if step == first:
                # In fp32, and alike wherever two processes hold the same ones.
                check_sites(module, mesh["tp" if way is Way.tp else "dp"].get_group())
            if step < first + CHECKED:
                loss_alone = step_alone(tokens)
                errors.append((abs(losses[-1] / loss_alone.item() - 1), gradient_error(module, alone)))
                nn.utils.clip_grad_norm_(alone.parameters(), LARGEST_NORM)
                trained_alone.step()
                trained_alone.zero_grad()
            clip(module, mesh)
            trained.step()
            trained.zero_grad()
            if (step + 1) % every == 0 or step + 1 == first + steps:
                dcp.save(saved(module, trained), checkpoint_id=folder / str(step + 1))
            progress.update(bar, advance=1, description=f"{losses[-1]:.3f}")
    seconds = (time.perf_counter() - began) / steps

    start_section(console, "Result")
    worst = torch.tensor(errors).amax(dim=0).to(device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    agrees = all(error <= bound for error, bound in zip(worst.tolist(), TOLERANCES[bf16]))
    console.print(result_table(module, losses, worst.tolist(), TOLERANCES[bf16], seconds, folder / str(first + steps)))
    if not agrees:
        console.print("The processes together do not compute what one computes.")
        raise typer.Exit(1)


def settings(first: int, steps: int, seed: int) -> str:
    return (
        f"Decoder over bytes, {LAYERS} layers, width {WIDTH}, 4 streams; steps {first + 1} to {first + steps} of "
        f"{BATCH} x {LENGTH} bytes of Python's modules; AdamW, learning rate {RATE:g}, sites {SITE_RATE:g}; torch "
        f"{torch.__version__}, seed {seed}"
    )


def result_table(
    module: nn.Module,
    losses: list[float],
    errors: list[float],
    bounds: tuple[float, float],
    seconds: float,
    checkpoint: Path,
) -> Table:
    held = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    table = Table("", "", show_header=False)
    table.add_row("loss of the first step", f"{losses[0]:.6f}")
    table.add_row("loss of the last step", f"{losses[-1]:.6f}")
    table.add_row("parameters in this process", f"{sum(p.numel() for p in held):,}")
    table.add_row("loss: off one process's by", f"{errors[0]:.1e} (allowed: {bounds[0]:.0e})")
    table.add_row("gradients: off one process's by", f"{errors[1]:.1e} (allowed: {bounds[1]:.0e})")
    table.add_row("seconds per step", f"{seconds:.3f}")
    table.add_row("checkpoint", f"{checkpoint}, {len(list(checkpoint.glob('*.distcp')))} files")
    table.caption = f"beside one process for {CHECKED} steps, whose time is in the seconds"
    return table


if __name__ == "__main__":
    typer.run(main)

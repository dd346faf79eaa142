"""How much of what a pipeline's stages send is hidden behind computation, as a model is and with its n-fold streams.

python demos/pipeline_overlap.py
python demos/pipeline_overlap.py --quick
python demos/pipeline_overlap.py --share 0.5 --json overlap.json

Two processes on gloo are the ranks. Between them messages take a time: one is there its bytes over the bandwidth after
it was sent and the one before it has passed. Exposed is what a step takes longer than without such delays, as a share
of the time for which a rank's messages are on their way. "On paper" is the same of the schedule's own order, computed
with a backward that takes twice as long as a forward.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from mhc_rewrite import mhcify
from mhc_rewrite.distributed import pipeline_stage

RANKS, HEADS = 2, 4
# The stages of each rank: one, two in turn, or down the ranks and up again.
ONE, LOOPED, V = ((0,), (1,)), ((0, 2), (1, 3)), ((0, 3), (1, 2))
SCHEDULES: dict[str, tuple[Any, Any]] = {
    "1F1B": (Schedule1F1B, ONE),
    "Interleaved1F1B": (ScheduleInterleaved1F1B, LOOPED),
    "ZBV": (ScheduleZBVZeroBubble, V),
    "DualPipeV": (ScheduleDualPipeV, V),
}
ORIGINAL, CONVERTED, RECOMPUTED = "original", "converted", "converted, recomputed"
console = Console(width=140)


@dataclass(frozen=True)
class Setting:
    """Sizes: `rows` sequences of `length` tokens a microbatch; `share`: see `main`."""

    layers: int
    width: int
    rows: int
    length: int
    microbatches: int
    n: int
    share: float
    rounds: int


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Trunk(nn.Module):
    """Layers, and nothing around them."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


# -- messages that take a time -----------------------------------------------------------------------------------------


class Link:
    """What this rank sends to the other one, one message after the other."""

    def __init__(self) -> None:
        self.bandwidth, self.free, self.bytes = math.inf, 0.0, 0

    def send(self, op: dist.P2POp) -> Message:
        """With the time, on the machine's clock, at which it is there."""
        self.free = max(time.monotonic(), self.free) + op.tensor.nbytes / self.bandwidth
        self.bytes += op.tensor.nbytes
        due = torch.tensor(self.free, dtype=torch.float64)
        works = [dist.isend(part, group=op.group, group_dst=op.group_peer) for part in (due, op.tensor)]
        return Message(works, None, due)

    def receive(self, op: dist.P2POp) -> Message:
        """What the other one sends."""
        due = torch.zeros((), dtype=torch.float64)
        works = [dist.irecv(part, group=op.group, group_src=op.group_peer) for part in (due, op.tensor)]
        return Message(works, due, due)


@dataclass
class Message:
    """As a `dist.Work`: that of a receiver is waited for until it is due."""

    works: list[Any]
    due: Tensor | None
    kept: Tensor

    def wait(self) -> bool:
        for work in self.works:
            work.wait()
        if self.due is not None:
            time.sleep(max(0.0, float(self.due) - time.monotonic()))
        return True


class SlowStage(PipelineStage):
    """A stage that sends and receives by way of a link."""

    def __init__(self, link: Link, *args: Any) -> None:
        super().__init__(*args)
        self.link = link

    def _slowly(self, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        for op in ops:
            run = self.link.send if op.op is dist.isend else self.link.receive
            op.op = lambda *args, op=op, run=run, **kwargs: run(op)
        return ops

    def get_fwd_recv_ops(self, chunk: int) -> list[dist.P2POp]:
        return self._slowly(super().get_fwd_recv_ops(chunk))

    def get_bwd_recv_ops(self, chunk: int) -> list[dist.P2POp]:
        return self._slowly(super().get_bwd_recv_ops(chunk))

    def get_fwd_send_ops(self, chunk: int) -> list[dist.P2POp]:
        return self._slowly(super().get_fwd_send_ops(chunk))

    def get_bwd_send_ops(self, chunk: int) -> list[dist.P2POp]:
        return self._slowly(super().get_bwd_send_ops(chunk))


# -- on paper ----------------------------------------------------------------------------------------------------------

FORWARD, BACKWARD, INPUT, WEIGHT = "FORWARD", "FULL_BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT"
UNITS = {FORWARD: 1, BACKWARD: 2, INPUT: 1, WEIGHT: 1}
Action = tuple[str, int, int]  # what, stage, microbatch


def order_of(schedule: Any) -> dict[int, list[Action]]:
    """What each rank computes, one after the other."""
    found: dict[int, list[Action]] = {}
    for rank, actions in schedule.pipeline_order.items():
        flat = [one for action in actions if action for one in action.sub_actions or [action]]
        kinds = [(one.computation_type.name, one.stage_index, one.microbatch_index) for one in flat]
        found[rank] = [action for action in kinds if action[0] in UNITS]
    return found


def one_forward_one_backward(ranks: int, microbatches: int) -> dict[int, list[Action]]:
    """The order of 1F1B with a stage a rank."""
    found: dict[int, list[Action]] = {}
    for rank in range(ranks):
        ahead = min(ranks - rank, microbatches)
        steps = [(FORWARD, k) for k in range(ahead)]
        for k in range(microbatches):
            steps.append((BACKWARD, k))
            if ahead + k < microbatches:
                steps.append((FORWARD, ahead + k))
        found[rank] = [(what, rank, k) for what, k in steps]
    return found


def simulate(order: Mapping[int, Sequence[Action]], message: float) -> float:
    """How long a step takes where a stage's forward takes 1, and a message between two ranks `message`."""
    place = {stage: rank for rank, actions in order.items() for _, stage, _ in actions}
    last = max(place)
    free = dict.fromkeys(order, 0.0)
    link: dict[tuple[int, int], float] = {}
    there: dict[Action, float] = {}  # when a stage's input is on its rank; forward's, and the gradient of its output
    done: set[Action] = set()
    waiting = {rank: list(actions) for rank, actions in order.items()}
    while any(waiting.values()):
        before = len(done)
        for rank, actions in waiting.items():
            while actions:
                what, stage, k = actions[0]
                kind = FORWARD if what == FORWARD else BACKWARD
                comes_from = stage - 1 if kind == FORWARD else stage + 1
                needs = (kind, stage, k) if 0 <= comes_from <= last and what != WEIGHT else None
                if needs and needs not in there:
                    break
                free[rank] = max(free[rank], there[needs] if needs else 0.0) + UNITS[what]
                done.add(actions.pop(0))
                goes_to = stage + 1 if kind == FORWARD else stage - 1
                if what == WEIGHT or not 0 <= goes_to <= last:
                    continue
                arrives = free[rank]
                if place[goes_to] != rank:
                    way = (rank, place[goes_to])
                    arrives = link[way] = max(arrives, link.get(way, 0.0)) + message
                there[kind, goes_to, k] = arrives
        if len(done) == before:
            raise ValueError("the ranks wait for one another")
    return max(free.values())


# -- measured ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One model under one schedule, on this rank."""

    model: str
    name: str
    schedule: Any
    stages: list[nn.Module]
    link: Link
    order: dict[int, list[Action]]
    inputs: tuple[Tensor, ...]
    target: Tensor | None

    def step(self, bandwidth: float) -> float:
        """Seconds that the slower rank takes for a training step."""
        for stage in self.stages:
            stage.zero_grad()
        self.link.bandwidth, self.link.free, self.link.bytes = bandwidth, 0.0, 0
        dist.barrier()
        began = time.perf_counter()
        self.schedule.step(*self.inputs, target=self.target)
        took = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        return float(took)


def runs(setting: Setting) -> list[Run]:
    """All of them, with the same weights and the same sites."""
    shape = (setting.rows, setting.length, setting.width)
    example = (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)
    found = []
    for name in (ORIGINAL, CONVERTED, RECOMPUTED):
        torch.manual_seed(0)
        model = Trunk(setting.layers, setting.width)
        if name != ORIGINAL:
            mhcify(model, example, n_streams=setting.n, recompute="auto" if name == RECOMPUTED else None)
        cut: dict[tuple[int, int], nn.Module] = {}
        for kind, (schedule, places) in SCHEDULES.items():
            mine, number = places[dist.get_rank()], sum(map(len, places))
            for k in mine:
                if (number, k) not in cut:
                    cut[number, k] = stage_of(model, name, k, number, example)
            parts, link = [cut[number, k] for k in mine], Link()
            stages: Any = [SlowStage(link, part, k, number, torch.device("cpu")) for part, k in zip(parts, mine)]
            single = schedule is Schedule1F1B
            made = schedule(stages[0] if single else stages, setting.microbatches, loss_fn=loss)
            order = one_forward_one_backward(RANKS, setting.microbatches) if single else order_of(made)
            inputs = (example[0].repeat(setting.microbatches, 1, 1),) if 0 in mine else ()
            target = torch.zeros(setting.microbatches, 1) if number - 1 in mine else None
            found.append(Run(name, kind, made, parts, link, order, inputs, target))
    return found


def stage_of(model: nn.Module, name: str, index: int, number: int, example: tuple[Tensor, ...]) -> nn.Module:
    """Some of the layers, evenly."""
    layers = [key for key, child in model.named_modules() if isinstance(child, Block)]
    each = len(layers) // number
    parts = [layers[k * each : (k + 1) * each] for k in range(number)]
    if name == ORIGINAL:
        return nn.Sequential(*(model.get_submodule(key) for key in parts[index]))
    return pipeline_stage(model, parts, index, example)


def loss(out: Tensor, _: Tensor) -> Tensor:
    return out.square().mean()


def measure(rank: int, setting: Setting, folder: str) -> None:
    """In each of the two processes; the first one writes what was found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", RANKS), rank=rank, world_size=RANKS,
        timeout=datetime.timedelta(seconds=120),
    )  # fmt: skip
    everything = runs(setting)
    computing = {}
    for run in everything:
        run.step(math.inf)
        run.step(math.inf)
        computing[run.model, run.name] = run.step(math.inf)
    # A microbatch's computation on a rank, of the converted model: 1F1B has m + p - 1 of them one after the other.
    microbatch = computing[CONVERTED, "1F1B"] / (setting.microbatches + RANKS - 1)
    message = 4 * setting.n * setting.rows * setting.length * setting.width
    bandwidth = message / (setting.share * microbatch)
    taken: list[dict[float, list[float]]] = [{math.inf: [], bandwidth: []} for _ in everything]
    for _ in range(setting.rounds):
        for run, its in zip(everything, taken):
            for speed, seconds in its.items():
                seconds.append(run.step(speed))
    rows = [figures(run, its, bandwidth, setting) for run, its in zip(everything, taken)]
    if rank == 0:
        found = {"setting": asdict(setting), "torch": torch.__version__, "bandwidth": bandwidth, "rows": rows}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def figures(run: Run, taken: Mapping[float, Sequence[float]], bandwidth: float, setting: Setting) -> dict[str, Any]:
    """One row of the table. Both ranks send as much, in these four schedules."""
    fast, slow = taken[math.inf], taken[bandwidth]
    streams = 1 if run.model == ORIGINAL else setting.n
    message = 4 * streams * setting.rows * setting.length * setting.width
    transfer = run.link.bytes / bandwidth
    alone = simulate(run.order, 0.0)
    step = statistics.median(fast)
    longer = statistics.median(after - before for before, after in zip(fast, slow))
    unit = step / alone  # seconds of a stage's forward
    on_paper = (simulate(run.order, message / bandwidth / unit) - alone) * unit
    return {
        "model": run.model, "schedule": run.name, "message": message, "bytes": run.link.bytes, "transfer": transfer,
        "step": step, "longer": longer, "exposed": longer / transfer, "on_paper": on_paper / transfer,
    }  # fmt: skip


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One line a model and schedule."""
    headers = (
        "a message, MB",
        "a rank sends, MB",
        "on the way, s",
        "step, s",
        "with transfer, s",
        "exposed",
        "on paper",
    )
    made = Table("model", "schedule", *headers)
    for column in made.columns[2:]:
        column.justify = "right"
    for row in rows:
        made.add_row(
            row["model"], row["schedule"], f"{row['message'] / 1e6:.3g}", f"{row['bytes'] / 1e6:.3g}",
            f"{row['transfer']:.3f}", f"{row['step']:.3f}", f"{row['longer']:.3f}",
            f"{row['exposed']:.2f}", f"{row['on_paper']:.2f}",
        )  # fmt: skip
    return made


def main(
    layers: Annotated[int, typer.Option(min=4, help="Layers of two sites each, a multiple of four.")] = 8,
    width: Annotated[int, typer.Option(min=HEADS, help="C.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of a microbatch.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 256,
    microbatches: Annotated[int, typer.Option(min=4, help="Of a step.")] = 8,
    n: Annotated[int, typer.Option(min=2, max=16, help="Number of streams.")] = 4,
    share: Annotated[
        float, typer.Option(min=0.01, help="What a message of n streams takes, of a rank's time for a microbatch.")
    ] = 0.15,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; in each everything runs once.")] = 9,
    quick: Annotated[bool, typer.Option(help="Sizes and rounds that show that it runs, and no more.")] = False,
    output: Annotated[Optional[Path], typer.Option("--json", help="Write the figures to this file.")] = None,  # noqa: UP045
) -> None:
    """Measure what is left exposed of a pipeline's transfers, on the CPU."""
    if layers % 4:
        raise typer.BadParameter("--layers must be a multiple of four: there are up to four stages.")
    setting = Setting(layers, width, rows, length, microbatches, n, share, rounds)
    if quick:
        setting = Setting(4, 32, 1, 32, 4, 2, share, 1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (setting, folder), nprocs=RANKS)
        found = json.loads(Path(folder, "found.json").read_text())
    console.print(
        f"{setting.layers} layers, C = {setting.width}, n = {setting.n}, {setting.microbatches} microbatches of "
        f"{setting.rows} x {setting.length} tokens, fp32; two processes of one thread each, torch {torch.__version__}"
    )
    console.print(
        f"messages pass at {found['bandwidth'] / 1e6:.1f} MB/s, at which one of n streams takes {setting.share:g} of a "
        f"rank's time for a microbatch; medians of {setting.rounds} rounds"
    )
    console.print(table(found["rows"]))
    if output:
        output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)

"""What tests/test_distributed_cost.py runs in every one of its processes: bytes that a rank really sends in a step.

Every collective that is called is seen, and what a rank sends for it is that of a ring; messages of pipelines are what
they are. Held against the formulas of the cost model, to the byte, for a converted model and for the same unconverted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV, ScheduleInterleaved1F1B
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import rank_cases
from mhc_rewrite import cost as costs
from mhc_rewrite import mhcify, plan
from mhc_rewrite.cost import Mesh, MeshCost, messages, padded
from mhc_rewrite.distributed import SiteParallel, pipeline_stage, shard_sites

WIDTH, HIDDEN, LAYERS, ROWS, LENGTH = 16, 6, 4, 2, 5


class Block(nn.Module):
    """Of the hidden width 6, which two ranks divide, and an odd one of 5, which FSDP pads."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        hidden = HIDDEN - odd
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Stack(nn.Module):
    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(odd) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def batch(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain(dtype: torch.dtype = torch.float32, odd: bool = False) -> Any:
    torch.manual_seed(0)
    return Stack(odd).to(dtype)


class Bytes(TorchDispatchMode):
    """What this rank sends, by the collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = function._schema.name.partition("::")
        if space.startswith(("c10d", "_c10d")):
            self._see(name, args)
        return function(*args, **(kwargs or {}))

    def _see(self, name: str, args: Any) -> None:
        others, world = dist.get_world_size() - 1, dist.get_world_size()
        if name in ("_allgather_base_", "all_gather_into_tensor"):
            sent = others * (args[1] if name == "_allgather_base_" else args[0]).nbytes
        elif name == "_reduce_scatter_base_":
            sent = others * args[0].nbytes
        elif name == "reduce_scatter_tensor":
            sent = others * args[0].nbytes // world
        elif name in ("allreduce_", "all_reduce"):
            sent = 2 * others * sum(t.nbytes for t in (args[0] if name == "allreduce_" else args[:1])) // world
        elif name == "send":
            sent = sum(t.nbytes for t in args[0])
        elif name in ("wait_tensor", "_wrap_tensor_autograd", "recv_"):
            return
        else:
            raise AssertionError(f"{name} is not counted")
        self.sent[name] = self.sent.get(name, 0) + sent

    @property
    def total(self) -> int:
        return sum(self.sent.values())


def sent(step: Callable[[], Any]) -> int:
    """In a third step: the first one prepares, and in the second DDP arranges its buckets anew."""
    step()
    step()
    with Bytes() as seen:
        step()
    return seen.total


def training(model: Any, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    return lambda: rank_cases.loss(model(batch(dtype=dtype))).backward()


def of_plan(mesh: Mesh, n: int, dtype: torch.dtype = torch.float32, odd: bool = False) -> MeshCost:
    return costs.cost(plan(plain(dtype, odd), (batch(dtype=dtype),), n_streams=n), mesh)


def converted(n: int, dtype: torch.dtype = torch.float32, odd: bool = False) -> Any:
    return mhcify(plain(dtype, odd), (batch(dtype=dtype),), n_streams=n)


def shard(model: Any, reshard: bool) -> Any:
    for layer in model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    return fully_shard(model, reshard_after_forward=reshard)


def fsdp_bytes() -> None:
    """Sites in their layers' groups, and apart; odd axes are padded: 3 of alpha, 5 of the blocks, 15 of a bias."""
    world = dist.get_world_size()
    for dtype, n, odd, apart, reshard in (
        (torch.float32, 4, False, False, True),
        (torch.float32, 3, True, False, False),
        (torch.bfloat16, 3, True, True, True),
    ):
        of = costs.on_mesh(of_plan(Mesh(fsdp=world), n, dtype, odd).cost, Mesh(fsdp=world), sites_apart=apart)
        sizes = {"parameters": padded(plain(odd=odd).parameters(), world), "gathers": 1 + reshard}
        before, after = of.bytes("fsdp", **sizes)
        model = converted(n, dtype, odd)
        model = shard(shard_sites(model) if apart else model, reshard)
        assert sent(training(shard(plain(dtype, odd), reshard), dtype)) == before
        assert sent(training(model, dtype)) == after
        assert after > before


def fsdp_collectives() -> None:
    """Groups of their own: as many more as the formula says."""
    world = dist.get_world_size()
    of = costs.on_mesh(of_plan(Mesh(fsdp=world), 4).cost, Mesh(fsdp=world), sites_apart=True)
    together, apart = shard(converted(4), True), shard(shard_sites(converted(4)), True)
    counts = [sum(rank_cases.collectives(model).values()) for model in (together, apart)]
    assert counts[1] - counts[0] == of.evaluate(of.collectives, of.cost.streams[0], gathers=2) == 2 * LAYERS


def ddp_bytes() -> None:
    world = dist.get_world_size()
    for dtype in (torch.float32, torch.bfloat16):
        of = of_plan(Mesh(dp=world), 3, dtype, True)
        before, after = of.bytes("dp", parameters=padded(plain(odd=True).parameters(), 1))
        assert sent(training(DistributedDataParallel(plain(dtype, True)), dtype)) == before
        assert sent(training(DistributedDataParallel(converted(3, dtype, True)), dtype)) == after
        assert after > before


def tp_bytes() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    styles: dict[str, Any] = {"layers.*.up": ColwiseParallel(), "layers.*.down": RowwiseParallel()}
    of = of_plan(Mesh(tp=mesh.size()), 4)
    want = of.bytes("tensor", tokens=ROWS * LENGTH)
    got = tuple(sent(training(parallelize_module(model, mesh, styles))) for model in (plain(), converted(4)))
    assert got == want and want[0] == want[1] > 0


def sp_bytes() -> None:
    """This rank's half of the tokens between blocks; the sites' gradients are summed when they are asked for."""
    mesh, n = init_device_mesh("cpu", (dist.get_world_size(),)), 3
    styles: dict[str, Any] = {
        "layers.*.norm": SequenceParallel(),
        "layers.*.up": ColwiseParallel(input_layouts=Shard(1)),
        "layers.*.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    x = torch.randn(ROWS, 6, WIDTH, generator=torch.Generator().manual_seed(1))

    def step(model: Any) -> None:
        model.zero_grad()
        rank_cases.loss(model(x.chunk(mesh.size(), 1)[dist.get_rank()])).backward()
        for name, p in model.named_parameters():
            if ".mhc_" in name:
                rank_cases.whole(p.grad)

    of = of_plan(Mesh(sp=mesh.size()), n)
    want = of.bytes("tensor", tokens=ROWS * 6)
    alone = parallelize_module(plain(), mesh, styles)
    model = parallelize_module(converted(n), mesh, {**styles, "": SiteParallel()})
    assert (sent(lambda: step(alone)), sent(lambda: step(model))) == want and want[1] > want[0] > 0


def pipelined(schedule: Any, mine: tuple[int, ...], number: int, parts: list[nn.Module]) -> int:
    """Bytes that this rank sends in a step of its stages."""
    stages: Any = [PipelineStage(part, k, number, torch.device("cpu")) for part, k in zip(parts, mine)]
    single = schedule is Schedule1F1B
    run = schedule(
        stages[0] if single else stages, rank_cases.MICROBATCHES, loss_fn=lambda out, _: rank_cases.loss(out)
    )
    target = torch.zeros(rank_cases.MICROBATCHES, 1) if number - 1 in mine else None
    return sent(lambda: run.step(*[batch(ROWS * rank_cases.MICROBATCHES)] * (0 in mine), target=target))


def pipeline_bytes() -> None:
    """As many messages as the stages' places say, each of n streams, and of one as the model was."""
    n = 3
    of = of_plan(Mesh(pp=dist.get_world_size()), n)
    looped, v = rank_cases.LOOPED, rank_cases.V
    original, model = plain(), converted(n)
    cut: dict[str, nn.Module] = {}
    for schedule, places in (
        (Schedule1F1B, ((0,), (1,))),
        (ScheduleInterleaved1F1B, looped),
        (ScheduleDualPipeV, v),
    ):
        mine, number = places[dist.get_rank()], sum(map(len, places))
        each = LAYERS // number
        names = [[f"layers.{layer}" for layer in range(k * each, (k + 1) * each)] for k in range(number)]
        for k in mine:
            if str(names[k]) not in cut:
                cut[str(names[k])] = pipeline_stage(model, names, k, (batch(),))
        before = [nn.Sequential(*(original.get_submodule(name) for name in names[k])) for k in mine]
        after = [cut[str(names[k])] for k in mine]
        most = torch.tensor([pipelined(schedule, mine, number, parts) for parts in (before, after)])
        dist.all_reduce(most, dist.ReduceOp.MAX)
        ranks = [rank for k in range(number) for rank, its in enumerate(places) if k in its]
        sizes = {"tokens": ROWS * LENGTH, "microbatches": rank_cases.MICROBATCHES, "messages": messages(ranks)}
        want = of.bytes("pipeline", **sizes)
        assert tuple(most.tolist()) == want and want[1] == n * want[0] > 0, (schedule, most, want)

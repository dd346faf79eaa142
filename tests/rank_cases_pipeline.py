"""What tests/test_distributed_pipeline.py runs in every one of its processes: stages cut by `pipeline_stage`."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from handmade.common import VOCABULARY, WIDTH
from mhc_rewrite import mhcify
from mhc_rewrite.distributed import check_sites, pipeline_stage, shard_sites
from mhc_rewrite.kernels import ops
from oracle import perturb
from rank_cases import SCHEDULES, agree, gradients, loss
from stages import Decoder

DEVICE = torch.device("cpu")
MICROBATCHES = 4
BYTES = ["tok_embeddings", *(f"layers.{k}" for k in range(4)), "norm", "output"]
IN_TWO = [BYTES[:3], BYTES[3:]]
IN_FOUR = [BYTES[:2], BYTES[2:3], BYTES[3:4], BYTES[4:]]
WITHOUT_SITES = [BYTES[:1], BYTES[1:4], BYTES[4:5], BYTES[5:]]  # the first one and the last have none
WIDE, NARROW = (2, 5, 4, WIDTH), (2, 5, WIDTH)


def tokens(count: int = 2 * MICROBATCHES) -> Tensor:
    return torch.randint(VOCABULARY, (count, 5), generator=torch.Generator().manual_seed(1))


def masks(count: int = 2 * MICROBATCHES) -> Tensor:
    return (torch.rand(count, 5, generator=torch.Generator().manual_seed(2)) > 0.2).float()


EXAMPLE = (tokens(2), masks(2))


def decoder(**options: Any) -> Any:
    torch.manual_seed(0)
    model = mhcify(Decoder(), EXAMPLE, **options)
    perturb(model)
    return model


def in_microbatches(model: nn.Module) -> dict[str, Tensor]:
    parts = zip(tokens().chunk(MICROBATCHES), masks().chunk(MICROBATCHES), strict=True)
    torch.stack([loss(model(t, m)) for t, m in parts]).mean().backward()
    return gradients(model)


def step(schedule: Any, stages: list[Any], mine: tuple[int, ...], count: int, batch: slice = slice(None)) -> None:
    one = stages if len(stages) > 1 or schedule not in (ScheduleGPipe, Schedule1F1B) else stages[0]
    run = schedule(one, MICROBATCHES, loss_fn=lambda out, _: loss(out))
    target = torch.zeros(MICROBATCHES, 1) if count - 1 in mine else None
    run.step(*[tokens()[batch]] * (0 in mine), mask=masks()[batch], target=target)


class Sent:
    """The shapes that leave a stage."""

    def __init__(self, stages: list[nn.Module]) -> None:
        self.shapes: set[tuple[int, ...]] = set()
        for stage in stages:
            stage.register_forward_hook(lambda _, args, out: self.shapes.add(tuple(out.shape)))


def pipelined(schedule: Any, layers: Any, mine: tuple[int, ...], **options: Any) -> float:
    """A schedule on some layers; gradients, what passes, and how often each site is evaluated a microbatch."""
    passing = [WIDE] * (len(layers) - 1) + [(2, 5, VOCABULARY)]
    if layers is WITHOUT_SITES:
        passing = [NARROW, WIDE, WIDE, (2, 5, VOCABULARY)]
    model = decoder(**options)
    want = in_microbatches(copy.deepcopy(model))
    stages = [pipeline_stage(model, layers, index, EXAMPLE) for index in mine]
    del model
    built = [PipelineStage(part, index, len(layers), DEVICE) for index, part in zip(mine, stages, strict=True)]
    sent = Sent(stages)
    counts: Counter[str] = Counter()
    before = {name: getattr(ops, name) for name in ("pre", "boundary")}

    def counted(name: str) -> Any:
        def run(*args: Any) -> Any:
            counts[name] += 1
            return before[name](*args)

        return run

    for name in before:
        setattr(ops, name, counted(name))
    try:
        step(schedule, built, mine, len(layers))
    finally:
        for name, operator in before.items():
            setattr(ops, name, operator)
    got = {name: g for part in stages for name, g in gradients(part).items()}
    agree(got, {name: its for name, its in want.items() if name in got})
    assert got.keys() == {name for part in stages for name, _ in part.named_parameters()}
    assert sent.shapes == {passing[index] for index in mine}, sent.shapes
    sites = sum(name.rpartition(".")[2].startswith("mhc_") for part in stages for name, _ in part.named_modules())
    # Before the first step the schedule runs each stage once, backward too, to learn what passes.
    evaluations = torch.tensor(sum(counts.values()) / max(sites, 1) / (MICROBATCHES + 1))
    dist.all_reduce(evaluations, dist.ReduceOp.MAX)
    print(f"{schedule.__name__} {options}: at most {evaluations:.2f} evaluations, {sorted(sent.shapes)}")
    assert evaluations <= 2.5, evaluations
    return evaluations.item()


def stages_of_two() -> dict[str, float]:
    mine = (dist.get_rank(),)
    return {"two": max(pipelined(kind, IN_TWO, mine, recompute=3) for kind in (ScheduleGPipe, Schedule1F1B))}


def stages_of_four() -> dict[str, float]:
    return {"four": max(pipelined(kind, IN_FOUR, places[dist.get_rank()], recompute=3) for kind, places in SCHEDULES)}


def stages_without_recompute() -> None:
    for schedule, places in SCHEDULES:
        pipelined(schedule, IN_FOUR, places[dist.get_rank()])


def stages_without_sites() -> None:
    for schedule, places in SCHEDULES:
        pipelined(schedule, WITHOUT_SITES, places[dist.get_rank()], recompute=4)


def with_fsdp() -> None:
    """Two pipelines of two stages, each stage sharded over two ranks, sites by themselves; and a plain start of it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    data, place = mesh["dp"].get_local_rank(), mesh["pp"].get_local_rank()
    for options in ({}, {"recompute": 3}):
        model = decoder(**options)
        want = in_microbatches(copy.deepcopy(model))
        stage: Any = pipeline_stage(model, IN_TWO, place, EXAMPLE)
        shard_sites(stage, mesh["dp"])
        for layer in stage.layers.values():
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(stage, mesh=mesh["dp"])
        group = mesh["pp"].get_group()
        one = PipelineStage(stage, place, 2, DEVICE, group=group)
        run = Schedule1F1B(one, MICROBATCHES // 2, loss_fn=lambda out, _: loss(out))
        half = slice(4 * data, 4 * data + 4)
        target = torch.zeros(MICROBATCHES // 2, 1) if place == 1 else None
        run.step(*[tokens()[half]] * (place == 0), mask=masks()[half], target=target)
        check_sites(stage, mesh["dp"].get_group())
        got = gradients(stage)
        agree(got, {name: its for name, its in want.items() if name in got})
        assert len(got) == len(list(stage.parameters()))

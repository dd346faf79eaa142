"""What tests/test_distributed_pipeline.py runs in every one of its processes: stages cut by `pipeline_stage`."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, SplitPoint, pipeline
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import rank_cases
from handmade.common import VOCABULARY, WIDTH
from mhc_rewrite import mhcify
from mhc_rewrite.distributed import SiteParallel, check_sites, pipeline_stage, shard_sites
from mhc_rewrite.kernels import ops
from oracle import perturb
from rank_cases import SCHEDULES, agree, gradients, loss
from stages import Decoder, in_stages

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


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often coefficients are evaluated inside, by operator."""
    counts: Counter[str] = Counter()
    before = {name: getattr(ops, name) for name in ("pre", "boundary")}

    def counting(name: str) -> Any:
        def run(*args: Any) -> Any:
            counts[name] += 1
            return before[name](*args)

        return run

    for name in before:
        setattr(ops, name, counting(name))
    try:
        yield counts
    finally:
        for name, operator in before.items():
            setattr(ops, name, operator)


def pipelined(schedule: Any, layers: Any, mine: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """The second step of a schedule, as the first one runs each stage once more to learn what passes: how far gradients
    are from those of one process, what passes, and how often each site is evaluated a microbatch."""
    passing = [WIDE] * (len(layers) - 1) + [(2, 5, VOCABULARY)]
    if layers is WITHOUT_SITES:
        passing[0] = NARROW
    model = decoder(**options)
    want = in_microbatches(copy.deepcopy(model))
    stages = [pipeline_stage(model, layers, index, EXAMPLE) for index in mine]
    del model
    built: Any = [PipelineStage(part, index, len(layers), DEVICE) for index, part in zip(mine, stages, strict=True)]
    sent: set[tuple[int, ...]] = set()
    for stage in stages:
        stage.register_forward_hook(lambda _, args, out: sent.add(tuple(out.shape)))
    run = schedule(built if len(layers) > 2 else built[0], MICROBATCHES, loss_fn=lambda out, _: loss(out))
    target = torch.zeros(MICROBATCHES, 1) if len(layers) - 1 in mine else None
    for _ in range(2):
        for stage in stages:
            stage.zero_grad()
        with counted() as counts:
            run.step(*[tokens()] * (0 in mine), mask=masks(), target=target)
    got = {name: g for part in stages for name, g in gradients(part).items()}
    assert got.keys() == {name for part in stages for name, _ in part.named_parameters()}
    assert sent == {passing[index] for index in mine}, sent
    sites = sum(name.rpartition(".")[2].startswith("mhc_") for part in stages for name, _ in part.named_modules())
    evaluations = sum(counts.values()) / MICROBATCHES / max(sites, 1)
    assert evaluations <= 2.5, (schedule, evaluations)
    its = {name: its for name, its in want.items() if name in got}
    agree(got, its)
    floor = 1e-3 * max(float(g.abs().max()) for g in its.values())
    errors = [float((got[name] - g).abs().max()) / max(float(g.abs().max()), floor) for name, g in its.items()]
    return {"gradients": max(errors), "evaluations": evaluations, "sent": sorted(s for s in sent if s == WIDE)}


def worst(figures: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all schedules and ranks."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, figures)
    every = [figure for one in ranks for figure in one]
    return {
        **{name: max(figure[name] for figure in every) for name in ("gradients", "evaluations")},
        "sent": " ".join(str(shape) for shape in sorted({tuple(s) for figure in every for s in figure["sent"]})),
    }


def schedules() -> dict[str, Any]:
    two = [pipelined(one, IN_TWO, (dist.get_rank(),), recompute=3) for one in (ScheduleGPipe, Schedule1F1B)]
    return worst(two + [pipelined(one, IN_FOUR, places[dist.get_rank()], recompute=3) for one, places in SCHEDULES])


def without_recompute() -> None:
    for schedule, places in SCHEDULES:
        assert pipelined(schedule, IN_FOUR, places[dist.get_rank()])["evaluations"] == 1


def without_sites() -> None:
    for schedule, places in SCHEDULES:
        pipelined(schedule, WITHOUT_SITES, places[dist.get_rank()], recompute=4)


def cut_by_pipeline() -> None:
    """Cut by torch, between the layers. In a V two stages that follow one another are on one rank, where what torch's
    `build_stage` makes would send to itself: there the parts go into stages as one writes them by hand."""
    model = rank_cases.converted()
    want = rank_cases.in_microbatches(copy.deepcopy(model))
    example = rank_cases.batch().repeat(2, 1, 1).chunk(MICROBATCHES)[0]
    cuts = {f"layers.{k}": SplitPoint.BEGINNING for k in (1, 2, 3)}
    for schedule, places in SCHEDULES:
        parts, mine = pipeline(copy.deepcopy(model), mb_args=(example,), split_spec=cuts), places[dist.get_rank()]
        stages = [parts.get_stage_module(k) for k in mine]
        rank_cases.pipelined(
            schedule, mine, [PipelineStage(part, k, 4, DEVICE) for k, part in zip(mine, stages, strict=True)]
        )
        for k, stage in zip(mine, stages, strict=True):
            last = ("layers.3", "norm") if k == 3 else (f"layers.{k}.",)
            agree(gradients(stage), {name: its for name, its in want.items() if name.startswith(last)})


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


def with_tensor_parallelism() -> None:
    """Stages whose layers are spread over both processes, one after another in each of them."""
    model = decoder(recompute=3)
    value = loss(model(tokens(2), masks(2)))
    value.backward()
    want = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    stages = [pipeline_stage(model, IN_TWO, index, EXAMPLE) for index in (0, 1)]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in stages:
        styles = {"layers.*.mlp.up": ColwiseParallel(), "layers.*.mlp.down": RowwiseParallel()}
        parallelize_module(stage, mesh, {"": SiteParallel(sequence_sharded=False), **styles})
    assert all(isinstance(p, DTensor) for stage in stages for name, p in stage.named_parameters() if ".mhc_" in name)
    found, _ = in_stages(stages, (tokens(2),), {"mask": masks(2)}, loss)
    torch.testing.assert_close(found, value.detach(), rtol=1e-5, atol=0)
    got = {name: g for stage in stages for name, g in gradients(stage).items()}
    agree(got, want)
    for stage in stages:
        check_sites(stage)

"""Cases of tests/test_distributed_recipe.py, and others whose figures stand in docs/distributed.md."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import rank_cases_tensor as cases
from mhc_rewrite import HyperConnection, lowering
from mhc_rewrite.distributed import SiteParallel, check_sites
from mhc_rewrite.passes.fuse_boundaries import BOUNDARY, Fused, fuse_boundaries
from rank_cases import (
    LAYERS,
    agree,
    collectives,
    converted,
    gradients,
    in_one,
    plain,
    shard,
    shard_by_themselves,
    sites_of,
    step,
)

# -- compiled ----------------------------------------------------------------------------------------------------------


def by_itself(model: nn.Module) -> nn.Module:
    return model


def boundaries(spread: Callable[[Any], Any]) -> tuple[int, set[str]]:
    """How many boundaries are one operator in what Dynamo makes of a model, and why others are not; gradients hold."""
    found: list[Fused] = []
    count = 0

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        found.append(fuse_boundaries(graph_module, example_inputs))
        mine = sum(node.target is BOUNDARY for node in graph_module.graph.nodes)

        def run(*inputs: Any) -> Any:  # layers may share a graph
            nonlocal count
            count += mine
            return graph_module(*inputs)

        return run

    _, want = in_one(converted())
    model = converted()
    torch._dynamo.reset()
    run = step if spread is not by_itself else in_one
    run(torch.compile(spread(model), backend=backend))
    agree(gradients(model), want)
    return count, {why for fused in found for why in fused.left.values()}


WHOLE, BY_LAYERS = 2 * LAYERS - 1, LAYERS
COMPILED = {
    "one process": (by_itself, WHOLE),
    "DDP": (DistributedDataParallel, WHOLE),
    "FSDP2 of the model": (fully_shard, WHOLE),
    "FSDP2 of each layer": (shard, BY_LAYERS),
    "with sites by themselves": (shard_by_themselves, BY_LAYERS),
}


def fused_boundaries(*names: str) -> dict[str, int]:
    """DDP and a model that is sharded as one are one graph; FSDP's hooks around each layer end a graph."""
    seen = {}
    for name in names:
        spread, want = COMPILED[name]
        seen[name], why = boundaries(spread)
        assert seen[name] == want, (name, seen)
        assert why == (set() if want == WHOLE else {"its state comes from outside of the graph"}), (name, why)
    return seen


def some_fused_boundaries() -> None:
    fused_boundaries("DDP", "FSDP2 of each layer")


def all_fused_boundaries() -> dict[str, int]:
    return fused_boundaries(*COMPILED)


def compiled(spread: Callable[[Any], Any], per_layer: bool = False, recompute: int | None = None) -> None:
    """By the backend "mhc", in two steps: losses and gradients as uncompiled in one process."""
    want_loss, want = in_one(converted())
    model: Any = converted(recompute=recompute)
    torch._dynamo.reset()
    run = spread(model)
    if per_layer:
        for layer in model.layers:
            layer.compile(backend=lowering.mhc)
    else:
        run = torch.compile(run, backend=lowering.mhc, options={"recompute": recompute})
    for _ in range(2):
        model.zero_grad()
        torch.testing.assert_close(step(run), want_loss, rtol=1e-5, atol=0)
        agree(gradients(model), want)


def compiled_ddp() -> None:
    compiled(DistributedDataParallel)


def compiled_fsdp() -> None:
    compiled(shard)


def compiled_fsdp_further() -> None:
    compiled(fully_shard)
    compiled(shard, per_layer=True)
    compiled(shard_by_themselves)


def compiled_recompute() -> None:
    compiled(DistributedDataParallel, recompute=4)
    compiled(shard, recompute=2)
    compiled(shard, per_layer=True, recompute=2)


# -- figures of docs/distributed.md ------------------------------------------------------------------------------------


def off(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference over a tensor's largest element, as `agree` has it."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    floor = 1e-3 * max(float(t.abs().max()) for t in want.values())
    return max(float((got[name] - its).abs().max()) / max(float(its.abs().max()), floor) for name, its in want.items())


def every_recompute() -> dict[str, Any]:
    """Layers resharded behind their forward or not, sites in their layer's group or by themselves."""
    lengths, depths = (1, 2, 4, 6, 8, "auto"), (8, 12)
    ways = list(itertools.product((True, False), (shard, shard_by_themselves)))
    in_loss, in_gradients = 0.0, 0.0
    for depth in depths:
        want_loss, want = in_one(converted(depth))
        for length, (reshard, spread) in itertools.product(lengths, ways):
            model = spread(converted(depth, recompute=length), reshard_after_forward=reshard)
            for _ in range(2):  # the second finds the memory that the first has freed
                model.zero_grad()
                in_loss = max(in_loss, abs(float(step(model) / want_loss) - 1))
                in_gradients = max(in_gradients, off(gradients(model), want))
    assert in_loss <= 1e-5 and in_gradients <= 1e-5, (in_loss, in_gradients)
    return {"runs": len(lengths) * len(ways) * len(depths), "loss": in_loss, "gradients": in_gradients}


def bf16_beside_fp32_sites() -> dict[str, Any]:
    """A policy in bf16, and weights in bf16, with `shard_sites`."""
    dtypes: set[torch.dtype] = set()
    sums: list[float] = []

    def look(site: HyperConnection, args: Any, result: Any) -> None:
        *_, post, res = result
        dtypes.update(t.dtype for t in (*site.parameters(), post, res))
        sums.append(float((res.detach().double().sum(-1) - 1).abs().max()))

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for dtype, options in ((torch.float32, {"mp_policy": policy}), (torch.bfloat16, {})):
        model = shard_by_themselves(converted().to(dtype), **options)
        for site in sites_of(model):
            site.register_forward_hook(look)
        step(model)
        check_sites(model)
        dtypes.update(p.grad.dtype for name, p in model.named_parameters() if ".mhc_" in name)
    assert dtypes == {torch.float32} and max(sums) <= 1e-6, (dtypes, max(sums))
    return {"dtypes": ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes), "sums": max(sums)}


def fsdp_traffic() -> dict[str, Any]:
    """Gathers and reductions of a step: of a model, of its conversion, and where sites are groups of their own."""
    found = {}
    for name, model in (("plain", shard(plain())), ("together", shard(converted())),
                        ("alone", shard_by_themselves(converted()))):  # fmt: skip
        counts = collectives(model)
        kinds = [next(counts[kind] for kind in counts if part in kind) for part in ("gather", "reduce_scatter")]
        found[name] = " + ".join(map(str, kinds))
    assert found["plain"] == found["together"]
    return found


def tensor_traffic() -> dict[str, Any]:
    """Collectives of a step under tensor parallelism, and where tokens are sharded between its regions."""
    found = {}
    for name, plan, sites in (
        ("tp", cases.tensor_parallel(), {}),
        ("sp", cases.sequence_parallel(local=True), {"": SiteParallel()}),
    ):
        counts = [
            cases.collectives(parallelize_module(model, cases.mesh(), styles))
            for model, styles in ((cases.original(), plan), (cases.converted(), {**plan, **sites}))
        ]
        assert counts[0] == counts[1], counts
        found[name] = " + ".join(f"{count} {kind.split('_into')[0]}" for kind, count in sorted(counts[0].items()))
    return found

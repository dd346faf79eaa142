"""What tests/test_distributed.py runs in every one of its processes: each function is a case, and raises if it fails.

All compare with one process: the same model converted with the same perturbed sites, fed the batches of all ranks.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
    SplitPoint,
    pipeline,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torchvision_operators import define_torchvision_operators

from handmade.common import WIDTH, PreNorm, Stack
from mhc_rewrite import HyperConnection, load_sites, mhcify, plan, save_sites, unmhcify
from mhc_rewrite.distributed import check_sites, shard_sites
from mhc_rewrite.errors import MHCError
from oracle import perturb

LAYERS = 4


def batch(rank: int | None = None) -> Tensor:
    """The batch of a rank, or of all."""
    x = torch.randn(2 * dist.get_world_size(), 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return x if rank is None else x.chunk(dist.get_world_size())[rank]


class Scaled(PreNorm):
    """A layer that may be called in two ways."""

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is None:
            return super().forward(x)
        x = x + scale * self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def plain(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    return Stack([Scaled() for _ in range(layers)])


def converted(layers: int = LAYERS, **options: Any) -> Any:
    model = mhcify(plain(layers), (batch(0),), **options)
    perturb(model)
    return model


def loss(out: Tensor) -> Tensor:
    """Of what a norm returns neither the mean nor the mean square has gradients to speak of."""
    return (out.float() * torch.arange(out.shape[-1]).cos()).exp().mean()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def in_one(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all ranks' batches in one process."""
    value = loss(model(batch().to(next(model.parameters()).dtype)))
    value.backward()
    return value.detach(), gradients(model)


def step(model: nn.Module) -> Tensor:
    value = loss(model(batch(dist.get_rank()).to(next(model.parameters()).dtype)))
    value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def agree(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    floor = 1e-3 * max(float(t.abs().max()) for t in want.values())
    for name, its in want.items():
        error = float((got[name] - its).abs().max())
        assert error <= rtol * max(float(its.abs().max()), floor), f"{name}: {error:.2g} of {its.abs().max():.2g}"


def shard(model: Any, **options: Any) -> Any:
    """Every layer, then the rest."""
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def collectives(model: nn.Module) -> dict[str, int]:
    """How many of each kind a step has, by name, the second one: that of the loss is among them."""
    step(model)
    with CommDebugMode() as seen:
        step(model)
    return {str(kind).rpartition(".")[2]: count for kind, count in seen.get_comm_counts().items()}


def sites_of(model: nn.Module) -> list[HyperConnection]:
    return [module for module in model.modules() if isinstance(module, HyperConnection)]


def refused(act: Callable[[], Any], *words: str) -> None:
    try:
        act()
    except MHCError as error:
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError("nothing was raised")


# -- FSDP2 -------------------------------------------------------------------------------------------------------------


def fsdp_fp32() -> None:
    want_loss, want = in_one(converted())
    model = shard(converted())
    torch.testing.assert_close(step(model), want_loss, rtol=1e-5, atol=0)
    agree(gradients(model), want)


def fsdp_recompute() -> None:
    want_loss, want = in_one(converted())
    for length, reshard in ((1, True), (4, True), (4, False), ("auto", True)):
        model = shard(converted(recompute=length), reshard_after_forward=reshard)
        for _ in range(2):  # the second finds the memory that the first has freed
            model.zero_grad()
            torch.testing.assert_close(step(model), want_loss, rtol=1e-5, atol=0)
            agree(gradients(model), want)


def fsdp_bf16_policy() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard(converted(), mp_policy=policy)
    seen: list[tuple[torch.dtype, ...]] = []
    errors: list[float] = []

    def look(site: HyperConnection, args: Any, result: Any) -> None:
        *_, post, res = result
        operands = [t.dtype for t in site.operands(torch.bfloat16) if isinstance(t, Tensor)]
        seen.append((post.dtype, res.dtype, *operands))
        errors.append(float((res.detach().double().sum(-1) - 1).abs().max()))

    for site in sites_of(model):
        site.register_forward_hook(look)
    step(model)
    agree(gradients(model), in_one(converted())[1], rtol=0.1)
    assert seen and {dtype for dtypes in seen for dtype in dtypes} == {torch.float32}, seen
    assert max(errors) < 1e-6, max(errors)
    counts = [collectives(shard(other, mp_policy=policy)) for other in (converted(), plain())]
    assert counts[0] == counts[1] and len(counts[0]) >= 2, counts
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


def shard_by_themselves(model: Any, **options: Any) -> Any:
    """The sites first, each a group of its own in fp32."""
    reshard = options.get("reshard_after_forward", False)
    return shard(shard_sites(model, reshard_after_forward=reshard), **options)


def fsdp_sites_by_themselves() -> None:
    want_loss, want = in_one(converted())
    for length, reshard in ((None, True), (4, True), (4, False)):
        model = shard_by_themselves(converted(recompute=length), reshard_after_forward=reshard)
        torch.testing.assert_close(step(model), want_loss, rtol=1e-5, atol=0)
        agree(gradients(model), want)


def fsdp_collectives() -> None:
    """A group of its own is a gather and a reduction more."""
    alone, together = collectives(shard_by_themselves(converted())), collectives(shard(converted()))
    more = {name: count - together[name] for name, count in alone.items() if count != together[name]}
    assert len(more) == 2 and set(more.values()) == {2 * LAYERS}, (alone, together)


def fsdp_bf16_weights() -> None:
    """Weights in bf16, or a policy in bf16, beside sites in fp32: one group of FSDP can't hold both."""
    bf16 = torch.bfloat16
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32)
    for dtype, options in ((bf16, {}), (torch.float32, {"mp_policy": policy})):
        _, want = in_one(converted().to(dtype))
        model = shard_by_themselves(converted().to(dtype), **options)
        kinds: set[torch.dtype] = set()

        def look(site: HyperConnection, args: Any, result: Any, kinds: set[torch.dtype] = kinds) -> None:
            kinds.update(t.dtype for t in (*site.parameters(), *result[-2:]))

        for site in sites_of(model):
            site.register_forward_hook(look)
        step(model)
        check_sites(model)
        assert kinds == {torch.float32}
        got = gradients(model)
        assert {name: g.dtype for name, g in got.items()} == {name: g.dtype for name, g in want.items()}
        assert {g.dtype for name, g in got.items() if ".mhc_" in name} == {torch.float32}
        agree(got, want, rtol=0.1)


def sites_are_checked() -> None:
    model = converted()
    site = model.layers[1].mhc_0
    loss(model(batch())).backward()
    check_sites(model)
    with torch.no_grad():
        site.alpha.grad[0] += dist.get_rank()
    refused(lambda: check_sites(model), "gradient of layers.1.mhc_0.alpha differs")
    site.alpha.grad = site.alpha.grad if dist.get_rank() else None
    refused(lambda: check_sites(model), "gradient of layers.1.mhc_0.alpha is not there on all")
    model.zero_grad()
    check_sites(DistributedDataParallel(model))
    with torch.no_grad():
        site.phi[3, 1] += dist.get_rank()
    refused(lambda: check_sites(model), "layers.1.mhc_0.phi differs")
    site.phi.data = torch.zeros_like(site.phi, dtype=torch.bfloat16)
    refused(lambda: check_sites(model), "layers.1.mhc_0.phi is torch.bfloat16")
    refused(lambda: check_sites(plain()), "not converted")


def fsdp_replicas() -> None:
    """HSDP: here two replicas of one shard each."""
    _, want = in_one(converted())
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicas", "shards"))
    for model in (shard(converted(recompute=4), mesh=mesh), shard(shard_sites(converted(), mesh), mesh=mesh)):
        step(model)
        check_sites(model)
        agree(gradients(model), want)


def fsdp_accumulates() -> None:
    _, want = in_one(converted())
    model = shard(converted(recompute=4))
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        step(model)
    agree({name: gradient / 2 for name, gradient in gradients(model).items()}, want)


def fsdp_checkpointed() -> None:
    _, want = in_one(converted())
    for length in (None, 4):
        model = converted(recompute=length)
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, PreNorm))
        step(shard(model))
        got = gradients(model)
        agree({name.replace("_checkpoint_wrapped_module.", ""): its for name, its in got.items()}, want)


def fsdp_back_to_the_original() -> None:
    """unmhcify behind fully_shard: the layers stay sharded."""
    want_loss, want = in_one(plain())
    model = unmhcify(shard(mhcify(plain(), (batch(0),))))
    assert all(isinstance(module, FSDPModule) for module in (model, *model.layers))
    assert not any(isinstance(module, HyperConnection) for module in model.modules())
    torch.testing.assert_close(step(model), want_loss, rtol=1e-5, atol=0)
    agree(gradients(model), want)


def fsdp_starts_anew() -> None:
    """On the meta device, sharded, given memory and started: as sites that were started before; random ones too."""
    for init in ("preserve", "paper"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "paper"
            model = mhcify(plain(), (batch(0),), init=init)
        torch.manual_seed(2)
        for site in sites_of(model):
            site.reset_parameters()
        want = {name: p.detach().clone() for name, p in model.named_parameters() if ".mhc_" in name}
        shard(model.to("meta")).to_empty(device="cpu")
        torch.manual_seed(2 + dist.get_rank())  # ranks draw others, as for their batches
        for site in sites_of(model):
            site.reset_parameters()
        for name, its in want.items():
            p = model.get_parameter(name)
            assert isinstance(p, DTensor)
            got = whole(p.detach())
            first = got.clone()
            dist.broadcast(first, 0)
            assert torch.equal(got, first), name
            assert torch.equal(got, its) if init == "preserve" else abs(float(got.std() - its.std())) < 0.01, name


def fsdp_norm_behind_the_streams() -> None:
    """Sharded on its own, it is called with other objects than those that the last layer returned."""
    want_loss, want = in_one(converted())
    model = converted()
    fully_shard(model.norm, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=True))
    shard(model)
    torch.testing.assert_close(step(model), want_loss, rtol=1e-5, atol=0)
    agree(gradients(model), want)


def fsdp_new_kind_of_call() -> None:
    """A kind of call that the example did not show: layers that are sharded, and shards inside of what is captured."""

    def run(model: Any) -> dict[str, Tensor]:
        model.eval().zero_grad()
        x = batch(dist.get_rank() if isinstance(model, FSDPModule) else None)
        loss(model(x, torch.linspace(0, 2, WIDTH))).backward()
        return gradients(model)

    want = run(converted(2))
    agree(run(shard(converted(2))), want)

    def in_parts(model: Any, **options: Any) -> Any:
        for layer in model.layers:
            for part in (layer.attn, layer.mlp):
                fully_shard(part, **options)
        return shard(model)

    agree(run(in_parts(converted(2))), want)
    # Parts in bf16 can't be captured, as the hooks that cast what they get do not run.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    refused(lambda: run(in_parts(converted(2), mp_policy=policy)), "before fully_shard")
    model = converted(2)
    run(model)
    agree(run(in_parts(model, mp_policy=policy)), want, rtol=0.1)


def fsdp_refuses_conversion() -> None:
    model = shard(plain())
    refused(lambda: mhcify(model, (batch(0),)), "FSDP", "Convert first")
    refused(lambda: mhcify(model.layers[0], (batch(0),)), "FSDP", "Convert first")
    root = fully_shard(plain())
    refused(lambda: mhcify(root.layers[0], (batch(0),)), "FSDP", "Convert first")
    inside = plain()
    fully_shard(inside.layers[1].mlp)
    refused(lambda: plan(inside, (batch(0),)), "'layers.1.mlp'", "FSDP", "Convert first")
    with tempfile.TemporaryDirectory() as folder:
        save_sites(converted(2), folder)
        late = shard(plain(2))
        refused(lambda: load_sites(late, folder), "FSDP", "Convert first")
        load_sites(plain(2), folder)


# -- DDP ---------------------------------------------------------------------------------------------------------------


def ddp() -> None:
    want_loss, want = in_one(converted())
    model = converted()
    wrapped = DistributedDataParallel(model)
    torch.testing.assert_close(step(wrapped), want_loss, rtol=1e-5, atol=0)
    agree(gradients(model), want)


def ddp_refuses_conversion() -> None:
    model = plain()
    wrapped = DistributedDataParallel(model)
    refused(lambda: mhcify(model, (batch(0),)), "DistributedDataParallel", "Convert first")
    refused(lambda: mhcify(model.layers[1], (batch(0),)), "DistributedDataParallel", "Convert first")
    refused(lambda: mhcify(wrapped, (batch(0),)), "DistributedDataParallel", "Convert first")
    refused(lambda: mhcify(nn.Sequential(wrapped), (batch(0),)), "DistributedDataParallel", "Convert first")
    mhcify(plain(), (batch(0),))  # another one
    wrapped = None
    mhcify(model, (batch(0),))


# -- tensor parallelism ------------------------------------------------------------------------------------------------


def tensor_parallel(model: Any) -> Any:
    styles: dict[str, Any] = {"layers.*.mlp.up": ColwiseParallel(), "layers.*.mlp.down": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), styles)


def tp() -> None:
    want_loss, want = in_one(converted())
    for recompute in (None, 4):
        model = tensor_parallel(converted(recompute=recompute))
        got_loss, got = in_one(model)
        torch.testing.assert_close(got_loss, want_loss, rtol=1e-5, atol=0)
        agree(got, want)


def tp_refuses_conversion() -> None:
    model = tensor_parallel(plain())
    refused(lambda: mhcify(model, (batch(0),)), "'layers.0.mlp.up.weight'", "DTensor", "Convert first")


def tp_of_transformers() -> None:
    """Loaded in parts by transformers, then converted."""
    define_torchvision_operators()
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.distributed import DistributedConfig

    world = dist.get_world_size()
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(world))
    sizes: dict[str, int] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    alone = LlamaForCausalLM(config)
    tokens = torch.randint(64, (2, 6), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)  # only the first process saves
        alone.save_pretrained(shared[0])
        dist.barrier()
        parts = LlamaForCausalLM.from_pretrained(shared[0], distributed_config=DistributedConfig(tp_size=world))
        dist.barrier()
    results = []
    for model in (alone, parts):
        assert any(isinstance(p, DTensor) for p in model.parameters()) == (model is parts)
        mhcify(model, {"input_ids": tokens})
        perturb(model)
        value = loss(model(input_ids=tokens).logits)
        value.backward()
        results.append((value.detach(), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    agree(results[1][1], results[0][1])


# -- pipelines ---------------------------------------------------------------------------------------------------------

LOOPED, V = ((0, 2), (1, 3)), ((0, 3), (1, 2))  # the stages of each rank
SCHEDULES: tuple[tuple[Any, Any], ...] = (
    (ScheduleInterleaved1F1B, LOOPED),
    (ScheduleInterleavedZeroBubble, LOOPED),
    (ScheduleZBVZeroBubble, V),
    (ScheduleDualPipeV, V),
)
MICROBATCHES = 4


def pipelined(schedule: Any, mine: tuple[int, ...], stages: list[Any]) -> None:
    run = schedule(stages, MICROBATCHES, loss_fn=lambda out, _: loss(out))
    target = torch.zeros(MICROBATCHES, 1) if 3 in mine else None
    run.step(*[batch().repeat(2, 1, 1)] * (0 in mine), target=target)


def in_microbatches(model: nn.Module) -> dict[str, Tensor]:
    torch.stack([loss(model(part)) for part in batch().repeat(2, 1, 1).chunk(MICROBATCHES)]).mean().backward()
    return gradients(model)


def pipeline_of_converted_stages() -> None:
    """Every stage is a model by itself: between two of them passes the trunk."""
    torch.manual_seed(0)
    whole_model = nn.Sequential(*(nn.Sequential(PreNorm(), PreNorm()) for _ in range(4)))
    for number, part in enumerate(whole_model):
        mhcify(part, (batch(0),))
        perturb(part, seed=number)
    want = in_microbatches(copy.deepcopy(whole_model))
    for schedule, places in SCHEDULES:
        parts, mine = copy.deepcopy(whole_model), places[dist.get_rank()]
        pipelined(schedule, mine, [PipelineStage(parts[k], k, 4, torch.device("cpu")) for k in mine])
        agree(gradients(parts), {name: its for name, its in want.items() if int(name[0]) in mine})


def pipeline_of_a_converted_model() -> None:
    """Cut by torch between the layers: n streams pass."""
    model = converted()
    want = in_microbatches(copy.deepcopy(model))
    example = batch().repeat(2, 1, 1).chunk(MICROBATCHES)[0]
    cuts = {f"layers.{k}": SplitPoint.BEGINNING for k in (1, 2, 3)}
    for schedule, places in SCHEDULES[:2]:
        parts, mine = pipeline(copy.deepcopy(model), mb_args=(example,), split_spec=cuts), places[dist.get_rank()]
        stages = [parts.build_stage(k, torch.device("cpu")) for k in mine]
        pipelined(schedule, mine, stages)
        for k, stage in zip(mine, stages, strict=True):
            last = ("layers.3", "norm") if k == 3 else (f"layers.{k}.",)
            agree(gradients(stage.submod), {name: its for name, its in want.items() if name.startswith(last)})


# -- the harness itself ------------------------------------------------------------------------------------------------


def fails_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of the second one")
    dist.barrier()


def hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(1000)
    dist.barrier()

"""What tests/test_distributed.py runs in every one of its processes: each function is a case, and raises if it fails.

All compare with one process: the same model converted with the same perturbed sites, fed the batches of all ranks.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from handmade.common import WIDTH, PreNorm, Stack
from mhc_rewrite import HyperConnection, mhcify, unmhcify
from mhc_rewrite.errors import MHCError
from oracle import perturb

LAYERS = 4


def batch(rank: int | None = None) -> Tensor:
    """The batch of a rank, or of all."""
    x = torch.randn(2 * dist.get_world_size(), 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return x if rank is None else x.chunk(dist.get_world_size())[rank]


def plain(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    return Stack([PreNorm() for _ in range(layers)])


def converted(layers: int = LAYERS, **options: Any) -> Any:
    model = mhcify(plain(layers), (batch(0),), **options)
    perturb(model)
    return model


def loss(out: Tensor) -> Tensor:
    return out.float().square().mean() + out.float().mean()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).detach() for name, p in model.named_parameters() if p.grad is not None}


def in_one(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of all ranks' batches in one process."""
    value = loss(model(batch()))
    value.backward()
    return value.detach(), gradients(model)


def step(model: nn.Module) -> Tensor:
    value = loss(model(batch(dist.get_rank())))
    value.backward()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def agree(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-5) -> None:
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    floor = 1e-2 * max(float(t.abs().max()) for t in want.values())
    for name, its in want.items():
        error = float((got[name] - its).abs().max())
        assert error <= rtol * max(float(its.abs().max()), floor), f"{name}: {error:.2g} of {its.abs().max():.2g}"


def shard(model: Any, **options: Any) -> Any:
    """Every layer, then the rest."""
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


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
    for length, reshard in itertools.product((1, 2, 4, 6, "auto"), (True, False)):
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
        operands = [t.dtype for t in site._operands(torch.bfloat16) if isinstance(t, Tensor)]
        seen.append((post.dtype, res.dtype, *operands))
        errors.append(float((res.detach().double().sum(-1) - 1).abs().max()))

    for site in sites_of(model):
        site.register_forward_hook(look)
    step(model)
    agree(gradients(model), in_one(converted())[1], rtol=0.1)
    assert seen and {dtype for dtypes in seen for dtype in dtypes} == {torch.float32}, seen
    assert max(errors) < 1e-6, max(errors)
    counts = []
    for other in (converted(), plain()):
        shard(other, mp_policy=policy)
        with CommDebugMode() as collectives:
            step(other)
        counts.append({str(kind): count for kind, count in collectives.get_comm_counts().items()})
    assert counts[0] == counts[1] and len(counts[0]) >= 2, counts
    assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters()} == {torch.float32}


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

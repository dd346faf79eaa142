"""Sites on streams that are DTensors, every connection; what tests/test_distributed_tensor.py runs in each process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

import handmade
from handmade import found as in_all_ways
from handmade import spellings
from handmade.common import Kind
from mhc_rewrite import HyperConnection, MHCConfig, mhcify
from mhc_rewrite.distributed import SiteParallel
from mhc_rewrite.sites.streams import shared_dropout, shared_dropout_module
from mhc_rewrite.torch_private import optimizers_sum_shares
from oracle import perturb
from rank_cases import agree, gradients, whole
from rank_cases_tensor import WIDTH, mesh


class Sites(nn.Module):
    """Every operator once, each output of `pre` used."""

    def __init__(self, channel_dim: int, **options: Any) -> None:
        super().__init__()
        made = [HyperConnection(WIDTH, MHCConfig(**options), index=k, channel_dim=channel_dim) for k in range(3)]
        self.mhc_0, self.mhc_1, self.mhc_2 = (site.double() for site in made)
        perturb(self)

    def forward(self, X: Tensor) -> Tensor:
        u, mix = self.mhc_0.pre(X)
        X, u, mix = self.mhc_1.boundary(X, u.sin(), mix)
        X = self.mhc_1.post(X, u.cos(), mix)
        u, mix = self.mhc_2.pre(X)
        return self.mhc_2.post_collapse(X, u.sin(), mix)


SITES: tuple[dict[str, Any], ...] = (
    {"connection": "hc"},
    {"channel_dim": 1},
    *({"connection": name} for name in ("mhc", "deepseek_v4", "kromhc", "tbp", "identity")),
    *({"connection": name, "dynamic": False} for name in ("mhc", "hc", "cayley")),
    *({"connection": name, "learn": ("post",)} for name in ("mhc", "hc", "mhc_lite")),
    {"channel_dim": 1, "connection": "hc"},
)


def dtensor(X: Tensor, placement: Placement) -> DTensor:
    if placement.is_partial():
        return DTensor.from_local(X / dist.get_world_size(), mesh(), [placement])
    return distribute_tensor(X, mesh(), [placement])


def sites_on_dtensors() -> None:
    """Sharded on an axis of the tokens, each by itself and without collectives; on others gathered, and right."""
    for given in SITES:
        options = {"channel_dim": -1, **given}
        last = options["channel_dim"] == -1
        torch.manual_seed(1)
        X = torch.randn((3, 5, 4, WIDTH) if last else (3, 4, WIDTH, 5, 2), dtype=torch.float64)
        alone, x = Sites(**options), X.clone().requires_grad_()
        out = alone(x)
        out.sin().sum().backward()
        want = {**gradients(alone), "X": x.grad, "out": out.detach()}
        of_tokens, others = ((0, 1), (2, 3)) if last else ((0, 3), (1, 2))
        kinds = [*map(Shard, (*of_tokens, *others)), Replicate(), Partial()]
        for placement in kinds if given in SITES[:2] else kinds[1:2]:
            model = parallelize_module(Sites(**options), mesh(), SiteParallel())
            streams = dtensor(X, placement).requires_grad_()
            with CommDebugMode() as seen:
                result = model(streams)
                result.sin().to_local().sum().backward()
            if placement in [*map(Shard, of_tokens), Replicate()] and optimizers_sum_shares():
                assert not seen.get_total_counts(), (given, placement, seen.get_comm_counts())
                share = Replicate() if placement.is_replicate() else Partial()
                assert {p.grad.placements for p in model.parameters() if p.grad is not None} == {(share,)}
            got = {**gradients(model), "X": whole(streams.grad), "out": result.detach().full_tensor()}
            agree(got, want, 1e-9)


# -- what stands between sites -----------------------------------------------------------------------------------------

BETWEEN = (
    "post-norm without layers.0.mhc_1", "DeepNorm", "hidden states", "ConvNeXt", "windows, channels first",
    "two streams in turn", "written over",
)  # fmt: skip


def of_kind(kind: Kind, placement: Placement | None, **options: Any) -> dict[str, Tensor]:
    """Outputs and gradients of a perturbed conversion, in one process or with all parameters and inputs as DTensors."""
    model, arguments = mhcify(kind.model(), kind.arguments(), **{**kind.options, **options}), kind.arguments()
    perturb(model)
    if placement is not None:
        distribute_module(model, mesh())
        arguments = tuple(dtensor(x.detach(), placement) for x in arguments)
    outputs = [x for x in tree_leaves(model(*arguments)) if isinstance(x, Tensor) and x.is_floating_point()]
    assert all(isinstance(x, DTensor) == (placement is not None) for x in outputs)
    torch.stack([whole(x.sin().sum()) for x in outputs]).sum().backward()
    return {**gradients(model), **{f"out {k}": whole(x.detach()) for k, x in enumerate(outputs)}}


def kinds_on_dtensors() -> None:
    """Operations on the trunk, sites without parameters, images, readers: as in one process."""
    found = {kind.name: kind for kind in (*handmade.KINDS, *spellings.KINDS, *in_all_ways.KINDS)}
    with sdpa_kernel(SDPBackend.MATH):  # torch knows no rule for the gradient of others on DTensors of a CPU
        for name in BETWEEN:
            agree(of_kind(found[name], Shard(0)), of_kind(found[name], None), 1e-9)
        stretches = {"n_streams": {"layers.0": 4, "layers.1": 2}}
        resized = [of_kind(found["post-norm"], placement, **stretches) for placement in (Shard(1), None)]
        agree(*resized, 1e-9)


def dropout_on_dtensors() -> None:
    """One mask for all streams."""
    x = dtensor(torch.ones(4, 6, 3, WIDTH), Shard(0))
    for dropped in (shared_dropout(x, 0.5, True, -1), shared_dropout_module(nn.Dropout(0.5), x, -1)):
        values = whole(dropped)
        assert isinstance(dropped, DTensor) and torch.equal(values, values[:, :, :1].expand_as(values))
        assert set(values.unique().tolist()) == {0.0, 2.0}


def results_that_nobody_uses() -> None:
    torch.manual_seed(1)
    X = torch.randn(2, 4, 4, WIDTH, dtype=torch.float64)
    alone, model = Sites(-1).mhc_0, parallelize_module(Sites(-1), mesh(), SiteParallel()).mhc_0
    alone.pre(X)[0].sin().sum().backward()
    model.pre(dtensor(X, Shard(1)))[0].sin().to_local().sum().backward()
    agree(gradients(model), gradients(alone), 1e-9)

"""Sites on streams that are DTensors, every connection; what tests/test_distributed_tensor.py runs in each process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    parallelize_module,
)

from mhc_rewrite import HyperConnection, MHCConfig
from mhc_rewrite.distributed import SiteParallel
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
    *({"connection": name} for name in ("mhc", "hc", "deepseek_v4", "kromhc", "tbp", "identity")),
    *({"connection": name, "dynamic": False} for name in ("mhc", "hc", "cayley")),
    *({"connection": name, "learn": ("post",)} for name in ("mhc", "hc", "mhc_lite")),
    {"channel_dim": 1},
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
        for placement in kinds:
            model = parallelize_module(Sites(**options), mesh(), SiteParallel())
            streams = dtensor(X, placement).requires_grad_()
            with CommDebugMode() as seen:
                result = model(streams)
                result.sin().to_local().sum().backward()
            if placement in [*map(Shard, of_tokens), Replicate()]:
                assert not seen.get_total_counts(), (given, placement, seen.get_comm_counts())
                share = Replicate() if placement.is_replicate() else Partial()
                assert {p.grad.placements for p in model.parameters() if p.grad is not None} == {(share,)}
            got = {**gradients(model), "X": whole(streams.grad), "out": result.detach().full_tensor()}
            agree(got, want, 1e-9)

"""Sites as groups of FSDP of their own."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mhc_rewrite.conversion.converted import find_converted, sites_in_use


def shard_sites(
    model: nn.Module, mesh: DeviceMesh | None = None, *, reshard_after_forward: bool = False
) -> nn.Module:  # fmt: skip
    """Shards every site by itself, in its own dtype, whatever the layers around it are in.

    To be called before `fully_shard` of layers and model: a group of FSDP has one dtype, and sites stay fp32 where
    weights are bf16. A policy of mixed precision for the layers does not reach them then.

    Args:
        model: converted, or a wrapper around a converted model.
        mesh: as for `fully_shard`.
        reshard_after_forward: whether parameters are freed behind each site and gathered again in backward. They are
            small; keeping them saves a collective a site.

    Returns:
        The same model.

    Raises:
        MHCError: the model is not converted.
    """
    _, converted, _ = find_converted(model)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    for site in sites_in_use(converted).values():
        fully_shard(site, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    return model

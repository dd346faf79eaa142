"""Sites under tensor and sequence parallelism."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from mhc_rewrite.errors import SitesError
from mhc_rewrite.sites.hyper_connection import HyperConnection


class SiteParallel(ParallelStyle):
    """A style for `parallelize_module`: the parameters of sites as DTensors, whole on every rank of the mesh.

        parallelize_module(model, mesh["tp"], {"": SiteParallel(), ...})

    With sequence parallelism every rank mixes the streams of its own tokens, and the sites' gradients are to be summed
    over the ranks. Gradients are left as the shares of that sum (`Partial`), as torch does with those of norms under
    `SequenceParallel`: no collective is added to forward and backward, and clipping, optimizers and FSDP sum them. The
    streams may be DTensors too, sharded on an axis of the tokens or not; then those say what gradients are.

    Applied to a site, or to a module that holds sites, for all of them. After the conversion, before `fully_shard`.

    Args:
        sequence_sharded: what plain tensors are that come to a site: this rank's part of the tokens, or (False) all of
            them, the same on every rank, as with tensor parallelism alone.
    """

    def __init__(self, *, sequence_sharded: bool = True) -> None:
        super().__init__()
        self.sequence_sharded = sequence_sharded

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise SitesError(
                f"SiteParallel got a mesh of {device_mesh.ndim} dimensions {device_mesh.mesh_dim_names or ''}. Give "
                'parallelize_module the one that the tokens or heads are spread over: mesh["tp"].'
            )
        sites = {name: child for name, child in module.named_modules() if isinstance(child, HyperConnection)}
        if not sites:
            raise SitesError(
                f"SiteParallel was given for a {type(module).__name__} without sites. Convert the model first, and "
                'give it for sites ("layers.*.mhc_*"), or for the model ("").'
            )
        for name, site in sites.items():
            for parameter, value in list(site.named_parameters(recurse=False)):
                if isinstance(value, DTensor):
                    where = f"{name}.{parameter}".lstrip(".")
                    raise SitesError(
                        f"SiteParallel: {where!r} in {type(module).__name__} is distributed already. Give it once "
                        "for a site, and before fully_shard or shard_sites."
                    )
                made = distribute_tensor(value, device_mesh, [Replicate()], src_data_rank=self.src_data_rank)
                site.register_parameter(parameter, nn.Parameter(made, requires_grad=value.requires_grad))
            site.local_gradients = (Partial() if self.sequence_sharded else Replicate(),)
        return module

    def __repr__(self) -> str:
        return f"SiteParallel(sequence_sharded={self.sequence_sharded})"

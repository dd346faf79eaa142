"""Whether the sites are what they must be on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from mhc_rewrite.conversion.converted import find_converted, sites_in_use
from mhc_rewrite.errors import SitesError

_SHOWN = 6


def check_sites(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Holds the sites' parameters and, where there are any, their gradients against those of the other ranks.

    To be called on all ranks of the group, between backward and the optimizer's step. Parameters must be fp32 (or
    fp64), and they and their gradients equal to the bit wherever they are held more than once: whole ones on all ranks
    of `group`, DTensors along the dimensions of their mesh that replicate them.

    Args:
        model: converted, or a wrapper around a converted model.
        group: of the ranks that hold the same sites; all ranks by default.

    Raises:
        SitesError: one of them is narrower or differs; by name, on every rank of the group.
        MHCError: the model is not converted.
    """
    _, converted, _ = find_converted(model)
    sites = sites_in_use(converted)
    held = {f"{name}.{key}": value for name, site in sites.items() for key, value in site.named_parameters()}
    wrong = [f"{name} is {value.dtype}" for name, value in held.items() if torch.finfo(value.dtype).bits < 32]
    trained = _of_all({name for name, value in held.items() if value.grad is not None}, group)
    everywhere = set.intersection(*trained)
    for name, value in held.items():
        wrong += _differing(name, value.detach(), group)
        if name in everywhere:
            wrong += _differing(f"the gradient of {name}", value.grad, group)
        elif name in set.union(*trained):
            wrong.append(f"the gradient of {name} is not there on all ranks")
    said = list(dict.fromkeys(line for lines in _of_all(wrong, group) for line in lines))
    if said:
        raise SitesError(
            f"Sites are not what they must be on every rank: {'; '.join(said[:_SHOWN])}"
            + (f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")
            + ". Convert on all ranks alike, before the model is sharded or wrapped; docs/distributed.md says what is "
            "served."
        )


def _differing(name: str, value: Any, group: dist.ProcessGroup | None) -> list[str]:
    if not isinstance(value, DTensor):
        groups, local = [group], value
    else:
        mesh = value.device_mesh
        groups = [mesh.get_group(k) for k, how in enumerate(value.placements) if isinstance(how, Replicate)]
        local = value.to_local()
    return [f"{name} differs between ranks" for one in groups if not _equal(local, one)]


def _equal(value: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether a tensor is the same on all ranks of a group; all of them get the same answer."""
    least, most = value.contiguous().clone(), value.contiguous().clone()
    dist.all_reduce(least, dist.ReduceOp.MIN, group)
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    return torch.equal(least, most)


def _of_all(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, mine, group)
    return answers

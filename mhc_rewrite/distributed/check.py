"""Whether the sites are what they must be on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from mhc_rewrite.conversion.converted import find_converted, sites_in_use
from mhc_rewrite.errors import SitesError

_SHOWN = 6


def check_sites(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Holds the sites' parameters and, where there are any, their gradients against those of the other ranks.

    To be called on all ranks of the group, between backward and the optimizer's step. Parameters must be fp32 (or
    fp64), and they and their gradients equal to the bit wherever they are held more than once: whole ones on all ranks
    of `group`, DTensors along the dimensions of their mesh that replicate them. Gradients that are each rank's share of
    a sum must not all be the same share.

    Args:
        model: converted, or a wrapper around a converted model.
        group: of the ranks that hold the same sites; all ranks by default.

    Raises:
        SitesError: one of them is narrower or differs; by name, on every rank of the group. Or these are not the same
            sites, but those of stages.
        MHCError: the model is not converted.
    """
    _, converted, _ = find_converted(model)
    sites = sites_in_use(converted)
    held = {f"{name}.{key}": value for name, site in sites.items() for key, value in site.named_parameters()}
    _check_same({name: tuple(value.shape) for name, value in held.items()}, group)
    wrong = [f"{name} is {value.dtype}" for name, value in held.items() if torch.finfo(value.dtype).bits < 32]
    trained = _of_all({name for name, value in held.items() if value.grad is not None}, group)
    everywhere = set.intersection(*trained)
    for name, value in held.items():
        wrong += _differing(name, value.detach(), group)
        if name in everywhere:
            wrong += _differing(f"the gradient of {name}", value.grad, group)
        elif name in set.union(*trained):
            wrong.append(f"the gradient of {name} is not there on all ranks")
    wrong += _same_shares({name: held[name].grad for name in sorted(everywhere)})
    said = list(dict.fromkeys(line for lines in _of_all(wrong, group) for line in lines))
    if said:
        raise SitesError(
            f"Sites are not what they must be on every rank: {'; '.join(said[:_SHOWN])}"
            + (f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else "")
            + ". Convert on all ranks alike, before the model is sharded or wrapped. Ranks with other batches need DDP "
            "or FSDP. Ranks that have other tokens of one batch (sequence parallelism) need SiteParallel() of "
            "mhc_rewrite.distributed in the plan of parallelize_module; those that have the same tokens need "
            "SiteParallel(sequence_sharded=False) there, or none. docs/distributed.md says what is served."
        )


def _check_same(forms: dict[str, tuple[int, ...]], group: dist.ProcessGroup | None) -> None:
    """Whether these are the same parameters on all ranks: else there is nothing to compare."""
    first, *others = _of_all(forms, group)
    for other in others:
        unlike = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
        if unlike:
            raise SitesError(
                f"The ranks hold different sites: {unlike[0]} is not the same, or not there, on all. Give check_sites "
                'the group of those that hold the same ones: with the stages of a pipeline, mesh["dp"].get_group() '
                "say. Elsewhere convert on all ranks alike."
            )


def _differing(name: str, value: Any, group: dist.ProcessGroup | None) -> list[str]:
    if not isinstance(value, DTensor):
        groups, local = [group], value
    else:
        mesh = value.device_mesh
        groups = [mesh.get_group(k) for k, how in enumerate(value.placements) if isinstance(how, Replicate)]
        local = value.to_local()
    return [f"{name} differs between ranks" for one in groups if not _equal(local, one)]


def _same_shares(gradients: dict[str, Any]) -> list[str]:
    """What is wrong where every rank has computed all of a gradient, and all of these are to be summed."""
    found = {}
    for name, gradient in gradients.items():
        if isinstance(gradient, DTensor):
            local, mesh = gradient.to_local(), gradient.device_mesh
            places = [k for k, how in enumerate(gradient.placements) if isinstance(how, Partial) and mesh.size(k) > 1]
            alike = [_equal(local, mesh.get_group(k)) for k in places]
            if alike and not (all(alike) and not local.any()):  # those of a start are zero on all
                found[name] = all(alike)
    return [f"the gradient of {name} is to be summed over ranks that all have the same" for name in found] * all(
        found.values()
    )


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

"""The cost of a plan."""

from __future__ import annotations

import dataclasses
from typing import overload

import torch

from mhc_rewrite.cost.formulas import Cost, Stream
from mhc_rewrite.cost.mesh import Mesh, MeshCost, on_mesh
from mhc_rewrite.plans import RewritePlan


@overload
def cost(plan: RewritePlan) -> Cost: ...


@overload
def cost(plan: RewritePlan, mesh: Mesh) -> MeshCost: ...


def cost(plan: RewritePlan, mesh: Mesh | None = None) -> Cost | MeshCost:
    """The formulas of a plan, and its sizes.

    A module that is called several times is several sites with one set of parameters.

    Args:
        plan: of `mhc_rewrite.plan`.
        mesh: for what ranks send one another; parameters and gradients are taken to have the streams' dtype, and the
            sites to be sharded by themselves where that is narrower than theirs.

    Raises:
        ConfigError: the mesh has more stages than the model has sites.
    """
    streams: list[Stream] = []
    seen: set[str] = set()
    for stream in plan.streams:
        itemsize = max(getattr(torch, site.dtype.removeprefix("torch.")).itemsize for site in stream.sites)
        before = 1
        for sites in stream.stretches:
            own = {site.name for site in sites} - seen
            seen |= own
            n_here = sites[0].n_streams
            streams.append(Stream(stream.width, len(sites), len(own), itemsize, n_here, before))
            before = n_here or before
    of = Cost(plan.config, tuple(streams))
    return of if mesh is None else on_mesh(of, mesh)


def with_streams(plan: RewritePlan, streams: int) -> RewritePlan:
    """The same plan with another n, for all sites: what is found in a model does not depend on it.

    Raises:
        ConfigError: n is out of range.
    """
    made = [
        dataclasses.replace(stream, sites=tuple(dataclasses.replace(site, n_streams=None) for site in stream.sites))
        for stream in plan.streams
    ]
    config = dataclasses.replace(plan.config, n_streams=streams)
    return dataclasses.replace(plan, config=config, streams=tuple(made))

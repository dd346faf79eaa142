"""The sizes of the paper's largest model, and what others say of its overhead."""

from __future__ import annotations

import dataclasses

from mhc_rewrite.config import MHCConfig
from mhc_rewrite.cost.formulas import FP32, Cost, Stream
from mhc_rewrite.cost.mesh import Mesh, MeshCost, on_mesh
from mhc_rewrite.cost.mesh_step import Job
from mhc_rewrite.errors import ConfigError

# arXiv:2512.24880, table 5, 27B: 30 layers, the residual adds of attention and of the MLP in each; bf16 streams [11].
PAPER_STREAM = Stream(width=2560, sites=60, modules=60, itemsize=2)
PAPER_LAYERS = 30
PAPER_PARAMETERS = 4.14e9  # active
PAPER_ALL_PARAMETERS = 27.0e9
PAPER_BATCH = 1280  # sequences of a step, of PAPER_LENGTH tokens each
PAPER_LENGTH = 4096
PAPER_OVERHEAD = {4: 0.067}  # section 4.3
COMMENTARY_OVERHEAD = {1: 0.0, 2: 0.03, 4: 0.067, 8: 0.12}  # a commentary on the paper, which itself gives n = 4 only


def paper(streams: int) -> Cost:
    """The paper's largest model with n streams."""
    return Cost(MHCConfig(n_streams=streams), (PAPER_STREAM,))


def paper_on(mesh: Mesh, streams: int) -> tuple[MeshCost, Job]:
    """The same on a mesh, with a step of the paper's batch; gradients are reduced in fp32.

    Raises:
        ConfigError: the batch does not go evenly onto the mesh.
    """
    ranks = mesh.dp * mesh.fsdp
    if PAPER_BATCH % ranks:
        raise ConfigError(
            f"{mesh}: the paper's step has {PAPER_BATCH} sequences, which do not go evenly onto dp * fsdp = {ranks} "
            "ranks, as they do onto 64 or 128."
        )
    of = dataclasses.replace(on_mesh(paper(streams), mesh), reduced=FP32)
    return of, Job(PAPER_ALL_PARAMETERS, PAPER_PARAMETERS, PAPER_LAYERS, PAPER_LENGTH, PAPER_BATCH // ranks)

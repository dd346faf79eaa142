"""How long ranks wait for what they send one another: an estimate, by a simple model.

A message takes its bytes over the bandwidth of the slowest link on its way. What runs beside computation is hidden as
far as that computation lasts; the rest is exposed, and makes a step longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
from torch import nn

from mhc_rewrite.cost.mesh import Mesh, MeshCost, m, messages, p, padded
from mhc_rewrite.cost.step import Device, Links, assumptions, estimate
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.plans import RewritePlan

c, d, t = sympy.symbols("c d t", nonnegative=True)
u = sympy.symbols("u", positive=True)
TIME_SYMBOLS = {
    c: "seconds that a rank computes for a microbatch", d: "seconds that a message takes",
    t: "seconds that collectives take", u: "groups of a stage, as many as layers",
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """In which order a pipeline's ranks compute, as far as it matters here.

    Attributes:
        stages: of a rank; where there are two, the model goes down the ranks and back up again.
        idle: microbatches' time in which a rank has nothing to do, while the pipeline fills and drains.
        exposed: seconds that it waits for messages in a step.
    """

    stages: int
    idle: sympy.Expr
    exposed: sympy.Expr

    def ranks(self, pipeline: int) -> Sequence[int]:
        """Of each stage."""
        down = list(range(pipeline))
        return down if self.stages == 1 else down + down[::-1]


SCHEDULES = {
    # The first microbatch passes p - 1 cuts and as many backward, and no message is hidden: for each further one, but
    # every p-th, the first rank waits for two more.
    "1F1B": Schedule(1, p - 1, 2 * d * (m + p - 3 - sympy.floor((m - 2) / p))),
    # The first microbatch passes 2(p - 1) cuts and as many backward. From then on messages run beside the computation
    # of other microbatches, which is what DualPipe is for, if they take no longer than a stage's forward, c / 6; what
    # they take longer is waited for as under 1F1B. In torch's order, in which forward and backward of two microbatches
    # run one after the other; a forward, the inputs' gradients and the weights' take a third of a stage's time each.
    "DualPipeV": Schedule(2, (p - 1) / 6, 4 * (p - 1) * d + (m - 1) * 2 * (p - 1) / p * sympy.Max(0, d - c / 6)),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What a rank does in a step.

    Attributes:
        parameters: elements, of the whole model, as `padded` counts them.
        active: those that a token uses.
        layers: of the whole model, each a group of FSDP or a bucket of DDP.
        tokens: of a microbatch.
        microbatches: of a step.
    """

    parameters: float
    active: float
    layers: int
    tokens: int
    microbatches: int


def job(
    plan: RewritePlan, model: nn.Module, mesh: Mesh, active: float, tokens: int, microbatches: int | None = None
) -> Job:
    """A step of a model: every module that holds sites is a layer.

    Args:
        microbatches: four a stage if it is left out, and one where there are no stages.
    """
    parameters, layers = padded(model.parameters(), mesh.fsdp), len({site.carrier for site in plan.sites})
    return Job(parameters, active, layers, tokens, microbatches or (4 * mesh.pp if mesh.pp > 1 else 1))


@dataclass(frozen=True)
class MeshTime:
    """Seconds of a step.

    Attributes:
        computing: with the time in which the pipeline fills and drains.
        exposed: waiting for what is sent, by the ways of `MeshCost.sent`.
    """

    computing: float
    exposed: dict[str, float]

    @property
    def waiting(self) -> float:
        """In all."""
        return sum(self.exposed.values())

    @property
    def total(self) -> float:
        """Of the step."""
        return self.computing + self.waiting


@dataclass(frozen=True)
class MeshEstimate:
    """A training step of the model as it was, and converted."""

    original: MeshTime
    converted: MeshTime

    @property
    def overhead(self) -> float:
        """What the conversion adds, as a share."""
        return self.converted.total / self.original.total - 1


def exposed(way: str) -> sympy.Expr:
    """Seconds of a step that a rank waits for its collectives.

    - fsdp: the first layer's gathering and the last one's reduction, or what lasts longer than the computation beside
      it: the whole step's, and that of one microbatch where a pipeline gathers once;
    - dp: the last layer's, or what lasts longer than the last backward, two thirds of a microbatch;
    - tensor: all of it; a block waits for it.
    """
    beside = {"fsdp": sympy.Piecewise((m, sympy.Eq(p, 1)), (1, True)) * c, "dp": 2 * c / 3}
    return sympy.Max(t / u, t - beside[way]) if way in beside else t


def bandwidth(mesh: Mesh, axis: str, links: Links) -> float:
    """Bytes a second that a rank sends along an axis.

    Ranks are numbered with tp or sp innermost, then fsdp, dp and pp. A group that fits a node uses the links inside. In
    one that does not, the k ranks of each node share its ring through k of the node's links to others.
    """
    inner = {"tensor": 1, "fsdp": mesh.blocks, "dp": mesh.blocks * mesh.fsdp, "pipeline": mesh.size // mesh.pp}[axis]
    ranks = {"tensor": mesh.blocks, "fsdp": mesh.fsdp, "dp": mesh.dp, "pipeline": mesh.pp}[axis]
    if inner * ranks <= links.node:
        return links.inside
    together = 1 if axis == "pipeline" else max(1, links.node // inner)
    return min(links.inside, together * links.between)


def sent_bytes(of: MeshCost, job: Job, way: str, schedule: str = "1F1B") -> tuple[int, int]:
    """Bytes that the rank that sends most sends in a step: as the model was, and converted."""
    return of.bytes(
        way, parameters=job.parameters, tokens=job.tokens, microbatches=job.microbatches,
        messages=messages(SCHEDULES[schedule].ranks(of.mesh.pp)),
    )  # fmt: skip


def estimate_on_mesh(of: MeshCost, on: Device, job: Job, schedule: str) -> MeshEstimate:
    """The step time by roofline and by `exposed`: no measurement. `mesh_assumptions` says in words what goes into it.

    Args:
        schedule: a key of `SCHEDULES`, for meshes with a pipeline.

    Raises:
        ConfigError: there are no figures for the device's links, or the schedule has more stages than there are layers.
    """
    mesh, order = of.mesh, SCHEDULES[schedule]
    if on.links is None:
        raise ConfigError(f"There are no figures for links between devices of this kind: {on.title}.")
    stages = order.stages * mesh.pp
    if mesh.pp > 1 and stages > job.layers:
        raise ConfigError(f"pp={mesh.pp} has {stages} stages under {schedule}, and the model {job.layers} layers.")
    if mesh.pp > 1 and order.stages > 1 and stages > job.microbatches:
        raise ConfigError(
            f"{mesh} has {stages} stages under {schedule}, which takes at least as many microbatches, and a step has "
            f"{job.microbatches}."
        )
    once = estimate(of.cost, on, job.active, recompute=True)
    spread = {"original": mesh.pp * mesh.blocks, "added": mesh.pp * mesh.sp}
    original = once.baseline * job.tokens / spread["original"]
    sites = once.added * job.tokens / spread["added"]
    sent = messages(order.ranks(mesh.pp))
    times = []
    for converted in (False, True):
        computing = original + converted * sites
        values = {c: computing, m: job.microbatches, p: mesh.pp, u: max(1.0, job.layers / mesh.pp)}
        waiting = {}
        for way in of.sent:
            seconds = sent_bytes(of, job, way, schedule)[converted] / bandwidth(mesh, way, on.links)
            if way == "pipeline":
                values[d] = seconds / max(1, sent * job.microbatches)
            formula = order.exposed if way == "pipeline" else exposed(way)
            waiting[way] = float(formula.subs({**values, t: seconds}))
        busy = (job.microbatches + float(order.idle.subs(p, mesh.pp))) * computing
        times.append(MeshTime(busy, waiting))
    return MeshEstimate(*times)


def mesh_assumptions(of: MeshCost, on: Device, job: Job) -> tuple[str, ...]:
    """What `estimate_on_mesh` takes for granted, for a reader."""
    links = on.links
    assert links is not None
    apart = "by themselves, in fp32, kept from forward to backward" if of.sites_apart else "with their layers"
    return (
        f"links: {links.node} devices a node, {links.inside / 1e9:g} GB/s each way inside of it and "
        f"{links.between / 1e9:g} a device between nodes ({links.source}); at their peak, without latency",
        "ranks are numbered with tp or sp innermost, then fsdp, dp and pp; the links are there for one way at a time",
        f"parameters are gathered in {of.gathered} bytes and their gradients reduced in {of.reduced}, those of sites "
        f"{apart}; gathered twice a microbatch, in a pipeline once a step; by layer, {job.layers} of them, all alike",
        "waited for, of fsdp and dp: one layer's, or what lasts longer than the computation beside it; of tp and sp: "
        "all; of a pipeline: under 1F1B all that lie on the first rank's way, two a microbatch but every p-th; under "
        "DualPipeV the 4(p - 1) that fill and drain it, and what messages take longer than a sixth of a microbatch",
        "idle: p - 1 microbatches under 1F1B, (p - 1)/6 under DualPipeV",
        "blocks are spread evenly over tp or sp; sites are not with tp, where all its ranks hold the same streams",
        "boundaries fused, and every site's forward runs once more in backward",
        "expert and context parallelism, embedding and head, and the optimizer are left out",
        *assumptions(of.cost, on, job.active)[:-1],
    )

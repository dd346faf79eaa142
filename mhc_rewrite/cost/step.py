"""What a training step takes on a device: an estimate by roofline."""

from __future__ import annotations

import functools
import importlib.resources
import json
from dataclasses import dataclass

from mhc_rewrite.cost.formulas import C, Cost, L, s
from mhc_rewrite.errors import ConfigError


@dataclass(frozen=True)
class Links:
    """What connects devices, as in devices.json.

    Attributes:
        node: devices of a node.
        inside: bytes a second that a device sends to others of its node, while it receives as many.
        between: those that it sends to other nodes.
        source: of these figures.
    """

    node: int
    inside: float
    between: float
    source: str


@dataclass(frozen=True)
class Device:
    """Peak figures of a device, as in devices.json.

    Attributes:
        bandwidth: of memory, bytes a second.
        bf16, tf32, fp32: dense flop a second; tf32 None where products of fp32 numbers are made in fp32.
        source: of these figures.
        utilisation: share of the peak that the model without mHC is assumed to reach.
        utilisation_source: where that is from.
        links: None where there are no figures.
    """

    title: str
    bandwidth: float
    bf16: float
    tf32: float | None
    fp32: float
    source: str
    utilisation: float
    utilisation_source: str
    links: Links | None = None

    @property
    def product(self) -> float:
        """Flop a second of the projection: the kernels make a product of fp32 numbers of three in tf32."""
        return self.tf32 / 3 if self.tf32 else self.fp32


@functools.cache
def devices() -> dict[str, Device]:
    """By name."""
    data = json.loads((importlib.resources.files("mhc_rewrite") / "devices.json").read_text(encoding="utf-8"))
    links = {name: figures.pop("links", None) for name, figures in data.items()}
    return {
        name: Device(**figures, links=Links(**links[name]) if links[name] else None) for name, figures in data.items()
    }


def device(name: str) -> Device:
    """A device's figures.

    Raises:
        ConfigError: no such device; the message names the known ones.
    """
    if name not in devices():
        raise ConfigError(f"There are no figures for the device {name!r}. The known ones are: {', '.join(devices())}.")
    return devices()[name]


@dataclass(frozen=True)
class Estimate:
    """Seconds for one token of a training step: of the model as it was, and what its sites add."""

    baseline: float
    added: float

    @property
    def overhead(self) -> float:
        """What is added, as a share."""
        return self.added / self.baseline


def estimate(of: Cost, on: Device, parameters: float, fusion: str = "boundary", recompute: bool = False) -> Estimate:
    """The step time by roofline: no measurement. `assumptions` says in words what goes into it.

    Args:
        parameters: of the model, those that a token uses.
        fusion: a key of `Cost.traffic`.
        recompute: backward runs every site's forward once more.

    Raises:
        ConfigError: the streams are neither of two nor of four bytes an element.
    """
    itemsize = max(stream.itemsize for stream in of.streams)
    if itemsize not in (2, 4):
        raise ConfigError("There are no figures for fp64: the estimate is for models in bf16, fp16 and fp32.")
    peak = on.bf16 if itemsize == 2 else on.fp32
    forward, backward = (
        max(
            moved / on.bandwidth,
            of.evaluate(L * done.projection) / on.product + of.evaluate(L * (done.mixes + done.sinkhorn)) / on.fp32,
        )
        for moved, done in zip(of.moved(fusion), of.flops)
    )
    replaced = of.evaluate(L * s * 6 * C) / on.bandwidth
    return Estimate(
        baseline=6 * parameters / (on.utilisation * peak),
        added=(1 + recompute) * forward + backward - replaced,
    )


def assumptions(of: Cost, on: Device, parameters: float) -> tuple[str, ...]:
    """What `estimate` takes for granted, for a reader."""
    kind = "bf16" if max(stream.itemsize for stream in of.streams) == 2 else "fp32"
    product = "three tf32 products" if on.tf32 else "fp32"
    peaks = f"{on.bandwidth / 1e12:g} TB/s, {on.bf16 / 1e12:g} Tflop/s in bf16, "
    peaks += f"{on.tf32 / 1e12:g} in tf32, " if on.tf32 else ""
    return (
        f"device: {on.title}: {peaks}{on.fp32 / 1e12:g} in fp32 ({on.source})",
        f"the model without mHC: 6 flops a parameter and token, {parameters:.4g} parameters, at {on.utilisation:.0%} "
        f"of the peak in {kind} ({on.utilisation_source}); attention's scores and the optimizer are left out",
        "a site: the longer of its traffic at the peak bandwidth and its flops at the peak, forward and backward "
        f"apart; the projection as {product}, the rest in fp32. Real kernels stay below both peaks: a lower bound",
        "the residual add that a site replaces is taken off: 2C read and C written, forward and backward",
        "recomputing runs every site's forward once more; launches, weights and communication cost nothing",
    )

"""One run: a small decoder over bytes of Python's own sources, converted or not, trained and looked at on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import platform
import statistics
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_rewrite import mhcify
from mhc_rewrite.connections import mhc
from mhc_rewrite.insight.experiments.base import Job, Look, Result, residual_of
from mhc_rewrite.insight.experiments.measures import (
    composite,
    errors,
    gains,
    matrices,
    quantiles,
    short,
    sites_of,
    states,
)
from mhc_rewrite.lifecycle.optim import parameter_groups
from mhc_rewrite.version import VERSION

LOOKS = 4  # of a run, beside the one at its start
HELD_OUT = 10  # every so manieth file of the text is held out
PROBES = 12  # batches that the loss on held-out text is taken over
WEIGHT_DECAY, WARM_UP, FLOOR, CLIP = 0.1, 0.1, 0.1, 1.0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Decoder(nn.Module):
    """Bytes (batch, length) -> logits of each next one (batch, length, 256); torch's own layers, norm first."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, job.width), nn.Embedding(job.length, job.width)
        layer = nn.TransformerEncoderLayer(
            job.width, job.heads, 4 * job.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(job.width)
        self.layers = nn.TransformerEncoder(layer, job.layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(job.width, 256, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(job.length))
        for p in self.parameters():
            if p.dim() == 2:  # torch's layers of a stack start as copies of one
                nn.init.normal_(p, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight
        logits: Tensor = self.head(self.layers(x, mask=self.mask, is_causal=True))
        return logits


def train(job: Job, folder: Path) -> Result:
    """Trains one model from its start to its end. `folder` keeps weights that half-way runs begin with."""
    torch.manual_seed(job.seed)
    to_train_on, held_out = (part.to(DEVICE) for part in text())
    model = Decoder(job).to(DEVICE)
    first = next(batches(held_out, job, seed=0))[:, :-1]
    if job.half_way and not job.converted_first:
        model.load_state_dict(_half_way(job, folder))
    convert(model, job, first)
    if job.half_way and job.converted_first:
        model.load_state_dict(_half_way(job, folder))
    steps = round(job.steps * job.longer)
    optimizer = optimizer_of(model, job)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    start = [res.mean(0) for res in matrices(states(model, first))]
    looks, seconds, gradient = [], [], 0.0
    data = batches(to_train_on, job, seed=1 + job.seed + (1000 if job.half_way else 0))
    looked = {round(part * steps / LOOKS) for part in range(LOOKS + 1)}
    for step in range(steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model, next(data)).backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        seconds.append(time.perf_counter() - began)
        gradient = max(float(norm), gradient, key=lambda value: (math.isnan(value), value))
        if step in looked:  # with the gradients of the step to come
            looks.append(_look(model, job, step, held_out, first, start, gradient))
            gradient = 0.0
            if not math.isfinite(looks[-1].held_out):
                break
        began = time.perf_counter()
        nn.utils.clip_grads_with_norm_(model.parameters(), CLIP, norm)
        if step < steps:
            optimizer.step()
            schedule.step()
        seconds[-1] += time.perf_counter() - began
    if not job.half_way and job.longer == 1:
        _keep(model, _kept(job, folder))
    return Result(job, tuple(looks), statistics.median(seconds), versions())


def convert(model: nn.Module, job: Job, inputs: Tensor) -> None:
    """In place; leaves it as it is where the job has plain residuals."""
    if job.init is None:
        return
    streams: Any = job.streams
    if isinstance(streams, tuple):
        streams = {f"layers.layers.{layer}": n for layer, n in enumerate(streams)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of "paper", which is compared here
        mhcify(
            model, (inputs,), n_streams=streams, init=job.init, connection=job.connection,
            dynamic=job.dynamic, sinkhorn_iterations=job.iterations,
        )  # fmt: skip
    _strengthen(model, job)


def optimizer_of(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    groups = parameter_groups(model, WEIGHT_DECAY, site_lr=job.lr * job.site_lr)
    return torch.optim.AdamW(groups, job.lr, (0.9, 0.95), fused=True)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "mhc_rewrite": VERSION}


def text() -> tuple[Tensor, Tensor]:
    """Python's own sources as bytes: to train on, and held out.

    Raises:
        FileNotFoundError: this Python has none.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    if len(files) < 2 * HELD_OUT:
        raise FileNotFoundError(f"{folder} holds no Python sources to train on.")
    parts = [b for i, b in enumerate(files) if i % HELD_OUT], files[::HELD_OUT]
    train_on, held_out = (torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts)
    return train_on, held_out


def batches(source: Tensor, job: Job, seed: int) -> Iterator[Tensor]:
    """(batch, length + 1) pieces from random places, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(job.length + 1)
    while True:
        begin = torch.randint(len(source) - job.length, (job.batch, 1), generator=generator)
        yield source[begin + offsets].long()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross entropy of each byte given those before it, in nats."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


@torch.no_grad()
def _strengthen(model: nn.Module, job: Job) -> None:
    if job.strengths is None:
        return
    apart, read_apart, uniform = job.strengths
    assert isinstance(job.streams, int)
    for site in sites_of(model):
        mhc.preserve(
            site.phi, site.alpha, site.bias, job.streams, site.index,
            apart=apart, read_apart=read_apart, uniform=uniform,
        )  # fmt: skip


def _look(
    model: nn.Module, job: Job, step: int, held_out: Tensor, inputs: Tensor, start: list[Tensor], gradient: float
) -> Look:
    with torch.no_grad():
        probes = batches(held_out, job, seed=0)
        loss = short(loss_of(model, torch.cat([next(probes) for _ in range(PROBES)])), 7)
    if job.init is None:
        return Look(step, loss, gradient=short(gradient))
    seen = states(model, inputs)
    found = matrices(seen)
    moved = torch.cat([(now.mean(0) - then).flatten() for now, then in zip(found, start, strict=True)])
    last = seen[-1][1]
    mean = last.mean(-2, keepdim=True)
    apart = (last - mean).square().mean().sqrt() / mean.square().mean().sqrt()
    rows, columns = (torch.cat(sums) for sums in zip(*map(errors, found), strict=True))
    return Look(
        step, loss, _gradients(model), short(moved.square().mean().sqrt()), short(apart), short(gradient),
        _gains(found), quantiles(row=rows, column=columns),
    )  # fmt: skip


def _gains(found: list[Tensor]) -> dict[str, float]:
    """Empty where n changes on the way."""
    if len({res.shape[-1] for res in found}) > 1:
        return {}
    forward, backward = gains(composite(found))
    return quantiles(forward=forward, backward=backward)


def _gradients(model: nn.Module) -> dict[str, float]:
    """Of the mappings' biases."""
    total = {"pre": 0.0, "post": 0.0, "res": 0.0}
    for site in sites_of(model):
        if site.bias.grad is not None:
            n = site.config.n
            for name, part in zip(total, site.bias.grad.tensor_split([n, 2 * n])):
                total[name] += float(part.square().sum())
    return {name: short(math.sqrt(square)) for name, square in total.items()}


def _first_half(job: Job) -> Job:
    """The run that a half-way run goes on with."""
    return dataclasses.replace(job if job.converted_first else residual_of(job),
                               variant="", half_way=False, converted_first=False, longer=1.0)  # fmt: skip


def _kept(job: Job, folder: Path) -> Path:
    named = dataclasses.replace(job, variant="")
    return folder / f"{hashlib.sha256(repr(named).encode()).hexdigest()[:16]}.pt"


def _half_way(job: Job, folder: Path) -> dict[str, Tensor]:
    first = _first_half(job)
    path = _kept(first, folder)
    if not path.exists():
        train(first, folder)
    weights: dict[str, Tensor] = torch.load(path)
    return weights


def _keep(model: nn.Module, path: Path) -> None:
    """As a whole or not at all: runs beside this one may look for it."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    torch.save(model.state_dict(), name)
    os.replace(name, path)

"""One run: a small decoder over bytes of Python's own sources, converted or not, trained and looked at on the way."""

from __future__ import annotations

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_rewrite import HyperConnection, mhcify
from mhc_rewrite.connections import mhc
from mhc_rewrite.insight.experiments.base import Job, Look, Result
from mhc_rewrite.kernels.reference import split
from mhc_rewrite.lifecycle.optim import parameter_groups
from mhc_rewrite.version import VERSION

LOOKS = 8  # of a run, beside the one at its start
HELD_OUT = 10  # every so manieth file of the text is held out
PROBES = 12  # batches that the loss on held-out text is taken over
WEIGHT_DECAY, WARM_UP, FLOOR, CLIP = 0.1, 0.1, 0.1, 1.0


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
    to_train_on, held_out = text()
    model = Decoder(job)
    if job.half_way:
        model.load_state_dict(_half_way(job, folder))
    first = next(batches(held_out, job, seed=0))[:, :-1]
    if job.init is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of "paper", which is compared here
            mhcify(model, (first,), n_streams=job.streams, init=job.init)
        _strengthen(model, job)
    groups = parameter_groups(model, WEIGHT_DECAY) if job.init else model.parameters()
    optimizer = torch.optim.AdamW(groups, job.lr, (0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, job.steps))
    start = _matrices(model, first)
    looks, seconds = [], []
    data = batches(to_train_on, job, seed=1 + job.seed + (1000 if job.half_way else 0))
    looked = {round(part * job.steps / LOOKS) for part in range(LOOKS + 1)}
    for step in range(job.steps + 1):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss_of(model, next(data)).backward()
        seconds.append(time.perf_counter() - began)
        if step in looked:  # with the gradients of the step to come
            looks.append(_look(model, job, step, held_out, first, start))
            if not math.isfinite(looks[-1].held_out):
                break
        began = time.perf_counter()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if step < job.steps:
            optimizer.step()
            schedule.step()
        seconds[-1] += time.perf_counter() - began
    if job.init is None and not job.half_way:
        _keep(model, _kept(job, folder))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "mhc_rewrite": VERSION}
    return Result(job, tuple(looks), statistics.median(seconds), versions)


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


def _sites(model: nn.Module) -> list[HyperConnection]:
    return [module for module in model.modules() if isinstance(module, HyperConnection)]


@torch.no_grad()
def _strengthen(model: nn.Module, job: Job) -> None:
    if job.strengths is None:
        return
    apart, read_apart, uniform = job.strengths
    for site in _sites(model):
        mhc.preserve(
            site.phi, site.alpha, site.bias, job.streams, site.index,
            apart=apart, read_apart=read_apart, uniform=uniform,
        )  # fmt: skip


@torch.no_grad()
def _states(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What each site reads, (batch, length, n, C); that of the first may be (..., 1, C)."""
    seen: list[Tensor] = []
    hooks = [site.register_forward_hook(lambda site, args, result: seen.append(_state(args, result)))
             for site in _sites(model)]  # fmt: skip
    try:
        model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _state(args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> Tensor:
    """A site's `pre` is given the state; its `boundary` returns it first."""
    return args[0] if len(args) == 1 else result[0]


@torch.no_grad()
def _matrices(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """H_res of each site, the mean over the tokens of these inputs."""
    states = _states(model, inputs)
    return [site.coefficients(X).res.flatten(0, -3).mean(0) for site, X in zip(_sites(model), states)]


def _look(model: nn.Module, job: Job, step: int, held_out: Tensor, inputs: Tensor, start: list[Tensor]) -> Look:
    with torch.no_grad():
        probes = batches(held_out, job, seed=0)
        loss = statistics.fmean(float(loss_of(model, next(probes))) for _ in range(PROBES))
    if job.init is None:
        return Look(step, loss)
    gradients = {"pre": 0.0, "post": 0.0, "res": 0.0}
    for site in _sites(model):
        if site.bias.grad is not None:
            parts = split(site.bias.grad, job.streams)._asdict()
            gradients = {name: total + float(parts[name].square().sum()) for name, total in gradients.items()}
    moved = torch.stack([now - then for now, then in zip(_matrices(model, inputs), start)])
    last = _states(model, inputs)[-1]
    mean = last.mean(-2, keepdim=True)
    apart = (last - mean).square().mean().sqrt() / mean.square().mean().sqrt()
    rooted = {name: math.sqrt(total) for name, total in gradients.items()}
    return Look(step, loss, rooted, float(moved.square().mean().sqrt()), float(apart))


def _kept(job: Job, folder: Path) -> Path:
    return folder / f"half-way-{job.layers}x{job.width}-{job.steps}-{job.seed}.pt"


def _half_way(job: Job, folder: Path) -> dict[str, Tensor]:
    path = _kept(job, folder)
    if not path.exists():
        train(Job(**{**job.__dict__, "init": None, "strengths": None, "half_way": False}), folder)
    weights: dict[str, Tensor] = torch.load(path)
    return weights


def _keep(model: nn.Module, path: Path) -> None:
    """As a whole or not at all: runs beside this one may look for it."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    torch.save(model.state_dict(), name)
    os.replace(name, path)

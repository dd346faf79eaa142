"""Every kernel in many configurations, as demos/gpu_all.py times them: on the device, launch by launch.

A candidate is one configuration of one kernel; the others have their defaults. Its operator runs once, and what comes
out is held against the default's. Then its own launch is timed, after those before it.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from gpu_operators import EPS, ITERATIONS, Size, operands
from gpu_times import Clock
from torch import Tensor

from mhc_rewrite.kernels import triton_boundary, triton_boundary_backward, triton_post
from mhc_rewrite.kernels.triton_configs import Config, Launch, choose, using


class Job(NamedTuple):
    """`chain` names the launches that are made; the one timed is at `place`. `streams`: elements of streams that it
    must move, in units of tokens x C."""

    kernel: str
    chain: str
    place: int
    streams: Callable[[int], int]


JOBS = [
    Job("pre", "pre", 0, lambda n: n),
    Job("finish", "pre", 1, lambda n: n + 1),
    Job("dots", "pre_backward", 0, lambda n: n + 1),
    Job("dots", "boundary_backward", 0, lambda n: n + 2),
    Job("coefficients", "boundary_backward", 1, lambda n: 0),
    Job("state", "pre_backward", 2, lambda n: 2 * n + 1),
    Job("state", "boundary_backward", 2, lambda n: 2 * n + 1),
    Job("unmix", "boundary_backward", 3, lambda n: 3 * n + 2),
    Job("pre_parameters", "pre_backward", 3, lambda n: n),
    Job("boundary_parameters", "boundary_backward", 4, lambda n: n + 1),
    Job("post", "post", 0, lambda n: 2 * n + 1),
    Job("post_backward", "post_backward", 0, lambda n: 3 * n + 2),
]


class Candidate(NamedTuple):
    job: Job
    config: Config
    size: Size


def grid(
    each: tuple[int, int], tokens: tuple[int, ...], width: tuple[int, ...], warps: tuple[int, ...],
    stages: tuple[int, ...] = (2,), parts: tuple[int, ...] = (1,),
) -> Iterator[Config]:  # fmt: skip
    """All of these with a number of elements a thread within `each`."""
    for some in itertools.product(tokens, width, warps, stages, parts):
        if each[0] <= some[0] * some[1] / (32 * some[2]) <= each[1]:
            yield Config("-".join(map(str, some)), *some)


def configurations(job: Job) -> list[Config]:
    if job.kernel == "pre":
        whole = grid((4, 16), (16, 32, 64), (32, 64), (4, 8), (2, 3))
        split = grid((8, 32), (16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (4, 10, 20))
        return [*whole, *split]
    parameters = grid((2, 16), (16, 32, 64, 128), (16, 32, 64), (4, 8), (2, 3), (256, 512, 1024))
    streamed = grid((4, 16), (1, 2, 4, 8, 16), (128, 256, 512, 1024), (2, 4, 8))
    return list({
        "finish": grid((4, 16), (4, 8, 16, 32), (64, 128, 256, 512), (2, 4, 8), parts=(1, 4, 64)),
        "dots": grid((4, 16), (1, 2, 4, 8, 16), (128, 256, 512, 1024), (2, 4, 8), parts=(1, 2, 4)),
        "coefficients": grid((0, 1e9), (4, 8, 16, 32, 64), (1,), (1, 2, 4)),
        "state": grid((4, 16), (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3), (1, 4, 20)),
        "pre_parameters": parameters,
        "boundary_parameters": parameters,
        "post": grid((8, 32), (1, 2, 4, 8, 16), (128, 256, 512, 1024), (2, 4, 8)),
        "post_backward": streamed,
        "unmix": streamed,
    }[job.kernel])  # fmt: skip


def candidates(size: Size, few: bool = False) -> list[Candidate]:
    """Kernel after kernel in turn, so that a stop leaves some of each."""
    found = [[Candidate(job, config, size) for config in _spread(configurations(job), few)] for job in JOBS]
    return [one for row in itertools.zip_longest(*found) for one in row if one is not None]


def _spread(configs: list[Config], few: bool) -> list[Config]:
    """In an order in which neighbours differ."""
    step = next(step for step in (37, 41, 43) if len(configs) % step)
    order = [configs[k * step % len(configs)] for k in range(len(configs))]
    return order[:2] if few else order


class Chains:
    """Operands of one size, and the launches of each operator on them, with what they write."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str, filled: bool = True) -> None:
        self.size, self.n = size, size.n
        if filled:
            values = operands(size, dtype, device)
        else:
            given = operands(Size(1, size.n, size.width), dtype, device)
            values = {
                k: v if k in ("phi", "alpha", "bias") else v.new_empty((size.tokens, *v.shape[1:]))
                for k, v in given.items()
            }
        self.X, self.y, self.h_post, self.h_res, *self.parameters = values.values()
        self._kept: tuple[Tensor, ...] = ()

    def make(self, chain: str) -> tuple[list[Launch], tuple[Tensor, ...]]:
        """The launches and their outputs."""
        X, y, h_post, h_res = self.X, self.y, self.h_post, self.h_res
        if chain == "post":
            out = torch.empty_like(X)
            return [triton_post.post_launch(X, y, h_post, h_res, out)], (out,)
        if chain == "post_backward":
            outputs = tuple(map(torch.empty_like, (X, y, h_post, h_res)))
            return [triton_post.post_backward_launch(X, X, y, h_post, h_res, *outputs)], outputs
        mix = (y, h_post, h_res) if chain.startswith("boundary") else None
        columns = self.parameters[0].shape[1]
        sizes = (h_post.shape, h_res.shape, (len(X), columns), (len(X), 1))
        if not chain.endswith("backward"):
            made = (torch.empty_like(y), *(h_post.new_empty(size) for size in sizes))
            return triton_boundary.pre_launches(X, *self.parameters, made, "mhc", ITERATIONS, EPS), made
        if not self._kept:
            launches, made = self.make("pre")
            for launch in launches:
                launch.run()
            self._kept = made[-2:]
        outputs = tuple(map(torch.empty_like, (X, *mix) if mix else (X,)))
        gradients = tuple(map(torch.empty_like, self.parameters))
        launches = triton_boundary_backward.backward_launches(
            X if mix else None, (y, h_post, h_res), X, mix, *self.parameters, *self._kept, outputs, gradients, "mhc",
            ITERATIONS, False,
        )  # fmt: skip
        return launches, (*outputs, *gradients)


def of(candidate: Candidate, chains: Chains) -> tuple[list[Launch], tuple[Tensor, ...]]:
    split = Config("split", 64, 64, 4, 2, 10)
    with contextlib.ExitStack() as stack:
        if candidate.job.kernel == "finish":  # which is there only behind a cut
            stack.enter_context(using("pre", split))
        stack.enter_context(using(candidate.job.kernel, candidate.config))
        return chains.make(candidate.job.chain)


def compile_one(candidate: Candidate, chains: Chains) -> None:
    """Fills Triton's cache on disk, that of its launchers too."""
    launch = of(candidate, chains)[0][candidate.job.place]
    compiled_of(launch)


def compiled_of(launch: Launch) -> Any:
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
    compiled = launch.kernel.warmup(**launch.arguments, **launch.constants, **options, grid=launch.grid)
    compiled._init_handles()
    return compiled


class Sweep:
    """Times candidates of one size; rows of figures."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        self.chains, self.clock, self.device = Chains(size, dtype, device), Clock(device), device
        self.truths: dict[str, tuple[Tensor, ...]] = {}

    def truth(self, chain: str) -> tuple[Tensor, ...]:
        if chain not in self.truths:
            launches, outputs = self.chains.make(chain)
            for launch in launches:
                launch.run()
            self.truths[chain] = outputs
        return self.truths[chain]

    def row(self, candidate: Candidate, rounds: int) -> dict[str, Any]:
        job, config, size = candidate
        row = {"size": str(size), "kernel": job.kernel, "chain": job.chain, "config": asdict(config)}
        try:
            launches, outputs = of(candidate, self.chains)
            for launch in launches:
                launch.run()
            error = max(
                float((a.double() - b).norm() / b.double().norm()) for a, b in zip(outputs, self.truth(job.chain))
            )
            launch, earlier = launches[job.place], launches[: job.place]
            taken = [self.clock(launch.run, lambda: [one.run() for one in earlier]) for _ in range(rounds + 1)][1:]
        except Exception as problem:
            return {**row, "failed": f"{type(problem).__name__}: {problem}"[:300]}
        seconds = statistics.median(timing.device for timing in taken)
        moved = job.streams(size.n) * size.tokens * size.width * self.chains.X.element_size()
        row |= {"us": 1e6 * seconds, "host_us": 1e6 * statistics.median(timing.host for timing in taken),
                "ahead": all(timing.ahead for timing in taken), "GBps": moved / seconds / 1e9, "error": error,
                "grid": launch.grid, "launches": len(launches)}  # fmt: skip
        if self.device == "cuda":
            compiled = compiled_of(launch)
            row |= {"registers": compiled.n_regs, "spills": compiled.n_spills, "shared": compiled.metadata.shared}
        return row

    def defaults(self) -> list[Candidate]:
        size = self.chains.size
        return [Candidate(job, choose(job.kernel, size.n, size.width, size.tokens), size) for job in JOBS]

"""What a conversion costs: the model beside its conversion, eager and compiled, as plain data.

Times are taken in turn in one process; a ratio is the median, over rounds, of the quotient of two neighbouring times.
What depends on what a process has done before, compilation and memory, is measured in a fresh one for each way to run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import gc
import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite.api import mhcify
from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.errors import ExampleInputsError, MHCError
from mhc_rewrite.insight.peers import convert_sites
from mhc_rewrite.kernels import cpu
from mhc_rewrite.lowering import compile as compile_mhc
from mhc_rewrite.sites.hyper_connection import HyperConnection

EAGER, INDUCTOR, MHC = "eager", "inductor", "mhc"
ORIGINAL, CONVERTED = "original", "converted"
WARM_UP = 2  # rounds that do not count

# Read by glibc when a process starts. For times: with the usual settings every large result is fresh memory from the
# system, and page faults dominate all else. For memory: a block that is free is given back, and not counted.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}
FRESH_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_MMAP_MAX_": "1000000"}

Inputs = Mapping[str, Any] | tuple[Any, ...] | None


class Load(Protocol):
    """Gives a model and example inputs of the call that is timed, or None where `mhcify` needs none."""

    def __call__(self) -> tuple[nn.Module, Inputs]: ...


@dataclass(frozen=True)
class Workload:
    """What is run, however it is run.

    Attributes:
        load: called in fresh processes too, so it has to be picklable: a function of a module, or a partial of one.
        config: of the conversion; its `recompute` is that of the backend "mhc" too. The sites' parameters are
            perturbed: at the start H_* are special.
        training: a training step (forward, backward of a mean of squares, gradients dropped) in train mode; else a
            forward pass under no_grad in eval mode.
        autocast: dtype of torch.autocast around the forward.
        device: where it runs.
    """

    load: Load
    config: MHCConfig = MHCConfig()  # noqa: RUF009 (frozen)
    training: bool = True
    autocast: torch.dtype | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Measured:
    """One way to run one model.

    Attributes:
        model: "original", "converted", or the package that computes the sites of a converted one.
        backend: "eager", or what torch.compile was given.
        seconds: median of one step.
        ratio: over the original, eager or compiled by Inductor; 1 for the original.
        launches: kernels, copies and fills of one step on a GPU; None elsewhere.
        compilation: seconds of the first step with cold caches, less those of a later one; None for eager.
        kept: bytes held between forward and backward beside what is there all the time; None without training.
        peak: bytes held at most during a step, beside what is there all the time.
    """

    model: str
    backend: str
    seconds: float
    ratio: float
    launches: int | None = None
    compilation: float | None = None
    kept: int | None = None
    peak: int | None = None


def ways(backends: Sequence[str], peers: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The (model, backend) to run, the original first: "mhc" is for converted models, which Inductor's original meets.

    A peer runs as the original does.
    """
    plain = list(dict.fromkeys(map(_baseline, backends)))
    made = [(ORIGINAL, backend) for backend in plain] + [(CONVERTED, backend) for backend in backends]
    return made + [(peer, backend) for peer in peers for backend in plain]


def _baseline(backend: str) -> str:
    return INDUCTOR if backend == MHC else backend


def bench(
    workload: Workload,
    *,
    backends: Sequence[str] = (EAGER, MHC),
    peers: Sequence[str] = (),
    rounds: int = 15,
    fresh: bool = True,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[Measured]:
    """Measures a model and its conversion.

    Args:
        backends: "eager", "mhc", and any other backend of torch.compile.
        peers: packages, of `PEERS`, whose sites are run in place of this project's in the converted model.
        rounds: of which each runs everything once.
        fresh: compilation and memory too, in a process for each way.
        progress: told what is being done.

    Raises:
        MHCError: as `mhcify`.
        ExampleInputsError: the model does not take the inputs.
        PeerError: a peer is not there.
    """
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    loaded = _loaded(workload)
    for name, backend in ways(backends, peers):
        progress(f"{name}, {backend}: first step")
        steps[name, backend] = _step(workload, _model(workload, name, loaded), backend, loaded[1])
        steps[name, backend]()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for k in range(WARM_UP + rounds):
        progress(f"round {k + 1} of {WARM_UP + rounds}")
        for key, step in steps.items():
            times[key].append(clocked(step, workload.device))
    measured = []
    for (name, backend), seconds in times.items():
        others = times[ORIGINAL, _baseline(backend)]
        ratio = statistics.median(mine / other for mine, other in zip(seconds[WARM_UP:], others[WARM_UP:]))
        launches = _launches(steps[name, backend]) if workload.device == "cuda" else None
        measured.append(Measured(name, backend, statistics.median(seconds[WARM_UP:]), ratio, launches))
    if not fresh:
        return measured
    steps.clear()
    for k, one in enumerate(measured):
        progress(f"{one.model}, {one.backend}: compilation and memory, in a process of its own")
        measured[k] = replace(one, **in_a_fresh_process(workload, one.model, one.backend))
    return measured


@torch.no_grad()
def perturb(model: nn.Module, scale: float = 0.02) -> None:
    """Moves every site parameter at random, the same way each time."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((scale * noise).to(parameter))


# -- one way to run ----------------------------------------------------------------------------------------------------


def _loaded(workload: Workload) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    model, inputs = workload.load()
    call = example_call(model, inputs)

    def moved(value: Any) -> Any:
        return value.to(workload.device) if isinstance(value, Tensor) else value

    return model.to(workload.device).train(workload.training), tree_map(moved, call)


def _model(workload: Workload, name: str, loaded: tuple[nn.Module, Any]) -> nn.Module:
    model, (args, kwargs) = loaded
    model = copy.deepcopy(model)
    if name != ORIGINAL:
        mhcify(model, kwargs or args, config=workload.config)
        perturb(model)
    if name not in (ORIGINAL, CONVERTED):
        convert_sites(model, name)
    return model


def _step(
    workload: Workload, model: nn.Module, backend: str, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> Callable[..., Any]:
    """One step; in training it calls its argument between forward and backward."""
    args, kwargs = arguments
    run: Callable[..., Any] = model
    if backend == MHC:
        run = compile_mhc(model, options={"recompute": workload.config.recompute})
    elif backend != EAGER:
        run = torch.compile(model, backend=backend)

    def call(run: Callable[..., Any]) -> Any:
        cast = torch.autocast(workload.device, workload.autocast) if workload.autocast else contextlib.nullcontext()
        with cast:
            return run(*args, **kwargs)

    def train(between: Callable[[], Any] = lambda: None) -> None:
        loss = _result(call(run)).float().square().mean()
        between()
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    @torch.no_grad()
    def forward() -> None:
        call(run)

    try:
        with torch.no_grad():
            call(model)  # what is wrong with the inputs is clearer without torch.compile
    except MHCError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
        raise ExampleInputsError(
            f"{type(model).__name__} can't be called with these inputs, of the shapes {shapes}: "
            f"{type(error).__name__}: {error}. Give others, or other sizes."
        ) from error
    return train if workload.training else forward


def _result(out: Any) -> Tensor:
    """The first tensor of an output that a loss can be made of."""
    return next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def clocked(step: Callable[[], Any], device: str) -> float:
    """Seconds of a call, all that it has begun on the device included."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _launches(step: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


# -- fresh processes ---------------------------------------------------------------------------------------------------


def in_a_fresh_process(workload: Workload, name: str, backend: str) -> dict[str, Any]:
    """`compilation`, `kept` and `peak` of `Measured`; the caches of compiled graphs are empty there."""
    with environment(FRESH_MEMORY), tempfile.TemporaryDirectory() as caches:
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
            return pool.submit(_measure, workload, name, backend, torch.get_num_threads(), caches).result()


@contextlib.contextmanager
def environment(allocator: Mapping[str, str]) -> Iterator[None]:
    """For processes that start inside: this allocator and no other settings of it."""
    before = {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}
    for key in before:
        del os.environ[key]
    os.environ.update(allocator)
    try:
        yield
    finally:
        for key in allocator:
            del os.environ[key]
        os.environ.update(before)


def _measure(workload: Workload, name: str, backend: str, threads: int, caches: str) -> dict[str, Any]:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = caches
    torch.set_num_threads(threads)
    cpu.available()  # built once for all processes: no part of a compilation
    loaded = _loaded(workload)
    model = _model(workload, name, loaded)
    if backend != EAGER:  # what a backend does once in a process is nobody's compilation
        small = nn.Linear(2, 2, device=workload.device)
        torch.compile(small, backend=_baseline(backend))(torch.ones(2, 2, device=workload.device)).sum().backward()
    step = _step(workload, model, backend, loaded[1])
    first, later = (clocked(step, workload.device) for _ in range(2))
    figures: dict[str, Any] = {"compilation": None if backend == EAGER else first - later}
    gc.collect()
    try:
        before = _reset(workload.device)
    except OSError:  # no Linux, or one that does not let a process begin its account anew
        return figures
    if workload.training:
        step(lambda: figures.update(kept=_held(workload.device) - before))
    else:
        step()
    return {**figures, "peak": _peak(workload.device) - before}


def _reset(device: str) -> int:
    """Begins a new account of the highest memory use; gives the present one."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return _held(device)


def _held(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _of_process("VmRSS")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _of_process("VmHWM")


def _of_process(field: str) -> int:
    """Bytes of a field of Linux's account of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, field
    return 1024 * int(found[1])

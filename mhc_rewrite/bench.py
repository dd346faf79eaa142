"""What a conversion costs: the model beside its conversion, eager and compiled, as plain data.

Everything runs in turn in one process; a ratio is the median, over rounds, of the quotient of two neighbouring times.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhc_rewrite.api import mhcify
from mhc_rewrite.capture.example import example_call
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.hyper_connection import HyperConnection

EAGER = "eager"
WARM_UP = 2  # rounds that do not count


@dataclass(frozen=True)
class Cost:
    """One way to run one model.

    Attributes:
        model: "original" or "converted".
        backend: "eager", or what torch.compile was given.
        seconds: median of one step.
        ratio: over the original with the same backend; 1 for the original.
        first_call: seconds of the first step: compilation, with cold caches, and one step. 0 for eager.
        saved: bytes kept from forward to backward besides parameters; 0 without training.
    """

    model: str
    backend: str
    seconds: float
    ratio: float
    first_call: float
    saved: int


def bench(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    config: MHCConfig | None = None,
    backends: Sequence[str] = (EAGER, "inductor"),
    training: bool = True,
    autocast: torch.dtype | None = None,
    rounds: int = 15,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[Cost]:
    """Times a training step (forward, backward of a sum of squares) or a forward pass of a model and its conversion.

    Args:
        model: stays as it is; copies are measured.
        example_inputs: of the calls that are timed; may be left out where `mhcify` needs none.
        config: of the conversion. Its sites' parameters are perturbed: at the start H_* are special.
        backends: "eager", and any backend of torch.compile.
        training: with gradients, in train mode; else under no_grad, in eval mode.
        autocast: dtype of torch.autocast around the forward.
        rounds: of which each runs everything once.
        progress: told what is being done.

    Raises:
        MHCError: as `mhcify`.
    """
    args, kwargs = example_call(model, example_inputs)
    progress("converting")
    original = copy.deepcopy(model).train(training)
    converted = mhcify(copy.deepcopy(model).train(training), example_inputs, config=config or MHCConfig())
    perturb(converted)
    device = next(model.parameters()).device
    steps: dict[tuple[str, str], Callable[[], Any]] = {}
    first: dict[tuple[str, str], float] = {}
    for backend in backends:
        if backend != EAGER:
            progress(f"starting {backend}")
            with _cold_caches():  # what a backend does once in a process is nobody's first step
                small = nn.Linear(2, 2, device=device)
                torch.compile(small, backend=backend)(torch.ones(2, 2, device=device)).sum().backward()
        for name, of in (("original", original), ("converted", converted)):
            run = of if backend == EAGER else torch.compile(of, backend=backend)
            steps[name, backend] = _step(run, of, args, kwargs, training, autocast)
            progress(f"first step: {name}, {backend}")
            with _cold_caches():
                first[name, backend] = _clocked(steps[name, backend], device)
    times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for k in range(WARM_UP + rounds):
        progress(f"round {k + 1} of {WARM_UP + rounds}")
        for key, step in steps.items():
            times[key].append(_clocked(step, device))
    times = {key: seconds[WARM_UP:] for key, seconds in times.items()}
    costs = []
    for (name, backend), seconds in times.items():
        ratios = [mine / other for mine, other in zip(seconds, times["original", backend])]
        compiled = 0.0 if backend == EAGER else first[name, backend]
        saved = saved_bytes(steps[name, backend], (original, converted)) if training else 0
        costs.append(Cost(name, backend, statistics.median(seconds), statistics.median(ratios), compiled, saved))
    return costs


@torch.no_grad()
def perturb(model: nn.Module, scale: float = 0.02) -> None:
    """Moves every site parameter at random, the same way each time."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, HyperConnection):
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((scale * noise).to(parameter))


def saved_bytes(step: Callable[[], Any], models: Sequence[nn.Module]) -> int:
    """Bytes of what one step keeps from forward to backward, each piece of memory once, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for model in models for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def _step(
    run: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool,
    autocast: torch.dtype | None,
) -> Callable[[], Any]:  # fmt: skip
    device = next(model.parameters()).device.type
    cast = torch.autocast(device, dtype=autocast) if autocast else contextlib.nullcontext()

    def train() -> None:
        with cast:
            out = run(*args, **kwargs)
        _result(out).float().square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    @torch.no_grad()
    def forward() -> Any:
        with cast:
            return run(*args, **kwargs)

    return train if training else forward


def _result(out: Any) -> Tensor:
    """The first tensor of an output that a loss can be made of."""
    return next(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point())


@contextlib.contextmanager
def _cold_caches() -> Iterator[None]:
    """Inside, a compilation takes what it takes the first time."""
    before = torch.compiler.config.force_disable_caches
    torch.compiler.config.force_disable_caches = True
    try:
        yield
    finally:
        torch.compiler.config.force_disable_caches = before


def _clocked(step: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin

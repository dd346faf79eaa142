"""What a row of the table of model families is, and the checks that every row passes.

A family is converted, its site parameters are perturbed at random, and the result is held against an n-stream forward
written by hand (`Family.oracle`), which knows the original model and the site parameters and nothing of the package.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oracle import Params, perturb, site_names, site_params

PRESERVE_FP64 = 1e-10
PRESERVE_FP32 = 1e-5
PERTURBED_FP64 = 1e-9
MOVED = 0.1


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: as the table shows it.
        build: () -> the original model with random weights, fp32; called under a fixed seed.
        inputs: () -> keyword (dict) or positional (tuple) arguments, floating ones fp32; called under a fixed seed.
        sites: number of sites, counted from the model's source.
        streams: the expected site names, stream by stream, in execution order.
        oracle: (fresh copy of the original, {site name: Params}) -> callable with the model's signature that runs it
            with n streams by hand. It may change the copy.
        gradients: compare gradients too.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any] | tuple[Any, ...]]
    sites: int
    streams: tuple[tuple[str, ...], ...]
    oracle: Callable[[nn.Module, dict[str, Params]], Callable[..., Any]]
    gradients: bool = True

    def __str__(self) -> str:
        return self.name

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The original, in eval mode."""
        with seeded(self.name):
            return self.build().to(dtype).eval()

    def arguments(self, dtype: torch.dtype = torch.float64) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of a call, floating tensors in `dtype`."""
        inputs = self.example(dtype)
        return ((), inputs) if isinstance(inputs, dict) else (inputs, {})

    def example(self, dtype: torch.dtype = torch.float64) -> dict[str, Any] | tuple[Any, ...]:
        """`inputs()` with floating tensors in `dtype`, as `mhcify` takes them."""
        with seeded(self.name + " inputs"):
            inputs = self.inputs()

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        if isinstance(inputs, dict):
            return {key: cast(value) for key, value in inputs.items()}
        return tuple(cast(value) for value in inputs)


class Perturbed(NamedTuple):
    """Relative errors of the converted model against the hand-written one, and how far the outputs moved."""

    output: float
    gradient: float
    moved: float


@contextmanager
def seeded(text: str) -> Iterator[None]:
    """A random state that depends on `text` alone; the old state returns afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(text.encode()))
        yield


def output(result: Any) -> Tensor:
    """The tensor that a call is judged by: the first floating one of what it returned."""
    if isinstance(result, Tensor):
        return result
    for value in result.values() if hasattr(result, "values") else result:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise AssertionError(f"no floating tensor in {type(result).__name__}")


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of `want`; infinite where shapes differ or `got` is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max())


def plan_streams(found: Any) -> tuple[tuple[str, ...], ...]:
    """The site names of a RewritePlan, stream by stream."""
    return tuple(tuple(site.name for site in stream.sites) for stream in found.streams)


def preserve_error(family: Family, dtype: torch.dtype) -> float:
    """Relative error of the freshly converted model against the original."""
    from mhc_rewrite import mhcify

    model = family.model(dtype)
    args, kwargs = family.arguments(dtype)
    with torch.no_grad():
        want = output(model(*args, **kwargs))
        mhcify(model, family.example(dtype))
        return relative(output(model(*args, **kwargs)), want)


def perturbed_errors(family: Family) -> Perturbed:
    """Output and gradients of the perturbed conversion against the hand-written n-stream forward, in fp64."""
    from mhc_rewrite import mhcify

    model = family.model()
    args, kwargs = family.arguments()
    original = copy.deepcopy(model)
    mhcify(model, family.example())
    perturb(model, seed=zlib.crc32(family.name.encode()))
    state = {key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()}
    params = {name: site_params(state, name) for name in site_names(state)}
    assert sorted(params) == sorted({name for stream in family.streams for name in stream})
    by_hand = copy.deepcopy(original)
    run = family.oracle(by_hand, params)

    with torch.no_grad():
        unperturbed = output(original(*args, **kwargs))
    got, want = output(model(*args, **kwargs)), output(run(*args, **kwargs))
    moved = relative(want.detach(), unperturbed)
    error = relative(got.detach(), want.detach())
    if not family.gradients:
        return Perturbed(error, 0.0, moved)

    with seeded("weights of the loss"):
        weight = torch.randn_like(want)
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    return Perturbed(error, _gradient_error(model, by_hand, params), moved)


def _gradient_error(model: nn.Module, by_hand: nn.Module, params: dict[str, Params]) -> float:
    """Largest relative error over all parameters: those of the model and those of the sites.

    Relative to the parameter's own largest gradient, or to 1e-4 of the largest of all where that is more: the H_res of
    a first site has a zero gradient, since its streams are equal.
    """
    want = {name: p.grad for name, p in by_hand.named_parameters(remove_duplicate=False)}
    for name, site in params.items():
        want |= {f"{name}.{field}": value.grad for field, value in site._asdict().items()}
    got = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
    # The hand-written model may have been changed in its modules, never in its parameters' names.
    assert got.keys() == want.keys(), sorted(got.keys() ^ want.keys())
    assert any(grad is not None for grad in want.values())
    floor = 1e-4 * max(float(grad.abs().max()) for grad in want.values() if grad is not None)
    worst = 0.0
    for name, grad in want.items():
        mine = got[name]
        if grad is None or mine is None:
            # A parameter that no path reaches (an unused expert, a head without a loss) has no gradient in both.
            other = mine if grad is None else grad
            assert other is None or not bool(other.any()), f"{name} has a gradient on one side only"
            continue
        worst = max(worst, float((mine - grad).abs().max()) / max(float(grad.abs().max()), floor))
    return worst


def record(record_property: Callable[[str, object], None], family: Family | str, **columns: float | int | str) -> None:
    """Puts columns of a family's row where `conftest.pytest_terminal_summary` finds them, under xdist too."""
    record_property("family", {"name": str(family), **columns})


def check_structure(family: Family, record_property: Callable[[str, object], None]) -> None:
    """The plan has the expected sites and streams; `check_perturbed` sees that the conversion carries them out."""
    from mhc_rewrite import plan

    found = plan(family.model(torch.float32), family.example(torch.float32))
    record(record_property, family, sites=len(found.sites), streams=len(found.streams))
    assert plan_streams(found) == family.streams
    assert len(found.sites) == family.sites
    for stream in found.streams:
        # A site is rewritten in the module that holds its add, or further out.
        assert (stream.entry, stream.exit) == (stream.sites[0].carrier, stream.sites[-1].carrier)
        for site in stream.sites:
            assert site.name.startswith(f"{site.holder}.mhc_" if site.holder else "mhc_")
            assert not site.carrier or f"{site.holder}.".startswith(f"{site.carrier}.")
            assert not site.excluded


def check_preserve(family: Family, record_property: Callable[[str, object], None]) -> None:
    """At initialisation the converted model computes the original function."""
    fp64 = preserve_error(family, torch.float64)
    fp32 = preserve_error(family, torch.float32)
    record(record_property, family, preserve_fp64=fp64, preserve_fp32=fp32)
    assert fp64 <= PRESERVE_FP64
    assert fp32 <= PRESERVE_FP32


def check_perturbed(family: Family, record_property: Callable[[str, object], None]) -> None:
    """Perturbed, it computes what the hand-written n-stream forward does."""
    errors = perturbed_errors(family)
    record(record_property, family, perturbed=errors.output, gradient=errors.gradient, moved=errors.moved)
    assert errors.moved >= MOVED
    assert errors.output <= PERTURBED_FP64
    assert errors.gradient <= PERTURBED_FP64

"""Holds a converted model against the original on the example: outputs and gradients, in evaluation and in training.

`observe` runs the model in both modes, before and after the conversion, from the same random state; `verify` compares
what it saw. The model's own gradients, buffers and random states stay as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.call import as_now
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.errors import MHCError, UnsupportedModelError
from mhc_rewrite.sites.hyper_connection import HyperConnection

_SEED = 20251224
_SAMPLE = 4096  # elements of each gradient that are compared one by one; its norm stands for the others
# By the narrowest dtype that takes part, in bits: of outputs, over 1 and the largest; of gradients, over their norm.
_OUTPUTS = {64: 1e-4, 32: 1e-3, 16: 0.2}
_GRADIENTS = {64: 1e-4, 32: 1e-2, 16: 0.5}
# A gradient that is nothing but rounding (a key's bias in attention) is held against the others'.
_FLOOR = {64: 1e-6, 32: 1e-4, 16: 1e-2}
# What differs more is held against what it does when parameters move by so much, so often: a difference of a few times
# that is rounding.
_LAST_DIGITS, _WOBBLES, _TIMES = 1e-6, 3, 4
_UNDETERMINED = 1e-2  # of 1 and the largest: outputs that move further could not be told from wrong ones


@dataclass
class Gradient:
    """Of one parameter: its norm, and the elements that are compared."""

    norm: float
    sample: Tensor


@dataclass
class Run:
    """One call of the model in one mode, and its backward.

    Attributes:
        outputs: the tensors that it returned, detached.
        gradients: of the model's own parameters, by name.
        failed: why it could not be called.
        failed_backward: why its backward could not be run, or that there is nothing to differentiate.
        random: whether it drew random numbers.
        rates: the rates of its dropouts, where they were left out.
    """

    outputs: list[Tensor] = dataclasses.field(default_factory=list)
    gradients: dict[str, Gradient] = dataclasses.field(default_factory=dict)
    failed: str | None = None
    failed_backward: str | None = None
    random: bool = False
    rates: set[float] = dataclasses.field(default_factory=set)


# Training without dropout is run only where random numbers were drawn.
Observation = dict[str, Run]
# How far outputs, by number, and gradients, by name, move with the parameters' last digits.
Wobble = dict[int | str, float]
EVALUATION, TRAINING, WITHOUT_DROPOUT = "evaluation", "training", "training without dropout"


def observe(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
    """What the model does on the example, in each mode.

    Raises:
        MHCError: a converted model refuses a call that its original takes.
    """
    seen = {EVALUATION: _run(model, args, kwargs, training=False), TRAINING: _run(model, args, kwargs, training=True)}
    if seen[TRAINING].random:
        with _WithoutDropout() as left_out:
            seen[WITHOUT_DROPOUT] = _run(model, args, kwargs, training=True)
        seen[WITHOUT_DROPOUT].rates = left_out.rates
    return seen


_UNSEEN = (
    "Code between its layers reads the residual stream in a way that the analysis did not see, or a layer's forward "
    "takes another path when it is captured."
)


def verify(
    model: nn.Module, before: Observation, after: Observation, *, values: bool, again: Callable[[], Observation],
    cause: str | None = None,
) -> tuple[str, ...]:  # fmt: skip
    """What was compared, as sentences for the report.

    Args:
        model: the converted model.
        before: what the original did.
        after: what the converted model does.
        values: whether outputs and gradients have to agree, or only their shapes.
        again: observes the converted model once more. What differs may do so anyway: where a relu is at its kink,
            statistics of a small batch are divided by, or many sharp layers follow a part in fp32, rounding does it.
        cause: what may have made this conversion do something else, for the error, where more than usual is known.

    Raises:
        UnsupportedModelError: the converted model fails where the original does not, or does something else.
    """
    said = []
    bits = _narrowest(model)
    wobbling = _wobbles(model, bits, after, again)
    wobbles: dict[str, Wobble] = {}
    differs = functools.partial(_difference, model, values=values, bits=bits, cause=cause or _UNSEEN)
    for mode in (EVALUATION, TRAINING):
        one, other = before[mode], after[mode]
        difference = differs(mode, one, other)
        if difference is not None and values and _have_one_form(one, other):
            difference = differs(mode, one, other, wobbles.get(mode))
            while difference is not None and (further := next(wobbling, None)) is not None:
                wobbles = further
                difference = differs(mode, one, other, wobbles[mode])
            if difference is None:
                said.append(f"{mode}: {_compared(one, values)}, as closely as they are determined at all")
                continue
        if difference is not None and one.failed is None and other.failed is None and other.failed_backward is None:
            quiet = before.get(WITHOUT_DROPOUT) if mode == TRAINING else None
            if quiet is not None and WITHOUT_DROPOUT in after:
                same = differs(WITHOUT_DROPOUT, quiet, after[WITHOUT_DROPOUT])
                if same is None and quiet.rates == after[WITHOUT_DROPOUT].rates:
                    why = "random numbers are drawn in another order"
                    said.append(f"{WITHOUT_DROPOUT}, since {why}: {_compared(quiet, values)}")
                    continue
        if difference is not None:
            raise UnsupportedModelError(difference)
        said.append(f"{mode}: {_compared(one, values)}")
    return tuple(said)


# -- running -----------------------------------------------------------------------------------------------------------


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Run:
    run = Run()
    with undisturbed(model), torch.inference_mode(False), torch.enable_grad(), _seeded():
        model.train(training)
        state = _random_state()
        try:
            args, kwargs = as_now((args, kwargs))
            result = model(*args, **kwargs)
        except MHCError as error:
            if isinstance(error.__cause__, Exception):  # a capture that failed as the call itself does
                run.failed = _said(error.__cause__)
                return run
            raise  # it says itself what is wrong
        except Exception as error:
            run.failed = _said(error)
            return run
        run.random = _random_state() != state
        tensors = list(_tensors(result))
        run.outputs = [tensor.detach() for tensor in tensors]
        run.gradients, run.failed_backward = _backward(model, tensors)
    return run


def _backward(model: nn.Module, outputs: list[Tensor]) -> tuple[dict[str, Gradient], str | None]:
    """The gradients of the model's own parameters for a fixed weighting of all outputs, or why there are none.

    By `torch.autograd.grad`: nothing is left on the parameters, and hooks on their accumulation do not run.
    """
    sites = {id(p) for module in model.modules() if isinstance(module, HyperConnection) for p in module.parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    own = {name: p for name, p in trained.items() if id(p) not in sites}
    outputs = [t for t in outputs if t.requires_grad and t.is_floating_point()]
    if not own or not outputs:
        return {}, "nothing to differentiate"
    weights = [torch.arange(t.numel(), device=t.device).cos().reshape(t.shape).to(t.dtype) for t in outputs]
    try:
        # The sites' are asked for too: a training step would want them.
        found = torch.autograd.grad(outputs, list(trained.values()), weights, allow_unused=True)
    except Exception as error:
        return {}, _said(error)
    return {name: _sampled(g) for name, g in zip(trained, found) if g is not None and name in own}, None


def _sampled(gradient: Tensor) -> Gradient:
    if gradient.layout is not torch.strided:
        gradient = gradient.to_dense()
    norm = (
        float("nan")
        if gradient.is_meta
        else float(gradient.norm(dtype=torch.promote_types(gradient.dtype, torch.float32)))
    )
    flat = gradient.flatten()
    return Gradient(norm, flat[:: max(1, flat.numel() // _SAMPLE)].clone())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a result: of containers that pytree knows, of mappings, and of dataclasses."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Random state of the comparison's own: not that in which the captures were made. The caller puts it back."""
    torch.manual_seed(_SEED)
    random.seed(_SEED)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        yield
        return
    state = numpy.random.get_state()
    numpy.random.seed(_SEED % 2**32)
    try:
        yield
    finally:
        numpy.random.set_state(state)


def _random_state() -> tuple[Any, ...]:
    torch_state = torch.get_rng_state().tolist()
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    numpy = sys.modules.get("numpy")
    name, keys, *rest = numpy.random.get_state() if numpy else (None, None)
    return torch_state, cuda, random.getstate(), name, None if keys is None else keys.tobytes(), rest


class _WithoutDropout(TorchFunctionMode):
    """Dropout keeps everything; what draws a mask by bernoulli draws ones. `rates` are those left out."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: set[float] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = vocabulary.name_of(func)
        if "dropout" in name and args and isinstance(args[0], Tensor):
            rate, training = (*args[1:3], *[None] * 2)[:2]
            if kwargs.get("training", training) is not False:
                self.rates.add(kwargs.get("p", rate))
            return args[0]
        if name == "scaled_dot_product_attention" and kwargs.get("dropout_p"):
            self.rates.add(kwargs["dropout_p"])
            kwargs["dropout_p"] = 0.0
        if name == "bernoulli_":
            self.rates.update(args[1:], kwargs.values())
            return args[0].fill_(1)
        if name == "bernoulli":
            return torch.ones_like(args[0])
        return func(*args, **kwargs)


# -- comparing ---------------------------------------------------------------------------------------------------------


def _wobbles(
    model: nn.Module, bits: int, seen: Observation, again: Callable[[], Observation]
) -> Iterator[dict[str, Wobble]]:
    """By mode, how far outputs and gradients move when the parameters' last digits do: by once, twice, ..."""
    moved: dict[str, Wobble] = {mode: {} for mode in seen}
    generator = torch.Generator().manual_seed(_SEED)
    # Models in fp64 have parts in fp32.
    size = max(torch.finfo({64: torch.float64, 32: torch.float32, 16: torch.bfloat16}[bits]).eps, _LAST_DIGITS)
    parameters = [p for p in model.parameters() if p.is_floating_point() and not p.is_meta]
    for _ in range(_WOBBLES):
        kept = [p.detach().clone() for p in parameters]
        try:
            with torch.no_grad():
                for p in parameters:
                    noise = torch.rand(p.shape, generator=generator).to(p.device, p.dtype)
                    p.mul_(1 + size * (2 * noise - 1))
            other = again()
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, kept, strict=True):
                    p.copy_(value)
        for mode in moved.keys() & other.keys():
            one, now = seen[mode], other[mode]
            if not _have_one_form(one, now):
                continue
            errors: Wobble = {number: _furthest(*pair) for number, pair in enumerate(zip(one.outputs, now.outputs))}
            for name in one.gradients.keys() & now.gradients.keys():
                errors[name] = _apart(one.gradients[name], now.gradients[name])
            for key, error in errors.items():
                if error < torch.inf:
                    moved[mode][key] = max(moved[mode].get(key, 0.0), error)
        yield moved


def _difference(
    model: nn.Module, mode: str, one: Run, other: Run, wobble: Mapping[int | str, float] | None = None,
    *, values: bool, bits: int, cause: str,
) -> str | None:  # fmt: skip
    """What the converted model does that the original does not; None where nothing can be seen."""
    kind = type(model).__name__
    if one.failed is not None:
        return None  # the original can't be run so
    if other.failed is not None:
        return f"The converted {kind} fails on the example in {mode} ({other.failed}), so nothing was changed. {cause}"
    what = _of_outputs(one.outputs, other.outputs, values, bits, wobble or {})
    if what is not None:
        return (
            f"The converted {kind} returns something else than the original on the example in {mode}: {what}. Nothing "
            f"was changed. {cause}"
        )
    if one.failed_backward is None and other.failed_backward is not None:
        return (
            f"The converted {kind} would fail at its first training step, which was tried in {mode}: "
            f"{other.failed_backward}. Nothing was changed; the original's backward runs."
        )
    what = None
    if values and one.failed_backward is None:
        what = _of_gradients(one.gradients, other.gradients, bits, wobble or {})
    if what is not None:
        return (
            f"The converted {kind} has other gradients than the original on the example in {mode}: {what}. Nothing was "
            "changed. A layer's forward does something with gradients that its capture does not repeat."
        )
    return None


def _have_one_form(one: Run, other: Run) -> bool:
    return [(t.shape, t.dtype) for t in one.outputs] == [(t.shape, t.dtype) for t in other.outputs]


def _furthest(old: Tensor, new: Tensor) -> float:
    """The largest difference of two outputs; infinite where one is no number and the other is one."""
    if old.is_meta or not old.is_floating_point() or not old.numel():
        return 0.0
    old, new = old.double(), new.double()
    error = torch.where((old == new) | (old.isnan() & new.isnan()), torch.zeros_like(old), (old - new).abs())
    return float(error.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _of_outputs(
    before: list[Tensor], after: list[Tensor], values: bool, bits: int, wobble: Mapping[int | str, float]
) -> str | None:
    if len(before) != len(after):
        return f"{len(after)} tensors for {len(before)}"
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        which = f"tensor {number}" if len(before) > 1 else "the result"
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"{which} is {tuple(new.shape)} {new.dtype} for {tuple(old.shape)} {old.dtype}"
        if not values or old.is_meta or not old.is_floating_point() or not old.numel():
            continue
        wide = old.double()
        finite = wide[wide.isfinite()].abs()
        size = 1 + (float(finite.max()) if finite.numel() else 0.0)
        allowed = max(
            _OUTPUTS[_bits(old.dtype, bits)] * size, min(_TIMES * wobble.get(number, 0.0), _UNDETERMINED * size)
        )
        worst = _furthest(old, new)
        if worst > allowed:
            return f"{which} differs by {worst:.2g}, where {allowed:.2g} would be rounding"
    return None


def _of_gradients(
    before: dict[str, Gradient], after: dict[str, Gradient], bits: int, wobble: Mapping[int | str, float]
) -> str | None:
    if before.keys() != after.keys():
        only = sorted(before.keys() ^ after.keys())
        return f"{', '.join(map(repr, only[:3]))} has a gradient in one of them only"
    largest = max((g.norm for g in before.values() if g.norm < torch.inf), default=0.0)
    for name, old in before.items():
        new = after[name]
        if old.sample.is_meta:
            continue
        narrow = _bits(old.sample.dtype, bits)
        allowed = _GRADIENTS[narrow] * old.norm + _FLOOR[narrow] * largest + _TIMES * wobble.get(name, 0.0)
        error = _apart(old, new)
        if math.isnan(old.norm) and math.isnan(new.norm):
            continue
        if not error <= allowed:  # NaN is not
            return f"{name!r}'s differs by {error:.2g} of a norm of {old.norm:.2g}"
    return None


def _apart(one: Gradient, other: Gradient) -> float:
    return max(float((one.sample.double() - other.sample.double()).norm()), abs(one.norm - other.norm))


def _narrowest(model: nn.Module) -> int:
    """Bits of the narrowest floating dtype in the model: how far two orders of its sums may be apart."""
    dtypes = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return min((_bits(dtype, 64) for dtype in dtypes), default=64)


def _bits(dtype: torch.dtype, at_most: int) -> int:
    return max(16, min(torch.finfo(dtype).bits, at_most))


def _compared(run: Run, values: bool) -> str:
    if run.failed is not None:
        return f"not compared, as the original can't be run so ({run.failed})"
    outputs = f"{len(run.outputs)} output{'s' * (len(run.outputs) != 1)}"
    if not values:
        return f"shapes of {outputs}, and that backward runs" if run.failed_backward is None else f"shapes of {outputs}"
    if run.failed_backward is not None:
        return f"{outputs}; no gradients ({run.failed_backward})"
    return f"{outputs}, gradients of {len(run.gradients)} parameters"


def _said(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"

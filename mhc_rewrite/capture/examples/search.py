"""Tries calls of a model until one runs, and learns from each error what the next should have.

Nothing here knows a library: what an argument may look like is the `Supplier`'s to say. What is read from an error is
what a person would read: which argument is missing, which name is None in the line that failed, how many placeholders
the features want.
"""

from __future__ import annotations

import heapq
import itertools
import linecache
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.call import as_now
from mhc_rewrite.capture.state import undisturbed

TRIALS, SECONDS = 32, 15.0


@dataclass(frozen=True)
class Call:
    """One call to try.

    Attributes:
        names: the arguments that are given, in order.
        choices: which of its candidates an argument is, where it is not the first.
        placeholders: how many placeholder tokens each modality has.
    """

    names: tuple[str, ...]
    choices: Mapping[str, int] = field(default_factory=dict)
    placeholders: Mapping[str, int] = field(default_factory=dict)

    def key(self) -> Any:
        return self.names, tuple(sorted(self.choices.items())), tuple(sorted(self.placeholders.items()))


class Supplier(Protocol):
    """What arguments may look like."""

    known: list[str]  # the arguments that the model takes, in the order of its signature

    def candidates(self, name: str, call: Call) -> list[Any]:
        """What `name` may be in a call, likeliest first; empty where nobody knows."""


def search(model: nn.Module, starts: Sequence[Call], supplier: Supplier) -> tuple[dict[str, Any] | None, list[str]]:
    """Keyword arguments of the first call that runs, or None; and the errors of the calls before it."""
    errors: list[str] = []
    for start in starts:
        began = time.monotonic()
        todo: list[tuple[float, int, Call]] = [(0.0, 0, start)]
        seen = {start.key()}
        for _ in range(TRIALS):
            if not todo or time.monotonic() - began > SECONDS:
                break
            cost, _, call = heapq.heappop(todo)
            given = _arguments(call, supplier)
            failure = attempt(model, (), given)
            if failure is None:
                return given, errors
            errors.append(f"{type(failure).__name__}: {failure}")
            further = [*_further(call, given, failure, supplier)]
            failure.__traceback__ = None  # its frames hold the run's tensors
            for step, following in further:
                if following.key() not in seen:
                    seen.add(following.key())
                    heapq.heappush(todo, (cost + step, len(seen), following))
    return None, errors


def attempt(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """Calls the model in evaluation mode, leaving no trace. Returns what went wrong."""
    with undisturbed(model):
        model.eval()
        try:
            model(*as_now(args), **as_now(kwargs))
        except Exception as error:
            return error
    return None


def _arguments(call: Call, supplier: Supplier) -> dict[str, Any]:
    return {name: chosen(supplier, name, call) for name in call.names}


def chosen(supplier: Supplier, name: str, call: Call) -> Any:
    """The candidate that a call gives for an argument; there may be fewer than when it was chosen."""
    candidates = supplier.candidates(name, call)
    return candidates[min(call.choices.get(name, 0), len(candidates) - 1)] if candidates else None


def _further(
    call: Call, given: Mapping[str, Any], error: Exception, supplier: Supplier
) -> Iterator[tuple[float, Call]]:
    """Calls to try next, with what each costs: little for what the error speaks of."""
    if (counted := _wanted_placeholders(call, error)) is not None:
        yield -1.0, counted
        return
    missing = [*_named(str(error), call, supplier), *_none_in_frames(error, call, supplier)]
    for place, name in enumerate(sorted(dict.fromkeys(missing), key=lambda name: name == "attention_mask")):
        yield place - 1.0, replace(call, names=(*call.names, name))
    blamed = _blamed(given, error)
    for name in call.names:
        number = call.choices.get(name, 0) + 1
        if number < len(supplier.candidates(name, call)):
            yield 0.2 if name in blamed else 1.0, replace(call, choices={**call.choices, name: number})


def _blamed(given: Mapping[str, Any], error: Exception) -> set[str]:
    """The arguments that the innermost failing function holds, of those that any does, and those of a named shape."""
    message = re.sub(r"\s", "", str(error))
    shaped = {name: str(list(value.shape)) for name, value in given.items() if isinstance(value, Tensor)}
    named = {name for name, shape in shaped.items() if "," in shape and shape.replace(" ", "") in message}
    held: set[str] = set()
    for frame, _ in _frames(error):
        values = list(frame.f_locals.values())
        mine = {name for name, value in given.items() if any(value is one for one in values)}
        if 0 < len(mine) < len(given):
            held = mine
    return named or held


def _suppliable(name: str, call: Call, supplier: Supplier) -> bool:
    return name not in call.names and name in supplier.known and bool(supplier.candidates(name, call))


def _named(message: str, call: Call, supplier: Supplier) -> list[str]:
    """Arguments that the message names and the call lacks; none where it has one of those named."""
    words = re.findall(r"[A-Za-z_]\w*", message)
    named = [word for word in dict.fromkeys(words) if word in supplier.known]
    missing = [name for name in named if _suppliable(name, call, supplier)]
    # "either input_ids or inputs_embeds": one of them is enough, and the first is the usual one.
    return missing[:1] if " or " in message else missing


def _none_in_frames(error: Exception, call: Call, supplier: Supplier) -> Iterator[str]:
    """Arguments that are None in the lines that failed, innermost first; an inner name may be the end of one."""
    for frame, lines in reversed(_frames(error)):
        text = " ".join(linecache.getline(frame.f_code.co_filename, line) for line in lines)
        for word in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", text)):
            if word in frame.f_locals and frame.f_locals[word] is None:
                for name in supplier.known:
                    if (name == word or name.endswith("_" + word)) and _suppliable(name, call, supplier):
                        yield name
                        break


def _frames(error: Exception) -> list[tuple[FrameType, range]]:
    """The frames that the error came through, outermost first, each with the lines of the call that failed."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code, first = trace.tb_frame.f_code, trace.tb_lineno
        last = first
        if hasattr(code, "co_positions"):  # Python 3.11
            position = next(itertools.islice(code.co_positions(), trace.tb_lasti // 2, None), (None, None))
            last = max(first, position[1] or first)
        frames.append((trace.tb_frame, range(first, min(last, first + 20) + 1)))
        trace = trace.tb_next
    return frames


def _wanted_placeholders(call: Call, error: Exception) -> Call | None:
    """The call with as many placeholder tokens as there are features, where the error counts both."""
    message = str(error)
    found = re.search(r"tokens\W+(\d+)\D+features\D*(\d+)", message)
    if found is None:
        found = re.search(r"tokens \((\d+)\) and features \((\d+)\)", message)
    if found is not None:
        tokens, features = int(found[1]), int(found[2])
    elif found := re.search(r"value tensor of shape \[(\d+),.*indexing result of shape \[(\d+),", message):
        features, tokens = int(found[1]), int(found[2])  # features put in at a mask
    else:
        return None
    kind = re.search(r"image|video|audio", message.lower())
    name = kind[0] if kind else "image"
    for count in (*_counted_features(error, name), features):
        if count != tokens and call.placeholders.get(name) != count:
            return replace(call, placeholders={**call.placeholders, name: count})
    return None


def _counted_features(error: Exception, kind: str) -> Iterator[int]:
    """How many features the function that complained had: some messages give another number than was compared."""
    for frame, _ in _frames(error):
        for name, value in frame.f_locals.items():
            if name == "features" or (kind in name and name.endswith("features")):
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                    yield math.prod(value.shape[:-1])


def random_generator() -> torch.Generator:
    """Numbers of an example's own: the user's random state stays where it is."""
    return torch.Generator().manual_seed(0)

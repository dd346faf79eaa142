"""Tries calls of a model until one runs, and learns from each error what the next should have.

Nothing here knows a library: what an argument may look like is the `Supplier`'s to say. What is read from an error is
what a person would read: which argument is missing, which name is None in the line that failed, how many placeholders
the features want.
"""

from __future__ import annotations

import linecache
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.call import as_now
from mhc_rewrite.capture.state import undisturbed

TRIALS = 48


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

    known: Sequence[str]  # the arguments that the model takes, in the order of its signature

    def candidates(self, name: str, call: Call) -> list[Any]:
        """What `name` may be in a call, likeliest first; empty where nobody knows."""


def search(model: nn.Module, starts: Sequence[Call], supplier: Supplier) -> tuple[dict[str, Any] | None, list[str]]:
    """Keyword arguments of the first call that runs, or None; and the errors of the calls before it."""
    errors: list[str] = []
    for start in starts:
        todo, seen = deque([start]), {start.key()}
        for _ in range(TRIALS):
            if not todo:
                break
            call = todo.popleft()
            given = _arguments(call, supplier)
            if given is None:
                continue
            failure = attempt(model, (), given)
            if failure is None:
                return given, errors
            errors.append(f"{type(failure).__name__}: {failure}")
            mended = [*_mended(call, failure, supplier)]
            other = [*_other(call, supplier)]
            failure.__traceback__ = None  # its frames hold the run's tensors
            for batch, put in ((mended[::-1], todo.appendleft), (other, todo.append)):
                for further in batch:
                    if further.key() not in seen:
                        seen.add(further.key())
                        put(further)
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


def _arguments(call: Call, supplier: Supplier) -> dict[str, Any] | None:
    given = {}
    for name in call.names:
        candidates = supplier.candidates(name, call)
        number = call.choices.get(name, 0)
        if number >= len(candidates):
            return None
        given[name] = candidates[number]
    return given


def _mended(call: Call, error: Exception, supplier: Supplier) -> Iterator[Call]:
    """Calls without what the error names as wrong."""
    if (count := _wanted_placeholders(call, error)) is not None:
        yield count
        return
    missing = [*_named(str(error), call, supplier), *_none_in_frames(error, call, supplier)]
    for name in dict.fromkeys(missing):
        yield replace(call, names=(*call.names, name))


def _other(call: Call, supplier: Supplier) -> Iterator[Call]:
    """The same call with the next candidate of one argument."""
    for name in call.names:
        number = call.choices.get(name, 0) + 1
        if number < len(supplier.candidates(name, call)):
            yield replace(call, choices={**call.choices, name: number})


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
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    for frame, line in reversed(frames):
        text = linecache.getline(frame.f_code.co_filename, line)
        for word in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", text)):
            if word in frame.f_locals and frame.f_locals[word] is None:
                for name in supplier.known:
                    if (name == word or name.endswith("_" + word)) and _suppliable(name, call, supplier):
                        yield name
                        break


def _wanted_placeholders(call: Call, error: Exception) -> Call | None:
    """The call with as many placeholder tokens as there are features, where the error counts both."""
    found = re.search(r"tokens\W+(\d+)\D+features\W+(?:torch\.Size)?\D*(\d+)", str(error))
    if found is None:
        found = re.search(r"tokens \((\d+)\) and features \((\d+)\)", str(error))
    if found is None:
        return None
    tokens, features = int(found[1]), int(found[2])
    kind = re.search(r"image|video|audio", str(error).lower())
    name = kind[0] if kind else "image"
    counted = [*_counted_features(error, name), features]
    for count in counted:
        if count != tokens and call.placeholders.get(name) != count:
            return replace(call, placeholders={**call.placeholders, name: count})
    return None


def _counted_features(error: Exception, kind: str) -> Iterator[int]:
    """How many features the function that complained had: some messages give another number than was compared."""
    trace = error.__traceback__
    while trace is not None:
        for name, value in trace.tb_frame.f_locals.items():
            if (
                name.endswith("features")
                and isinstance(value, Tensor)
                and value.is_floating_point()
                and value.dim() > 1
            ):
                if kind in name or name == "features":
                    yield math.prod(value.shape[:-1])
        trace = trace.tb_next


def random_generator() -> torch.Generator:
    """Numbers of an example's own: the user's random state stays where it is."""
    return torch.Generator().manual_seed(0)

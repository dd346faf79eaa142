"""Tries calls of a model until one runs; `lessons` says what each error teaches.

Nothing here knows a library: what an argument may look like is the `Supplier`'s to say.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from mhc_rewrite.capture.examples.calls import Call, Supplier, chosen
from mhc_rewrite.capture.examples.lessons import further
from mhc_rewrite.capture.state import undisturbed

TRIALS, SECONDS = 32, 12.0  # for each call to begin with; for all of them


def search(
    model: nn.Module, starts: Sequence[Call], supplier: Supplier, trials: int = TRIALS, seconds: float = SECONDS
) -> tuple[dict[str, Any] | None, list[str]]:
    """Keyword arguments of the first call that runs, or None; and the errors of the calls before it."""
    errors: list[str] = []
    end = time.monotonic() + seconds
    for number, start in enumerate(starts):
        began = time.monotonic()
        share = (end - began) / (len(starts) - number)
        todo: list[tuple[float, int, Call]] = [(0.0, 0, start)]
        seen = {start.key()}
        for trial in range(trials):
            if not todo or (trial and time.monotonic() - began > share):
                break
            cost, _, call = heapq.heappop(todo)
            given = _arguments(call, supplier)
            failure = attempt(model, (), given)
            if failure is None:
                return _arguments(call, supplier), errors  # as they were: the model may write into its arguments
            errors.append(f"{type(failure).__name__}: {failure}")
            following = [*further(call, given, failure, supplier)]
            failure.__traceback__ = None  # its frames hold the run's tensors
            for step, next_call in following:
                if next_call.key() not in seen:
                    seen.add(next_call.key())
                    heapq.heappush(todo, (cost + step, len(seen), next_call))
    return None, errors


def attempt(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """Calls the model in evaluation mode, leaving no trace on it. Returns what went wrong."""
    with undisturbed(model):
        model.eval()
        try:
            model(*args, **kwargs)
        except Exception as error:
            return error
    return None


def _arguments(call: Call, supplier: Supplier) -> dict[str, Any]:
    return {name: chosen(supplier, name, call) for name in call.names}

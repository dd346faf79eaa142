"""Captures one module's forward as an FX graph, with its children as leaves.

The forward runs once on values that carry the real tensors of an example beside their graph node (values.py). So
`None`, tuples, dtypes and ranks answer as in life, children are really called, and no Python of theirs has to be
traceable. Sizes stay symbolic: they are nodes, and a branch on one becomes a guard of the captured variant. A branch on
a tensor's content is asked again in the graph (decisions.py). What else Python reads is guarded or refused (watch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.call import CallShape, flatten, replace_leaves
from mhc_rewrite.capture.code import is_machinery
from mhc_rewrite.capture.graph import ModuleGraph
from mhc_rewrite.capture.record import source_line
from mhc_rewrite.capture.tracer import ModuleTracer, capture_error
from mhc_rewrite.errors import CaptureError


def _other_content(bound: dict[str, Any]) -> dict[str, Any]:
    """The same call on other numbers."""

    def other(value: Any) -> Any:
        return value * 0.75 + 0.125 if isinstance(value, Tensor) and value.is_floating_point() else value

    _, leaves = flatten(bound)
    changed = {path: other(value) for path, value in leaves.items()}
    return {name: replace_leaves(value, name, changed) for name, value in bound.items()}


def _alike(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def trace(
    module: nn.Module, name: str, forward: Callable[..., Any], bound: dict[str, Any], inlined: set[nn.Module],
    answers: tuple[Any, ...] = (),
) -> ModuleGraph:  # fmt: skip
    """Captures `forward(module, **bound)`. The caller protects the state (capture.state).

    Args:
        module: the carrier.
        name: its name in the model, for messages.
        forward: its original forward function.
        bound: arguments by name, as `CallShape.bind` gives them.
        inlined: descendants that are captured as part of it.
        answers: to its first questions about the content of tensors.

    Raises:
        CaptureError: the forward does what a graph can't repeat, or failed on the example.
    """
    shape = CallShape.of(forward)
    try:
        tracer = ModuleTracer(module, name, inlined, answers)
        captured = tracer.run(forward, bound, shape)
        while tracer.made.unknown - tracer.made.kinds:
            tracer = ModuleTracer(module, name, inlined, answers, tracer.made.kinds | tracer.made.unknown)
            captured = tracer.run(forward, bound, shape)
        if tracer.strays:
            other = ModuleTracer(module, name, inlined, captured.outcomes, tracer.made.kinds)
            other.run(forward, _other_content(bound), shape)
            if not _alike(tracer.strays, other.strays):
                why = "it makes a tensor by other means than torch's functions, where a graph can't follow"
                raise capture_error(name, module, None, why)
        return captured
    except CaptureError:
        raise
    except (Exception, SystemExit) as error:
        frame, line = error.__traceback__, None
        while frame is not None:
            file = frame.tb_frame.f_code.co_filename
            if not is_machinery(file):
                line = source_line(file, frame.tb_lineno)
            frame = frame.tb_next
        raise capture_error(name, module, line, f"{type(error).__name__}: {error}".strip().splitlines()[0]) from error

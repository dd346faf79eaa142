"""Running a user's model without leaving a trace: random state, buffers, modes and gradients stay as they were.

A capture changes what all threads share: modes and hooks of modules, random state, functions of torch. So it waits
until no other thread is in a call of a converted model, and such calls wait for it.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mhc_rewrite.errors import CaptureError

_PLAIN = (bool, int, float, str, type(None))


# How long a capture waits for other threads, in seconds: one of them may wait for what this one has to do.
PATIENCE = 60.0


class _Calls:
    """Calls of converted models that are under way, in all threads, and the thread that captures."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.running = 0
        self.owner: int | None = None
        self.nested = 0
        self.here = threading.local()  # depth: of calls in this thread

    def depth(self) -> int:
        return getattr(self.here, "depth", 0)

    def is_free(self) -> bool:
        return self.owner in (None, threading.get_ident())


_calls = _Calls()


class under_way:
    """Around a call of a converted module. Gives whether it is the outermost one of its thread."""

    def __enter__(self) -> bool:
        depth = _calls.depth()
        if depth == 0:
            with _calls.changed:
                _calls.changed.wait_for(_calls.is_free)
                _calls.running += 1
        _calls.here.depth = depth + 1
        return depth == 0

    def __exit__(self, *_: object) -> None:
        _calls.here.depth -= 1
        if _calls.here.depth == 0:
            with _calls.changed:
                _calls.running -= 1
                _calls.changed.notify_all()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, no other thread is in a call of a converted model; one that waits here itself does not count.

    Raises:
        CaptureError: the others don't come to an end.
    """
    mine = int(_calls.depth() > 0)
    with _calls.changed:
        if _calls.owner != threading.get_ident():
            _calls.running -= mine
            _calls.changed.notify_all()
            ready = _calls.changed.wait_for(lambda: _calls.owner is None and _calls.running == 0, PATIENCE)
            _calls.running += mine
            if not ready:
                raise CaptureError(
                    "This call has not been seen before, and to capture it other threads have to leave the model, "
                    f"which none did for {PATIENCE:.0f} s. Call the model once in this way in one thread, before "
                    "others use it."
                )
            _calls.owner = threading.get_ident()
        _calls.nested += 1
    try:
        yield
    finally:
        with _calls.changed:
            _calls.nested -= 1
            if _calls.nested == 0:
                _calls.owner = None
                _calls.changed.notify_all()


@contextlib.contextmanager
def undisturbed(*roots: nn.Module) -> Iterator[None]:
    """Inside, modules may be run; outside, children, buffers, plain attributes and the random states are as before.

    No gradients are recorded and nothing is compiled. Caches that are passed in as arguments are the caller's to copy.
    """
    with alone(), _put_back(roots):
        yield


@contextlib.contextmanager
def _put_back(roots: tuple[nn.Module, ...]) -> Iterator[None]:
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    devices = sorted({t.device.index for root in roots for t in root.parameters() if t.device.type == "cuda"})
    buffers = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
    copies = {id(b): b.detach().clone() for _, _, b in buffers}
    attributes = [(m, {n: v for n, v in m.__dict__.items() if isinstance(v, _PLAIN)}) for m in modules]
    trees: list[tuple[Any, dict[str, Any]]] = [
        (held, dict(held)) for m in modules for held in (m._modules, m._parameters)
    ]
    random_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state(legacy=False) if numpy is not None else None
    for owner, name, buffer in buffers:  # writing them back would move their versions, and autograd may have kept them
        owner._buffers[name] = copies[id(buffer)]
    try:
        # What the model has compiled itself, or does on its own (flex_attention), would be compiled with what looks on.
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(random_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for held, before in trees:  # with the attributes that say which child is in use
            if held.keys() != before.keys() or any(held[name] is not child for name, child in before.items()):
                held.clear()
                held.update(before)
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for owner, plain in attributes:  # the mode among them
            owner.__dict__.update(plain)

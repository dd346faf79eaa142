"""Running a user's model without leaving a trace: random state, buffers, modes and gradients stay as they were."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import nn

from mhc_rewrite.torch_private import is_compiled

_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def undisturbed(*roots: nn.Module) -> Iterator[None]:
    """Inside, modules may be run; outside, their buffers, plain attributes and the random states are as before.

    No gradients are recorded and nothing is compiled. Caches that are passed in as arguments are the caller's to copy.
    """
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    devices = sorted({t.device.index for root in roots for t in root.parameters() if t.device.type == "cuda"})
    buffers = [(m, name, b, b.detach().clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    attributes = [(m, {n: v for n, v in m.__dict__.items() if isinstance(v, _PLAIN)}) for m in modules]
    random_state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state(legacy=False) if numpy is not None else None
    try:
        with contextlib.ExitStack() as stack:
            if any(is_compiled(part) for part in modules):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.random.fork_rng(devices=devices))
            stack.enter_context(torch.no_grad())
            yield
    finally:
        random.setstate(random_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for owner, name, buffer, value in buffers:
            if not buffer.is_meta:
                with torch.no_grad():
                    buffer.copy_(value)
            owner._buffers[name] = buffer
        for owner, plain in attributes:  # the mode among them
            owner.__dict__.update(plain)

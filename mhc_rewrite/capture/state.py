"""Running a user's model without leaving a trace: random state, buffers, modes and gradients stay as they were."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, the module may be run; outside, its buffers, plain attributes and the random states are as before.

    No gradients are recorded. Caches that are passed in as arguments are the caller's to copy.
    """
    devices = sorted({t.device.index for t in module.parameters() if t.device.type == "cuda"})
    buffers = [(m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    copies = {id(b): b.detach().clone() for _, _, b in buffers}
    attributes = [(m, {n: v for n, v in m.__dict__.items() if isinstance(v, _PLAIN)}) for m in module.modules()]
    random_state = random.getstate()
    for owner, name, buffer in buffers:  # writing them back would move their versions, and autograd may have kept them
        owner._buffers[name] = copies[id(buffer)]
    try:
        # What the model has compiled itself, or does on its own (flex_attention), would be compiled with what looks on.
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(random_state)
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for owner, plain in attributes:  # the mode among them
            owner.__dict__.update(plain)

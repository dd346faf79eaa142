"""Calls that begin again: where a branch on content goes the other way, another graph of the same call takes over."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.state import version
from mhc_rewrite.errors import UnsupportedModelError


class Beginning:
    """The state of random numbers and of a module's buffers before a call that may have to begin again.

    Attributes:
        written: paths of the buffers that the call is known to change.
    """

    def __init__(self, module: nn.Module, written: tuple[str, ...], leaves: dict[str, Any]) -> None:
        self.devices = sorted({t.device.index for t in leaves.values() if isinstance(t, Tensor) and t.is_cuda})
        self.python = random.getstate()
        self.numpy = numpy.random.get_state(legacy=False) if (numpy := sys.modules.get("numpy")) is not None else None
        self.torch = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.buffers = [
            (part, name, buffer, version(buffer), buffer.clone() if _path(path, name) in written else None)
            for path, part in module.named_modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """
        Raises:
            UnsupportedModelError: something was written that was not when the forward was captured.
        """
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        for part, name, buffer, seen, before in self.buffers:
            part._buffers[name] = buffer
            if before is not None:
                buffer.copy_(before)
            elif version(buffer) != seen:
                raise UnsupportedModelError(
                    f"{type(part).__name__} has written to its buffer {name!r}, which it did not at the conversion, "
                    "before a branch on the content of a tensor went another way than so far. Such a call begins "
                    "again, and that can't be undone. Convert with example inputs for which it is written."
                )


def _path(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name

"""Calls that begin again: where a branch on content goes the other way, another graph of the same call takes over."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn


class Beginning:
    """The state of random numbers and of a module's buffers before a call that may have to begin again."""

    def __init__(self, module: nn.Module, leaves: dict[str, Any]) -> None:
        self.devices = sorted({t.device.index for t in leaves.values() if isinstance(t, Tensor) and t.is_cuda})
        self.python = random.getstate()
        self.numpy = numpy.random.get_state(legacy=False) if (numpy := sys.modules.get("numpy")) is not None else None
        self.torch = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]
        self.buffers = [
            (part, name, buffer, buffer.clone())
            for part in module.modules()
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for device, state in zip(self.devices, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, device)
        for part, name, buffer, before in self.buffers:
            part._buffers[name] = buffer
            # A batch norm's statistics do not count how often they are written to, and a write that changes nothing
            # would make autograd refuse a buffer that it keeps.
            if not torch.equal(buffer, before):
                buffer.copy_(before)

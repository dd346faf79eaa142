"""Models that torch.distributed holds already: their conversion would come too late, and captures need what is sharded.

Whoever shards or wraps a model notes its parameters then. Sites that come later are not among them: nobody would add up
their gradients over the ranks.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mhc_rewrite.errors import CaptureError, UnsupportedModelError
from mhc_rewrite.kernels.sharding import is_dtensor
from mhc_rewrite.torch_private import frees_parameters


def refuse_sharded(model: nn.Module) -> None:
    """Refuses a model that is sharded or wrapped for training on several devices.

    Parameters as DTensors are let pass where their module has a forward of its own instead of its class's, which makes
    of them what it needs (transformers' tensor parallelism). Elsewhere hooks do it, and captures run no hooks.

    Raises:
        UnsupportedModelError: it is.
    """
    for name, module in model.named_modules():
        named = f"{name!r} ({type(module).__name__})" if name else f"This {type(module).__name__}"
        if isinstance(module, DistributedDataParallel):
            raise _too_late(
                f"{named} is wrapped in DistributedDataParallel", "mhcify(model), and DistributedDataParallel(model)"
            )
        if frees_parameters(module):
            raise _too_late(f"{named} is sharded by FSDP", "mhcify(model), and fully_shard(...) as before")
        by_hooks = "forward" not in module.__dict__
        for parameter, value in module.named_parameters(recurse=False):
            if by_hooks and is_dtensor(value):
                where = f"{name}.{parameter}".lstrip(".")
                raise _too_late(
                    f"{where!r} is distributed over several devices (DTensor)",
                    "mhcify(model), and then parallelize_module(model, ...), or whatever distributed it",
                )
    if _held_by_ddp(model):
        raise _too_late(
            f"This {type(model).__name__} is held by a DistributedDataParallel",
            "mhcify(model), and DistributedDataParallel(model)",
        )


def _too_late(what: str, instead: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what}, so sites would come too late: nobody would add up their gradients over the ranks. Convert first, on "
        f"every rank, then shard or wrap: {instead}."
    )


def _held_by_ddp(model: nn.Module) -> bool:
    """Whether a wrapper that is still alive holds the model or a part of it; the model itself does not show it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    mine = set(map(id, model.modules()))

    def found() -> bool:
        wrappers = [held for held in gc.get_objects() if issubclass(type(held), DistributedDataParallel)]
        return any(id(module) in mine for wrapper in wrappers for module in wrapper.modules())

    if not found():
        return False
    gc.collect()  # one that nobody has any longer is no hindrance
    return found()


@contextlib.contextmanager
def gathered(module: nn.Module, name: str) -> Iterator[None]:
    """While a forward is captured, what FSDP2 shards inside it on its own is there: captures run no hooks.

    Raises:
        CaptureError: the capture did, of a module that is sharded.
    """
    inside = [
        child
        for child in module.modules()
        if child is not module and isinstance(child, _Gathers) and frees_parameters(child) and _is_sharded(child)
    ]
    for child in inside:
        child.unshard()
    try:
        yield
    except CaptureError as error:
        if not any(map(frees_parameters, module.modules())):
            raise
        raise CaptureError(
            f"{name or 'The model'!r} is sharded by FSDP and is called in a way that is new to it, which could not be "
            f"captured behind the shards ({str(error).rstrip('.')}). Call the converted model so once before "
            "fully_shard.",
            name,
        ) from error
    finally:
        for child in inside:
            child.reshard()


@runtime_checkable
class _Gathers(Protocol):
    """FSDPModule, which need not be imported where there is none."""

    def unshard(self) -> Any: ...
    def reshard(self) -> Any: ...


def _is_sharded(module: nn.Module) -> bool:
    return any(map(is_dtensor, module.parameters()))

"""Example inputs of timm's and torchvision's models: pictures, of the size that the model was built for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.call import as_now
from mhc_rewrite.capture.examples.calls import random_generator
from mhc_rewrite.capture.examples.search import attempt

_BATCH, _FRAMES, _LARGE = 2, 8, 320


def of_images(model: nn.Module) -> tuple[Any, ...] | None:
    """Positional arguments of a call that runs, the first one tried if none does; None for other models."""
    if not _is_known(model):
        return None
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = weight.device if weight is not None else torch.device("cpu")
    dtype = weight.dtype if weight is not None else torch.float32

    def picture(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random_generator()).to(device, dtype)

    tried = []
    for size in dict.fromkeys(_sizes(model)):
        one = picture(_BATCH, *size)
        for args in ((one,), ([*one.sigmoid()],), (one, one.flip(0))):
            if attempt(model, as_now(args), {}) is None:
                return args
            tried.append(args)
    return tried[0] if tried else None


def _is_known(model: nn.Module) -> bool:
    config = getattr(model, "default_cfg", None)
    of_timm = isinstance(config, Mapping) and "input_size" in config
    return of_timm or type(model).__module__.startswith("torchvision.models")


def _sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Channels and extents that the model was built with, then those of its weights, then usual ones."""
    config = getattr(model, "default_cfg", None) or {}
    stated, *usual = config.get("input_size", (3, 224, 224))
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    for channels in ([first.in_channels] if first is not None else []) + [stated]:
        yield from _of_channels(model, channels, usual, isinstance(first, nn.Conv3d))


def _of_channels(model: nn.Module, channels: int, usual: list[int], clips: bool) -> Iterator[tuple[int, ...]]:
    if clips:
        yield channels, _FRAMES, 32, 32  # what takes any extent: convolutions over time are slow, in fp64 above all
        yield channels, _FRAMES, 112, 112
        yield channels, 2 * _FRAMES, 224, 224
    built = [getattr(owner, name, None) for owner in (getattr(model, "patch_embed", None), model)
             for name in ("img_size", "image_size", "input_size")]  # fmt: skip
    built += [size for m in model.modules() if (size := getattr(m, "img_size", None)) is not None][:1]
    for size in built:
        if isinstance(size, int):
            yield channels, size, size
        elif isinstance(size, (tuple, list)) and len(size) == 2 and all(isinstance(extent, int) for extent in size):
            yield channels, *size
    if usual[0] > _LARGE:
        yield channels, _LARGE, _LARGE
    yield channels, *usual
    for extent in (64, 224, 256, 299):
        yield channels, extent, extent

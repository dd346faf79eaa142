"""What a user would not see: that something made before the conversion knows nothing of the sites."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mhc_rewrite.sites.hyper_connection import HyperConnection


def warn_of_what_came_before(model: nn.Module) -> None:
    """Warns where an optimizer or an adapter was there first: it would leave the sites out without a word."""
    own = {id(p) for p in model.parameters()}
    found = _optimizers_of(own)
    if found:
        gc.collect()  # of those that nobody holds any more
        found = _optimizers_of(own)
    for name in found:
        warnings.warn(
            f"{name} was made before the conversion, so it will not train the sites. Make it again, of "
            "mhc_rewrite.parameter_groups(model, weight_decay=...).",
            stacklevel=3,
        )
    sites = [module for module in model.modules() if isinstance(module, HyperConnection)]
    adapted = any(type(module).__module__.startswith("peft.") for module in model.modules())
    if adapted and any(p.requires_grad for module in sites for p in module.parameters()):
        warnings.warn(
            "The model has an adapter of PEFT. The sites are trained beside it, and the adapter's save_pretrained "
            "leaves them out. To have them in it, convert first and then make the adapter with "
            "modules_to_save=mhc_rewrite.modules_to_save(model).",
            stacklevel=3,
        )


def _optimizers_of(parameters: set[int]) -> list[str]:
    """The class names of the optimizers that hold any of these. Nothing leads from a parameter to its optimizer."""
    kinds, objects = set(_subclasses(torch.optim.Optimizer)), gc.get_objects()
    if kinds.isdisjoint(map(type, objects)):  # a process has a million objects: nothing is quicker
        return []
    return [
        type(found).__name__
        for found in objects
        if type(found) in kinds  # isinstance would ask the object, which may answer oddly
        and any(id(p) in parameters for group in found.param_groups for p in group["params"])
    ]


def _subclasses(kind: type[Any]) -> Iterator[type]:
    yield kind
    for below in type.__subclasses__(kind):
        yield from _subclasses(below)

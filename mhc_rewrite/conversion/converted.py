"""Finds converted models inside wrappers, and the sites that they call.

A wrapper (PEFT, torch.compile, DDP, Lightning, one's own) holds the converted model somewhere below it, and may hold a
site in something that hands calls on (PEFT's `modules_to_save`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from mhc_rewrite.conversion.naming import CarrierWiring
from mhc_rewrite.errors import MHCError
from mhc_rewrite.plans import RewritePlan
from mhc_rewrite.sites.hyper_connection import HyperConnection

_CONVERSION = "_mhc_conversion"
_SITE_NAME = re.compile(r"(^|\.)mhc_\d+$")


@dataclass(frozen=True)
class Conversion:
    """What a converted model knows of its conversion.

    Attributes:
        plan: what was done.
        carriers: as in `Analysis`; with it the conversion can be done again without an example.
        compared: what was held against the original, for the report.
    """

    plan: RewritePlan
    carriers: dict[str, CarrierWiring]
    compared: tuple[str, ...] = ()


def remember(model: nn.Module, conversion: Conversion) -> None:
    """Notes on a model how it was converted."""
    model.__dict__[_CONVERSION] = conversion


def forget(model: nn.Module) -> None:
    """The inverse of `remember`."""
    del model.__dict__[_CONVERSION]


def find_converted(model: nn.Module) -> tuple[str, nn.Module, Conversion]:
    """The converted model in `model`, or below it: its name there, itself, its conversion.

    Raises:
        MHCError: there is none, or there are several.
    """
    found = [(name, m, m.__dict__[_CONVERSION]) for name, m in model.named_modules() if _CONVERSION in m.__dict__]
    kind = type(model).__name__
    if not found:
        raise MHCError(f"{kind} is not converted; mhcify(model) does that.")
    if len(found) > 1:
        names = ", ".join(repr(name) for name, *_ in found)
        raise MHCError(f"{kind} holds several converted models ({names}): name one, as in model.get_submodule(name).")
    return found[0]


def sites_in_use(model: nn.Module) -> dict[str, HyperConnection]:
    """The sites that calls reach, by the name under which the model's parameters have them."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for name, module in model.named_modules():
        if _SITE_NAME.search(name):
            site = called_site(module)
            if site is not None:
                found[names[id(site)]] = site
    return found


def site_at(model: nn.Module, name: str) -> HyperConnection:
    """The site of a converted model by its name in the plan.

    Raises:
        MHCError: something else stands there.
    """
    site = called_site(model.get_submodule(name))
    if site is None:
        raise MHCError(f"{name!r} is no site any more: {type(model.get_submodule(name)).__name__} stands there.")
    return site


def called_site(module: nn.Module) -> HyperConnection | None:
    """The site that answers where `module` stands: itself, or the one that a wrapper hands calls on to."""
    site = getattr(getattr(module, "pre", None), "__self__", None)
    return site if isinstance(site, HyperConnection) else None

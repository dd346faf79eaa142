"""Puts rewritten forwards into a live model and takes them out again.

A module that plays a part gets a subclass of its own class with the same name, whose forward asks the module's `Role`.
So the model stays the model: `isinstance`, signatures, hooks, `state_dict` names, copies and pickles keep working.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import itertools
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mhc_rewrite.capture.call import CallShape
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.conversion.analysis import Analysis
from mhc_rewrite.conversion.captures import CallKind, Captured
from mhc_rewrite.conversion.converted import called_site
from mhc_rewrite.conversion.roles import CarrierRole, Rewrites, Role, Scope
from mhc_rewrite.errors import CaptureError, StreamError, UnsupportedModelError
from mhc_rewrite.plans import ResidualSite, ResidualStream
from mhc_rewrite.sites.hyper_connection import HyperConnection

_ROLE = "_mhc_role"
# Attributes that a converted module needs to have. torch's encoder would pack a padded batch into a nested tensor for
# its fused layers, which a rewritten layer can't take.
_SETTINGS: dict[type, dict[str, Any]] = {nn.TransformerEncoder: {"use_nested_tensor": False}}


# -- classes ---------------------------------------------------------------------------------------------------------


@functools.cache
def converted_class(base: Any) -> type[nn.Module]:
    """A subclass of `base` with the same name, whose forward asks the module's role."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        role = self.__dict__.get(_ROLE)  # a slice of a Sequential has the class, but no role
        if role is None:
            return original(self, *args, **kwargs)
        return role.run(self, original, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    namespace = {
        "forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "__qualname__": base.__qualname__,
        "__doc__": base.__doc__, "_mhc_base": base,
    }  # fmt: skip
    return type(base.__name__, (base,), namespace)


def _rebuild(base: Any) -> nn.Module:
    cls = converted_class(base)
    _tell_transformers([base])
    return cls.__new__(cls)


def _tell_transformers(kinds: Iterable[type]) -> None:
    """Lets transformers know that there are converted models, if any of these classes is of one of its models.

    Its own `save_pretrained` would write a folder that loads as the original, without a word. What teaches it better is
    above this room and imports transformers: hence by name, and only where transformers is there already.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is not None and any(issubclass(kind, modeling.PreTrainedModel) for kind in kinds):
        importlib.import_module("mhc_rewrite.hf")


def role_of(module: nn.Module) -> Role | None:
    """A converted module's role."""
    return module.__dict__.get(_ROLE)


def is_converted(model: nn.Module) -> bool:
    """Whether any module of the model has a role."""
    return any(role_of(module) is not None for module in model.modules())


# -- putting in and taking out ---------------------------------------------------------------------------------------


def install(model: nn.Module, analysis: Analysis) -> None:
    """Converts the model in place; whatever fails, the model is as it was.

    Raises:
        UnsupportedModelError: a site would have to live where it can't.
    """
    added: list[tuple[nn.Module, str]] = []
    try:
        for stream in analysis.plan.streams:
            config = _of_stream(analysis.plan.config, stream)
            for index, site in enumerate(_each_site(stream)):
                if not site.excluded:
                    _add_site(model, site, index, config)
                    added.append((model.get_submodule(site.holder), site.name.rpartition(".")[2]))
        roles = _roles(model, analysis)
        for name, role in roles.items():
            module = model.get_submodule(name)
            for base, settings in _SETTINGS.items():
                for attribute, value in settings.items() if isinstance(module, base) else ():
                    role.settings[attribute] = getattr(module, attribute)
                    setattr(module, attribute, value)
            module.__dict__[_ROLE] = role
            kind: Any = type(module)
            module.__class__ = converted_class(kind)
        _tell_transformers(map(type, model.modules()))
    except BaseException:
        _restore(model)
        for holder, name in added:
            holder._modules.pop(name, None)
        raise


def uninstall(model: nn.Module) -> None:
    """Takes sites and roles out again."""
    _restore(model)
    for module in model.modules():
        for name, child in list(module._modules.items()):
            # A wrapper may stand around a site (PEFT's modules_to_save): it goes with it.
            if name.startswith("mhc_") and child is not None and called_site(child) is not None:
                del module._modules[name]


def _restore(model: nn.Module) -> None:
    for module in model.modules():
        role = role_of(module)
        if role is not None:
            for attribute, value in role.settings.items():
                setattr(module, attribute, value)
            del module.__dict__[_ROLE]
            module.__class__ = type(module)._mhc_base  # type: ignore[attr-defined]


def _each_site(stream: ResidualStream) -> Iterable[ResidualSite]:
    return dict.fromkeys(stream.sites)


def _of_stream(config: MHCConfig, stream: ResidualStream) -> MHCConfig:
    """With a number of sites in place of `recompute="auto"`."""
    if config.recompute != "auto":
        return config
    from mhc_rewrite.cost import best_segment  # sympy takes its time

    calls = sum(not site.excluded for site in stream.sites)
    return dataclasses.replace(config, recompute=best_segment(config.n_streams, max(1, calls)))


def _add_site(model: nn.Module, site: ResidualSite, index: int, config: MHCConfig) -> None:
    holder = model.get_submodule(site.holder)
    name = site.name.rpartition(".")[2]
    if isinstance(holder, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise UnsupportedModelError(
            f"{site.holder or 'The model'!r} holds a residual add ({site.source}) and is a {type(holder).__name__}, "
            "whose children are its forward: a site can't be one of them. Derive it from nn.Module."
        )
    if isinstance(getattr(holder, name, None), HyperConnection):  # of a stream before
        raise UnsupportedModelError(
            f"{site.holder or 'The model'!r} runs in two residual streams, since one ends between two of its calls. "
            f"A site ({site.source}) belongs to one stream: give each stream a module of its own, or leave this one "
            f"as it is, with exclude={(site.holder or site.name,)}."
        )
    if hasattr(holder, name):
        raise UnsupportedModelError(f"{site.holder or 'The model'!r} has an attribute {name!r} of its own; rename it.")
    tensor = next(itertools.chain(holder.parameters(), model.parameters()), None)
    double = site.dtype == "torch.float64"
    with torch.inference_mode(False):  # the mode of the conversion is not that of the model
        connection = HyperConnection(
            site.width, config, index=index, channel_dim=site.channel_dim,
            device=tensor.device if tensor is not None else None, dtype=torch.float64 if double else torch.float32,
        )  # fmt: skip
    holder.add_module(name, connection.train(holder.training))


def _roles(model: nn.Module, analysis: Analysis) -> dict[str, Role]:
    config = analysis.plan.config
    scopes = [
        Scope(number, stream, config.collapse, may_end_early=number in analysis.may_end_early)
        for number, stream in enumerate(analysis.plan.streams)
    ]
    roles: dict[str, Role] = {}

    def role(name: str) -> Role:
        return roles.setdefault(name, Role(name))

    for name, wiring in analysis.carriers.items():
        inlined = tuple(sorted(part[len(name) :].lstrip(".") for part in wiring.inlined))
        mine = {number: scopes[number] for number in wiring.leaves}
        shape = CallShape.of(type(model.get_submodule(name)).forward)
        role(name).carrier = CarrierRole(name, config, wiring, inlined, shape, mine)
    for scope in scopes:
        top = scope.stream.scope
        if any(analysis.carriers[name].leaves[scope.number] != [False] for name in _carriers_of(scope.stream)):
            role(top).begins.append(scope)
            parts = top.split(".") if top else []
            for length in range(len(parts), -1, -1):
                role(".".join(parts[:length])).outer.append(scope)
            for reader in analysis.readers[scope.number]:
                role(reader).reads.append(scope)
    rewrites: Rewrites = {}
    for kind, captured in analysis.captures.by_kind.items():
        carrier = roles[kind.module].carrier if kind.module in roles else None
        if carrier is not None and not isinstance(captured, CaptureError):
            module = model.get_submodule(kind.module)
            _first_variants(module, carrier, kind, analysis.captures.leaves[kind], captured, rewrites)
    return roles


def _carriers_of(stream: ResidualStream) -> list[str]:
    return list(dict.fromkeys(site.carrier for site in stream.sites))


def _first_variants(
    module: nn.Module, carrier: CarrierRole, kind: CallKind, leaves: dict[str, Any], captured: Captured,
    rewrites: Rewrites,
) -> None:  # fmt: skip
    """The variants that the example's calls need: streams arrive but at the first carrier, go on but at the last."""
    numbers = list(carrier.wiring.leaves)
    ways = set()
    for position in range(max(len(goes_on) for goes_on in carrier.wiring.leaves.values())):
        leaving = tuple(
            n for n in numbers if carrier.wiring.leaves[n][min(position, len(carrier.wiring.leaves[n]) - 1)]
        )
        arriving = tuple(
            number for _, number, may_arrive in carrier.wiring.entries.values()
            if may_arrive and not (position == 0 and _first_carrier(carrier.scopes[number].stream) == carrier.name)
        )  # fmt: skip
        ways.add((arriving, leaving))
    for arriving, leaving in ways:
        with contextlib.suppress(
            StreamError
        ):  # a further call of ours may show other adds; a user's such call will say so
            carrier.add(module, kind.training, kind.key, leaves, *captured, arriving, leaving, rewrites)


def _first_carrier(stream: ResidualStream) -> str:
    return stream.sites[0].carrier

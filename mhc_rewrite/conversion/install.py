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
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mhc_rewrite.capture.call import CallShape
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.conversion.analysis import Analysis
from mhc_rewrite.conversion.captures import CallKind, Captured
from mhc_rewrite.conversion.converted import called_site
from mhc_rewrite.conversion.hooks import OnTheTrunk, adapt, give_back
from mhc_rewrite.conversion.roles import CarrierRole, Rewrites, Role, meet_dynamo
from mhc_rewrite.conversion.whole import ROLE
from mhc_rewrite.errors import CaptureError, StreamError, UnsupportedModelError
from mhc_rewrite.plans import ResidualSite, ResidualStream, RewritePlan
from mhc_rewrite.sites.hyper_connection import HyperConnection
from mhc_rewrite.sites.state import plain
from mhc_rewrite.torch_private import scripted_calls_take, shards_take

# Attributes that a converted module needs to have. torch's encoder would pack a padded batch into a nested tensor for
# its fused layers, which a rewritten layer can't take.
_SETTINGS: dict[type, dict[str, Any]] = {nn.TransformerEncoder: {"use_nested_tensor": False}}


# -- classes ---------------------------------------------------------------------------------------------------------


# Containers that hold an add in a forward of their own: their sites are children, and none of what they contain.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_CONTENTS = ("__iter__", "__len__", "__getitem__", "__contains__", "__reversed__", "keys", "values", "items")


@functools.cache
def converted_class(base: Any, hides_sites: bool = False) -> type[nn.Module]:
    """A subclass of `base` with the same name, whose forward asks the module's role.

    Args:
        base: the module's own class.
        hides_sites: a container's: what iterates, counts or indexes it does not see the sites among its children.
    """
    original = base.forward
    made: Any = None
    meet_dynamo()
    scripted_calls_take(plain)  # code between the layers may be TorchScript's
    shards_take(plain)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        role = self.__dict__.get(ROLE)  # a slice of a Sequential has the class, but no role
        if role is None or type(self)._mhc_forward is not made._mhc_forward:  # of a conversion before
            return original(self, *args, **kwargs)
        return role.run(self, original, args, kwargs)

    def full(self: Any, hook: Callable[..., Any], prepend: bool = False) -> Any:
        return base.register_full_backward_hook(self, OnTheTrunk(hook), prepend)

    def full_pre(self: Any, hook: Callable[..., Any], prepend: bool = False) -> Any:
        return base.register_full_backward_pre_hook(self, OnTheTrunk(hook), prepend)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _rebuild, (base, hides_sites), state

    contents = [name for name in _CONTENTS if hides_sites and hasattr(base, name)]
    namespace = {
        **{name: _contents(base, name) for name in contents},
        "forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "__qualname__": base.__qualname__,
        "__doc__": base.__doc__, "_mhc_base": base, "register_full_backward_hook": full,
        "register_full_backward_pre_hook": full_pre,
    }  # fmt: skip
    made = type(base.__name__, (base,), namespace)
    made._mhc_forward = made.forward  # transformers wraps the forward of every subclass of a layer
    return made


def _contents(base: Any, name: str) -> Any:
    """A container's method, run on one like it without sites."""
    original = getattr(base, name)

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any) -> Any:
        like = base.__new__(base)
        modules = {key: child for key, child in self._modules.items() if not isinstance(child, HyperConnection)}
        like.__dict__.update(self.__dict__, _modules=modules)
        return original(like, *args)

    return method


def _rebuild(base: Any, hides_sites: bool) -> nn.Module:
    cls = converted_class(base, hides_sites)
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
    return module.__dict__.get(ROLE)


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that a module had before the conversion, as a function of the module."""
    kind: Any = type(module)
    original: Callable[..., Any] = getattr(kind, "_mhc_base", kind).forward
    return original


def lost(model: nn.Module) -> list[str]:
    """Modules whose class got another forward since it was converted, by name: fx's graph modules do so."""
    kinds = {name: type(module) for name, module in model.named_modules() if role_of(module) is not None}
    return [name for name, kind in kinds.items() if kind.forward is not kind._mhc_forward]


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
            configs = _configs(analysis.plan, stream)
            for index, site in enumerate(_each_site(stream)):
                if not site.excluded:
                    _add_site(model, site, index, configs[site], analysis.plan)
                    added.append((model.get_submodule(site.holder), site.name.rpartition(".")[2]))
        roles = _roles(model, analysis)
        for name, role in roles.items():
            module = model.get_submodule(name)
            kind: Any = type(module)
            converted = converted_class(kind, _contains_a_site(module))
            for base, settings in _SETTINGS.items():
                for attribute, value in settings.items() if isinstance(module, base) else ():
                    role.settings[attribute] = getattr(module, attribute)
                    setattr(module, attribute, value)
            module.__class__ = converted
            module.__dict__[ROLE] = role
            adapt(module)
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
            give_back(module)
            del module.__dict__[ROLE]
            # A class that was made of the converted one later (FSDP's, a parametrization's) stays, as without a role
            # the forward is the original's.
            if "_mhc_base" in type(module).__dict__:
                module.__class__ = type(module)._mhc_base  # type: ignore[attr-defined]


def _contains_a_site(module: nn.Module) -> bool:
    children = module._modules.values()
    return isinstance(module, _CONTAINERS) and any(isinstance(child, HyperConnection) for child in children)


def _each_site(stream: ResidualStream) -> Iterable[ResidualSite]:
    return dict.fromkeys(stream.sites)


def _configs(plan: RewritePlan, stream: ResidualStream) -> dict[ResidualSite, MHCConfig]:
    """The options as the sites of a stream take them: with a start that fits, n of their stretch, and a number in place
    of `recompute="auto"`."""
    config = dataclasses.replace(plan.config, init=stream.start(plan.config.init))
    made: dict[ResidualSite, MHCConfig] = {}
    for stretch in stream.stretches:
        n, recompute = plan.streams_at(stretch[0]), config.recompute
        if recompute == "auto":
            from mhc_rewrite.cost import best_segment  # sympy takes its time

            recompute = best_segment(n, len(stretch))
        for site in stretch:  # one that is called in several stretches takes the options of the first
            made.setdefault(site, dataclasses.replace(config, n_streams=n, recompute=recompute))
    return made


def _add_site(model: nn.Module, site: ResidualSite, index: int, config: MHCConfig, plan: RewritePlan) -> None:
    holder = model.get_submodule(site.holder)
    name = site.name.rpartition(".")[2]
    out = site.holder or site.name
    if isinstance(getattr(holder, name, None), HyperConnection):  # of a stream before
        raise UnsupportedModelError(
            f"{site.holder or 'The model'!r} runs in two residual streams, since one ends between two of its calls. "
            f"A site ({site.source}) belongs to one stream: give each stream a module of its own"
            + (f", or leave this one as it is, with exclude={(out,)}." if _has_sites_without(plan, out) else ".")
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


def _has_sites_without(plan: RewritePlan, out: str) -> bool:
    """Whether a stream keeps enough sites where a module or a site is excluded."""
    left = [
        {s.name for s in stream.sites if not s.excluded and out not in (s.name, s.holder, s.carrier)}
        for stream in plan.streams
    ]
    return any(len(names) >= plan.config.min_sites for names in left)


def _roles(model: nn.Module, analysis: Analysis) -> dict[str, Role]:
    config, streams = analysis.plan.config, analysis.plan.streams
    roles = {name: Role(name, reads=True) for name in _readers(model, set(analysis.carriers))}
    roles[""] = Role("", reads=True, parts=tuple(analysis.carriers))
    for name, module in model.named_modules():
        if isinstance(module, tuple(_SETTINGS)) and any(_inside(carrier, name) for carrier in analysis.carriers):
            roles.setdefault(name, Role(name))
    for name, wiring in analysis.carriers.items():
        inlined = tuple(sorted(part[len(name) :].lstrip(".") for part in wiring.inlined))
        channel_dims = {number: streams[number].sites[0].channel_dim for number in wiring.leaves}
        shape = CallShape.of(type(model.get_submodule(name)).forward)
        roles.setdefault(name, Role(name)).carrier = CarrierRole(name, config, wiring, inlined, shape, channel_dims)
    for holder in dict.fromkeys(site.holder for site in analysis.plan.sites):
        if _contains_a_site(model.get_submodule(holder)):
            roles.setdefault(holder, Role(holder))
    rewrites: Rewrites = {}
    for kind, captured in analysis.captures.by_kind.items():
        carrier = roles[kind.module].carrier if kind.module in roles else None
        if carrier is not None and not isinstance(captured, CaptureError):
            module = model.get_submodule(kind.module)
            leaves, first = analysis.captures.leaves[kind], [stream.sites[0].carrier for stream in streams]
            _first_variants(module, carrier, kind, leaves, captured, first, rewrites)
    return roles


def _readers(model: nn.Module, carriers: set[str]) -> list[str]:
    """The modules that run no part of a stream, and are called by modules that do: a state never gets into them."""
    inside = {name for name, _ in model.named_modules() if any(_inside(carrier, name) for carrier in carriers)}
    above = {name for name in inside if any(carrier != name and _inside(carrier, name) for carrier in carriers)}
    return [
        name for name, module in model.named_modules()
        if name and name not in inside and name.rpartition(".")[0] in above and not isinstance(module, HyperConnection)
    ]  # fmt: skip


def _inside(name: str, parent: str) -> bool:
    return parent in ("", name) or name.startswith(parent + ".")


def _first_variants(
    module: nn.Module, carrier: CarrierRole, kind: CallKind, leaves: dict[str, Any], captured: Captured,
    first: list[str], rewrites: Rewrites,
) -> None:  # fmt: skip
    """The variants that the example's calls need: streams arrive but at the first carrier, go on but at the last."""
    ways = set()
    for turn in range(max(len(goes_on) for goes_on in carrier.wiring.leaves.values())):
        arriving = tuple(
            number for _, number in carrier.wiring.entries.values() if turn or first[number] != carrier.name
        )  # fmt: skip
        ways.add((arriving, carrier.leaving(dict.fromkeys(carrier.wiring.leaves, turn))))
    for arriving, leaving in ways:
        with contextlib.suppress(
            StreamError
        ):  # a further call of ours may show other adds; a user's such call will say so
            carrier.add(module, kind.training, kind.key, leaves, *captured, arriving, leaving, rewrites)

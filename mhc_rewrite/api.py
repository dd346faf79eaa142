"""The one line, and what goes with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mhc_rewrite.capture.call import describe
from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.conversion.analysis import Analysis, analyse, unheard
from mhc_rewrite.conversion.converted import Conversion, find_converted, forget, remember, site_at, sites_in_use
from mhc_rewrite.conversion.install import install, is_converted, lost, role_of, uninstall
from mhc_rewrite.conversion.listing import list_graph
from mhc_rewrite.conversion.notices import warn_of_what_came_before
from mhc_rewrite.conversion.sharded import refuse_sharded
from mhc_rewrite.conversion.verify import observe, verify
from mhc_rewrite.errors import AlreadyConvertedError, ConfigError, UnsupportedModelError
from mhc_rewrite.plans import ListedGraph, ResidualSite, RewritePlan, RewriteReport
from mhc_rewrite.sites.hyper_connection import HyperConnection

log = logging.getLogger(__name__)


def plan(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    config: MHCConfig | None = None,
    filter_fn: Callable[[ResidualSite], bool] | None = None,
    **fields: Any,
) -> RewritePlan:
    """What `mhcify` would do with the same arguments. Changes nothing.

    Raises:
        MHCError: as `mhcify`.
    """
    return _analyse(model, example_inputs, config, filter_fn, fields)[2].plan


def mhcify(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
    *,
    config: MHCConfig | None = None,
    filter_fn: Callable[[ResidualSite], bool] | None = None,
    **fields: Any,
) -> nn.Module:
    """Rewrites the model's residual streams into n-stream manifold-constrained hyper-connections, in place.

    Args:
        model: any module with residual adds `x + F(x)`.
        example_inputs: keyword arguments as a dict, or positional ones as a tuple, for one call of the model. May be
            left out for models of transformers, timm and torchvision and for torch's own transformer stacks.
        config: the options; or give them as fields: n_streams=4, init="preserve", include=(), exclude=(), ...
        filter_fn: which sites to rewrite, beside include and exclude; gets a `ResidualSite`.

    Returns:
        The same model. With init="preserve" it computes what it did before.

    Raises:
        ConfigError: an option can't be used, or a pattern matches nothing.
        ExampleInputsError: no example inputs, or wrong ones.
        AlreadyConvertedError: the model was converted before, or has hyper-connections of its own.
        CaptureError: a module with residual adds can't be captured as a graph.
        NoResidualError: there is no residual stream to rewrite.
        UnsupportedModelError: TorchScript, a trunk whose dtype or layout has no streams, or a model that is sharded or
            wrapped for several devices already.
    """
    args, kwargs, analysis = _analyse(model, example_inputs, config, filter_fn, fields)
    chosen = analysis.plan.config
    if chosen.n_streams == 1:
        warnings.warn("n_streams=1 is the model as it is: nothing was rewritten.", stacklevel=2)
        return model
    if chosen.init == "paper" and chosen.connection != "hc":
        warnings.warn(
            f"init='paper' starts sites as the source of {chosen.connection!r} does, and the function of a pretrained "
            "model is lost (mHC's begin with an almost uniform H_res, which averages the streams away). "
            "init='preserve' keeps it.",
            stacklevel=2,
        )
    before = observe(model, args, kwargs)
    install(model, analysis)
    try:
        after = observe(model, args, kwargs)
        for name in lost(model):
            kind = type(model.get_submodule(name)).__name__
            raise UnsupportedModelError(
                f"{name or 'The model'!r} ({kind}) sets its forward anew when its mode changes, as graph modules with "
                "a graph for each mode do, and would lose the conversion. Convert the model that it was made from, and "
                "make it from that."
            )
        compared = verify(
            model,
            before,
            after,
            values=chosen.init != "paper",
            again=lambda: observe(model, args, kwargs),
            cause=unheard(model, analysis.carriers),
        )
    except BaseException:
        uninstall(model)
        raise
    remember(model, Conversion(analysis.plan, analysis.carriers, compared))
    warn_of_what_came_before(model)
    log.info("%s: %d sites in %d streams", type(model).__name__, len(analysis.plan.sites), len(analysis.plan.streams))
    return model


def unmhcify(model: nn.Module) -> nn.Module:
    """Gives the original model back, in place, inside whatever wraps it; the sites and what they learned are dropped.

    A warning says so where they have learned something.

    Raises:
        MHCError: the model is not converted.
    """
    _, converted, _ = find_converted(model)
    sites = list(sites_in_use(converted).values())
    learned = [site for site in sites if site.has_learned()]
    if learned:
        count = sum(p.numel() for site in sites for p in site.parameters())
        warnings.warn(
            f"{len(learned)} of {len(sites)} sites of {type(converted).__name__} have learned: their {count:,} "
            "parameters are dropped, and what comes back is the model's own weights with plain residuals. "
            "mhc_rewrite.save_sites(model, folder) before unmhcify keeps them.",
            stacklevel=2,
        )
    uninstall(converted)
    forget(converted)
    return model


def report(model: nn.Module) -> RewriteReport:
    """What the conversion did, as data that prints as a table; looks inside wrappers.

    Raises:
        MHCError: the model is not converted.
    """
    _, model, conversion = find_converted(model)
    made = conversion.plan
    sites = {id(p) for module in model.modules() if isinstance(module, HyperConnection) for p in module.parameters()}
    own = sum(p.numel() for p in model.parameters() if id(p) not in sites)
    added = tuple(
        sum(p.numel() for name in dict.fromkeys(s.name for s in stream.sites if not s.excluded)
            for p in site_at(model, name).parameters())
        for stream in made.streams
    )  # fmt: skip
    calls = {
        role.name: tuple(dict.fromkeys(describe(key[1], key[0]) for key in role.carrier.variants))
        for role in map(role_of, model.modules())
        if role is not None and role.carrier is not None
    }
    return RewriteReport(made, own, added, calls, conversion.compared)


def graphs(model: nn.Module) -> list[ListedGraph]:
    """The carriers' forwards before and after the rewrite, as captured in evaluation mode, in execution order.

    Raises:
        MHCError: the model is not converted.
    """
    _, model, conversion = find_converted(model)
    made = conversion.plan
    listed = []
    for name in dict.fromkeys(site.carrier for stream in made.streams for site in stream.sites):
        module = model.get_submodule(name)
        role = role_of(module)
        if role is None or role.carrier is None or not role.carrier.variants:
            continue
        (training, key, *_), variants = next(iter(role.carrier.variants.items()))
        listed.append(list_graph(name, type(module).__name__, describe(key, training), variants[0]))
    return listed


def _analyse(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None,
    config: MHCConfig | None,
    filter_fn: Callable[[ResidualSite], bool] | None,
    fields: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any], Analysis]:
    if config is not None and fields:
        raise ConfigError(f"Give either config= or fields, not both (got config and {', '.join(fields)}).")
    if config is not None and not isinstance(config, MHCConfig):
        raise ConfigError(f"config= takes an MHCConfig, not {type(config).__name__}; MHCConfig.from_dict makes one.")
    chosen = config or MHCConfig.from_fields(fields)
    _check_model(model)
    args, kwargs = example_call(model, example_inputs)
    return args, kwargs, analyse(model, args, kwargs, chosen, filter_fn)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"mhcify takes an nn.Module, not {type(model).__name__}.")
    if is_converted(model):
        raise AlreadyConvertedError(
            f"{type(model).__name__} is converted already. unmhcify(model) gives the original back, to convert it anew."
        )
    refuse_sharded(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{name or 'The model'!r} is a TorchScript module ({type(module).__name__}), whose forward has no "
                "Python to rewrite. Convert the model that it was made from."
            )
        kind = type(module).__name__
        if "HyperConnection" in kind:
            raise AlreadyConvertedError(
                f"{name or 'The model'!r} is a {kind}: this model has hyper-connections of its own, so there is no "
                "single residual stream to widen."
            )

"""The sites of a converted model apart from it: their parameters by name, and as files to share, as adapters are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mhc_rewrite.api import mhcify
from mhc_rewrite.conversion.converted import find_converted, forget, site_at, sites_in_use
from mhc_rewrite.conversion.install import is_converted, uninstall
from mhc_rewrite.errors import SitesError
from mhc_rewrite.kernels.sharding import is_dtensor
from mhc_rewrite.lifecycle.saved_plan import SavedPlan, check_fits, check_same_sites, install_saved, saved_plan

CONFIG, WEIGHTS = "mhc_config.json", "mhc_model.safetensors"


def site_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all sites that calls reach, by their names in `model.named_parameters()`.

    Looks inside wrappers; empty for a model that is not converted.
    """
    sites = sites_in_use(model)
    return {f"{name}.{field}": p for name, site in sites.items() for field, p in site.named_parameters()}


def save_sites(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes the sites of a converted model, without the model: `mhc_config.json` and `mhc_model.safetensors`.

    Args:
        model: a converted model, or a wrapper around one.
        folder: is made if it is not there.

    Raises:
        MHCError: the model holds no converted model, or several.
        SitesError: parameters have no values here.
    """
    _, part, _ = find_converted(model)
    saved = saved_plan(part)
    tensors: dict[str, Tensor] = {}
    for site in saved.sites:
        for field, tensor in site_at(part, site.name).state_dict().items():
            tensors[f"{site.name}.{field}"] = _whole(tensor, f"{site.name}.{field}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, WEIGHTS), metadata={"format": "pt"})
    Path(folder, CONFIG).write_text(json.dumps(saved.to_dict(), indent=1) + "\n", encoding="utf-8")


def load_sites(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> nn.Module:
    """Loads what `save_sites` wrote, and converts the model first if it is not converted; all or nothing.

    A model is converted as the saved one was, without running it: nothing is captured before the first call.

    Args:
        model: the original, a conversion with the same sites and options, or a wrapper around either.
        folder: what `save_sites` wrote.
        example_inputs: convert by these, as `mhcify` does: for a model whose source is another than it was then.

    Returns:
        The same model.

    Raises:
        SitesError: no such files, or they do not fit the model: other modules, names, shapes or options.
    """
    saved, tensors = _read(Path(folder))
    if is_converted(model):
        _, part, _ = find_converted(model)
        _load(part, saved, tensors)
        return model
    part = _original(model, saved.kind)
    try:
        if example_inputs is None:
            install_saved(part, saved)
        else:
            check_fits(part, saved)
            names = {site.name for site in saved.sites}
            mhcify(part, example_inputs, config=saved.plan.config, filter_fn=lambda site: site.name in names)
        _load(part, saved, tensors)
    except BaseException:
        if is_converted(part):
            uninstall(part)
            forget(part)
        raise
    return model


def _read(folder: Path) -> tuple[SavedPlan, dict[str, Tensor]]:
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise SitesError(
            f"{os.fspath(folder)!r} holds no saved sites: {CONFIG} and {WEIGHTS}, as save_sites writes them ({error})."
        ) from error
    return SavedPlan.from_dict(data), tensors


def _original(model: nn.Module, kind: str) -> nn.Module:
    """The model of the saved class: `model`, or the only one of that class inside it."""
    if type(model).__name__ == kind:
        return model
    inside = [module for module in model.modules() if type(module).__name__ == kind]
    return inside[0] if len(inside) == 1 else model


def _load(part: nn.Module, saved: SavedPlan, tensors: dict[str, Tensor]) -> None:
    """Copies saved tensors into the sites of a converted model, after all of them were found to fit."""
    sites = check_same_sites(part, find_converted(part)[2], saved)
    wanted = {
        f"{name}.{field}": (name, field, tensor)
        for name, site in sites.items() for field, tensor in site.state_dict().items()
    }  # fmt: skip
    for key in dict.fromkeys([*wanted, *tensors]):
        if key not in tensors or key not in wanted:
            where = "is missing from" if key in wanted else "does not belong into"
            raise SitesError(f"{key!r} {where} {WEIGHTS}: the file is not of the same conversion as {CONFIG}.")
        if tensors[key].shape != wanted[key][2].shape:
            raise SitesError(
                f"{key!r} has shape {tuple(tensors[key].shape)} in {WEIGHTS} and {tuple(wanted[key][2].shape)} in "
                f"{type(part).__name__}."
            )
    with torch.no_grad():
        for name, site in sites.items():
            values = {field: _as(mine, tensors[f"{name}.{field}"]) for field, mine in site.state_dict().items()}
            site.load_state_dict(values, assign=site.bias.is_meta)


def _as(mine: Any, value: Tensor) -> Tensor:
    """A value as the tensor that it replaces is: distributed where that is."""
    if not is_dtensor(mine):
        return value
    from torch.distributed.tensor import distribute_tensor  # there already where there is one

    return distribute_tensor(value, mine.device_mesh, mine.placements)


def _whole(tensor: Any, name: str) -> Tensor:
    """A tensor's values in memory of their own, gathered where it is sharded."""
    if is_dtensor(tensor):
        tensor = tensor.full_tensor()
    if tensor.is_meta:
        raise SitesError(f"{name!r} is on the meta device and has no values: load the model's weights first.")
    return tensor.detach().cpu().clone().contiguous()

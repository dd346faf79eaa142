"""A converted model's parameters as optimizers, and as PEFT, want to be told of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mhc_rewrite.sites.hyper_connection import HyperConnection


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float | None = None, site_lr: float | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters as groups for an optimizer. Weight decay would pull a site's coefficients to where no
    model wants them, H_res away from the identity, and spares the model's own norms and biases, as Trainer does.

    Args:
        model: converted; in wrappers too.
        weight_decay: of the model's own weights.
        lr: learning rate of the model's own parameters; left out, the optimizer's.
        site_lr: the same for the sites'.

    Returns:
        Up to four groups, none of them empty, with a `name`: "weights", "norms and biases", and of the sites "phi",
        whose parameters are matrices, and "alpha and bias".
    """
    sites = {id(p): name for module in _sites(model) for name, p in module.named_parameters(recurse=False)}
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters(recurse=False)}
    groups: dict[str, list[Tensor]] = {"weights": [], "norms and biases": [], "phi": [], "alpha and bias": []}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if id(p) in sites:
            groups["phi" if sites[id(p)] == "phi" else "alpha and bias"].append(p)
        else:
            spared = id(p) in norms or "bias" in name.lower() or any(map(_names_norm, name.split(".")))
            groups["norms and biases" if spared else "weights"].append(p)
    made = []
    for group, parameters in groups.items():
        rate = lr if group in ("weights", "norms and biases") else site_lr
        decay = weight_decay if group == "weights" else 0.0
        if parameters:
            rates = {} if rate is None else {"lr": rate}
            made.append({"name": group, "params": parameters, "weight_decay": decay, **rates})
    return made


def modules_to_save(model: nn.Module) -> list[str]:
    """What PEFT's `modules_to_save=` has to name for the sites to be trained and saved with an adapter."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, HyperConnection)}
    return sorted(names, key=lambda name: (len(name), name))


def _sites(model: nn.Module) -> list[HyperConnection]:
    return [module for module in model.modules() if isinstance(module, HyperConnection)]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _names_norm(part: str) -> bool:
    part = part.lower()
    return "layernorm" in part or "rmsnorm" in part or part == "norm" or part.endswith("_norm")

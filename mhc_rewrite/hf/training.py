"""transformers' Trainer, and what derives from it, with a converted model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from mhc_rewrite.sites.hyper_connection import HyperConnection


class SitesInTrainer:
    """For any Trainer: no weight decay on the sites, and a learning rate of their own.

        class SFT(SitesInTrainer, SFTTrainer): ...

        SFT(model=model, args=args, train_dataset=data, site_lr=1e-3)

    Args:
        site_lr: of the sites; `args.learning_rate` if left out. The scheduler scales it as it scales that.
    """

    def __init__(self, *args: Any, site_lr: float | None = None, **kwargs: Any) -> None:
        self.site_lr = site_lr
        super().__init__(*args, **kwargs)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's, without the sites'."""
        names: list[str] = super().get_decay_parameter_names(model)  # type: ignore[misc]
        sites = _site_parameter_names(model)
        return [name for name in names if name not in sites]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with the sites in a group of their own where they have a learning rate of their own."""
        given = getattr(self, "optimizer", None) is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if self.site_lr is None or given:
            return optimizer
        trained = self.model if model is None else model  # type: ignore[attr-defined]
        sites = {id(p) for p in _site_parameters(trained).values()}
        mine = []
        for group in optimizer.param_groups:
            mine += [p for p in group["params"] if id(p) in sites]
            group["params"] = [p for p in group["params"] if id(p) not in sites]
        optimizer.add_param_group({"params": mine, "weight_decay": 0.0, "lr": self.site_lr})
        return optimizer


class MHCTrainer(SitesInTrainer, Trainer):
    """`Trainer` for a converted model."""


def _site_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.{name}" if path else name: p
        for path, module in model.named_modules() if isinstance(module, HyperConnection)
        for name, p in module.named_parameters(recurse=False)
    }  # fmt: skip


def _site_parameter_names(model: nn.Module) -> set[str]:
    return set(_site_parameters(model))

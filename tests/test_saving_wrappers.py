"""Wrappers around converted models, and around sites, are looked into."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mhc_rewrite import (
    HyperConnection,
    graphs,
    is_converted,
    load_sites,
    mhcify,
    report,
    save_sites,
    site_parameters,
    unmhcify,
)
from test_saving import example, gpt, original


class Task(nn.Module):
    """As a LightningModule has its model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.net = model
        self.probe = nn.Linear(2, 2)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


class Handing(nn.Module):
    """Around a site, as PEFT's `modules_to_save` has it: the original, and the copy that answers."""

    def __init__(self, site: HyperConnection) -> None:
        super().__init__()
        self.original_module = site
        self.copies = nn.ModuleDict({"default": copy.deepcopy(site)})

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("copies")["default"], name)


def handing(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.mhc_0 = Handing(block.mhc_0)
    return model


def ddp(model: nn.Module) -> nn.Module:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data parallel": ddp,
    "in a module": Task,
    "twice": lambda model: torch.compile(Task(model), backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "around sites": handing,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_are_looked_into(wrapper: str, tmp_path: Path) -> None:
    try:
        model = WRAPPERS[wrapper](gpt())
        want = model(**example())
        assert is_converted(model) and not is_converted(WRAPPERS["in a module"](original()))
        named = site_parameters(model)
        assert len(named) == 18 and named.items() <= dict(model.named_parameters()).items()
        found = report(model)
        assert found.plan.model == "GPT" and sum(found.parameters_added) == sum(p.numel() for p in named.values())
        assert found.parameters_before == sum(p.numel() for p in original().parameters()) and len(graphs(model)) == 3
        save_sites(model, tmp_path)
        assert torch.equal(load_sites(original(), tmp_path)(**example()), gpt()(**example()))
        other = WRAPPERS["in a module"](original())
        assert torch.allclose(load_sites(other, tmp_path)(**example()), want, atol=1e-6)
        with pytest.warns(UserWarning, match="6 of 6 sites of GPT have learned"):
            assert unmhcify(model) is model
        assert not is_converted(model) and not site_parameters(model)
        assert torch.equal(model(**example()), original()(**example()))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_the_site_that_answers_is_saved(tmp_path: Path) -> None:
    """Not the frozen original beside it."""
    model = handing(mhcify(original(), example()))
    with torch.no_grad():
        for p in site_parameters(model).values():
            p.add_(0.3)
    assert any(".copies.default.phi" in name for name in site_parameters(model))
    save_sites(model, tmp_path)
    assert torch.equal(load_sites(original(), tmp_path)(**example()), model(**example()))

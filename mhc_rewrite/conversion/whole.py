"""Whether a converted model still has the layers that were rewritten."""

from __future__ import annotations

from typing import Any

from torch import nn

from mhc_rewrite.errors import StreamError

# Where a module has its role.
ROLE = "_mhc_role"


def check_whole(model: nn.Module, parts: tuple[str, ...]) -> None:
    """Refuses a model out of which rewritten layers were taken, at every call; they may be inside wrappers."""
    missing = [path for path in parts if not _is_there(model, path)]
    if not missing:
        return
    roles = [module.__dict__.get(ROLE) for module in model.modules()]
    there = {role.name for role in roles if role is not None}
    gone = next((path for path in missing if path not in there), None)
    if gone is not None:
        raise StreamError(
            f"{gone!r} was taken out of {type(model).__name__} since it was converted. As a stage of a pipeline, what "
            "is left would hand on the mean of its streams, and the next one begin anew with that: "
            "mhc_rewrite.distributed.pipeline_stage(model, layers, index), on the whole converted model, makes stages. "
            "For a model of fewer layers take them out before mhcify; unmhcify(model) leads back."
        )


def _is_there(model: nn.Module, path: str) -> bool:
    """Whether there is a module with parts at a path."""
    child: Any = model
    for name in path.split(".") if path else ():
        child = child._modules.get(name)
        if child is None:
            return False
    return bool(child._modules)

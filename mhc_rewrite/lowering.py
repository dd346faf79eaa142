"""The backend "mhc" of `torch.compile`: this project's passes on the graph of Dynamo, then Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from mhc_rewrite.config import check_recompute
from mhc_rewrite.passes import annotate_recompute as recomputation
from mhc_rewrite.passes.annotate_recompute import annotate_recompute
from mhc_rewrite.passes.fuse_boundaries import fuse_boundaries
from mhc_rewrite.torch_private import inductor, joint_graph_pass


def mhc(
    graph_module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What `torch.compile(model, backend="mhc")` calls; its name is an entry point, so nothing has to be imported.

    Args:
        mode: Inductor's.
        options: Inductor's, and `recompute`: keep the stream state only at the first of this many consecutive sites
            and recompute the rest in backward; "auto" takes the number that keeps least, None leaves it to Inductor.

    Raises:
        ConfigError: `recompute` can't be used.
    """
    options = dict(options or {})
    recompute = check_recompute(options.pop("recompute", None))
    fuse_boundaries(graph_module, example_inputs)
    segments = annotate_recompute(graph_module, example_inputs, recompute=recompute)
    if segments.modified:
        mine = joint_graph_pass(recomputation.mark_joint_graph, recomputation.uuid(segments), options)
        options["joint_custom_pre_pass"] = mine
    return inductor(mode, options)(graph_module, example_inputs)


def compile(model: Any = None, **options: Any) -> Any:
    """`torch.compile` with the backend "mhc"; takes the same options.

    `options={"recompute": ...}` is this backend's own, see `mhc`; the others reach Inductor.

    Raises:
        ConfigError: `recompute` can't be used.
    """
    check_recompute((options.get("options") or {}).get("recompute"))
    return torch.compile(model, backend=mhc, **options)

"""A layer whose forward is a function, its capture and rewrite, and graphs as text: for the tests of the passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_rewrite.conversion.captures import Captured, capture_forward
from mhc_rewrite.passes.expand_streams import Rewrite, SiteTarget, expand_streams

WIDTH, N = 8, 3
Forward = Callable[..., Any]


class Layer(nn.Module):
    """What the forwards below are made of."""

    def __init__(self, forward: Forward, channels_first: bool = False) -> None:
        super().__init__()
        self.run = forward
        self.a, self.b = (nn.Conv2d(WIDTH, WIDTH, 1) if channels_first else nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(WIDTH) if channels_first else nn.LayerNorm(WIDTH) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.gamma = nn.Parameter(torch.ones(WIDTH))
        self.eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def features(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 5, WIDTH), generator=torch.Generator().manual_seed(0))


def capture(layer: Layer, x: Tensor | None = None, training: bool = False) -> Captured:
    return capture_forward(layer, "layer", {"x": features() if x is None else x}, [], training)


def rewrite(
    captured: Captured, arriving: bool = False, leaving: bool = False, excluded: tuple[int, ...] = ()
) -> Rewrite:
    """All its sites in one stream, `mhc_<k>` in the order of execution."""
    graph, residuals = captured
    sites = sorted((site for trunk in residuals.trunks for site in trunk.sites), key=lambda site: site.place)
    targets = {site.key: SiteTarget(None if k in excluded else f"mhc_{k}", 0) for k, site in enumerate(sites)}
    return expand_streams(
        graph, residuals, targets, n=N, collapse="mean",
        arriving=frozenset({0} if arriving else ()), leaving=frozenset({0} if leaving else ()),
    )  # fmt: skip


def text(graph: fx.Graph) -> str:
    """One line a node: what it computes, and its role and shape where it is one of the stream's."""
    lines = []
    for node in graph.nodes:
        if node.op == "get_attr":
            continue
        args = [_argument(arg) for arg in node.args] + [f"{name}={_argument(arg)}" for name, arg in node.kwargs.items()]
        if node.op == "placeholder":
            line = f"{node.name}: placeholder"
        elif node.op == "output":
            line = f"return {', '.join(args)}"
        elif node.op == "call_module":
            line = f"{node.name} = {node.target}({', '.join(args)})"
        elif node.op == "call_method":
            line = f"{node.name} = {args[0]}.{node.target}({', '.join(args[1:])})"
        else:
            line = f"{node.name} = {node.target.__name__}({', '.join(args)})"
        if role := node.meta.get("role"):
            line += f"  # {role} {node.meta.get('shape', '')}".rstrip()
        lines.append(line)
    return "\n".join(lines)


def _argument(arg: Any) -> str:
    def name(node: fx.Node) -> fx.Node | _Path:
        return _Path(str(node.target)) if node.op == "get_attr" else node

    return repr(fx.node.map_arg(arg, name))


class _Path(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

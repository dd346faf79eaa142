"""Gradients: of the state that a site reads, and of a site's parameters."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.connections import connection_of
from mhc_rewrite.insight.watching.format import MAPPINGS
from mhc_rewrite.insight.watching.tokens import in_front, some
from mhc_rewrite.kernels import ops
from mhc_rewrite.sites.hyper_connection import HyperConnection
from mhc_rewrite.torch_private import frees_parameters


class StateGradient:
    """The gradient of the state that one call of a site reads, of some tokens.

    Where `boundary` made the state and read it at once, what arrives there lacks what the site itself adds to it. That
    is made from what arrives at its outputs, token by token, once backward is over.

    Args:
        site, args, result: a call.
        tokens: how many, at most.
    """

    def __init__(
        self, site: HyperConnection, args: tuple[Tensor, ...], result: tuple[Tensor, ...], tokens: int
    ) -> None:
        self._arrived: dict[str, Tensor] = {}
        self._pre: tuple[Tensor, tuple[Any, ...]] | None = None
        h_post = result[-2]
        self._count = math.prod(h_post.shape[:-1])
        if len(args) == 1:
            parts = {"state": (args[0], 2)}
        else:
            parts = {"state": (result[0], 2), "u": (result[1], 1), "post": (result[2], 0), "res": (result[3], 0)}
            with torch.no_grad():
                state = some(in_front(result[0], site, 2), h_post, tokens)
                copies = frees_parameters(site)
                operands = tuple(
                    (x.detach().clone() if copies else x.detach()) if isinstance(x, Tensor) else x
                    for x in site.operands(result[0].dtype)
                )
            self._pre = state, operands
        form = h_post.detach()
        for name, (tensor, axes) in parts.items():
            if tensor.requires_grad:
                tensor.register_hook(functools.partial(self._arrives, name, site, axes, form, tokens))

    @torch.no_grad()
    def _arrives(
        self, name: str, site: HyperConnection, axes: int, h_post: Tensor, tokens: int, gradient: Tensor
    ) -> None:
        if name not in self._arrived:  # that of another backward comes later
            self._arrived[name] = some(in_front(gradient, site, axes) if axes else gradient, h_post, tokens)

    def squares(self) -> tuple[Tensor | None, Tensor] | None:
        """The squared norm of the gradient, None where the streams are one tensor, and of its sum over them; of all
        tokens, from these. None where nothing arrived."""
        gradient = self._arrived.get("state")
        if self._pre is not None and len(self._arrived) > (gradient is not None):
            state, operands = self._pre
            state.requires_grad_()
            with torch.enable_grad():
                made = dict(zip(("u", "post", "res"), ops.pre(state, *operands)))
            own = {name: out for name, out in made.items() if name in self._arrived}
            (more,) = torch.autograd.grad([*own.values()], state, [self._arrived[name] for name in own])
            gradient = more if gradient is None else gradient + more
        if gradient is None:
            return None
        whole = None if gradient.shape[-2] == 1 else self._squared_norm(gradient)
        return whole, self._squared_norm(gradient.sum(-2))

    def _squared_norm(self, gradient: Tensor) -> Tensor:
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        return torch.linalg.vector_norm(gradient, dtype=dtype).square() * (self._count / len(gradient))


@functools.lru_cache(maxsize=64)
def columns(connection: str, n: int, width: int, logits: int) -> dict[str, list[int]]:
    """The columns of the parameter phi that make H_pre, H_post and H_res."""
    sizes = [n, n, logits - 2 * n]
    kind = connection_of(connection)
    if kind.projection is None:
        return dict(zip(MAPPINGS, (part.tolist() for part in torch.arange(logits).split(sizes))))
    shape = kind.shapes(n, width)["phi"]
    marked = kind.projection(torch.arange(1.0, shape[1] + 1).expand(shape), n)  # every column by its number
    parts = (part.unique().long() - 1 for part in marked.split(sizes, dim=-1))
    return dict(zip(MAPPINGS, ([number for number in part.tolist() if number >= 0] for part in parts)))


@torch.no_grad()
def parameter_gradients(site: HyperConnection) -> dict[str, tuple[Tensor, Tensor]]:
    """Of phi, alpha and bias, those that have a gradient: by column its sum of squares and its largest size."""
    found = {}
    for name in ("phi", "alpha", "bias"):
        parameter: Any = getattr(site, name)
        gradient = None if parameter is None else parameter.grad
        if gradient is not None:
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            rows = whole.reshape(-1, whole.shape[-1])
            found[name] = rows.square().sum(0), rows.abs().amax(0)
    return found

"""The mathematics of a site in plain PyTorch, and a scratch pad for writing an n-stream model by hand.

Written from the specification alone: nothing here comes from the package under test, and nothing here is fast. The
Sinkhorn iterations are the direct ones on exp(A), fit for the moderate logits of the tests and for fp64.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

import connections_by_hand

SITE_PARAMETER = re.compile(r"(?:^|\.)mhc_\d+\.(phi|alpha|bias)$")


class Params(NamedTuple):
    """One site's parameters. mhc: phi (n*C, n^2 + 2n); hc: phi (C, n + 2); alpha (3,), bias (n^2 + 2n,).

    In place of n^2 other connections have as many logits of H_res as `connections_by_hand.COLUMNS` says.
    """

    phi: Tensor
    alpha: Tensor
    bias: Tensor


def site_params(state: Mapping[str, Tensor], name: str) -> Params:
    """The parameters of the site `name` in the state dict of a converted model."""
    return Params(*(state[f"{name}.{field}"] for field in Params._fields))


def site_names(state: Mapping[str, Tensor]) -> list[str]:
    """The names of all sites that have parameters in the state dict of a converted model."""
    return [key[: -len(".phi")] for key in state if SITE_PARAMETER.search(key) and key.endswith(".phi")]


def site_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter of a site, with its name."""
    return ((name, p) for name, p in model.named_parameters() if SITE_PARAMETER.search(name))


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0, strength: float = 1.0) -> None:
    """Draws all site parameters anew, far from where they start, and bounded.

    The projections x @ phi / r get a standard deviation near 0.5. Of the biases a quarter stays: -8 off the diagonal of
    H_res would leave the streams nearly unmixed whatever is added to it.
    """
    generator = torch.Generator().manual_seed(seed)
    found = 0
    for name, p in site_parameters(model):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        kind = name.rpartition(".")[2]
        if kind == "phi":
            p.copy_(0.5 * strength / math.sqrt(p.shape[0]) * noise)
        elif kind == "alpha":
            p.copy_(0.5 + torch.rand(p.shape, generator=generator, dtype=torch.float64))
        else:
            p.copy_(0.25 * p + strength * noise)
        found += 1
    assert found, "the model has no site parameters"


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """SK(A) (..., n, n): exp(A), then `iterations` times every column over its sum, every row over its sum [9]."""
    matrix = logits.exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-2, keepdim=True)
        matrix = matrix / matrix.sum(dim=-1, keepdim=True)
    return matrix


def mhc_coefficients(params: Params, X: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre (..., n), H_post (..., n), H_res (..., n, n) of the state X (..., n, C) [14 to 19]."""
    return _coefficients(lambda logits, n: sinkhorn(logits.unflatten(-1, (n, n))), params, X, eps)


def _coefficients(
    h_res: Callable[[Tensor, int], Tensor], params: Params, X: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = X.shape[-2]
    x = X.flatten(-2)
    r = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    columns = [n, n, len(params.bias) - 2 * n]
    pre, post, res = ((x @ params.phi) / r).split(columns, dim=-1)
    b_pre, b_post, b_res = params.bias.split(columns)
    return (
        torch.sigmoid(params.alpha[0] * pre + b_pre),
        2 * torch.sigmoid(params.alpha[1] * post + b_post),
        h_res(params.alpha[2] * res + b_res, n),
    )


def hc_coefficients(params: Params, X: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same for Hyper-Connections: static + alpha * tanh(norm(X) W), without constraint.

    Row i of norm(X) W holds H_post[i], H_pre[i] and H_res[:, i] of stream i.
    """
    n = X.shape[-2]
    normed = X / (X.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    dynamic = torch.tanh(normed @ params.phi)
    b_pre, b_post, b_res = params.bias.split([n, n, n * n])
    return (
        b_pre + params.alpha[0] * dynamic[..., 1],
        b_post + params.alpha[1] * dynamic[..., 0],
        b_res.view(n, n) + params.alpha[2] * dynamic[..., 2:].transpose(-1, -2),
    )


COEFFICIENTS: dict[str, Callable[[Params, Tensor, float], tuple[Tensor, Tensor, Tensor]]] = {
    "mhc": mhc_coefficients,
    "hc": hc_coefficients,
    **{name: functools.partial(_coefficients, h_res) for name, h_res in connections_by_hand.H_RES.items()},
}


def tokens_last(X: Tensor, channel_dim: int) -> Tensor:
    """The state as (..., n, C): from (B, n, C, H, W) where the trunk's channels are dim 1."""
    return X if channel_dim == -1 else X.movedim((channel_dim, channel_dim + 1), (-2, -1))


def site(
    params: Params, X: Tensor, channel_dim: int = -1, connection: str = "mhc", eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """What the block reads, and how its result is written back.

    X is the state, (..., n, C) or (B, n, C, H, W) with `channel_dim=1`. Returns u in the shape of one stream, H_post
    (..., n) and H_res (..., n, n), the last two with the tokens first.
    """
    X = tokens_last(X, channel_dim)
    H_pre, H_post, H_res = COEFFICIENTS[connection](params, X, eps)
    u = (H_pre.unsqueeze(-1) * X).sum(dim=-2)
    return (u if channel_dim == -1 else u.movedim(-1, channel_dim)), H_post, H_res


def apply(X: Tensor, y: Tensor, H_post: Tensor, H_res: Tensor, channel_dim: int = -1) -> Tensor:
    """X'[i] = sum_j H_res[i, j] X[j] + H_post[i] y, in the layout of X."""
    X = tokens_last(X, channel_dim)
    y = y if channel_dim == -1 else y.movedim(channel_dim, -1)
    new = H_res @ X + H_post.unsqueeze(-1) * y.unsqueeze(-2)
    return new if channel_dim == -1 else new.movedim((-2, -1), (channel_dim, channel_dim + 1))


class Streams:
    """The steps of an n-stream model, to be called by hand where the ordinary model has its residual adds.

    Args:
        state: name -> tensor, with the site parameters of the converted model.
        n: number of streams.
        channel_dim: the trunk's channels: -1, or 1 for NCHW.
        connection: a name in `COEFFICIENTS`.
    """

    def __init__(self, state: Mapping[str, Tensor], n: int, channel_dim: int = -1, connection: str = "mhc") -> None:
        self.state, self.n, self.channel_dim, self.connection = state, n, channel_dim, connection
        self.seen: list[str] = []

    @property
    def dim(self) -> int:
        """The streams' axis: directly before the channels."""
        return -2 if self.channel_dim == -1 else self.channel_dim

    def expand(self, x: Tensor) -> Tensor:
        """n equal streams."""
        return torch.stack([x] * self.n, dim=self.dim)

    def collapse(self, X: Tensor) -> Tensor:
        """The mean of the streams: what follows the last site, and whoever else reads the trunk."""
        return X.mean(dim=self.dim)

    def each(self, operation: Callable[[Tensor], Tensor], X: Tensor) -> Tensor:
        """An operation on the trunk, applied to one stream after the other."""
        return torch.stack([operation(x) for x in X.unbind(self.dim)], dim=self.dim)

    def params(self, name: str) -> Params:
        """The parameters of a site."""
        return site_params(self.state, name)

    def read(self, name: str, X: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        """The first half of a site: u, and `write(y, trunk=None)`, which makes X' = H_res trunk(X) + H_post y."""
        self.seen.append(name)
        u, H_post, H_res = site(self.params(name), X, self.channel_dim, self.connection)

        def write(y: Tensor, trunk: Callable[[Tensor], Tensor] | None = None) -> Tensor:
            return apply(X if trunk is None else self.each(trunk, X), y, H_post, H_res, self.channel_dim)

        return u, write

    def site(
        self,
        name: str,
        X: Tensor,
        branch: Callable[[Tensor], Tensor],
        trunk: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """`trunk(x) + branch(x)` on n streams. What the coefficients and u are made from is what the branch reads."""
        u, write = self.read(name, X)
        return write(branch(u), trunk)

    def plain(
        self, X: Tensor, branch: Callable[[Tensor], Tensor], trunk: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The same of a site that the user excluded: the block reads the mean, every stream receives its result."""
        y = branch(self.collapse(X))
        return (X if trunk is None else self.each(trunk, X)) + y.unsqueeze(self.dim)

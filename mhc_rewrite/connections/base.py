"""What a connection is: one function from raw coefficients to H_pre, H_post and H_res, and how a site starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mhc_rewrite.errors import ConfigError
from mhc_rewrite.kernels.kinds import FUNCTIONS, KINDS, Function

# (raw (T, K), alpha (3,), bias (K,), n) -> H_pre (T, n), H_post (T, n), H_res (T, n, n) as [out, in]
Mappings = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]

# (phi, alpha, bias, n, index) -> None, in place. `index` is the site's place in its stream.
Start = Callable[[Tensor, Tensor, Tensor, int, int], None]

STARTS = {
    "preserve": "the original function, and streams that part at the first site",
    "equal": "the original function, and streams that stay equal until H_post has learned",
    "near_identity": "the original function; H_res as good as the identity, where it stays",
    "paper": "that of the connection's own source",
}


def _square(n: int) -> int:
    return n * n


def _any_number(n: int) -> str:
    return ""


def first_group(n: int) -> int:
    """How many of n streams are in the first of the two groups that "preserve" starts with; the others follow them."""
    return (n + 1) // 2


@dataclass(frozen=True)
class Connection:
    """One relative of mHC: all share the site's shape, only how H_* are made differs.

    raw = (x @ phi) / r, with K columns [pre: n | post: n | res: `columns(n)`], is what the function gets; phi, alpha
    and bias are a site's parameters. The function is plain PyTorch: autograd differentiates it, once and for any number
    of tokens T, so it must not look at values.

    Attributes:
        starts: how a site may begin, for every name in `STARTS`. All but "paper" keep the mean of the streams.
        source: paper or model that defines it.
        function: None where `KINDS` has kernels for it, under the name that it is registered by.
        columns: n -> how many logits H_res has.
        refuses: n -> why it is not defined for so many streams, and what is; empty where it is.
        in_halves: whether "preserve" parts streams into `first_group` and the rest, which is what they are taken for
            where n changes within a model.
        phi_shape: (n, C) -> shape of the projection; (n C, K) where there is none.
        projection: (phi, n) -> phi as the operators take it, (n C, K); as it is where there is none.
    """

    starts: Mapping[str, Start]
    source: str
    function: Mappings | None = None
    columns: Callable[[int], int] = _square
    refuses: Callable[[int], str] = _any_number
    in_halves: bool = True
    phi_shape: Callable[[int, int], tuple[int, int]] | None = None
    projection: Callable[[Tensor, int], Tensor] | None = None

    def shapes(self, n: int, width: int) -> dict[str, tuple[int, ...]]:
        """Of a site's parameters: phi, alpha and bias."""
        columns = 2 * n + self.columns(n)
        phi = self.phi_shape(n, width) if self.phi_shape else (n * width, columns)
        return {"phi": phi, "alpha": (3,), "bias": (columns,)}


CONNECTIONS: dict[str, Connection] = {}


def register_connection(name: str, connection: Connection) -> None:
    """Makes a connection a value of `MHCConfig.connection`.

    Args:
        name: that options, plans and saved conversions have. Whoever loads one registers it first.
        connection: its function, starts and source.

    Raises:
        ConfigError: the name is another connection's, a start is missing, or there is nothing that computes it.
    """
    if CONNECTIONS.get(name, connection) is not connection:
        raise ConfigError(f"There is a connection {name!r} already. Register this one under another name.")
    if missing := [start for start in STARTS if start not in connection.starts]:
        raise ConfigError(
            f"The connection {name!r} has no start {missing[0]!r}: starts has one for each of {[*STARTS]}."
        )
    if connection.function is not None:
        FUNCTIONS[name] = Function(connection.function, connection.columns)
    elif name not in KINDS:
        raise ConfigError(f"The connection {name!r} has no function, and there are no kernels for it.")
    CONNECTIONS[name] = connection


def connection_of(name: str) -> Connection:
    """The connection of that name.

    Raises:
        ConfigError: there is none, or none yet in this process.
    """
    if not isinstance(name, str) or name not in CONNECTIONS:
        raise ConfigError(
            f"There is no connection {name!r}, but {', '.join(map(repr, CONNECTIONS))}. One of your own is registered "
            "first: import the file that does it, in every process that loads or runs the model."
        )
    return CONNECTIONS[name]


def gates(raw: Tensor, alpha: Tensor, bias: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """H_pre = sigmoid and H_post = 2 sigmoid of s = alpha * raw + bias, as in mHC [17, 18], and the rest of s: H_res's
    logits (T, columns)."""
    sizes = [n, n, len(bias) - 2 * n]
    pre, post, res = (
        scale * part + shift for scale, part, shift in zip(alpha.unbind(), raw.split(sizes, -1), bias.split(sizes))
    )
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), res

"""One site's parameters and what it does with them. Knows tensors, not graphs."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mhc_rewrite.config import MHCConfig
from mhc_rewrite.connections import CONNECTIONS, Coefficients
from mhc_rewrite.kernels import reference
from mhc_rewrite.torch_private import KeepsPrecision


class Mix(NamedTuple):
    """What `pre` hands to `post`: `post` (tokens, n), `res` (tokens, n, n); fp32, or fp64 in an fp64 model."""

    post: Tensor
    res: Tensor


class HyperConnection(KeepsPrecision):
    """The coefficients of one site and the two mixes that use them; it never owns or calls the block.

        u, mix = site.pre(X)
        X = site.post(X, block(u), mix)

    Streams X are (..., n, C), or (B, n, C, ...) where `channel_dim` is 1; u and the block's output have no n axis.
    Parameters: phi, (nC, n^2 + 2n) for `mhc`; alpha (3,) for [pre, post, res]; bias (n^2 + 2n,), columns
    [pre | post | res row-major]. They stay fp32 when the model is made bf16 or fp16, and all arithmetic on them is
    in their dtype, under autocast as well. Source: arXiv:2512.24880, eq. 14 to 19.

    Args:
        width: C.
        config: expansion rate, connection, initialisation.
        index: the site's place in its stream; decides which stream it mostly reads at the start.
        channel_dim: the axis of C in the block's input: -1, or 1 for channels-first trunks.
        device, dtype: of the parameters; dtype fp64 in an fp64 model, fp32 otherwise.

    Raises:
        ConfigError: `mhc` on one stream can't preserve.
    """

    def __init__(
        self,
        width: int,
        config: MHCConfig | None = None,
        *,
        index: int = 0,
        channel_dim: int = -1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.width = width
        self.config = config or MHCConfig()
        self.index = index
        self.channel_dim = channel_dim
        n = self.config.n_streams
        shape = CONNECTIONS[self.config.connection].phi_shape(n, width)
        self.phi = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(n * n + 2 * n, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts the parameters as `config.init` says; after `to_empty` too."""
        connection = CONNECTIONS[self.config.connection]
        start = connection.preserve if self.config.init == "preserve" else connection.paper
        start(self.phi, self.alpha, self.bias, self.config.n_streams, self.index)

    def coefficients(self, streams: Tensor) -> Coefficients:
        """H_pre (tokens, n), H_post (tokens, n), H_res (tokens, n, n) of a state in this site's layout."""
        with self._full_precision(streams):
            return self._coefficients(self._tokens_last(streams))

    def pre(self, streams: Tensor) -> tuple[Tensor, Mix]:
        """What the block reads, in the dtype of `streams`, and the coefficients that `post` needs."""
        with self._full_precision(streams):
            state = self._tokens_last(streams)
            h = self._coefficients(state)
            u = reference.mix_in(state, h.pre).to(streams.dtype)
        return (u if self.channel_dim == -1 else u.movedim(-1, 1)), Mix(h.post, h.res)

    def post(self, streams: Tensor, branch: Tensor, mix: Mix) -> Tensor:
        """The next state, in the wider of the dtypes of `streams` and `branch`."""
        dtype = torch.promote_types(streams.dtype, branch.dtype)
        with self._full_precision(streams):
            state = self._tokens_last(streams)
            y = (branch if self.channel_dim == -1 else branch.movedim(1, -1)).to(state.dtype)
            mixed = reference.mix_out(state, y, mix.post, mix.res).to(dtype)
        return mixed if self.channel_dim == -1 else mixed.movedim((-2, -1), (1, 2))

    def _coefficients(self, state: Tensor) -> Coefficients:
        dtype = state.dtype
        parameters = (self.phi.to(dtype), self.alpha.to(dtype), self.bias.to(dtype))
        connection = CONNECTIONS[self.config.connection]
        return connection.coefficients(state, *parameters, self.config.sinkhorn_iterations, self.config.eps_norm)

    def _tokens_last(self, streams: Tensor) -> Tensor:
        """(tokens, n, C) in the dtype of the arithmetic."""
        state = streams if self.channel_dim == -1 else streams.movedim((1, 2), (-2, -1))
        return state.to(torch.promote_types(state.dtype, self.phi.dtype))

    @staticmethod
    def _full_precision(streams: Tensor) -> contextlib.AbstractContextManager[object]:
        # Autocast would round the coefficients to bf16 without a word: row sums of H_res wrong by 3e-3 a site.
        device = streams.device.type
        return torch.autocast(device, enabled=False) if device != "meta" else contextlib.nullcontext()

    def extra_repr(self) -> str:
        return f"{self.config.connection}, n_streams={self.config.n_streams}, width={self.width}, index={self.index}"

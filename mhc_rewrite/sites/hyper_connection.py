"""One site's parameters and what it does with them. Knows tensors, not graphs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhc_rewrite.config import MAPPINGS, MHCConfig
from mhc_rewrite.connections import connection_of
from mhc_rewrite.errors import SitesError
from mhc_rewrite.kernels import ops, reference
from mhc_rewrite.kernels.kinds import static
from mhc_rewrite.kernels.reference import Coefficients
from mhc_rewrite.kernels.sharding import is_dtensor
from mhc_rewrite.sites import options, recompute
from mhc_rewrite.sites.streams import collapse
from mhc_rewrite.torch_private import (
    KeepsPrecision,
    frees_parameters,
    inside_function_transform,
    optimizers_sum_shares,
)


class Portable:
    """Whether sites call torch's own operators alone, for graphs that are to run where this package is not."""

    on = False


def _plain_torch() -> bool:
    return Portable.on or torch.onnx.is_in_onnx_export() or inside_function_transform()


class Mix(NamedTuple):
    """What `pre` hands to `post`: `post` (tokens, n), `res` (tokens, n, n); fp32, or fp64 in an fp64 model."""

    post: Tensor
    res: Tensor


class HyperConnection(KeepsPrecision):
    """The coefficients of one site and the two mixes that use them; it never owns or calls the block.

        u, mix = site.pre(X)
        X = site.post(X, block(u), mix)

    Where the streams pass straight from one site to the next, the second does both in one: `X, u, mix =
    second.boundary(X, block(u), mix)`. Streams X are (..., n, C), or (B, n, C, ...) where `channel_dim` is 1, with n of
    one where all streams are equal; u and the block's output have no n axis.
    Parameters: phi, (nC, n^2 + 2n) for `mhc`; alpha (3,) for [pre, post, res]; bias (n^2 + 2n,), columns
    [pre | post | res row-major]; other connections have other numbers of columns. With `dynamic=False` bias is the only
    one, and phi and alpha are None. They stay fp32 when the model is made bf16 or fp16, and all arithmetic on them is
    in their dtype, under autocast as well. Source: arXiv:2512.24880, eq. 14 to 19.

    Args:
        width: C.
        config: expansion rate, connection, initialisation.
        index: the site's place in its stream; decides which streams it mostly reads and writes at the start.
        channel_dim: the axis of C in the block's input: -1, or 1 for channels-first trunks.
        device: of the parameters.
        dtype: of the parameters: fp64 in an fp64 model, fp32 otherwise.

    Raises:
        ConfigError: `mhc` on one stream can't preserve.
    """

    phi: Any  # nn.Parameter; None with dynamic=False, as is alpha
    alpha: Any
    bias: nn.Parameter
    # What gradients are to the ranks that share distributed parameters, where the streams are plain tensors: placements
    # that distributed/tensor.py gives. Elsewhere a site can't tell parts of the tokens from all of them.
    local_gradients: Any = None

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
        for name, shape in self._shapes().items():
            there = name == "bias" or self.config.dynamic
            made = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if there else None
            self.register_parameter(name, made)
        self.reset_parameters()

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return connection_of(self.config.connection).shapes(self.config.n, self.width)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Starts the parameters as `config.init` says; after `to_empty` too.

        Sharded ones (DTensor) get what the first rank draws: every rank that holds a part of them has to call this.
        """
        start = connection_of(self.config.connection).starts[self.config.init]
        form: Any = {"dtype": self.bias.dtype, "device": self.bias.device}
        mine = {name: getattr(self, name) for name in self._shapes()}
        made = {
            name: torch.empty(shape, **form) if mine[name] is None or is_dtensor(mine[name]) else mine[name]
            for name, shape in self._shapes().items()
        }
        start(made["phi"], made["alpha"], made["bias"], self.config.n, self.index)
        for name, value in made.items():
            p = mine[name]
            if p is not None and value is not p and not p.is_meta:
                from torch.distributed.tensor import distribute_tensor  # there already where a parameter is sharded

                p.copy_(distribute_tensor(value, p.device_mesh, p.placements))

    @torch.no_grad()
    def has_learned(self) -> bool:
        """Whether the parameters are others than `reset_parameters` gives; those that it draws at random aside."""
        if self.bias.is_meta:
            return False
        made: Any = {"index": self.index, "channel_dim": self.channel_dim, "device": "cpu", "dtype": self.bias.dtype}
        with torch.random.fork_rng(devices=[]):
            starts = [list(HyperConnection(self.width, self.config, **made).parameters()) for _ in range(2)]
        parameters: Any = self.parameters()
        mine = [p.full_tensor() if is_dtensor(p) else p for p in parameters]
        return any(torch.equal(a, b) and not torch.equal(a, p.cpu()) for a, b, p in zip(*starts, mine))

    def options(self) -> dict[str, Any]:
        """What decides, beside the parameters, which function the site computes."""
        return {**self.config.function(), "channel_dim": self.channel_dim}

    def get_extra_state(self) -> Tensor:
        """The options, which go with the parameters in every state dict."""
        return options.to_tensor(self.options(), self.bias.device)

    def set_extra_state(self, state: Any) -> None:
        """Holds the options of weights that are being loaded against this site's.

        Raises:
            SitesError: they differ, so that the weights would compute another function here.
        """
        if not isinstance(state, Tensor) or state.is_meta:
            return  # torch.distributed.checkpoint gives an object of its own where the weights have none
        # What weights of an earlier version say nothing of was as it is by default now.
        theirs, mine = {**MHCConfig().function(), **options.from_tensor(state)}, self.options()
        other = sorted(key for key in theirs.keys() | mine.keys() if theirs.get(key) != mine.get(key))
        if other:
            said = [", ".join(f"{key}={given.get(key)!r}" for key in other) for given in (theirs, mine)]
            raise SitesError(
                f"These weights are of a site with {said[0]}, and HyperConnection({self.extra_repr()}) has {said[1]}: "
                "with them it would compute another function. Convert the model with the options of the weights."
            )

    def coefficients(self, streams: Tensor) -> Coefficients:
        """H_pre (tokens, n), H_post (tokens, n), H_res (tokens, n, n) of a state in this site's layout, by the
        reference: for a look at a trained site, not for training it."""
        phi, alpha, bias, kind, iterations, eps_norm = self.operands(streams.dtype, is_dtensor(streams))
        raw, _ = reference.project(self._tokens_last(streams), phi, kind, eps_norm)
        return reference.coefficients(raw, alpha, bias, kind, iterations)

    def forward(
        self, streams: Tensor, branch: Tensor | None = None, h_post: Tensor | None = None, h_res: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """All that reads the parameters, for the hooks of whoever keeps them elsewhere: `pre` of the state alone,
        `boundary` with what the site before hands over; u, H_post and H_res, behind the next state if there is one.
        """
        if branch is None:
            operands = self.operands(streams.dtype, is_dtensor(streams))
            u, post, res, *_ = self._operators().pre(self._tokens_last(streams), *operands)
            return self._as_given(u), post, res
        operands = self.operands(torch.promote_types(streams.dtype, branch.dtype), is_dtensor(streams))
        mixed, u, post, res, *_ = self._operators().boundary(
            self._tokens_last(streams), self._branch(branch), h_post, h_res, *operands
        )
        return self._streams_as_given(mixed), self._as_given(u), post, res

    def pre(self, streams: Tensor) -> tuple[Tensor, Mix]:
        """What the block reads, in the dtype of `streams`, and the coefficients that `post` needs."""
        u, *mix = self(streams)
        return u, Mix(*mix)

    def post(self, streams: Tensor, branch: Tensor, mix: Mix) -> Tensor:
        """The next state, in the wider of the dtypes of `streams` and `branch`."""
        mixed = self._operators().post(self._tokens_last(streams), self._branch(branch), mix.post, mix.res)
        return self._streams_as_given(mixed)

    def boundary(self, streams: Tensor, branch: Tensor, mix: Mix) -> tuple[Tensor, Tensor, Mix]:
        """The `post` of the site before, whose `mix` it is, and this site's `pre`: the next state, u and the mix."""
        mixed, u, *next_mix = self(streams, branch, *mix)
        return mixed, u, Mix(*next_mix)

    def post_collapse(self, streams: Tensor, branch: Tensor, mix: Mix) -> Tensor:
        """The mean of what `post` gives over its streams."""
        if _plain_torch():
            return collapse(self.post(streams, branch, mix), self.channel_dim, "mean")
        y = self._operators().post_collapse(self._tokens_last(streams), self._branch(branch), mix.post, mix.res)
        # Cloned, as the trunk may be written to behind the streams, which autograd forbids on an operator's result.
        return self._as_given(y).clone(memory_format=torch.contiguous_format)

    def _operators(self) -> Any:
        if _plain_torch():
            return reference
        length = self.config.recompute
        if length is None or torch.compiler.is_compiling():
            return ops
        # A conversion puts a number in place of "auto". A site by itself knows of no other.
        return recompute.Operators(1 if length == "auto" else length, copies=frees_parameters(self))

    def operands(self, streams: torch.dtype, distributed: bool = False) -> tuple[Any, ...]:
        """phi, alpha, bias, kind, iterations and eps as the operators take them for streams of this dtype, which are
        DTensors (`distributed`) or not.

        Never narrower than fp32: a policy of mixed precision (FSDP) hands over parameters in bf16, and what is made of
        them in bf16 is an H_res whose rows sum to 1 within 2e-3 only.
        """
        config, connection = self.config, connection_of(self.config.connection)
        dtype = torch.promote_types(torch.promote_types(streams, self.bias.dtype), torch.float32)
        phi, alpha, bias = self._values(distributed)
        kind = config.connection
        if not config.dynamic:
            phi, alpha = bias.new_empty(config.n * self.width, 0), bias.new_zeros(3)
            kind = static(kind)
        elif connection.projection is not None:
            phi = connection.projection(phi, config.n)
        if len(config.learn) < len(MAPPINGS):
            columns = [config.n, config.n, len(bias) - 2 * config.n]
            bias = self._learning(bias, columns)
            if config.dynamic:
                phi, alpha = self._learning(phi, columns), self._learning(alpha, [1, 1, 1])
        return *(operand.to(dtype) for operand in (phi, alpha, bias)), kind, config.sinkhorn_iterations, config.eps_norm

    def _values(self, distributed: bool) -> tuple[Any, ...]:
        """phi, alpha and bias, as DTensors or as plain tensors.

        Raises:
            SitesError: the parameters are one and the streams the other, and nobody said what follows for gradients.
        """
        mine: tuple[Any, ...] = self.phi, self.alpha, self.bias
        if is_dtensor(self.bias) and not optimizers_sum_shares():  # a gradient passes through it as the sum
            mine = tuple(p if p is None else p.redistribute(placements=p.placements) for p in mine)
        if is_dtensor(self.bias) == distributed:
            return mine
        if distributed or self.local_gradients is None:
            streams, parameters = ("DTensors", "are not") if distributed else ("plain tensors", "are DTensors")
            raise SitesError(
                f"The streams that HyperConnection({self.extra_repr()}) got are {streams}, and its parameters "
                f"{parameters}. For tensor and sequence parallelism put mhc_rewrite.distributed.SiteParallel into the "
                "plan of parallelize_module, for this site as for all others. Where FSDP shards the site, call the "
                "module that it was sharded with, not a part of it."
            )
        return tuple(p if p is None else p.to_local(grad_placements=self.local_gradients) for p in mine)

    def _learning(self, operand: Tensor, sizes: list[int]) -> Tensor:
        """The operand, whose columns of mappings that are not to learn hand no gradient on."""
        parts, start = [], 0
        for name, size in zip(MAPPINGS, sizes, strict=True):
            part = operand.narrow(-1, start, size)
            parts.append(part if name in self.config.learn else part.detach())
            start += size
        return torch.cat(parts, dim=-1)

    def _tokens_last(self, streams: Tensor) -> Tensor:
        """(tokens, n, C)."""
        return streams if self.channel_dim == -1 else streams.movedim((1, 2), (-2, -1))

    def _streams_as_given(self, streams: Tensor) -> Tensor:
        return streams if self.channel_dim == -1 else streams.movedim((-2, -1), (1, 2))

    def _branch(self, branch: Tensor) -> Tensor:
        """(tokens, C)."""
        return branch if self.channel_dim == -1 else branch.movedim(1, -1)

    def _as_given(self, u: Tensor) -> Tensor:
        return u if self.channel_dim == -1 else u.movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{self.config.connection}, n_streams={self.config.n}, width={self.width}, index={self.index}"

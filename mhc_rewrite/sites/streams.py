"""What rewritten forwards call besides the sites: the streams' entry, exit, and operations lifted to every stream.

A trunk tensor with C on `channel_dim` becomes streams with n on the axis before C: (..., C) -> (..., n, C) for -1,
(B, C, ...) -> (B, n, C, ...) for 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhc_rewrite.connections.base import first_group
from mhc_rewrite.torch_private import constant_while_tracing


def stream_dim(channel_dim: int) -> int:
    """The axis of n in the streams."""
    return -2 if channel_dim == -1 else 1


def expand(x: Tensor, n: int, channel_dim: int) -> Tensor:
    """The entry: n equal streams, as a view."""
    dim = stream_dim(channel_dim)
    streams = x.unsqueeze(dim)
    sizes = [-1] * streams.dim()
    sizes[dim] = n
    return streams.expand(sizes)


def resized(streams: Tensor, n: int, channel_dim: int) -> Tensor:
    """n streams of another number of them, with the same mean. One stream, which stands for equal ones, stays one.

    Every new stream is a weighted mean of old ones, as `shares` says.
    """
    dim = stream_dim(channel_dim)
    if streams.shape[dim] == n or streams.shape[dim] == 1:
        return streams
    # Weights rounded to bf16 would move the mean.
    dtype = torch.promote_types(streams.dtype, torch.float32)
    parts = streams.to(dtype).unbind(dim)
    made = []
    for row in _shares(len(parts), n):
        first, *more = [part if share == 1 else part * share for part, share in zip(parts, row, strict=True) if share]
        made.append(sum(more, first))
    return torch.stack(made, dim).to(streams.dtype)


@constant_while_tracing
def _shares(before: int, n: int) -> tuple[tuple[float, ...], ...]:
    return shares(before, n)


@functools.cache
def shares(before: int, n: int) -> tuple[tuple[float, ...], ...]:
    """The (n, before) matrix that makes n streams: not negative, rows sum to 1, columns to n / before.

    So it keeps the mean, makes equal streams of equal ones, and no stream larger than the largest. "preserve" needs
    more: where the streams of each of its two groups are equal, so are the new streams of each group, or a site would
    not read the mean. Every old stream has the mass n and every new one `before`; what the groups have in common stays
    in its group, the rest of the larger one goes to the other, and within two groups masses are laid along each other
    in order. Where both numbers are even and one divides the other, this repeats streams, or averages neighbours.
    """
    old, new = (
        ((0, first_group(number)), (first_group(number), number - first_group(number))) for number in (before, n)
    )
    matrix = [[0.0] * before for _ in range(n)]
    masses = [size * n for _, size in old], [size * before for _, size in new]
    stays = [min(have, need) for have, need in zip(*masses)]
    for g, (from_, size) in enumerate(old):
        for h, (to, number) in enumerate(new):
            mass = stays[g] if g == h else min(masses[0][g] - stays[g], masses[1][h] - stays[h])
            for j in range(size):
                for i in range(number):
                    common = min((j + 1) * number, (i + 1) * size) - max(j * number, i * size)
                    if mass and common > 0:
                        matrix[to + i][from_ + j] = mass * common / (size * number * before)
    return tuple(map(tuple, matrix))


def collapse(streams: Tensor, channel_dim: int, how: str) -> Tensor:
    """The exit: the streams' mean or sum."""
    dim = stream_dim(channel_dim)
    return streams.mean(dim) if how == "mean" else streams.sum(dim)


def collapse_gradient(gradient: Tensor, channel_dim: int) -> Tensor:
    """The trunk's gradient of the streams': to move the trunk is to move all of them."""
    return collapse(gradient, channel_dim, "sum")


def spread_gradient(new: Tensor, old: Tensor, channel_dim: int) -> Tensor:
    """The streams' gradients `old`, changed alike so that the trunk's becomes `new`."""
    dim = stream_dim(channel_dim)
    return old + ((new - collapse_gradient(old, channel_dim)) / old.shape[dim]).unsqueeze(dim)


def read_mean(streams: Tensor, channel_dim: int) -> Tensor:
    """What a reader of the trunk gets that is no site's branch."""
    return streams.mean(stream_dim(channel_dim))


def one_stream(streams: Tensor, channel_dim: int) -> Tensor:
    """A tensor of the trunk's shape, dtype and device, for readers of these alone; a view."""
    return streams.select(stream_dim(channel_dim), 0)


def plain_add(streams: Tensor, branch: Tensor, channel_dim: int) -> Tensor:
    """An excluded site: X'[i] = X[i] + y."""
    return streams + branch.unsqueeze(stream_dim(channel_dim))


def align(operand: Tensor, rank: int, channel_dim: int) -> Tensor:
    """An operand that broadcasts against a trunk of `rank` axes, made to broadcast against its streams."""
    dim = stream_dim(channel_dim)
    axes_behind = 1 if dim == -2 else rank - 1
    return operand.unsqueeze(dim) if operand.dim() > axes_behind else operand


def shared_dropout(streams: Tensor, p: float, training: bool, channel_dim: int) -> Tensor:
    """Dropout on the trunk: one mask for all streams, drawn as the original draws it."""
    if not training or p == 0.0:
        return streams
    mask = F.dropout(torch.ones_like(one_stream(streams, channel_dim)), p, True)
    return streams * mask.unsqueeze(stream_dim(channel_dim))


def shared_dropout_module(dropout: nn.Module, streams: Tensor, channel_dim: int) -> Tensor:
    """The same for a dropout module of any kind."""
    if not dropout.training:
        return streams
    mask = dropout(torch.ones_like(one_stream(streams, channel_dim)))
    return streams * mask.unsqueeze(stream_dim(channel_dim))


def reshape_tokens(streams: Tensor, channel_dim: int, *shape: Any) -> Tensor:
    """A reshape of the trunk that leaves C alone: of the axes before it where it is last, of those behind it where it
    is axis 1."""
    sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    if channel_dim == -1:
        return streams.reshape(*sizes[:-1], streams.shape[-2], streams.shape[-1])
    return streams.reshape(*streams.shape[:3], *sizes[2:])


def with_number(streams: Tensor, index: Any, value: float) -> Tensor:
    """`streams[index] = value`, on a copy: streams may share memory."""
    written = streams.clone(memory_format=torch.contiguous_format)
    written[index] = value
    return written


def placed(like: Tensor, index: Any, part: Tensor) -> Tensor:
    """`part` at the places `index` of a tensor of the form of `like`, and zeros elsewhere."""
    whole = part.new_zeros(like.shape)
    whole[index] = part
    return whole


def in_layout_of(mix: Any, streams: Tensor, channel_dim: int) -> Any:
    """What a site's `pre` hands to its `post`, where the trunk's tokens were reshaped between the two."""
    post, res = mix
    n = post.shape[-1]
    tokens = streams.shape[:-2] if channel_dim == -1 else (streams.shape[0], *streams.shape[3:])
    return type(mix)(post.reshape(*tokens, n), res.reshape(*tokens, n, n))


def unless_changed(streams: Tensor, mean: Tensor, result: Tensor, channel_dim: int) -> Tensor:
    """The streams behind a module that gave their mean back as it was; new ones where it did not."""
    return streams if result is mean else expand(result, streams.shape[stream_dim(channel_dim)], channel_dim)


def fold(module: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A module on a channels-first trunk, the one tensor that it is given, with the streams as part of the batch."""
    (streams,) = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    batch, n = streams.shape[:2]

    def folded(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if getattr(module, "inplace", False):  # where axes fold as a view, autograd would refuse
            value = value.clone(memory_format=torch.contiguous_format)
        return value.flatten(0, 1)

    result = module(*(folded(value) for value in args), **{name: folded(value) for name, value in kwargs.items()})
    return result.unflatten(0, (batch, n))

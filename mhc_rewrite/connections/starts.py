"""What starts have in common: how H_pre and H_post begin, whatever makes H_res.

All but "paper" keep the mean of the streams, which is the residual, and read it: H_post has mean 1, the columns of
H_res sum to 1, and H_pre is 1/n but for directions in which the streams do not differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from mhc_rewrite.connections.base import Start, first_group
from mhc_rewrite.errors import ConfigError

ALPHA = 0.01
# Of "preserve": how far H_post is apart between the groups of streams, and H_pre within each of them.
APART, READ_APART = 0.5, 0.8
# Of "preserve" and "equal": how much of H_res is the uniform matrix; the rest is the identity.
UNIFORM = 0.2
# Of "equal" and "near_identity": the stream that a site mostly reads rotates with the site's index, as with equal H_pre
# on all streams they would never part.
PREFERRED_SHARE = 0.9
# Of "near_identity": exp(-8) beside exp(0).
OFF_DIAGONAL_LOGIT = -8.0

# n -> the streams of each group, and how far its H_post goes up and down; the mean over all streams is 0.
Groups = Callable[[int], Iterator[tuple[Sequence[int], float]]]
# (n, uniform) -> the logits by which H_res is (1 - uniform) I + (uniform / n) 1 1^T, or what comes nearest to it.
Mixing = Callable[[int, float], Sequence[float]]


def halves(n: int) -> Iterator[tuple[Sequence[int], float]]:
    first = first_group(n)
    yield range(first), (n - first) / first
    yield range(first, n), -1.0


def parts(bias: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of pre, post and res."""
    pre, post, res = bias.split([n, n, bias.shape[-1] - 2 * n])
    return pre, post, res


def still(phi: Tensor, alpha: Tensor, n: int) -> None:
    """Nothing depends on the state yet.

    Raises:
        ConfigError: one stream.
    """
    if n == 1:
        raise ConfigError("n_streams=1 can't preserve: a sigmoid does not reach H_pre = 1. A plain residual does it.")
    phi.zero_()
    alpha.fill_(ALPHA)


def part_groups(
    pre: Tensor, post: Tensor, index: int, groups: Groups = halves, apart: float = APART, read_apart: float = READ_APART
) -> None:
    """Groups get different H_post, in turns, so that they part at the first site. All streams of a group stay equal so,
    and a site reads the mean of all, as its H_pre differs from 1/n within groups alone."""
    n = len(pre)
    side = (-1) ** index * apart
    for streams, direction in groups(n):
        size = len(streams)
        for place, stream in enumerate(streams):
            post[stream] = logit((1 + side * direction) / 2)
            deviation = read_apart if place == index % size else -read_apart / (size - 1)
            pre[stream] = logit((1 + (deviation if size > 1 else 0.0)) / n)


def keep_equal(pre: Tensor, post: Tensor, index: int) -> None:
    """Streams stay equal, so that whatever stands between two sites may be done to each of them."""
    n = len(pre)
    pre.fill_(logit((1 - PREFERRED_SHARE) / (n - 1)))
    pre[index % n] = logit(PREFERRED_SHARE)
    post.zero_()


def preferring_one(mixing: Callable[[int], Sequence[float]]) -> Start:
    """How the published code of mHC-lite, KromHC and TBP begins, with these logits of H_res."""

    def start(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
        phi.zero_()
        alpha.fill_(ALPHA)
        pre, post, res = parts(bias, n)
        for part in (pre, post):
            part.fill_(-1.0)
            part[index % n] = 1.0
        res.copy_(res.new_tensor(mixing(n)))

    return start


def starts(mixing: Mixing, paper: Start, groups: Groups = halves) -> dict[str, Start]:
    """A start for each name of `STARTS`, from how the logits of a moderate H_res are found."""

    def preserve(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
        still(phi, alpha, n)
        pre, post, res = parts(bias, n)
        part_groups(pre, post, index, groups)
        res.copy_(res.new_tensor(mixing(n, UNIFORM)))

    def equal(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
        still(phi, alpha, n)
        pre, post, res = parts(bias, n)
        keep_equal(pre, post, index)
        res.copy_(res.new_tensor(mixing(n, UNIFORM)))

    def near_identity(phi: Tensor, alpha: Tensor, bias: Tensor, n: int, index: int) -> None:
        still(phi, alpha, n)
        pre, post, res = parts(bias, n)
        keep_equal(pre, post, index)
        beside = math.exp(OFF_DIAGONAL_LOGIT)
        res.copy_(res.new_tensor(mixing(n, n * beside / (1 + (n - 1) * beside))))

    return {"preserve": preserve, "equal": equal, "near_identity": near_identity, "paper": paper}


def logit(p: float) -> float:
    return math.log(p / (1 - p))

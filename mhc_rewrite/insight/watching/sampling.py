"""What is taken from one step of training: by hooks, which are there during that step alone.

Of the first forward with gradients that the model runs in the step, every site hands over, for some tokens, what it has
computed anyway: H_post, H_res and the state behind it; H_pre, which stays inside the operators, is made once more. A
checkpoint that runs a forward again in backward adds nothing but the gradients that arrive there.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.connections import connection_of
from mhc_rewrite.insight.watching.format import MAPPINGS
from mhc_rewrite.insight.watching.measures import state_products
from mhc_rewrite.kernels import reference
from mhc_rewrite.sites.hyper_connection import HyperConnection, Mix
from mhc_rewrite.sites.streams import stream_dim

GOLDEN = 0.6180339887498949


@dataclass
class Seen:
    """Of one call of a site, for some tokens.

    Attributes:
        tokens: of the whole call.
        pre, post, res: (k, n), (k, n), (k, n, n).
        after: of the state behind the site, as `state_products` gives it; None until that is there.
    """

    tokens: int
    pre: Tensor
    post: Tensor
    res: Tensor
    after: Tensor | None = None


class Hook:
    """A hook that copies of the model do not take along."""

    def __init__(self, function: Callable[..., Any] | None = None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        if self.function is not None:
            self.function(*args)

    def __deepcopy__(self, memo: Any) -> Hook:
        return Hook()

    def __reduce__(self) -> Any:
        return Hook, ()


class Sampling:
    """Hooks for one step.

    Args:
        roots: the modules of which one is called for a forward of the model.
        sites: every site with the numbers of its calls, in their order.
        tokens: how many are taken of a call, at most.

    Attributes:
        seen: by the number of the call.
        gradients: of the state that a call reads: the squared norm, None of equal streams, and that of the trunk's.
        loss: what the model returned under that name.
        compiled: whether a site ran in a compiled graph, where nothing can be seen.
    """

    def __init__(self, roots: Sequence[nn.Module], sites: Mapping[HyperConnection, Sequence[int]], tokens: int) -> None:
        self.seen: dict[int, Seen] = {}
        self.gradients: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.loss: Tensor | None = None
        self.compiled = False
        self._sites, self._tokens = sites, tokens
        self._depth = 0
        self._inside = self._done = False
        self._made: dict[int, tuple[int, Tensor]] = {}  # by where H_post lies: the call, and H_post, to stay there
        self._hooks = contextlib.ExitStack()
        self._posts = contextlib.ExitStack()
        for root in roots:
            before = root.register_forward_pre_hook(Hook(self._enter), prepend=True)
            after = root.register_forward_hook(Hook(self._leave), always_call=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)

    def close(self) -> None:
        self._posts.close()
        self._hooks.close()
        self._made.clear()

    # -- the forward ---------------------------------------------------------------------------------------------------

    def _enter(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            self.compiled = True
            return
        self._depth += 1
        if self._depth == 1 and not self._done and torch.is_grad_enabled():
            self._inside = True
            for site in self._sites:
                # Before FSDP's, which takes the parameters away behind the site.
                handle = site.register_forward_hook(Hook(self._see), prepend=True)
                self._hooks.callback(handle.remove)
                self._watch_post(site)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth = max(0, self._depth - 1)
        if self._depth == 0 and self._inside:
            self._inside, self._done = False, True
            self._posts.close()
            self._made = {}
            loss = result.get("loss") if isinstance(result, Mapping) else getattr(result, "loss", None)
            if isinstance(loss, Tensor) and loss.numel() == 1:
                self.loss = loss.detach()

    def _watch_post(self, site: HyperConnection) -> None:
        """The state behind a site is made by `post` where no other site follows, which is no call of the module."""
        site.post = functools.partial(self._post, site)  # type: ignore[method-assign]
        site.post_collapse = functools.partial(self._post_collapse, site)  # type: ignore[method-assign]
        for name in ("post", "post_collapse"):
            self._posts.callback(site.__dict__.pop, name, None)

    def _post(self, site: HyperConnection, streams: Tensor, branch: Tensor, mix: Mix) -> Tensor:
        made = HyperConnection.post(site, streams, branch, mix)
        if not torch.compiler.is_compiling():
            self._behind(mix.post, site, made)
        return made

    @torch.no_grad()
    def _behind(self, h_post: Tensor, site: HyperConnection, state: Tensor) -> None:
        number, _ = self._made.get(_memory(h_post), (None, None))
        if number is not None and self._inside:
            self.seen[number].after = state_products(_wide(_some(_last(state, site, 2), h_post, self._tokens)))

    def _post_collapse(self, site: HyperConnection, streams: Tensor, branch: Tensor, mix: Mix) -> Tensor:
        if not torch.compiler.is_compiling():
            self._before_collapse(site, streams, branch, mix)
        return HyperConnection.post_collapse(site, streams, branch, mix)

    @torch.no_grad()
    def _before_collapse(self, site: HyperConnection, streams: Tensor, branch: Tensor, mix: Mix) -> None:
        """The operator never makes the state."""
        number, _ = self._made.get(_memory(mix.post), (None, None))
        if number is not None and self._inside:
            seen = self.seen[number]
            X, y = (_wide(_some(_last(x, site, k), mix.post, self._tokens)) for x, k in ((streams, 2), (branch, 1)))
            seen.after = state_products(reference.post(X, y, seen.post, seen.res))

    def _see(self, site: HyperConnection, args: tuple[Tensor, ...], result: tuple[Tensor, ...]) -> None:
        if torch.compiler.is_compiling():
            self.compiled = True
            return
        numbers = self._sites[site]
        streams = args[0] if len(args) == 1 else result[0]
        if self._inside:
            if len(args) > 1:
                self._behind(args[2], site, streams)
            number = next((number for number in numbers if number not in self.seen), None)
            if number is not None:
                self._take(number, site, streams, *result[-2:])
                self._watch_gradient(number, site, streams)
        elif self._depth == 0 and len(numbers) == 1:  # a checkpoint's forward, in backward
            self._watch_gradient(numbers[0], site, streams)

    @torch.no_grad()
    def _take(self, number: int, site: HyperConnection, streams: Tensor, h_post: Tensor, h_res: Tensor) -> None:
        self._made[_memory(h_post)] = number, h_post
        some = _some(_last(streams, site, 2), h_post, self._tokens)
        parts = (_some(h, h_post, self._tokens) for h in (h_post, h_res))
        self.seen[number] = Seen(math.prod(h_post.shape[:-1]), site.reading(some), *parts)

    # -- the backward --------------------------------------------------------------------------------------------------

    def _watch_gradient(self, number: int, site: HyperConnection, streams: Tensor) -> None:
        if torch.is_grad_enabled() and streams.requires_grad:
            streams.register_hook(functools.partial(self._gradient, number, stream_dim(site.channel_dim)))

    @torch.no_grad()
    def _gradient(self, number: int, dim: int, gradient: Tensor) -> None:
        if number not in self.gradients:  # that of another forward comes later
            whole = None if gradient.shape[dim] == 1 else _squared_norm(gradient)
            self.gradients[number] = whole, _squared_norm(gradient.sum(dim))


def _squared_norm(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return torch.linalg.vector_norm(tensor, dtype=dtype).square()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _last(tensor: Tensor, site: HyperConnection, axes: int) -> Tensor:
    """With the axes of streams and features, or of features alone, behind those of tokens."""
    if site.channel_dim == -1:
        return tensor
    return tensor.movedim((1, 2), (-2, -1)) if axes == 2 else tensor.movedim(1, -1)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _some(tensor: Tensor, h_post: Tensor, tokens: int) -> Tensor:
    """(k, ...): the same tokens of whatever has H_post's leading axes."""
    leading = h_post.shape[:-1]
    return tensor[_places(leading, tokens, h_post.device)] if leading else tensor.unsqueeze(0)


@functools.lru_cache(maxsize=8)
def _places(leading: torch.Size, tokens: int, device: torch.device) -> tuple[Tensor, ...]:
    """Some tokens: one in each of as many equal parts, at another place in each, as the first token of every text
    is like no other."""
    count = math.prod(leading)
    k = min(tokens, count)
    flat = [min(count - 1, int((i + (i * GOLDEN) % 1) * count / k)) for i in range(k)]
    return torch.unravel_index(torch.tensor(flat, dtype=torch.long, device=device), leading)


# -- parameters ----------------------------------------------------------------------------------------------------


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

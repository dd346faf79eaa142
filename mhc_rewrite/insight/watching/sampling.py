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

from mhc_rewrite.insight.watching.gradients import StateGradient
from mhc_rewrite.insight.watching.measures import state_products
from mhc_rewrite.insight.watching.tokens import in_front, some
from mhc_rewrite.kernels import reference
from mhc_rewrite.sites.hyper_connection import HyperConnection, Mix


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
        loss: what the model returned under that name.
        compiled: whether a site ran in a compiled graph, where nothing can be seen.
    """

    def __init__(self, roots: Sequence[nn.Module], sites: Mapping[HyperConnection, Sequence[int]], tokens: int) -> None:
        self.seen: dict[int, Seen] = {}
        self._gradients: dict[int, StateGradient] = {}
        self.loss: Tensor | None = None
        self.compiled = False
        self._sites, self._tokens = sites, tokens
        self._depth = 0
        self._inside = self._done = False
        self._args: tuple[Tensor, ...] = ()  # of the site that is called
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
                # Before FSDP's, which hand the site other tensors, and take its parameters away behind it.
                before = site.register_forward_pre_hook(Hook(self._remember), prepend=True)
                behind = site.register_forward_hook(Hook(self._see), prepend=True)
                self._hooks.callback(before.remove)
                self._hooks.callback(behind.remove)
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
            self.seen[number].after = state_products(_wide(some(in_front(state, site, 2), h_post, self._tokens)))

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
            X, y = (_wide(some(in_front(x, site, k), mix.post, self._tokens)) for x, k in ((streams, 2), (branch, 1)))
            seen.after = state_products(reference.post(X, y, seen.post, seen.res))

    def _remember(self, site: HyperConnection, args: tuple[Tensor, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._args = args

    def _see(self, site: HyperConnection, _: Any, result: tuple[Tensor, ...]) -> None:
        if torch.compiler.is_compiling():
            self.compiled = True
            return
        args, self._args = self._args, ()
        numbers = self._sites[site]
        streams = args[0] if len(args) == 1 else result[0]
        if self._inside:
            if len(args) > 1:
                self._behind(args[2], site, streams)
            number = next((number for number in numbers if number not in self.seen), None)
            if number is not None:
                self._take(number, site, streams, *result[-2:])
                self._watch_gradient(number, site, args, result)
        elif self._depth == 0 and len(numbers) == 1:  # a checkpoint's forward, in backward
            self._watch_gradient(numbers[0], site, args, result)

    @torch.no_grad()
    def _take(self, number: int, site: HyperConnection, streams: Tensor, h_post: Tensor, h_res: Tensor) -> None:
        self._made[_memory(h_post)] = number, h_post
        state = some(in_front(streams, site, 2), h_post, self._tokens)
        parts = (some(h, h_post, self._tokens) for h in (h_post, h_res))
        self.seen[number] = Seen(math.prod(h_post.shape[:-1]), _reading(site, state), *parts)

    def _watch_gradient(
        self, number: int, site: HyperConnection, args: tuple[Tensor, ...], result: tuple[Tensor, ...]
    ) -> None:
        if torch.is_grad_enabled() and number not in self._gradients:
            self._gradients[number] = StateGradient(site, args, result, self._tokens)

    def gradients(self) -> dict[int, tuple[Tensor | None, Tensor]]:
        """Of the state that a call reads, where one has arrived: the squared norm, None of equal streams, and that of
        the trunk's."""
        found = {number: gradient.squares() for number, gradient in self._gradients.items()}
        return {number: squares for number, squares in found.items() if squares is not None}


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _reading(site: HyperConnection, state: Tensor) -> Tensor:
    """H_pre (k, n) of (k, n, C)."""
    phi, alpha, bias, kind, _, eps_norm = site.operands(state.dtype)
    raw, _ = reference.project(state, phi, kind, eps_norm)
    return reference.coefficients(raw, alpha, bias, kind, iterations=1).pre  # which Sinkhorn-Knopp does not touch

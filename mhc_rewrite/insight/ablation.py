"""What a trained model uses its streams and sites for: the same model without one of them."""

from __future__ import annotations

import contextlib
import difflib
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.conversion.converted import find_converted, site_at
from mhc_rewrite.conversion.patterns import matches
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.kernels import reference
from mhc_rewrite.plans import RewritePlan
from mhc_rewrite.sites.hyper_connection import HyperConnection


@contextlib.contextmanager
def ablate(
    model: nn.Module,
    *,
    stream: int | None = None,
    sites: str | Sequence[str] | None = None,
    mixing: bool = True,
) -> Iterator[None]:
    """Inside, the model runs without something; behind it, it is as before.

        with torch.no_grad():
            whole = model(**batch).loss
            with ablate(model, stream=2):
                without = model(**batch).loss

    Compiled code runs eagerly inside, where nothing else would be seen of the change.

    Args:
        model: converted; in wrappers too.
        stream: that takes part in nothing: the mean of the others stands in its place, before each site and behind it.
            So a model whose streams are alike stays as it is.
        sites: patterns of sites as in `include`. With neither of the others, the sites that are left out: their blocks
            add nothing, and the streams pass unmixed. With one of them, where it holds; everywhere if left out.
        mixing: False puts the identity in the place of H_res.

    Raises:
        MHCError: the model is not converted.
        ConfigError: nothing is to be left out, or more than one thing; a pattern matches no site; no such stream.
    """
    if (stream is not None) + (not mixing) > 1:
        raise ConfigError("ablate leaves out one thing at a time: a stream, or the mixing, or sites.")
    if stream is None and mixing and sites is None:
        raise ConfigError("ablate is to leave something out: give stream=, sites= or mixing=False.")
    _, converted, conversion = find_converted(model)
    chosen = _chosen(converted, conversion.plan, sites)
    if stream is not None:
        _check_stream(stream, chosen)
    change: Any = (
        functools.partial(_without_stream, stream) if stream is not None else _unmixed if not mixing else _left_out
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager())
        for site in chosen:
            stack.callback(site.register_forward_hook(change, prepend=True).remove)
        yield


class _Paused:
    times = 0
    stance: Any = None


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Inside, compiled code is paused: it knows of no hooks that came later. Whoever pauses it may go in any order."""
    if "torch._dynamo" not in sys.modules:  # which nothing can be compiled without
        yield
        return
    if not _Paused.times:
        _Paused.stance = torch.compiler.set_stance("force_eager")
    _Paused.times += 1
    try:
        yield
    finally:
        _Paused.times -= 1
        if not _Paused.times:
            _Paused.stance.__exit__(None, None, None)


def _chosen(model: nn.Module, plan: RewritePlan, sites: str | Sequence[str] | None) -> list[HyperConnection]:
    own = [site for site in plan.sites if not site.excluded]
    patterns = ("*",) if sites is None else (sites,) if isinstance(sites, str) else tuple(sites)
    for pattern in patterns:
        if not any(matches(site, (pattern,)) for site in own):
            names = list(dict.fromkeys(name for site in own for name in (site.name, site.holder)))
            near = difflib.get_close_matches(pattern, names, 3, 0.4) or names[:3]
            raise ConfigError(f"sites={pattern!r} matches no site. Near: {', '.join(map(repr, near))}.")
    return list(dict.fromkeys(site_at(model, site.name) for site in own if matches(site, patterns)))


def _check_stream(stream: int, sites: Sequence[HyperConnection]) -> None:
    fewest = min(site.config.n for site in sites)
    if not isinstance(stream, int) or isinstance(stream, bool) or not 0 <= stream < fewest:
        raise ConfigError(f"stream must be an int from 0 to {fewest - 1}, not {stream!r}: these sites have {fewest}.")


def _left_out(site: HyperConnection, args: Any, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *before, post, res = result
    return *before, torch.zeros_like(post), _identity(res)


def _unmixed(site: HyperConnection, args: Any, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    *before, res = result
    return *before, _identity(res)


def _identity(res: Tensor) -> Tensor:
    return torch.eye(res.shape[-1], dtype=res.dtype, device=res.device).expand(res.shape).contiguous()


def _without_stream(
    stream: int, site: HyperConnection, args: tuple[Tensor, ...], result: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    streams = args[0] if len(args) == 1 else result[0]
    last = site.channel_dim == -1
    state = streams if last else streams.movedim((1, 2), (-2, -1))
    n = site.config.n
    if state.shape[-2] == n:
        state = _in_its_place(n, stream, state) @ state
    phi, alpha, bias, kind, iterations, eps_norm = site.operands(state.dtype)
    raw, _ = reference.project(state, phi, kind, eps_norm)
    h = reference.coefficients(raw, alpha, bias, kind, iterations)
    u = reference.mix_in(state.to(h.pre.dtype), h.pre).to(streams.dtype)
    # The state that `post` mixes is the one from before, so H_res puts the mean in the stream's place; and behind too.
    others = _in_its_place(n, stream, h.res)
    post, res = (others @ h.post.unsqueeze(-1)).squeeze(-1), others @ h.res @ others
    made = (u if last else u.movedim(-1, 1), post, res)
    return made if len(args) == 1 else (streams, *made)


def _in_its_place(n: int, stream: int, like: Tensor) -> Tensor:
    """The (n, n) matrix that puts the mean of the other streams in the place of one."""
    matrix = torch.eye(n, dtype=like.dtype, device=like.device)
    matrix[stream] = 1 / (n - 1)
    matrix[stream, stream] = 0
    return matrix

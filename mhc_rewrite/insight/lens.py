"""What each stream would predict at each depth, through the model's own head: a logit lens by stream."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.conversion.converted import find_converted, site_at
from mhc_rewrite.errors import ConfigError, MHCError
from mhc_rewrite.insight.ablation import eager
from mhc_rewrite.sites.hyper_connection import HyperConnection, Mix
from mhc_rewrite.sites.streams import expand, stream_dim


@dataclass(frozen=True)
class StreamLens:
    """What `stream_lens` found. Tensors are (depth, column, ...), with the axes of the model's logits but the last
    behind: a depth is the state that a site reads, and at the end what the last site leaves; a column is a stream, and
    the last one their mean, which is the usual logit lens.

    Attributes:
        depths: names of the depths: sites, and "end".
        columns: "0", "1", ..., "mean". A site with fewer streams has NaN, and -1 for a prediction.
        predicted: the number of the likeliest class.
        probability: of that one.
        entropy: of the distribution, in nats.
        of_final: the probability of what the whole model predicts.
        final: what the whole model predicts, (...).
    """

    depths: tuple[str, ...]
    columns: tuple[str, ...]
    predicted: Tensor
    probability: Tensor
    entropy: Tensor
    of_final: Tensor
    final: Tensor

    def plot(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        at: tuple[int, ...] | None = None,
        decode: Callable[[int], str] = str,
    ) -> Any:
        """A heat map at one place: the probability of what the model predicts there, and what each stream would.

        Args:
            file: where the picture is saved, if anywhere.
            at: the place in `final`; the last token of the first text if left out.
            decode: from a class's number to what stands in the picture.

        Returns:
            matplotlib's figure.

        Raises:
            MHCError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MHCError("plot needs matplotlib: pip install matplotlib") from error
        place = (0,) * (self.final.dim() - 1) + (-1,) if at is None and self.final.dim() else at or ()
        here: Any = (..., *place)
        shown, words = self.of_final[here], self.predicted[here]
        size = (2 + 1.1 * len(self.columns), 1.5 + 0.3 * len(self.depths))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(shown.numpy(), aspect="auto", vmin=0, vmax=1, cmap="viridis")
        for row, line in enumerate(words.tolist()):
            for column, word in enumerate(line):
                if word >= 0:
                    colour = "black" if float(shown[row, column]) > 0.6 else "white"
                    axes.text(
                        column, row, decode(word), ha="center", va="center", color=colour, fontsize=8, clip_on=True
                    )
        axes.set_xticks(range(len(self.columns)), self.columns)
        axes.set_yticks(range(len(self.depths)), self.depths, fontsize=7)
        axes.set(xlabel="stream", title=f"What each stream would predict; the model: {decode(int(self.final[here]))}")
        figure.colorbar(image, label="probability of what the model predicts")
        if file is not None:
            figure.savefig(file, dpi=150)
        return figure


@torch.no_grad()
def stream_lens(
    model: nn.Module, inputs: Mapping[str, Any] | tuple[Any, ...] | Tensor, *, trunk: int = -1
) -> StreamLens:
    """Runs a model's end on each stream of each depth in the place of all streams.

    The whole model runs once for every depth and column, in evaluation mode: its end is whatever lies behind the last
    site, and only the model knows that.

    Args:
        model: converted; its result is a tensor of logits, or has them as `logits` or first.
        inputs: of one call: keyword arguments, positional ones, or a tensor.
        trunk: the number of the residual stream in the plan, where there are several; the last one by default.

    Raises:
        MHCError: the model is not converted, or gives no logits.
        ConfigError: there is no such residual stream.
    """
    _, converted, conversion = find_converted(model)
    found = conversion.plan.streams
    if not -len(found) <= trunk < len(found):
        raise ConfigError(f"trunk={trunk!r}: {conversion.plan.model} has {len(found)} residual streams.")
    names = dict.fromkeys(site.name for site in found[trunk].sites if not site.excluded)
    sites = {name: site_at(converted, name) for name in names}
    last = list(sites.values())[-1]
    args = (inputs,) if isinstance(inputs, Tensor) else () if isinstance(inputs, Mapping) else tuple(inputs)
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    with _evaluation(model), eager():
        end = _End(last)
        with end, _reading(sites) as states:
            final = _logits(model(*args, **kwargs))
        if end.state is None:
            raise MHCError(f"{list(sites)[-1]!r}, the last site of this residual stream, was not called.")
        states.append(("end", end.state))
        n = max(state.shape[stream_dim(last.channel_dim)] for _, state in states)
        told: list[list[tuple[Tensor, ...]]] = []
        nothing = tuple(torch.full(final.shape[:-1], value) for value in (-1, torch.nan, torch.nan, torch.nan))
        for _, state in states:
            told.append([])
            for given in _columns(state, n, last.channel_dim):
                if given is None:
                    told[-1].append(nothing)
                    continue
                with _End(last, end.calls, given):
                    told[-1].append(_told(_logits(model(*args, **kwargs)), final))
    tables: list[Tensor] = [torch.stack([torch.stack([one[k] for one in row]) for row in told]) for k in range(4)]
    columns = (*map(str, range(n)), "mean")
    depths = tuple(name for name, _ in states)
    predicted, probability, entropy, of_final = tables
    return StreamLens(depths, columns, predicted, probability, entropy, of_final, final.argmax(-1).cpu())


class _End:
    """What the last site leaves, seen, or another trunk in its place.

    Args:
        last: the site.
        calls: how often it leaves a state in a run: the last of these is replaced.
        trunk: the replacement.
    """

    def __init__(self, last: HyperConnection, calls: int = 0, trunk: Tensor | None = None) -> None:
        self.last, self.until, self.trunk = last, calls, trunk
        self.calls = 0
        self.state: Tensor | None = None

    def __enter__(self) -> None:
        self.last.post = self._post  # type: ignore[method-assign]
        self.last.post_collapse = self._post_collapse  # type: ignore[method-assign]

    def __exit__(self, *_: Any) -> None:
        del self.last.__dict__["post"], self.last.__dict__["post_collapse"]

    def _post(self, streams: Tensor, branch: Tensor, mix: Mix) -> Tensor:
        self.calls += 1
        self.state = HyperConnection.post(self.last, streams, branch, mix)
        if self.trunk is not None and self.calls == self.until:
            return expand(self.trunk, self.last.config.n, self.last.channel_dim).to(self.state.dtype).contiguous()
        return self.state

    def _post_collapse(self, streams: Tensor, branch: Tensor, mix: Mix) -> Tensor:
        state = self._post(streams, branch, mix)
        return state.mean(stream_dim(self.last.channel_dim))


@contextlib.contextmanager
def _reading(sites: Mapping[str, HyperConnection]) -> Iterator[list[tuple[str, Tensor]]]:
    """The states that the sites read, in the order of calls."""
    states: list[tuple[str, Tensor]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda site, args, result: states.append((name, args[0] if len(args) == 1 else result[0]))

    with contextlib.ExitStack() as stack:
        for name, site in sites.items():
            stack.callback(site.register_forward_hook(note(name)).remove)
        yield states


def _columns(state: Tensor, n: int, channel_dim: int) -> Iterator[Tensor | None]:
    """Every stream, and their mean. One stream, which stands for equal ones, is all of them."""
    dim = stream_dim(channel_dim)
    own = state.unbind(dim)
    yield from (own[0] if len(own) == 1 else own[k] if k < len(own) else None for k in range(n))
    yield state.mean(dim)


def _told(logits: Tensor, final: Tensor) -> tuple[Tensor, ...]:
    share = logits.softmax(-1)
    probability, predicted = share.max(-1)
    of_final = share.gather(-1, final.argmax(-1, keepdim=True)).squeeze(-1)
    return tuple(x.cpu() for x in (predicted, probability, torch.special.entr(share).sum(-1), of_final))


def _logits(result: Any) -> Tensor:
    found = result.get("logits") if isinstance(result, Mapping) else getattr(result, "logits", None)
    if found is None:
        found = result[0] if isinstance(result, (tuple, list)) and result else result
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() == 0:
        raise MHCError(
            "The model gives no logits: a tensor, `logits`, or a tuple that begins with them, but "
            f"{type(result).__name__}."
        )
    return found.float() if found.dtype != torch.float64 else found


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

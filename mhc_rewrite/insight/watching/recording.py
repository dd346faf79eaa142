"""`watch`: a training run, looked at in every so many steps."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mhc_rewrite.conversion.converted import find_converted, site_at
from mhc_rewrite.errors import ConfigError, DrawingError, RunFileError
from mhc_rewrite.insight.ablation import eager
from mhc_rewrite.insight.drawing import draw
from mhc_rewrite.insight.watching.figures import OfParameters, Part, in_a_few_words, joined, part, sample, to_cpu
from mhc_rewrite.insight.watching.format import MAPPINGS, Header, SiteCall, Writer, read
from mhc_rewrite.insight.watching.gradients import columns, parameter_gradients
from mhc_rewrite.insight.watching.sampling import Sampling
from mhc_rewrite.plans import RewritePlan
from mhc_rewrite.sites.hyper_connection import HyperConnection
from mhc_rewrite.version import VERSION

EPSILON = 1e-8  # of torch's Adam and AdamW


def watch(
    model: nn.Module,
    *,
    every: int = 10,
    to: str | os.PathLike[str] | None = None,
    tokens: int = 128,
    optimizer: torch.optim.Optimizer | None = None,
    resume: bool = False,
    group: Any = None,
) -> Watch:
    """Watches the sites of a model in training.

        with watch(model, every=10, to="run.jsonl") as seen:
            for batch in data:
                loss = model(batch).loss
                loss.backward()
                seen.step(loss=loss)  # before the optimizer's step
                optimizer.step()
                optimizer.zero_grad()

        with watch(model, to="run.jsonl") as seen:
            seen.attach(trainer)  # transformers' Trainer, or Lightning's
            trainer.train()

    In steps that are not sampled the model has no hooks, and in none of them is anything computed otherwise. Compiled
    code is paused in steps that are sampled, which run eagerly. On several processes all of them have to watch, since
    each waits for the others; the first one writes what all saw.

    Args:
        model: converted; the outermost module that training calls, in whatever wraps it.
        every: a sample at every so many steps, the first one included.
        to: the file; none if left out, and the last sample is in `line`.
        tokens: how many tokens figures are taken from, at most, of each process.
        optimizer: whose epsilon says which gradients are dead; that of `attach` is found, else it is 1e-8.
        resume: go on in a file that is there.
        group: the process group of those that train on different parts of a batch: all by default. Where others share
            a part, as in tensor parallelism, a mesh has it: `mesh["dp"].get_group()`.

    Raises:
        MHCError: the model is not converted.
        ConfigError: `every` or `tokens` is no number of at least 1.
        RunFileError: the file is there already, is another run's, or can't be written.
    """
    return Watch(model, every, to, tokens, optimizer, resume, group)


class Watch:
    """What `watch` returns.

    Attributes:
        line: the last sample, as in the file; None before the first one, and in other processes than the first.
        header: the file's first line.
    """

    def __init__(
        self, model: nn.Module, every: int, to: str | os.PathLike[str] | None, tokens: int,
        optimizer: torch.optim.Optimizer | None, resume: bool, group: Any,
    ) -> None:  # fmt: skip
        for name, value in (("every", every), ("tokens", tokens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be an int of at least 1, not {value!r}.")
        _, converted, conversion = find_converted(model)
        self.line: dict[str, Any] | None = None
        self.every, self.tokens = every, tokens
        self.next_step = 0
        self._roots = [model] if model is converted else [model, converted]
        calls, self._sites = _calls(converted, conversion.plan)
        self._group = group
        self._settings: dict[str, Any] = {"every": every, "tokens": tokens, "epsilon": _epsilon(optimizer)}
        self.header = Header(
            type(converted).__name__, conversion.plan.config.to_dict(), self._settings, tuple(calls), VERSION,
            "" if to is None else _drawing(converted),
        )  # fmt: skip
        self._writer: Writer | None = None
        self._sampling: Sampling | None = None
        self._paused = contextlib.ExitStack()
        self._said: set[str] = set()
        if to is not None:
            self._open(Path(to), resume)
        self.begin(self.next_step)

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if error is None else f"{type(error).__name__}: {error}".splitlines()[0])

    # -- steps ---------------------------------------------------------------------------------------------------------

    def step(self, loss: Tensor | float | None = None, step: int | None = None) -> dict[str, float]:
        """Ends a step, behind `backward` and before the optimizer changes anything, and begins the next.

        Args:
            loss: of this step; what the model returns as `loss` if left out.
            step: its number, where it isn't one more than the last one's.

        Returns:
            A few figures for a logger where the step was sampled; else none.
        """
        number = self.next_step if step is None else step
        found = self.end(loss, number)
        self.begin(number + 1)
        return found

    def begin(self, step: int) -> None:
        """The next forward belongs to this step."""
        self.abandon()
        self.next_step = step
        if step % self.every == 0:
            self._paused.enter_context(eager())
            if any(map(_is_compiled, self._roots[0].modules())):
                self._say("Compiled code is paused in steps that are sampled: they run eagerly.")
            self._sampling = Sampling(self._roots, self._sites, self.tokens)

    def end(self, loss: Tensor | float | None = None, step: int | None = None) -> dict[str, float]:
        """The gradients of this step are there; returns what `step` does."""
        sampling = self._sampling
        self.abandon()
        if sampling is None:
            return {}
        notes = self._notes(sampling)
        own = loss.detach() if isinstance(loss, Tensor) else loss
        parts = self._gather(part(sampling, None if own is None else float(own)))
        parameters = self._parameter_gradients(notes)  # in all processes, as they may be sharded
        if parts is None or not sampling.seen:
            return {}
        self.line = sample(
            self.header, self.next_step if step is None else step, joined(parts), parameters, notes
        )  # fmt: skip
        if self._writer is not None:
            self._writer.write(self.line)
        return in_a_few_words(self.header, self.line)

    def abandon(self) -> None:
        """Takes all hooks away, and lets compiled code run."""
        if self._sampling is not None:
            self._sampling.close()
            self._sampling = None
        self._paused.close()

    def close(self, end: str = "finished") -> None:
        """The run is over. The file says how it ended."""
        self.abandon()
        if self._writer is not None:
            self._writer.close(end)

    def attach(self, trainer: Any) -> Watch:
        """Lets a trainer say when steps begin and end: transformers' `Trainer` or Lightning's. What its logger gets has
        the figures of `step` in it.

        Raises:
            ConfigError: it is another kind of trainer.
        """
        from mhc_rewrite.insight.watching.callbacks import attach

        self.abandon()
        attach(self, trainer)
        return self

    def use(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Takes an optimizer's epsilon, before anything is written."""
        if optimizer is not None:
            self._settings["epsilon"] = _epsilon(optimizer)

    def _open(self, file: Path, resume: bool) -> None:
        """In the first process; all learn of it, as all have to sample the same steps."""
        error = ""
        if not _distributed() or dist.get_rank() == 0:
            try:
                self._writer = Writer(file, self.header, resume)
                if file.stat().st_size and (done := read(file).steps):
                    self.next_step = done[-1] + 1
            except RunFileError as found:
                error = str(found)
        if _distributed():
            agreed: list[Any] = [error, self.next_step]
            dist.broadcast_object_list(agreed)
            error, self.next_step = agreed
        if error:
            raise RunFileError(error)

    # -- one sample ----------------------------------------------------------------------------------------------------

    def _notes(self, sampling: Sampling) -> list[str]:
        if sampling.compiled:
            self._say(
                "Sites ran in compiled code, where they can't be seen: call torch.compile before watch, or "
                "watch(...).attach."
            )
        elif not sampling.seen:
            self._say(
                f"{self.header.model}: no forward with gradients was seen in step {self.next_step}. Give watch the "
                "outermost module that training calls, and call step once for every optimizer step."
            )
        missing = [str(site) for k, site in enumerate(self.header.sites) if k not in sampling.seen]
        if missing and sampling.seen:
            return [f"{len(missing)} calls of sites were not seen: {', '.join(missing[:4])}"]
        return []

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(what, stacklevel=4)

    def _gather(self, mine: Part) -> list[Part] | None:
        """What all processes saw, in the first one; None in the others."""
        if not _distributed():
            return [mine]
        first = dist.get_rank(self._group) == 0
        found: list[Any] | None = [None] * dist.get_world_size(self._group) if first else None
        dist.gather_object(mine, found, group=self._group, group_dst=0)
        return found

    def _parameter_gradients(self, notes: list[str]) -> dict[int, OfParameters]:
        gradients = {site: parameter_gradients(site) for site in self._sites}
        found = iter(to_cpu([vector for of in gradients.values() for pair in of.values() for vector in pair]))
        made: dict[int, OfParameters] = {}
        for site, numbers in self._sites.items():
            own: dict[str, tuple[Any, Any]] = {name: (next(found), next(found)) for name in gradients[site]}
            made |= dict.fromkeys(numbers, _by_mapping(site, own, self._settings["epsilon"]))
        if not any(gradients.values()) and any(site.bias.requires_grad for site in self._sites):
            notes.append("no parameter of a site has a gradient: step belongs between backward and zero_grad")
        return made


def _by_mapping(site: HyperConnection, found: dict[str, tuple[Tensor, Tensor]], epsilon: float) -> OfParameters:
    n, logits = site.config.n, len(site.bias)
    of_bias = dict(zip(MAPPINGS, torch.arange(logits).split([n, n, logits - 2 * n])))
    of_phi = columns(site.config.connection, n, site.width, logits) if "phi" in found else {}
    norms: dict[tuple[str, str], float] = {}
    dead = []
    for k, mapping in enumerate(MAPPINGS):
        places: dict[str, Any] = {"phi": of_phi.get(mapping), "alpha": [k], "bias": of_bias[mapping]}
        largest = 0.0
        for name, (squares, sizes) in found.items():
            norms[name, mapping] = float(squares[places[name]].sum().sqrt())
            largest = max([largest, *sizes[places[name]].tolist()])
        if found and len(of_bias[mapping]) and mapping in site.config.learn and largest < epsilon:
            dead.append(mapping)
    return OfParameters(norms, tuple(dead))


def _calls(model: nn.Module, plan: RewritePlan) -> tuple[list[SiteCall], dict[HyperConnection, list[int]]]:
    """The calls of sites, stream by stream, and the sites with the numbers of theirs."""
    calls: list[SiteCall] = []
    found: dict[HyperConnection, list[int]] = {}
    for number, stream in enumerate(plan.streams):
        for site in stream.sites:
            if not site.excluded:
                module = site_at(model, site.name)
                numbers = found.setdefault(module, [])
                calls.append(
                    SiteCall(number, site.name, len(numbers), site.branch, module.config.n, module.width)
                )  # fmt: skip
                numbers.append(len(calls) - 1)
    return calls, found


def _epsilon(optimizer: torch.optim.Optimizer | None) -> float:
    groups: Sequence[Any] = [] if optimizer is None else optimizer.param_groups
    return next((float(group["eps"]) for group in groups if group.get("eps") is not None), EPSILON)


def _drawing(model: nn.Module) -> str:
    """For the report; it takes a library that need not be there."""
    with contextlib.suppress(DrawingError):
        return draw(model).svg()
    return ""


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None

"""From what was seen in a step, by one process or several, to the line of the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.insight.watching.format import (
    FIGURES,
    LOSS_DIGITS,
    MAPPINGS,
    Header,
    short,
    shorts,
)
from mhc_rewrite.insight.watching.measures import composites, of_post, of_pre, of_res, of_states
from mhc_rewrite.insight.watching.sampling import Sampling, Seen

RARE = 0.99
_QUANTILES = ("row_error", "column_error", "forward_gain", "backward_gain")
_MEANS = ("from_identity", "from_uniform", "second_singular", "pre_entropy", "post_spread", "dominant", "rank")


@dataclass
class Part:
    """What one process saw, on the CPU.

    Attributes:
        seen: by the number of the call; in fp64.
        gradients: squared norms, as `Sampling.gradients` gives them.
    """

    seen: dict[int, Seen] = field(default_factory=dict)
    gradients: dict[int, tuple[float | None, float]] = field(default_factory=dict)
    loss: float | None = None


def part(sampling: Sampling, loss: float | None) -> Part:
    """What a step's hooks saw, in one transfer."""
    given: list[Tensor | None] = []
    for seen in sampling.seen.values():
        given += [seen.pre, seen.post, seen.res, seen.after]
    gradients = sampling.gradients()
    for squares in gradients.values():
        given += squares
    given.append(sampling.loss if loss is None else None)
    found = iter(to_cpu(given))
    made = Part()
    for number, seen in sampling.seen.items():
        pre, post, res, after = (next(found) for _ in range(4))
        made.seen[number] = Seen(seen.tokens, pre, post, res, after)  # type: ignore[arg-type]
    for number in gradients:
        state, trunk = next(found), next(found)
        made.gradients[number] = None if state is None else float(state), float(trunk)  # type: ignore[arg-type]
    own = next(found)
    made.loss = loss if own is None else float(own)
    return made


def to_cpu(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In fp64; those of one device and dtype together, as each transfer waits for all that the device has to do."""
    found: list[Tensor | None] = [None] * len(tensors)
    groups: dict[Any, list[int]] = {}
    for k, tensor in enumerate(tensors):
        if tensor is not None:
            groups.setdefault((tensor.device, tensor.dtype), []).append(k)
    for numbers in groups.values():
        together = [tensors[k] for k in numbers]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in together]).cpu().double()  # type: ignore[union-attr]
        for k, values in zip(numbers, flat.split([tensor.numel() for tensor in together])):  # type: ignore[union-attr]
            found[k] = values.reshape(tensors[k].shape)  # type: ignore[union-attr]
    return found


def joined(parts: Sequence[Part]) -> Part:
    """One of those of all processes that train on parts of a batch, whose loss is the mean of theirs."""
    if len(parts) == 1:
        return parts[0]
    made = Part()
    for number in sorted({number for part in parts for number in part.seen}):
        seen = [part.seen[number] for part in parts if number in part.seen]
        after = [one.after for one in seen if one.after is not None]
        made.seen[number] = Seen(
            sum(one.tokens for one in seen),
            torch.cat([one.pre for one in seen]),
            torch.cat([one.post for one in seen]),
            torch.cat([one.res for one in seen]),
            torch.cat(after) if len(after) == len(seen) else None,
        )
    scale = len(parts) ** 2
    for number in sorted({number for part in parts for number in part.gradients}):
        squares = [part.gradients[number] for part in parts if number in part.gradients]
        states = [state for state, _ in squares if state is not None]
        whole = sum(states) / scale if len(states) == len(squares) else None
        made.gradients[number] = whole, sum(trunk for _, trunk in squares) / scale
    losses = [part.loss for part in parts if part.loss is not None]
    made.loss = sum(losses) / len(losses) if losses else None
    return made


# -- a sample ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfParameters:
    """The gradients of one call's site.

    Attributes:
        norms: by parameter and mapping, those that have a gradient.
        dead: the mappings that have none above epsilon.
    """

    norms: Mapping[tuple[str, str], float] = field(default_factory=dict)
    dead: tuple[str, ...] = ()


def sample(
    header: Header, step: int, seen: Part, parameters: Mapping[int, OfParameters], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """The line of a step."""
    count = len(header.sites)
    figures: dict[str, list[float | None]] = {name: [None] * count for name in FIGURES}
    maps: dict[str, list[list[float | None] | None]] = {name: [None] * count for name in MAPPINGS}
    dead: dict[str, list[int]] = {name: [] for name in MAPPINGS}
    for numbers in _alike(seen.seen):
        own = [seen.seen[number] for number in numbers]
        for name, values in _of_sites(own).items():
            for number, value in zip(numbers, values.tolist(), strict=True):
                figures[name][number] = value if isinstance(value, int) else short(value)
        for name in MAPPINGS:
            means = torch.stack([getattr(one, name) for one in own]).mean(1).flatten(1)
            for number, mean in zip(numbers, means.tolist(), strict=True):
                maps[name][number] = shorts(mean)
    for number, (state, trunk) in seen.gradients.items():
        figures["state_gradient"][number] = None if state is None else short(math.sqrt(state))
        figures["trunk_gradient"][number] = short(math.sqrt(trunk))
    for number, gradients in parameters.items():
        for (parameter, mapping), norm in gradients.norms.items():
            figures[f"{parameter}_{mapping}_gradient"][number] = short(norm)
        for mapping in gradients.dead:
            dead[mapping].append(number)
    line = {
        "step": step, "loss": short(seen.loss, LOSS_DIGITS), "figures": figures, "dead": dead, "maps": maps,
        "composite": [_composite(numbers, seen, figures) for numbers in header.streams],
    }  # fmt: skip
    return {**line, "notes": list(notes)} if notes else line


def _alike(seen: Mapping[int, Seen]) -> list[list[int]]:
    """Sites whose figures can be taken together: of one, calling a function takes longer than its work."""
    groups: dict[Any, list[int]] = {}
    for number, one in seen.items():
        groups.setdefault((one.res.shape, one.after is None), []).append(number)
    return list(groups.values())


def _of_sites(seen: Sequence[Seen]) -> dict[str, Tensor]:
    """By figure, its value at each site."""
    pre, post, res = (torch.stack([getattr(one, name) for one in seen]) for name in MAPPINGS)
    values = {**of_res(res), **of_pre(pre), **of_post(post)}
    found = {}
    after = [one.after for one in seen if one.after is not None]
    if after:
        values |= of_states(torch.stack(after))
        found["spread"] = (values["apart"].sum(-1) / values["mean"].sum(-1)).sqrt()
    found |= {name: values[name].mean(-1) for name in _MEANS if name in values}
    for name in _QUANTILES:
        found |= quantiles(name, values[name])
    modes = torch.nn.functional.one_hot(values["pre_argmax"], pre.shape[-1]).sum(-2)
    found["pre_argmax"], found["pre_argmax_share"] = modes.argmax(-1), modes.amax(-1) / modes.sum(-1)
    return found


def quantiles(name: str, values: Tensor) -> dict[str, Tensor]:
    """The median over tokens, and the rare one."""
    middle, rare = values.quantile(torch.tensor([0.5, RARE], dtype=values.dtype), dim=-1)
    return {name: middle, f"{name}_99": rare}


def _composite(
    numbers: Sequence[int], seen: Part, figures: dict[str, list[float | None]]
) -> dict[str, list[Any]] | None:
    """Of a stream, over the sites that were called; None where these have not the same tokens."""
    called = [number for number in numbers if number in seen.seen]
    if not called or len({(seen.seen[k].tokens, len(seen.seen[k].res)) for k in called}) > 1:
        return None
    forward, backward, whole = composites([seen.seen[number].res for number in called])
    for name, gains in (("composite_forward", forward), ("composite_backward", backward)):
        for key, values in quantiles(name, torch.stack(gains)).items():
            for number, value in zip(called, values.tolist(), strict=True):
                figures[key][number] = short(value)
    mean = whole.mean(0)
    return {"map": shorts(mean.flatten().tolist()), "shape": list(mean.shape)}


def in_a_few_words(header: Header, line: Mapping[str, Any]) -> dict[str, float]:
    """A sample as the figures that loggers get: over all sites and streams."""
    figures = line["figures"]

    def over(how: Any, name: str) -> float | None:
        known = [value for value in figures[name] if value is not None]
        return float(how(known)) if known else None

    def mean(values: list[float]) -> float:
        return math.fsum(values) / len(values)

    found = {
        "mhc/forward_gain": over(max, "composite_forward_99"),
        "mhc/backward_gain": over(max, "composite_backward_99"),
        "mhc/column_error": over(max, "column_error_99"),
        "mhc/from_identity": over(mean, "from_identity"),
        "mhc/spread": over(mean, "spread"),
        "mhc/rank": over(mean, "rank"),
        "mhc/pre_entropy": over(mean, "pre_entropy"),
        "mhc/dead_mappings": float(sum(map(len, line["dead"].values()))),
    }
    return {name: value for name, value in found.items() if value is not None}

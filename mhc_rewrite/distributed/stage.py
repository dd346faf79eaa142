"""What a stage of a pipeline does when it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite.capture.call import CallShape, flatten
from mhc_rewrite.capture.decisions import Otherwise
from mhc_rewrite.capture.reads import Read, holds
from mhc_rewrite.capture.state import under_way
from mhc_rewrite.errors import StreamError
from mhc_rewrite.passes.cut_stage import StageGraph
from mhc_rewrite.sites import recompute
from mhc_rewrite.sites.state import StreamState, is_state, plain, state, streams_of


class Stage(nn.Module):
    """A part of a converted model. `pipeline_stage` makes it."""

    def __init__(self, programs: dict[bool, Program]) -> None:
        super().__init__()
        self._programs = programs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        program = self._programs[self.training]
        if torch.compiler.is_compiling():
            return program.run(self, args, kwargs)
        with under_way() as outermost:
            try:
                return program.run(self, args, kwargs)
            finally:
                if outermost:
                    recompute.forget()


@dataclass(frozen=True)
class Passing:
    """What comes into a stage: the name, its axes on the example, and the stream's kind and number if it is one."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    stream: tuple[int, int, int] | None  # channel_dim, number, turns

    def taken(self, value: Any) -> Any:
        if self.stream is None or not isinstance(value, Tensor):
            return value
        channel_dim, number, turns = self.stream
        if torch.compiler.is_dynamo_compiling():
            value = value.view_as(value)  # no input of the frame, of whose class there would be guards
        return state(value, channel_dim, "mean", number, turns)


@dataclass(frozen=True)
class Program:
    """What a stage does in one mode."""

    cut: StageGraph
    function: Callable[..., Any]
    arriving: tuple[Passing, ...]
    shape: CallShape
    example: dict[str, Any]  # bound arguments; tensors without memory
    pinned: bool
    asks_dtype: bool
    reads: tuple[Read, ...]
    model: Any  # a weak reference

    def run(self, stage: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.cut.first:
            came: tuple[Any, ...] = ()
        else:
            came, args = args, ()
            self._check_arriving(came)
        leaves = self._leaves(args, kwargs)
        model = self.model()
        if model is not None and not holds(model, self.reads):
            raise StreamError(
                "This stage was made from a forward that read attributes of the model, and one of them has changed "
                "since. Make the stage anew, with pipeline_stage, behind such a change; and leave a model of which "
                "stages are in use as it is, or delete it as a whole."
            )
        taken = [passing.taken(value) for passing, value in zip(self.arriving, came, strict=True)]
        try:
            result = self.function(stage, *taken, *leaves, *self.cut.constants)
        except Otherwise as other:
            raise StreamError(
                "The forward of the model branches on the content of a tensor, and goes another way in this call than "
                "with the example that this stage was made with. A stage has one way: give pipeline_stage an example "
                "that goes it."
            ) from other
        if self.cut.last:
            return tree_map(plain, result) if _holds_states(result) else result
        out = tuple(_as_sent(value) for value in result)
        return out[0] if len(out) == 1 else out

    def _check_arriving(self, came: tuple[Any, ...]) -> None:
        if len(came) != len(self.arriving):
            wanted = ", ".join(f"{one.name} {one.shape}" for one in self.arriving)
            raise StreamError(
                f"This stage takes what the stage before returns, {len(self.arriving)} tensors on the example "
                f"({wanted}), and got {len(came)} positional arguments. Arguments of the model go to later stages by "
                "name: schedule.step(mask=mask)."
            )
        for one, value in zip(self.arriving, came, strict=True):
            if not isinstance(value, Tensor) or value.dim() != len(one.shape):
                form = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise StreamError(
                    f"This stage takes {'n streams' if one.stream else 'a tensor'} {one.shape} on the example for "
                    f"{one.name!r}, and got {form}: what the stage before it returns, made from the same model by "
                    "pipeline_stage, must be given to it as it is."
                )
            if (self.pinned and value.shape != one.shape) or (self.asks_dtype and value.dtype != one.dtype):
                raise self._other_form(one.name, value, one.shape, one.dtype)

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The values of the arguments that this stage reads. What was not given is as on the example."""
        given = {
            name: value for name, value in self.shape.bind(args, {}).items() if name in self.shape.names[: len(args)]
        }
        given.update({f"*{k}": value for k, value in enumerate(args[len(self.shape.names) :])})
        given.update(kwargs)
        found: dict[str, Any] = {}
        for name, value in given.items():
            key, leaves = flatten({name: plain(value)})
            wanted, forms = flatten({name: self.example.get(name)})
            if key != wanted:
                raise StreamError(
                    f"The argument {name!r} is {_told(value)} in this call and was {_told(self.example.get(name))} in "
                    "the example that this stage was made with. Give pipeline_stage an example of this kind."
                )
            for path, leaf in leaves.items():
                form = forms[path]
                other = isinstance(leaf, Tensor) and (
                    (self.pinned and leaf.shape != form.shape) or leaf.dim() != form.dim()
                    or (self.asks_dtype and leaf.dtype != form.dtype)
                )  # fmt: skip
                if other:
                    raise self._other_form(path, leaf, tuple(form.shape), form.dtype)
            found.update(leaves)
        missing = sorted({path.split(".")[0] for path in self.cut.leaves if path not in found})
        if missing:
            by_name = ", ".join(f"{name}={name}" for name in missing)
            raise StreamError(
                f"This stage needs {', '.join(map(repr, missing))}, of the model's arguments, and did not get it. "
                f"Give it by name on every rank: schedule.step(..., {by_name})."
            )
        return [found[path] for path in self.cut.leaves]

    @staticmethod
    def _other_form(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> StreamError:
        return StreamError(
            f"{name!r} is {tuple(value.shape)} in {value.dtype}, and was {tuple(shape)} in {dtype} in the example that "
            "this stage was made with; the forward of the model asks for it. Give pipeline_stage an example of one "
            "microbatch, and the model in the dtype that it computes in: model.to(torch.bfloat16) before it, where a "
            "policy of mixed precision would come behind it."
        )


def _told(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (Tensor, tuple, list, dict)) else repr(value)


def _holds_states(result: Any) -> bool:
    return any(isinstance(leaf, StreamState) for leaf in tree_leaves(result))


def _as_sent(value: Any) -> Any:
    # Of the state itself, not of what it was made from: hooks (FSDP's) wait for its gradient.
    value = streams_of(value) if is_state(value) else plain(value)
    # Nothing else is sent; and schedules detach in place what leaves a stage. A view does not allow it, and a parameter
    # or what came in would be detached for good.
    value = value.contiguous()
    return torch.ops.aten._unsafe_view(value, value.shape)

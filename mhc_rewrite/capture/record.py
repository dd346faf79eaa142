"""Runs a model once and writes down every torch call, every module call, and which value goes where.

The recording is flat and whole: it decides which modules must be captured as graphs, and it links their streams
through code that is never traced, by the identity of the tensors that pass.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.call import CallShape, as_now, flatten
from mhc_rewrite.capture.functions import has_backward, opaque_calls
from mhc_rewrite.capture.sums import Sums
from mhc_rewrite.plans import SourceLine

# As code objects have it: a Path would leave out the "." of an entry of sys.path.
_OWN_CODE = f"{os.path.dirname(os.path.dirname(__file__))}{os.sep}"
_TORCH_CODE = f"{os.path.dirname(torch.__file__)}{os.sep}"
_TORCH_MODULES = f"{os.path.dirname(nn.__file__)}{os.sep}modules{os.sep}"


def user_line() -> SourceLine | None:
    """The innermost line of the user's code that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if is_user_code(file, function):
            return source_line(file, frame.f_lineno)
        frame = frame.f_back  # type: ignore[assignment]
    return None


Frame = tuple[str, str, int, str]  # file, function, line, and which of the operations of the line


def frames_within(outermost: tuple[CodeType, ...]) -> tuple[Frame, ...]:
    """The frames of all code but this package's, from the innermost call of `outermost` to here, outermost first."""
    frames: list[Frame] = []
    frame = sys._getframe(1)
    while frame is not None and frame.f_code not in outermost:
        file = frame.f_code.co_filename
        if not file.startswith(_OWN_CODE):
            frames.append((file, frame.f_code.co_name, frame.f_lineno or 0, _operation(frame.f_code, frame.f_lasti)))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(reversed(frames))


def _operation(code: CodeType, instruction: int) -> str:
    """The columns of what is being run: of `return x + (a if c else b)`, Python may make an instruction for each way.

    Python 3.10 has no columns.
    """
    first, last = _columns(code)[instruction // 2] if hasattr(code, "co_positions") else (None, None)
    return f"at {instruction}" if first is None else f"{first}-{last}"


@functools.lru_cache(maxsize=1024)
def _columns(code: Any) -> tuple[tuple[int | None, int | None], ...]:
    """Of each instruction of a function."""
    return tuple((first, last) for _, _, first, last in code.co_positions())


def is_user_code(file: str, function: str) -> bool:
    """Whether a line is neither torch's machinery nor this package's; what `torch.nn.modules` computes is code.

    A package whose folder's name only begins with torch's is the user's.
    """
    if file.startswith(_TORCH_MODULES):
        return function[0] != "_" or Path(file).name == "transformer.py"
    return not file.startswith((_TORCH_CODE, _OWN_CODE)) and file != contextlib.__file__


def source_line(file: str, line: int) -> SourceLine:
    """A line with its text."""
    import linecache

    return SourceLine(file, line, linecache.getline(file, line).strip())


@dataclass
class Operation:
    """One torch call. `inputs` and `outputs` are values: numbers that name a tensor's content at one time."""

    index: int
    target: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    call: int
    mixing: bool
    source: SourceLine | None = None
    where: str = ""  # which part of its first input it takes, where it takes one

    @property
    def name(self) -> str:
        return vocabulary.name_of(self.target)


@dataclass
class ModuleCall:
    """One call of a module: arguments, result, and the operations from `first` up to `last` that it ran."""

    index: int
    module: nn.Module
    name: str
    parent: int
    inputs: tuple[int, ...]  # values of the tensor arguments, at entry
    first: int
    key: tuple[Any, ...] = ()  # of the bound arguments, at entry
    leaf_values: dict[str, int] = field(default_factory=dict)  # path of a leaf of the bound arguments -> value
    last: int = -1
    outputs: tuple[int | None, ...] = ()  # values of the result's leaves; None for what is no tensor
    inside: str = ""  # the autograd.Function, with a backward of its own, that it was called in


@dataclass
class Recording:
    """A model's run. `calls[0]` stands for the root's own call."""

    operations: list[Operation] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    producer: dict[int, Operation] = field(default_factory=dict)
    shapes: list[torch.Size] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    parameters: set[int] = field(default_factory=set)  # the values that are parameters

    def ancestry(self, call: int) -> list[int]:
        """A call and all that enclose it, outermost first."""
        chain = []
        while call >= 0:
            chain.append(call)
            call = self.calls[call].parent
        return chain[::-1]

    def within(self, inner: int, outer: int) -> bool:
        """Whether one call runs inside another, or is it."""
        while inner > outer:
            inner = self.calls[inner].parent
        return inner == outer


def innermost_common(chains: list[list[int]]) -> int:
    """The innermost call that all of several ancestries share, outermost first each; 0, the root's, at the least."""
    common = 0
    for depth in zip(*chains, strict=False):
        if len(set(depth)) > 1:
            break
        common = depth[0]
    return common


class _Recorder(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording
        self.values: dict[int, int] = {}  # by id, of tensors that live
        self.living: dict[int, weakref.ref[Tensor]] = {}
        self.stack: list[int] = []
        self.functions = [""]  # of autograd, that run
        self.sums = Sums(lambda structure: structure)

    def value(self, tensor: Tensor) -> int:
        known = self.values.get(id(tensor))
        return self.new_value(tensor) if known is None else known

    def new_value(self, tensor: Tensor) -> int:
        number = len(self.recording.shapes)
        key = id(tensor)
        self.values[key] = number
        if key not in self.living:  # a later tensor may get the id of one that is gone, and memory is not kept for it
            self.living[key] = weakref.ref(tensor, lambda _: (self.living.pop(key), self.values.pop(key)))
        if isinstance(tensor, nn.Parameter):
            self.recording.parameters.add(number)
        self.recording.shapes.append(tensor.shape)
        self.recording.dtypes.append(tensor.dtype)
        return number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        plain = self.sums.plain(func, args, kwargs)
        if plain is not None:
            with self:
                return plain()
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inputs = tuple(self.value(t) for t in tensors)  # before the call, which may change them
        result = func(*args, **kwargs)
        self.sums.note(func, args, kwargs, result)
        if vocabulary.name_of(func) in vocabulary.LIKE:
            inputs = ()
        if tensors and self.stack:
            writes = vocabulary.name_of(func) == "setitem"
            results = [args[0]] if writes else [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if not (writes or vocabulary.is_inplace(func, kwargs)):
                results = [t for t in results if not any(t is given for given in tensors)]
            self.write(func, inputs, results, vocabulary.is_mixing(func))
            operation = self.recording.operations[-1]
            if operation.name in vocabulary.SLICING:
                index = tree_map(lambda x: ("value", self.value(x)) if isinstance(x, Tensor) else x, (args[1:], kwargs))
                operation.where = repr(index)
        return result

    def write(self, target: Any, inputs: tuple[int, ...], results: list[Tensor], mixing: bool) -> None:
        outputs = tuple(self.new_value(t) for t in results)
        operation = Operation(len(self.recording.operations), target, inputs, outputs, self.stack[-1], mixing)
        if operation.name in vocabulary.ADD or operation.name == "setitem":
            operation.source = user_line()
        self.recording.operations.append(operation)
        for value in outputs:
            self.recording.producer[value] = operation

    def opaque(self, function: Any, args: Any, kwargs: Any) -> Any:
        """A function whose own calls need not show: what it makes out of their sight is taken to be mixed."""
        inputs = tuple(self.value(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        self.functions.append(function.__qualname__ if has_backward(function) else self.functions[-1])
        try:
            result = function(*args, **kwargs)
        finally:
            self.functions.pop()
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor) and id(t) not in self.values]
        if made and self.stack:
            self.write(function, inputs, made, True)
        return result

    def enter(self, module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        parent = self.stack[-1] if self.stack else -1
        bound = CallShape.of(type(module).forward).bind(args, kwargs)
        call = ModuleCall(
            index=len(self.recording.calls), module=module, name=name, parent=parent,
            inputs=tuple(self.value(t) for t in tensors), first=len(self.recording.operations),
            inside=self.functions[-1],
        )  # fmt: skip
        call.key, leaves = flatten(bound)
        call.leaf_values = {path: self.value(v) for path, v in leaves.items() if isinstance(v, Tensor)}
        self.recording.calls.append(call)
        self.stack.append(call.index)

    def leave(self, result: Any) -> None:
        call = self.recording.calls[self.stack[-1]]
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf) not in self.values:
                # Made by code that torch functions do not show, a C++ extension say: taken to mix.
                self.write(call.module, tuple(sorted(set(call.inputs))), [leaf], True)
        call.outputs = tuple(self.value(t) if isinstance(t, Tensor) else None for t in tree_leaves(result))
        call.last = len(self.recording.operations)
        self.stack.pop()


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Recording, Any]:
    """Runs `model(*args, **kwargs)` and returns what happened, and the result. The caller protects the state."""
    args, kwargs = as_now((args, kwargs))
    recording = Recording()
    recorder = _Recorder(recording)
    handles = []

    def entering(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: recorder.enter(module, name, args, kwargs)

    def leaving(module: nn.Module, args: Any, result: Any) -> None:
        recorder.leave(result)

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(entering(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leaving))
        with opaque_calls(recorder.opaque, inline_checkpoints=False), recorder:
            result = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return recording, result


def operations_inside(recording: Recording, call: ModuleCall) -> Iterator[Operation]:
    """The operations that a call ran, its children's included."""
    yield from recording.operations[call.first : call.last]

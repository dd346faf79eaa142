"""How a capture sees the calls that a forward makes: torch functions, modules, and what lies outside of both."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils._pytree import tree_leaves

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.values import TRACED
from mhc_rewrite.torch_private import apply_as_now, python_of

if TYPE_CHECKING:
    from mhc_rewrite.capture.tracer import ModuleTracer

_OPAQUE = "_mhc_opaque"


def has_traced(*structures: Any) -> bool:
    """Whether traced values are among the leaves."""
    return any(type(leaf) in TRACED for leaf in tree_leaves(structures))


def is_opaque(function: Any) -> bool:
    """Whether a function's own torch calls are no part of a capture."""
    return hasattr(function, _OPAQUE)


def has_backward(function: Any) -> bool:
    """Whether an opaque function is one of autograd's that somebody has written, with a backward of its own."""
    owner = getattr(function, _OPAQUE, None)
    return isinstance(owner, type) and not owner.__module__.startswith("torch.")


_opaque_functions: dict[Any, Callable[..., Any]] = {}


def _opaque(run: Callable[..., Any], owner: Any) -> Callable[..., Any]:
    """`run(owner, ...)` as a function that a graph can name, the same one each time."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(owner, *args, **kwargs)

    name: Any = owner.name if isinstance(owner, torch.jit.ScriptFunction) else owner.__name__
    call.__name__, call.__qualname__ = f"opaque_{name}", name  # somebody's "add" is not torch's
    call.__module__ = "mhc_rewrite.opaque"
    setattr(call, _OPAQUE, owner)
    return _opaque_functions.setdefault(owner, call)


@contextlib.contextmanager
def opaque_calls(seen: Callable[..., Any], inline_checkpoints: bool) -> Iterator[None]:
    """Inside, this thread's calls of autograd's and TorchScript's functions become `seen(function, args, kwargs)`.

    No torch function tells of them. The function that a checkpoint runs again in backward can be called by itself, and
    so can the Python that a function was scripted from: a fused `residual + dropout(x + bias)` holds the add.
    """
    thread = threading.get_ident()
    apply, run_script = apply_as_now(), torch.jit.ScriptFunction.__call__

    def applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return apply(cls, *args, **kwargs)
        if inline_checkpoints and cls is torch.utils.checkpoint.CheckpointFunction:
            return args[0](*args[2:])  # (function, whether to keep the random state, *arguments)
        return seen(_opaque(apply, cls), args, kwargs)

    def scripted(function: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return run_script(function, *args, **kwargs)
        if (python := python_of(function)) is not None:
            return python(*args, **kwargs)
        return seen(_opaque(run_script, function), args, kwargs)

    with mock.patch.object(torch.autograd.Function, "apply", classmethod(applied)), \
            mock.patch.object(torch.jit.ScriptFunction, "__call__", scripted):  # fmt: skip
        yield


def call_argument(function: Any, *args: Any, **kwargs: Any) -> Any:
    """How a graph calls a function that it was given: torch.compile can't follow `function.__call__`."""
    return function(*args, **kwargs)


class FunctionMode(TorchFunctionMode):
    """Sees torch functions whether a traced value is among their arguments or not: `torch.rand(3)` must be a node."""

    def __init__(self, tracer: ModuleTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, tracer = kwargs or {}, self.tracer
        if tracer.shadowing:
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            tracer.refuse("it switches gradients on or off inside, which a graph would lose")
        name, kind = vocabulary.name_of(func), getattr(func, "__name__", "")
        if name in vocabulary.FORM and not has_traced(args, kwargs):
            return tracer.reads_form(func, args, kwargs)
        if kind in ("__set__", "__delete__"):
            tracer.refuse(f"it assigns to .{name} of a tensor, which a graph would not repeat")
        if kind == "__get__":
            return tracer.create_proxy("call_function", getattr, (args[0], name), {})
        if is_tensor_method_or_property(func):
            return tracer.create_proxy("call_method", func.__name__, args, kwargs)
        return tracer.create_proxy("call_function", func, args, kwargs)


@contextlib.contextmanager
def calls_seen(tracer: ModuleTracer) -> Iterator[None]:
    """Inside, the calls of this thread's forward go through the tracer.

    What knows no torch function is patched: module calls; functions that take sizes and no tensor, since torch's parser
    would refuse a traced size; autograd's functions, whose backward is their own; TorchScript's.
    """
    thread = threading.get_ident()

    def mine() -> bool:
        return threading.get_ident() == thread and not tracer.shadowing

    def called(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return tracer.called(module, original, args, kwargs) if mine() else original(module, *args, **kwargs)

        return call

    def factory(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not mine() or not has_traced(args, kwargs):
                return original(*args, **kwargs)
            return tracer.create_proxy("call_function", original, args, kwargs)

        return call

    def opaque(function: Any, args: Any, kwargs: Any) -> Any:
        return tracer.create_proxy("call_function", function, args, kwargs) if mine() else function(*args, **kwargs)

    children = {type(module) for module in tracer.paths if module not in tracer.inlined}
    owners = {base for kind in children for base in kind.__mro__ if "__call__" in vars(base)} | {nn.Module}
    factories: dict[str, Any] = {name: factory(getattr(torch, name)) for name in vocabulary.FACTORIES}
    cond = torch.cond

    def branch(*args: Any, **kwargs: Any) -> Any:
        if mine():
            tracer.refuse("it branches by torch.cond, whose branches a graph would not follow")
        return cond(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(torch, cond=branch, **factories))
        for owner in owners:
            stack.enter_context(mock.patch.object(owner, "__call__", called(vars(owner)["__call__"])))
        stack.enter_context(opaque_calls(opaque, inline_checkpoints=True))
        stack.enter_context(FunctionMode(tracer))
        yield

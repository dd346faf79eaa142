"""A call's arguments as a key, which says what a captured graph depends on, and leaves, which the graph reads.

Tensors and objects such as caches are leaves; None, booleans, numbers, strings and the structure around them are key:
a forward may branch on them, so each combination is a variant of its own. Plain Python that Dynamo can follow.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CellType, FunctionType, MethodType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.state import alone

PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
    torch.Size,
)

_BY_POSITION = "#"  # stands among the arguments of a wrapped forward: how many of them were not given by name


@dataclass(frozen=True)
class CallShape:
    """The parameters of a forward: names in positional order, and defaults.

    A decorator may look at what is given, and how: `wrapped` forwards are called just as they were.
    """

    names: tuple[str, ...]
    defaults: dict[str, Any] = field(hash=False)
    wrapped: bool = False

    @classmethod
    @functools.cache
    def of(cls, forward: Callable[..., Any]) -> CallShape:
        """Of a forward function; its first parameter is the module."""
        parameters = list(inspect.signature(forward).parameters.values())[1:]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return cls(
            names=tuple(p.name for p in parameters if p.kind in positional),
            defaults={p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty},
            wrapped=list(inspect.signature(forward, follow_wrapped=False).parameters.values())[1:] != parameters,
        )

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name; what `*args` takes is named `*0`, `*1`, ..."""
        bound = {_BY_POSITION: len(args)} if self.wrapped else dict(self.defaults)
        for index, value in enumerate(args):
            bound[self.names[index] if index < len(self.names) else f"*{index - len(self.names)}"] = value
        bound.update(kwargs)
        return bound

    def unbind(self, bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inverse of `bind`."""
        if self.wrapped:
            count = bound[_BY_POSITION]
            leading = [*self.names, *(f"*{index}" for index in range(count))][:count]
            return tuple(bound[name] for name in leading), {
                name: value for name, value in bound.items() if name not in (_BY_POSITION, *leading)
            }
        leading = list(itertools.takewhile(bound.__contains__, self.names))
        if len(leading) == len(self.names):
            leading += [name for name in bound if name[0] == "*"]
        return tuple(bound[name] for name in leading), {k: v for k, v in bound.items() if k not in leading}


def flatten(bound: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The key of bound arguments, and their leaves by path."""
    key: list[Any] = []
    leaves: dict[str, Any] = {}
    for name in sorted(bound):
        _flatten(bound[name], name, key, leaves)
    return tuple(key), leaves


def _flatten(value: Any, path: str, key: list[Any], leaves: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        leaves[path] = value
        key.append((path, "tensor"))
    elif value is None:
        key.append((path, None))
    elif isinstance(value, PLAIN):
        key.append((path, type(value), value))
    elif type(value) is tuple or type(value) is list:
        key.append((path, type(value), len(value)))
        for index, item in enumerate(value):
            _flatten(item, f"{path}.{index}", key, leaves)
    elif type(value) is dict and all(isinstance(name, str) for name in value):
        key.append((path, dict, tuple(value)))
        for name, item in value.items():
            _flatten(item, f"{path}.{name}", key, leaves)
    else:
        leaves[path] = value
        key.append((path, "object", type(value).__qualname__))


def copied(value: Any) -> Any:
    """A copy of an object such as a cache, its tensors without their autograd history."""
    here, original = threading.get_ident(), Tensor.__deepcopy__

    def deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Any:
        return tensor.detach().clone() if threading.get_ident() == here else original(tensor, memo)

    with alone(), mock.patch.object(Tensor, "__deepcopy__", deepcopy):
        return copy.deepcopy(value)


def as_now(value: Any, known: dict[int, Tensor] | None = None) -> Any:
    """Arguments with copies of tensors and of objects such as caches: a call may change them.

    What is one tensor stays one: `known` are the copies made so far, by the id of what they are of.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().clone()
        return known[id(value)]
    if isinstance(value, (nn.Module, torch.Generator, *PLAIN)) or value is None or callable(value):
        return value
    if type(value) in (tuple, list):
        return type(value)(as_now(item, known) for item in value)
    if type(value) is dict:
        return {key: as_now(item, known) for key, item in value.items()}
    return copied(value)


def modules_in(value: Any) -> list[nn.Module]:
    """The modules that calling an argument would run: itself, whose method it is, what it closes over."""
    found: dict[int, nn.Module] = {}
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        elif isinstance(item, (tuple, list)):
            todo.extend(item)
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, functools.partial):
            todo.extend((item.func, item.args, item.keywords))
        elif isinstance(item, MethodType):
            todo.extend((item.__self__, item.__func__))
        elif isinstance(item, FunctionType):
            todo.append(item.__defaults__ or ())
            todo.extend(cell.cell_contents for cell in item.__closure__ or () if cell != CellType())
        elif callable(item) and not isinstance(item, type):
            todo.append(getattr(item, "__dict__", {}))
    return list(found.values())


def replace_leaves(value: Any, path: str, leaves: dict[str, Any]) -> Any:
    """A bound argument with other leaves."""
    if path in leaves:
        return leaves[path]
    if type(value) is tuple or type(value) is list:
        return type(value)(replace_leaves(item, f"{path}.{index}", leaves) for index, item in enumerate(value))
    if type(value) is dict:
        return {name: replace_leaves(item, f"{path}.{name}", leaves) for name, item in value.items()}
    return value


def describe(key: tuple[Any, ...], training: bool) -> str:
    """A variant for a reader."""
    told = [entry for entry in key if entry[0] != _BY_POSITION and entry[-1] is not None]
    given = [entry[0] if len(entry) == 2 else f"{entry[0]}={entry[2]!r}" for entry in told]
    return f"{'train' if training else 'eval'}({', '.join(given)})"

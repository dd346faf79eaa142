"""Frozen data as JSON and back, by the type hints of its dataclasses."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from mhc_rewrite.config import MHCConfig


def to_data(value: Any) -> Any:
    """Dataclasses as dicts, sets as sorted lists, dicts whose keys are no strings as lists of pairs."""
    if isinstance(value, MHCConfig):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: to_data(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: to_data(item) for key, item in value.items()}
        return [[to_data(key), to_data(item)] for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return [to_data(item) for item in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [to_data(item) for item in value]
    return value


def from_data(kind: Any, data: Any) -> Any:
    """The inverse, for a value of type `kind`.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: the data is of another form.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is MHCConfig:
        return MHCConfig.from_dict(data)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: from_data(hints[name], item) for name, item in data.items()})  # type: ignore[operator]
    if origin in (types.UnionType, typing.Union):
        return None if data is None else from_data(next(a for a in arguments if a is not type(None)), data)
    if origin is dict:
        pairs = data.items() if isinstance(data, dict) else data
        return {from_data(arguments[0], key): from_data(arguments[1], item) for key, item in pairs}
    if origin in (list, set, frozenset):
        return origin(from_data(arguments[0], item) for item in data)
    if origin is tuple:
        kinds = [arguments[0]] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(from_data(one, item) for one, item in zip(kinds, data, strict=True))
    if not isinstance(data, kind):
        raise TypeError(f"{data!r} is no {kind.__name__}")
    return data

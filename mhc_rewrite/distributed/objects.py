"""What an object holds, to see whether somebody has changed it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_DEEP = 12


def content_of(value: Any, depth: int = 0) -> Any:
    """Something to compare: tensors by identity and version, containers and objects by what they hold."""
    if isinstance(value, Tensor):
        return id(value), value._version
    if depth == _DEEP or value is None or isinstance(value, (bool, int, float, str, type)) or callable(value):
        return value if isinstance(value, (bool, int, float, str)) else id(value)
    if isinstance(value, dict):
        return [(key if isinstance(key, str) else id(key), content_of(item, depth + 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [content_of(item, depth + 1) for item in value]
    if isinstance(value, (set, frozenset)):
        return {id(item) for item in value}
    return id(value), content_of(getattr(value, "__dict__", {}), depth + 1)

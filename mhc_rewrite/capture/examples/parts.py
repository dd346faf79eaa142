"""A transformers config and the configs in it, looked up by what they are for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_KINDS = {
    "image": r"vision|image|vit|visual|backbone|pixel|encoder",
    "video": r"video|vision|image|visual|backbone|encoder",
    "audio": r"audio|speech|acoustic|codec|encoder|semantic",
    "text": r"text|language|llm|decoder|lm|entity",
}


class Parts:
    """`config` with its parts, each an object with attributes or a dict."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.named: list[tuple[str, Any]] = list(_walk("", config))

    def of(self, kind: str) -> Iterator[Any]:
        """The parts for a kind of input first, then the whole, then the others."""
        mine = [part for name, part in self.named if name and re.search(_KINDS.get(kind, "$^"), name)]
        yield from mine
        yield self.config
        yield from (part for name, part in self.named if name and not any(part is one for one in mine))

    def look(self, kind: str, *names: str, default: Any = None) -> Any:
        """The first of `names` that a part has and that is not None."""
        return next(iter(self.every(kind, *names)), default)

    def every(self, kind: str, *names: str) -> list[Any]:
        """What the parts have by these names that is not None."""
        values = (getattr(part, name, None) for part in self.of(kind) for name in names)
        return [value for value in values if value is not None and not callable(value)]

    def number(self, kind: str, *names: str, default: int) -> int:
        """As `look`, for a positive number; of a list the last."""
        for part in self.of(kind):
            for name in names:
                value = getattr(part, name, None)
                if isinstance(value, (list, tuple)) and value:
                    value = value[-1]
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return default

    def all(self, field: str) -> list[int]:
        """The positive numbers that the parts have for a field."""
        values = (getattr(part, field, None) for _, part in self.named)
        return [value for value in values if isinstance(value, int) and value > 0]

    def matching(self, pattern: str) -> dict[str, int]:
        """All whole numbers whose names match, of the whole config before its parts."""
        found: dict[str, int] = {}
        for _, part in self.named:
            for name, value in _fields(part).items():
                if re.search(pattern, name) and isinstance(value, int) and not isinstance(value, bool):
                    found.setdefault(name, value)
        return found


def _fields(part: Any) -> dict[str, Any]:
    return part if isinstance(part, dict) else dict(vars(part))


def _walk(name: str, config: Any) -> Iterator[tuple[str, Any]]:
    yield name, config
    for key, value in _fields(config).items():
        if not key.startswith("_") and hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _walk(f"{name}.{key}".lstrip("."), value)

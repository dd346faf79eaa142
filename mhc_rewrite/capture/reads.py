"""The plain values that captured Python read: where each was, and what it was.

A captured graph has them built in, so it holds where they are the same: at a later call, or in a layer that is alike.
Plain Python that Dynamo can follow, which then guards on them as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# One step from an owner to what it holds.
Step = tuple[str, Any]


class _Absent:
    def __repr__(self) -> str:
        return "nothing"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Absent:
        return self

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()


@dataclass(frozen=True, eq=False)
class Read:
    """One value that was read.

    Attributes:
        root: where the way to it begins: an object, or None for the carrier itself.
        steps: `("attr", name)`, `("item", key)`, `("len", None)`, `("keys", None)` or
            `("call", arguments)`, one after another.
        expected: the value.
        identical: whether it must be this very object.
    """

    root: Any
    steps: tuple[Step, ...]
    expected: Any
    identical: bool = False


def attributes_of(path: str) -> tuple[Step, ...]:
    """The steps of a dotted path."""
    return tuple(("attr", name) for name in path.split(".")) if path else ()


def value_at(module: nn.Module, root: Any, steps: tuple[Step, ...]) -> Any:
    """What stands there now; ABSENT where nothing does."""
    value: Any = module if root is None else root
    try:
        for kind, key in steps:
            if kind == "attr":
                value = getattr(value, key)
            elif kind == "item":
                value = dict.__getitem__(value, key) if isinstance(value, dict) else value[key]
            elif kind == "len":
                value = len(value)
            elif kind == "keys":
                value = tuple(value)
            else:
                value = value(*key)
    except (AttributeError, LookupError, TypeError, ValueError):  # ValueError: an empty closure cell
        return ABSENT
    return value


def holds(module: nn.Module, reads: tuple[Read, ...]) -> bool:
    """Whether a module and all around it still say what they said when a forward was captured."""
    for read in reads:
        value = value_at(module, read.root, read.steps)
        expected = read.expected
        if read.identical:
            if value is not expected:
                return False
        elif type(value) is not type(expected) or not same(value, expected):
            return False
    return True


def same(value: Any, expected: Any) -> bool:
    """Whether two values of one type are equal: arrays by all of their elements, nan as itself."""
    if value is expected:
        return True
    equal = value == expected
    if isinstance(equal, bool):
        return equal
    return bool(value.shape == expected.shape and equal.all())

"""What objects hold: plain values, containers of them, cells, and the state of numpy's generators."""

from __future__ import annotations

import copy
import enum
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

from mhc_rewrite.capture.call import PLAIN
from mhc_rewrite.capture.code import is_machinery
from mhc_rewrite.capture.reads import ABSENT
from mhc_rewrite.capture.values import TRACED

PLAIN_TYPES = (*PLAIN, type(None), enum.Enum, range, slice, type(Ellipsis), torch.Generator)
CONTAINERS = (tuple, list, dict, set, frozenset)


def all_names(value: Any) -> set[str]:
    kinds = value.__mro__ if isinstance(value, type) else (value,)
    return {name for kind in kinds for name in vars(kind)}


def is_torchs_or_pythons(kind: Any) -> bool:
    """Whether a class or function is torch's or Python's."""
    module = sys.modules.get(getattr(kind, "__module__", "") or "")
    return module is not None and is_machinery(getattr(module, "__file__", None) or "<frozen >")


def generator_state(generator: Any) -> bytes:
    """Of a generator of numpy's, old or new, or of its module `numpy.random`."""
    if not isinstance(generator, types.ModuleType) and hasattr(generator, "bit_generator"):
        return pickle.dumps(generator.bit_generator.state)
    return pickle.dumps(generator.get_state(legacy=False))


def may_change(value: Any) -> bool:
    return not isinstance(value, (types.ModuleType, type)) and type(value) not in TRACED


def content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def is_plain(value: Any, depth: int = 0) -> bool:
    if type(value) in TRACED:  # which says that it is what it stands for
        return False
    if isinstance(value, dict):
        return depth < 6 and all(is_plain(k, depth + 1) and is_plain(v, depth + 1) for k, v in value.items())
    if isinstance(value, CONTAINERS):
        return depth < 6 and all(is_plain(item, depth + 1) for item in value)
    return isinstance(value, PLAIN_TYPES)


def items_of(held: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """As the dict holds them: a class of its own may make what it gives out, or store under another key."""
    return list(_own_kind(held).items(held))


def _own_kind(held: dict[Any, Any]) -> Any:
    return OrderedDict if isinstance(held, OrderedDict) else dict


def copy_of(held: list[Any] | dict[Any, Any] | set[Any]) -> Any:
    """What a list, a dict or a set holds, as a plain one."""
    if isinstance(held, dict):
        return dict(items_of(held))
    kind: Any = list if isinstance(held, list) else set
    return kind(kind.__iter__(held))


def held_by(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        return iter([value for _, value in items_of(thing)])
    return iter(thing if isinstance(thing, CONTAINERS) else vars(thing).values())


def put_back(thing: Any, held: Any) -> None:
    """What a list, a dict or an object held before; one that holds the very same is left alone."""
    now = vars(thing) if not isinstance(thing, CONTAINERS) else thing
    if len(now) == len(held) and all(a is b for a, b in zip(held_by(now), held_by(held), strict=True)):
        return
    if isinstance(thing, list):
        thing[:] = held
    elif isinstance(thing, dict):
        kind = _own_kind(thing)
        kind.clear(thing)
        for key, value in held.items():
            kind.__setitem__(thing, key, value)
    elif isinstance(thing, set):
        thing.clear()
        thing.update(held)
    else:
        vars(thing).clear()
        vars(thing).update(held)


def twin_of(thing: Any) -> tuple[Any, bool]:
    """What to compare an object with later: an equal copy, or it itself (True), where it has none."""
    try:
        twin = copy.deepcopy(thing)
        equal = type(twin) is type(thing) and bool(twin == thing)
    except Exception:
        equal = False
    return (twin, False) if equal else (thing, True)

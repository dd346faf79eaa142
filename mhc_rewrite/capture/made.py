"""Objects that a forward makes and hands to what it calls, a cache say: a graph makes them anew at each call.

Whose class to watch is known only once an object that nobody knows comes into a graph. So a capture that meets one
begins again, and sees the object being made.
"""

from __future__ import annotations

import contextlib
import enum
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from torch import fx, nn

from mhc_rewrite.capture.held import CONTAINERS, held_by, is_torchs_or_pythons
from mhc_rewrite.capture.values import TRACED

if TYPE_CHECKING:
    from mhc_rewrite.capture.tracer import ModuleTracer

_HEAP_TYPE = 1 << 9


class MadeObjects:
    """Those of one capture.

    Attributes:
        kinds: the classes that are watched.
        unknown: of objects whose making was not seen: to be watched in another capture.
    """

    def __init__(self, tracer: ModuleTracer, kinds: frozenset[type]) -> None:
        self.tracer, self.kinds = tracer, kinds
        self.unknown: set[type] = set()
        self.found: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = {}
        self.nodes: dict[int, fx.Node] = {}
        self.twins: dict[int, Any] = {}  # what calls get in their place: made with the example's values

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        thread = threading.get_ident()

        def making(original: Callable[..., None]) -> Callable[..., None]:
            def __init__(thing: Any, *args: Any, **kwargs: Any) -> None:
                original(thing, *args, **kwargs)
                if type(thing) in self.kinds and not self.tracer.shadowing and threading.get_ident() == thread:
                    self.found[id(thing)] = thing, args, kwargs, _content(thing)

            return __init__

        with contextlib.ExitStack() as stack:
            for kind in self.kinds:
                stack.enter_context(mock.patch.object(kind, "__init__", making(kind.__init__)))  # type: ignore[misc]
            yield

    def real(self, structure: Any) -> Any:
        """A structure with the example's values, before a call gets it that may change what it gets."""

        def value(leaf: Any) -> Any:
            if id(leaf) in self.found and self.node(leaf) is not None:
                return self.twins[id(leaf)]
            return leaf.value if type(leaf) in TRACED else leaf

        return fx.node.map_aggregate(structure, value)

    def node(self, thing: Any) -> fx.Node | None:
        """The node that makes an object; None for one that comes from elsewhere."""
        if id(thing) in self.nodes:
            return self.nodes[id(thing)]
        if id(thing) not in self.found:
            if _may_be_made(thing) and id(thing) not in self.tracer.watch.owners:
                self.unknown.add(type(thing))
            return None
        _, args, kwargs, before = self.found[id(thing)]
        now = _content(thing)
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            self.tracer.refuse(f"it changes a {type(thing).__name__} that it has made, which a graph would not repeat")
        made = self.tracer.graph.call_function(
            type(thing), self.tracer.create_arg(args), self.tracer.create_arg(kwargs)
        )  # fmt: skip
        self.nodes[id(thing)] = made
        self.twins[id(thing)] = type(thing)(*self.real(args), **self.real(kwargs))
        self.tracer.watch.hand_on(thing)
        return made


def _may_be_made(thing: Any) -> bool:
    kind = type(thing)
    return bool(
        kind.__flags__ & _HEAP_TYPE
        and not isinstance(thing, (nn.Module, enum.Enum, type, BaseException))
        and not is_torchs_or_pythons(kind)
    )


def _content(thing: Any) -> list[Any]:
    """What an object holds, and what its containers do."""
    held = list(held_by(thing)) if hasattr(thing, "__dict__") or isinstance(thing, CONTAINERS) else []
    return [*held, *(item for one in held if isinstance(one, CONTAINERS) for item in held_by(one))]

"""What a forward stores on modules: a graph repeats what goes into buffers, and needs no plain values that settle."""

from __future__ import annotations

import copy
import dis
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from mhc_rewrite.capture.reads import same, value_at
from mhc_rewrite.capture.record import source_line
from mhc_rewrite.plans import SourceLine

if TYPE_CHECKING:
    from mhc_rewrite.capture.tracer import ModuleTracer


class Stores:
    """What modules hold before a forward runs, to compare with and to put back."""

    def __init__(self, tracer: ModuleTracer, modules: list[nn.Module]) -> None:
        self.tracer, self.modules = tracer, modules
        self.before = [dict(module.__dict__) for module in modules]
        self.buffers = [dict(module._buffers) for module in modules]

    def put_back(self) -> None:
        for module, attributes, held in zip(self.modules, self.before, self.buffers, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(held)

    def refuse_changes(self, again: Callable[[], Any]) -> None:
        """Plain values that settle, as a window that is cut to the image's size does, need no storing: the graph has
        them built in. `again` runs the forward once more."""
        tracer, root = self.tracer, self.tracer.root
        after = [dict(module.__dict__) for module in self.modules]
        stored = [
            (name, new.get(name))
            for old, new in zip(self.before, after, strict=True)
            for name in new
            if name not in old or old[name] is not new[name]
        ]
        plain = all(isinstance(value, (bool, int, float, str, type(None))) for _, value in stored)
        changed = tracer.watch.changed()
        if tracer.watch.stored():
            tracer.refuse("it stores a result in a list, a dict or an object, which a graph would not repeat", None)
        if plain and (stored or changed):
            now = [copy.deepcopy(value_at(root, read.root, read.steps)) for read in changed]
            again()
            if all(module.__dict__[name] == new[name] for module, new in zip(self.modules, after, strict=True)
                   for name, _ in stored if name in new) and all(
                same(value_at(root, read.root, read.steps), value)
                for read, value in zip(changed, now, strict=True)
            ):  # fmt: skip
                tracer.watch.settled(changed)
                return
        if stored:
            name = stored[0][0]
            tracer.refuse(f"it stores {name!r} on the module, which a graph would not repeat", self._line(name))
        if changed:
            tracer.refuse(f"it changes {changed[0].steps[-1][1]!r}, which a graph would not repeat", None)

    def _line(self, name: str) -> SourceLine | None:
        """Where the forward's code, or what it calls, stores an attribute of this name."""
        for code in self.tracer.watch.codes:
            at = dict(dis.findlinestarts(code))
            for instruction in dis.get_instructions(code):
                if instruction.opname == "STORE_ATTR" and instruction.argval == name:
                    line = max((start, line) for start, line in at.items() if start <= instruction.offset)[1]
                    return source_line(code.co_filename, line)
        return None

    def keep_buffers(self) -> None:
        """What the forward has put in the place of buffers, the graph puts there at its end."""
        tracer = self.tracer
        for module, held in zip(self.modules, self.buffers, strict=True):
            for name, value in module._buffers.items():
                if value is held.get(name):
                    continue
                if module is not tracer.root and module not in tracer.paths:
                    why = f"it stores {name!r} on a module that is none of its own, which a graph would not repeat"
                    tracer.refuse(why, None)
                path = "" if module is tracer.root else tracer.paths[module] + "."
                owner = tracer.graph.get_attr(f"{path}_buffers")
                store = tracer.graph.call_function(operator.setitem, (owner, name, tracer.create_arg(value)))
                store.meta["effect"] = True

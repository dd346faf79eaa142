"""Watches what a forward's Python reads while it is captured, and refuses what can be neither guarded nor read anew.

Reads of attributes are seen by a `__getattribute__` that the classes of the objects get for the time of the capture:
the carrier and the modules below it first, and then whatever is found by reading. What code names outside of objects,
globals and closures, is taken from the functions that run, which the profiler's hook shows; it also shows C functions
that answer differently each time.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import gc
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.code import (
    ASKED,
    CLOCKS,
    DATES,
    QUESTIONS,
    RANDOM_STATE,
    WRAPPERS,
    chains_of,
    is_machinery,
    names_of,
)
from mhc_rewrite.capture.held import (
    CONTAINERS,
    PLAIN_TYPES,
    all_names,
    content_of,
    copy_of,
    generator_state,
    held_by,
    is_plain,
    is_torchs_or_pythons,
    items_of,
    may_change,
    put_back,
    twin_of,
)
from mhc_rewrite.capture.reads import ABSENT, Read, Step, attributes_of, same, value_at
from mhc_rewrite.capture.record import source_line
from mhc_rewrite.capture.values import TRACED

if TYPE_CHECKING:
    from mhc_rewrite.capture.tracer import ModuleTracer

Way = tuple[Any, tuple[Step, ...]]  # (root, steps), as in Read

_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
# Torch's own account of a module, and whether it is checkpointed, which a capture sees through: the same graph.
_UNREAD = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_is_full_backward_hook",
                     "gradient_checkpointing"})  # fmt: skip
# Types of globals that say nothing of what is computed.
_UNFOLLOWED = ("torch.", "logging", "typing", "re", "weakref", "_weakref", "abc", "threading", "_thread", "functools")
_FOLLOWED = (Tensor, nn.Module, threading.local, weakref.ref)
_HEAP_TYPE, _IMMUTABLE_TYPE = 1 << 9, 1 << 8


class Watch:
    """One capture's. `root` and the modules of `paths` are where reading begins."""

    def __init__(self, tracer: ModuleTracer, forward: Callable[..., Any]) -> None:
        self.tracer, self.root = tracer, tracer.root
        self.found: dict[Any, Read] = {}
        self.owners: dict[int, tuple[Way, Any]] = {}
        self.tensors: dict[int, Way] = {}
        self.before: list[tuple[Any, Any]] = []  # (object, a shallow copy of what it held)
        self.patched: dict[Any, Any] = {}
        self.codes: set[types.CodeType] = set()
        self.inner: set[types.CodeType] = set()  # made by those: its cells are variables of the forward
        self.classes: dict[type, Way] = {}
        self.functions: dict[types.CodeType, list[types.FunctionType]] = {}
        self.visited: set[int] = set()
        self.thread = threading.get_ident()
        self.handed: dict[int, Any] = {}
        self.numpy: dict[int, tuple[Any, bytes]] = {}  # generators, and where they were
        self.forward = forward

    def __enter__(self) -> Watch:
        self.outer: Any = sys.getprofile()
        self.collects = gc.isenabled()
        gc.disable()  # its callbacks would run as if the forward had called them
        for module, path in {**self.tracer.paths, self.root: ""}.items():
            steps = attributes_of(path)
            self._own(module, (None, steps))
        self._function(self.forward, None)
        if "numpy" in sys.modules:
            self._generator(sys.modules["numpy"].random)
        self.resume()
        return self

    def __exit__(self, *_: Any) -> None:
        self.pause()
        if not callable(self.outer) and hasattr(self.outer, "enable"):
            self.outer.enable()  # cProfile's, which only itself can set again
        if self.collects:
            gc.enable()
        for kind, before in self.patched.items():
            if before is None:
                del kind.__getattribute__
            else:
                kind.__getattribute__ = before
        for thing, held in self.before:
            put_back(thing, held)

    def resume(self) -> None:
        sys.setprofile(self._ran)

    def pause(self) -> None:
        sys.setprofile(self.outer if callable(self.outer) else None)

    # -- objects -----------------------------------------------------------------------------------------------------

    def _own(self, thing: Any, way: Way) -> None:
        """From now on its attributes are seen as they are read."""
        if id(thing) in self.owners:
            return
        self.owners[id(thing)] = way, thing
        kind: Any = type(thing)
        if not isinstance(thing, nn.Module) and hasattr(thing, "__dict__"):
            self.before.append((thing, dict(vars(thing))))
        if not self._patch(kind):
            self._all_of(thing, way)

    def hand_on(self, thing: Any) -> None:
        """An object that the forward has made is somebody else's from now on, to read and to change."""
        self.handed[id(thing)] = thing
        self._patch(type(thing))

    def _patch(self, kind: Any) -> bool:
        """Whether attributes of a class's objects are seen as they are read."""
        if kind in self.patched:
            return True
        if not kind.__flags__ & _HEAP_TYPE or kind.__flags__ & _IMMUTABLE_TYPE or issubclass(kind, type):
            return False
        before = vars(kind).get("__getattribute__")
        try:
            kind.__getattribute__ = self._watching(kind.__getattribute__)
        except TypeError:
            return False
        self.patched[kind] = before
        return True

    def _watching(self, original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def __getattribute__(thing: Any, name: str) -> Any:
            try:
                value = original(thing, name)
            except AttributeError:
                if self._counts(name):
                    self._attribute(thing, name, ABSENT)
                raise
            if self._counts(name):
                self._attribute(thing, name, value)
            return value

        return __getattribute__

    def _counts(self, name: str) -> bool:
        if self.tracer.shadowing or threading.get_ident() != self.thread:
            return False
        if name in _UNREAD or (name[:2] == "__" and name not in ("__class__", "__dict__")):
            return False
        return not is_machinery(sys._getframe(2).f_code.co_filename)

    def _attribute(self, thing: Any, name: str, value: Any) -> None:
        if id(thing) in self.handed:
            kind = type(thing).__name__
            self.tracer.refuse(f"it asks a {kind} that it has made and handed on, and that others may have changed")
        known = self.owners.get(id(thing))
        if known is None:
            return
        root, steps = known[0]
        if name == "training" and thing is self.root:
            return  # the mode is part of every key
        if value is ABSENT and isinstance(thing, nn.Module) and any(
            name in held for held in (thing._parameters, thing._buffers, thing._modules)
        ):  # fmt: skip
            value = getattr(thing, name)
            if value is not None:  # a graph reads parameters and children of the carrier anew
                if thing not in self.tracer.paths and thing is not self.root:
                    self.note((root, (*steps, ("attr", name))), value)
                return
        on_class = next((vars(base)[name] for base in type(thing).__mro__ if name in vars(base)), None)
        if isinstance(on_class, property):
            return  # its code is seen to run
        if isinstance(value, _FUNCTIONS):
            self._function(value, (root, (*steps, ("attr", name))))
            if name not in getattr(thing, "__dict__", ()):
                return  # methods are its class
        self.note((root, (*steps, ("attr", name))), value)

    def _all_of(self, thing: Any, way: Way) -> None:
        """For what can't be watched: all that it holds counts as read."""
        root, steps = way
        if not hasattr(thing, "__dict__"):
            self._record((id(root), steps), way, *twin_of(thing))
        for name, value in list(getattr(thing, "__dict__", {}).items()):
            if not name.startswith("__"):
                self.note((root, (*steps, ("attr", name))), value)

    # -- values ------------------------------------------------------------------------------------------------------

    def note(self, way: Way, value: Any) -> None:
        """A value was read there, before the forward changes it."""
        key = (id(way[0]), way[1])
        if key in self.found or type(value) in TRACED:
            return
        if value is ABSENT or isinstance(value, PLAIN_TYPES) or type(value).__module__ == "numpy":
            self._record(key, way, value.copy() if hasattr(value, "tobytes") else value)
        elif isinstance(value, Tensor):
            self.tensors.setdefault(id(value), way)
        elif isinstance(value, nn.Module):
            for path, module in value.named_modules():
                self._own(module, (way[0], (*way[1], *attributes_of(path))))
        elif isinstance(value, CONTAINERS):
            self._container(key, way, value)
        elif isinstance(value, _FUNCTIONS):
            self._record(key, way, value, identical=True)
        elif isinstance(value, type):
            self._record(key, way, value, identical=True)
            self.classes.setdefault(value, way)
        elif isinstance(value, types.ModuleType):
            return
        elif type(value).__module__.startswith("numpy.random"):
            self._generator(value)
        elif isinstance(value, random.Random):
            return  # its draws are seen
        elif isinstance(value, weakref.ref):
            self.note((way[0], (*way[1], ("call", ()))), value())
        elif isinstance(value, contextvars.ContextVar):
            asked = (*way[1], ("attr", "get"), ("call", ()))
            self.note((way[0], asked), value_at(self.root, way[0], asked))
        elif hasattr(type(value), "__next__"):
            self.tracer.refuse("it takes from an iterator or a file, which a graph would not repeat")
        else:
            self._own(value, way)

    def _record(self, key: Any, way: Way, value: Any, identical: bool = False) -> None:
        self.found[key] = Read(*way, value, identical)

    def _container(self, key: Any, way: Way, value: Any) -> None:
        if id(value) in self.visited or any(type(item) in TRACED for item in held_by(value)):
            return  # what holds a traced value already was made by the forward
        self.visited.add(id(value))
        root, steps = way
        if isinstance(value, (list, dict, set)):
            self.before.append((value, copy_of(value)))
        if is_plain(value):
            self._record(key, way, copy.deepcopy(value))
        elif isinstance(value, dict):
            if all(isinstance(name, PLAIN_TYPES) for name in value):
                self._record((id(root), (*steps, ("keys", None))), (root, (*steps, ("keys", None))), tuple(value))
            for name, item in items_of(value):
                self.note((root, (*steps, ("item", name))), item)
        elif isinstance(value, (tuple, list)):
            self._record((id(root), (*steps, ("len", None))), (root, (*steps, ("len", None))), len(value))
            for index, item in enumerate(list(value)):
                self.note((root, (*steps, ("item", index))), item)
        else:
            self._record(key, way, value, identical=True)

    # -- code --------------------------------------------------------------------------------------------------------

    def _ran(self, frame: types.FrameType, event: str, what: Any) -> None:
        """The profiler's hook. It is not called for what it does itself."""
        if self.tracer.shadowing:
            return
        if event == "c_call":
            self._called(frame, what)
        elif event == "call":
            code = frame.f_code
            if code in ASKED or code in RANDOM_STATE:
                caller = frame.f_back
                while caller is not None and caller.f_code.co_filename.startswith(WRAPPERS):
                    caller = caller.f_back
                if caller is not None and not is_machinery(caller.f_code.co_filename):
                    if code in RANDOM_STATE:
                        self._refuse(frame, "it reads or sets the state of torch's random numbers")
                    self.asked(ASKED[code])
            if code not in self.codes and not is_machinery(code.co_filename):
                self.codes.add(code)
                self.inner.update(part for part in code.co_consts if isinstance(part, types.CodeType))
                self._globals(frame, chains_of(code))
                self._closure(frame)

    def _called(self, frame: types.FrameType, function: Any) -> None:
        file, name = frame.f_code.co_filename, getattr(function, "__name__", "")
        owner = getattr(function, "__self__", None)
        if owner is torch._C and function in ASKED:
            if not is_machinery(file):
                self.asked(function)
        elif function is globals and not is_machinery(file):
            plain = [name for name, value in frame.f_globals.items() if not hasattr(type(value), "__next__")]
            self._globals(frame, [(name,) for name in plain if name[:2] != "__"])
        elif isinstance(owner, random.Random) and name in ("random", "getrandbits"):
            self._refuse(frame, _DRAWS.format("Python's random"))
        elif name in ("urandom", "getrandom") and isinstance(owner, types.ModuleType):
            self._refuse(frame, _DRAWS.format("the system's random"))
        elif is_machinery(file):
            return
        elif isinstance(owner, types.ModuleType) and owner.__name__ == "time" and name in CLOCKS:
            self._refuse(frame, "it reads the clock, which a graph would do once and for all")
        elif isinstance(owner, type) and owner.__module__ == "datetime" and name in DATES:
            self._refuse(frame, "it reads the clock, which a graph would do once and for all")
        elif isinstance(owner, types.ModuleType) and owner.__name__ in ("io", "_io") and name == "open":
            self._refuse(frame, "it reads a file, which a graph would do once and for all")

    def asked(self, function: Callable[..., Any]) -> None:
        """The forward asked torch about its surroundings."""
        for arguments in QUESTIONS[function]:
            way = function, (("call", arguments),)
            self._record((id(function), way[1]), way, function(*arguments))

    def _refuse(self, frame: types.FrameType, why: str) -> NoReturn:
        """With the line of the user's that led to it."""
        asks: types.FrameType | None = frame
        while asks is not None and is_machinery(asks.f_code.co_filename):
            asks = asks.f_back
        line = None if asks is None else source_line(asks.f_code.co_filename, asks.f_lineno)
        self.tracer.refuse(why, line)

    def _globals(self, frame: types.FrameType, chains: Iterable[tuple[str, ...]]) -> None:
        """What code names outside of itself, as far as plain attribute reads lead."""
        scope = frame.f_globals
        module = sys.modules.get(scope.get("__name__", ""))
        known = module is not None and vars(module) is scope
        for name, *attributes in chains:
            if name not in scope:
                continue
            value = scope[name]
            way: Way = (module, (("attr", name),)) if known else (scope, (("item", name),))
            self._follow(way, value, attributes)

    def _follow(self, way: Way, value: Any, attributes: list[str]) -> None:
        root, steps = way
        if isinstance(value, types.ModuleType):
            file = getattr(value, "__file__", None) or "<frozen >"
            environment = value.__name__ == "os" and attributes[:1] == ["environ"]
            if attributes and hasattr(value, attributes[0]) and (environment or not is_machinery(file)):
                self._follow((value, (("attr", attributes[0]),)), getattr(value, attributes[0]), attributes[1:])
        elif isinstance(value, (type, types.FunctionType)):
            if isinstance(value, types.FunctionType):
                self._function(value, way)
            if attributes and attributes[0] in all_names(value) and not is_torchs_or_pythons(value):
                next_value = getattr(value, attributes[0])
                if not isinstance(next_value, (*_FUNCTIONS, type)):
                    self._follow((root, (*steps, ("attr", attributes[0]))), next_value, attributes[1:])
            if isinstance(value, type):
                self.classes.setdefault(value, way)
        elif isinstance(value, _FUNCTIONS):
            self._function(value, way)
        elif isinstance(value, _FOLLOWED) or not type(value).__module__.startswith(_UNFOLLOWED):
            self.note(way, value)

    def _closure(self, frame: types.FrameType) -> None:
        """The cells of the function that runs: the frame has their values, the function the cells."""
        if frame.f_code in self.inner:
            return
        names = [name for name in frame.f_code.co_freevars if name != "__class__" and name in frame.f_locals]
        values = [frame.f_locals[name] for name in names]
        if not any(may_change(value) for value in values):
            return
        known = self.functions.get(frame.f_code) or [
            f for f in gc.get_referrers(frame.f_code) if type(f) is types.FunctionType and f.__code__ is frame.f_code
        ]
        for function in known:
            cells = dict(zip(frame.f_code.co_freevars, function.__closure__ or (), strict=True))
            if all(content_of(cells[name]) is value for name, value in zip(names, values, strict=True)):
                for name, value in zip(names, values, strict=True):
                    if isinstance(value, types.FunctionType):
                        self._function(value, None)
                    elif may_change(value):
                        self.note((cells[name], (("attr", "cell_contents"),)), value)
                return

    def _function(self, function: Any, way: Way | None) -> None:
        """A function that may run: its cells and its defaults belong to what is read."""
        if isinstance(function, functools.partial):
            function = function.func
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or id(function) in self.visited:
            return
        self.visited.add(id(function))
        self.functions.setdefault(function.__code__, []).append(function)
        if is_machinery(function.__code__.co_filename):
            return
        for index, value in enumerate(function.__defaults__ or ()):
            if may_change(value) and not isinstance(value, PLAIN_TYPES):
                self.note((function, (("attr", "__defaults__"), ("item", index))), value)
        for name, value in (function.__kwdefaults__ or {}).items():
            if may_change(value) and not isinstance(value, PLAIN_TYPES):
                self.note((function, (("attr", "__kwdefaults__"), ("item", name))), value)
        for cell in function.__closure__ or ():
            self._function(content_of(cell), None)
        self._function(getattr(function, "__wrapped__", None), None)

    # -- the end -----------------------------------------------------------------------------------------------------

    def reads(self) -> tuple[Read, ...]:
        """What was read, for later comparison."""
        self._class_attributes()
        return tuple(self.found.values())

    def same(self, way: Way, value: Any) -> None:
        """This very object has to stand there."""
        self._record((id(way[0]), way[1]), way, value, identical=True)

    def check_numpy(self, drawn: bool = False) -> None:
        """Whether numpy's generators are where they were: no hook sees their draws. `drawn` by a child, which may."""
        for key, (generator, before) in self.numpy.items():
            after = generator_state(generator)
            if not drawn and after != before:
                self.tracer.refuse(_DRAWS.format("numpy's random"), None)
            self.numpy[key] = generator, after

    def _generator(self, generator: Any) -> None:
        self.numpy.setdefault(id(generator), (generator, generator_state(generator)))

    def changed(self) -> list[Read]:
        """The reads that are no longer true: the forward itself changed them."""
        found = []
        for read in self.found.values():
            value = value_at(self.root, read.root, read.steps)
            if not (type(value) is type(read.expected) and (value is read.expected or same(value, read.expected))):
                found.append(read)
        return found

    def stored(self) -> bool:
        """Whether the forward left a traced value in a list, a dict or an object that it read."""
        return any(type(value) in TRACED for thing, _ in self.before for value in held_by(thing))

    def settled(self, reads: list[Read]) -> None:
        """These come out the same whatever they were: a memo. The capture does not depend on them."""
        gone = {id(read) for read in reads}
        self.found = {key: read for key, read in self.found.items() if id(read) not in gone}

    def _class_attributes(self) -> None:
        """Plain attributes of classes that the code may have asked by way of `type(self)` or another name."""
        names = {name for code in self.codes for name in names_of(code)} - _UNREAD
        for module in (self.root, *self.tracer.inlined):
            (root, steps), _ = self.owners[id(module)]
            self.classes.setdefault(type(module), (root, (*steps, ("attr", "__class__"))))
        for kind, (root, steps) in self.classes.items():
            for base in kind.__mro__:
                for name in names & vars(base).keys() if not is_torchs_or_pythons(base) else ():
                    if isinstance(vars(base)[name], (PLAIN_TYPES, *CONTAINERS)) and not name.startswith("__"):
                        self.note((root, (*steps, ("attr", name))), getattr(kind, name))


_DRAWS = "it draws from {} numbers, which a graph would do once and for all; draw with torch and compute with the draw"

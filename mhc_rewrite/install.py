"""Puts rewritten forwards into a live model and takes them out again.

A module that plays a part gets a subclass of its own class with the same name, whose forward asks the module's `Role`.
So the model stays the model: `isinstance`, signatures, hooks, `state_dict` names, copies and pickles keep working.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import linecache
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite import streams
from mhc_rewrite.analysis import Analysis, CarrierWiring
from mhc_rewrite.capture.call import CallShape, describe, flatten
from mhc_rewrite.capture.trace import ModuleGraph
from mhc_rewrite.captures import CallKind, Captured, capture_forward
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.errors import CaptureError, StreamError, UnseenCallError, UnsupportedModelError
from mhc_rewrite.hyper_connection import HyperConnection
from mhc_rewrite.model import ResidualSite, ResidualStream
from mhc_rewrite.passes.expand_streams import Rewrite, expand_streams
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals

_ROLE = "_mhc_role"
Rewrites = dict[Any, tuple[Rewrite, Callable[..., Any], Callable[..., Any] | None]]


@dataclass(eq=False)
class Scope:
    """One stream while the module that runs it is being called.

    Attributes:
        number: of the stream in the plan.
        stream: its sites and names.
        collapse: "mean" or "sum".
        depth: calls of enclosing modules that are under way.
        emitted: trunk tensors that carriers returned as streams.
        calls: how often each carrier was called, for those that the stream passes more than once.
        open: whether streams have come out that no carrier has collapsed yet.
        may_end_early: whether that is no harm at the end: all who read it take the mean.
    """

    number: int
    stream: ResidualStream
    collapse: str
    depth: int = 0
    emitted: list[Tensor] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    open: bool = False
    may_end_early: bool = False

    @property
    def channel_dim(self) -> int:
        return self.stream.sites[0].channel_dim

    def begin(self) -> None:
        self.emitted = []
        self.calls = {}
        self.open = False

    def emit(self, tensor: Tensor) -> None:
        if self.depth:  # a carrier may be called by itself, or once more in backward
            self.emitted.append(tensor)

    def collapsed(self, value: Any) -> Any:
        """`value` with the mean in place of this stream's trunk tensors."""
        if not self.emitted or not any(self.is_mine(leaf) for leaf in tree_leaves(value)):
            return value
        return tree_map(lambda x: streams.read_mean(x, self.channel_dim) if self.is_mine(x) else x, value)

    def is_mine(self, value: Any) -> bool:
        return isinstance(value, Tensor) and any(value is tensor for tensor in self.emitted)

    def check_closed(self, where: str) -> None:
        if self.open and not self.may_end_early:
            self.begin()
            raise StreamError(
                f"In {where or 'the model'!r} a residual stream was not collapsed: {self.stream.exit!r}, which ends it, "
                "did not run. Layers that are skipped at the end (LayerDrop, a changed num_hidden_layers) need another "
                "conversion: unmhcify(model), then mhcify it as it runs now."
            )


@dataclass
class Variant:
    """One rewritten forward: for one kind of call, with the streams coming in and going out in one way.

    It holds where `guards` give what is `expected`, and the leaves have these `dtypes` and `sizes`, if any are named.
    """

    function: Callable[..., Any]
    guards: Callable[..., Any] | None
    expected: tuple[Any, ...]
    constants: tuple[Any, ...]
    outgoing: tuple[int, ...]
    dtypes: tuple[Any, ...] | None
    sizes: tuple[Any, ...] | None
    captured: ModuleGraph
    rewrite: Rewrite
    sites: tuple[FoundSite, ...]


@dataclass
class CarrierRole:
    """The rewritten forwards of one carrier."""

    name: str
    config: MHCConfig
    wiring: CarrierWiring
    inlined: tuple[str, ...]  # relative to the carrier
    shape: CallShape
    scopes: dict[int, Scope]
    variants: dict[Any, list[Variant]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> CarrierRole:
        # Functions take the module as an argument, so copies of a model share them.
        return replace(self, scopes=copy.deepcopy(self.scopes, memo), variants=dict(self.variants))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "variants": {}}  # generated code is captured again at the first call

    def call(self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = self.shape.bind(args, kwargs)
        key, leaves = flatten(bound)
        arriving = self.arriving(leaves)
        leaving = self.leaving()
        variant = self.find(module, key, leaves, arriving, leaving)
        if variant is None:
            variant = self.learn(module, original, bound, key, leaves, arriving, leaving)
        result, outgoing = variant.function(module, *leaves.values(), *variant.constants)
        for number, tensor in zip(variant.outgoing, outgoing, strict=True):
            self.scopes[number].emit(tensor)
        for number in self.wiring.leaves:
            self.scopes[number].open = number in variant.outgoing
        return result

    def arriving(self, leaves: dict[str, Any]) -> tuple[int, ...]:
        """The streams that come in as streams: their tensor has one axis more than the trunk."""
        found = []
        for path, (rank, number) in self.wiring.entries.items():
            value = leaves.get(path)
            if isinstance(value, Tensor) and value.dim() == rank + 1:
                found.append(number)
            elif isinstance(value, Tensor) and value.dim() != rank:
                raise StreamError(
                    f"{self.name or 'the model'!r} was converted for {rank} axes in {path!r} and got {value.dim()}. "
                    "Call it as the example inputs did, or convert again with others."
                )
        return tuple(found)

    def leaving(self) -> tuple[int, ...]:
        """The streams that go on behind this call."""
        numbers = []
        for number, goes_on in self.wiring.leaves.items():
            position = 0
            if len(goes_on) > 1:
                calls = self.scopes[number].calls
                position = calls.get(self.name, 0) % len(goes_on)
                calls[self.name] = position + 1
            if goes_on[position]:
                numbers.append(number)
        return tuple(numbers)

    def find(
        self, module: nn.Module, key: Any, leaves: dict[str, Any], arriving: tuple[int, ...], leaving: tuple[int, ...]
    ) -> Variant | None:
        for variant in self.variants.get((module.training, key, arriving, leaving), ()):
            if variant.dtypes is not None and variant.dtypes != _dtypes(leaves):
                continue
            if variant.guards is not None or variant.sizes is not None:
                trunk = self.as_trunk(leaves, arriving, form_only=True)
                if variant.sizes is not None and variant.sizes != _sizes(trunk):
                    continue
                if variant.guards is not None:
                    found = tuple(variant.guards(module, *trunk.values(), *variant.constants))
                    if found != variant.expected:
                        continue
            return variant
        return None

    def learn(
        self, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any], key: Any, leaves: dict[str, Any],
        arriving: tuple[int, ...], leaving: tuple[int, ...],
    ) -> Variant:  # fmt: skip
        """Captures a call that was not seen before, from this call's own arguments."""
        if torch.compiler.is_compiling():
            raise UnseenCallError(
                f"{self.name or 'the model'!r} is called under torch.compile as {describe(key, module.training)}, which no "
                "eager call has shown. Call the model once in this way without torch.compile first."
            )
        bound = dict(bound)
        for path, value in self.as_trunk(leaves, arriving, form_only=False).items():
            if value is not leaves[path]:
                bound[path] = value  # a trunk is an argument of its own
        inlined = [module.get_submodule(path) for path in self.inlined]
        captured, residuals = capture_forward(module, self.name, bound, inlined, module.training, original)
        trunk = self.as_trunk(leaves, arriving, form_only=True)
        return self.add(module, module.training, key, trunk, captured, residuals, arriving, leaving, {})

    def as_trunk(self, leaves: dict[str, Any], arriving: tuple[int, ...], form_only: bool) -> dict[str, Any]:
        """The leaves with one tensor of the trunk's shape for each that came in as streams."""
        found = dict(leaves)
        for path, (_, number) in self.wiring.entries.items():
            if number in arriving and path in found:
                channel_dim = self.scopes[number].channel_dim
                read = streams.one_stream if form_only else streams.read_mean
                found[path] = read(found[path], channel_dim)
        return found

    def add(
        self, module: nn.Module, training: bool, key: Any, leaves: dict[str, Any], captured: ModuleGraph,
        residuals: Residuals, arriving: tuple[int, ...], leaving: tuple[int, ...], rewrites: Rewrites,
    ) -> Variant:  # fmt: skip
        """Rewrites a captured forward for one way of coming in and going out; `rewrites` are those made before."""
        found = {site.key for trunk in residuals.trunks for site in trunk.sites}
        if found.isdisjoint(self.wiring.targets) or not found <= self.wiring.known:
            new = sorted(f"{key[1]}:{key[2]}" for key in found - self.wiring.known)
            raise StreamError(
                f"{self.name or 'the model'!r}, called as {describe(key, training)}, "
                + (f"runs residual adds that the example inputs did not ({', '.join(new)})" if new else
                   "runs none of the residual adds that were converted")
                + ". Convert again with example inputs of this kind."
            )  # fmt: skip
        like = (id(captured), tuple(self.wiring.targets.items()), arriving, leaving)
        if like not in rewrites:
            rewrite = expand_streams(
                captured, residuals, self.wiring.targets, n=self.config.n_streams, collapse=self.config.collapse,
                arriving=frozenset(arriving), leaving=frozenset(leaving),
            )  # fmt: skip
            guards = compile_graph(_guard_graph(captured), "guards") if captured.guards else None
            rewrites[like] = rewrite, compile_graph(rewrite.graph, type(module).__name__), guards
        rewrite, function, guards = rewrites[like]
        variant = Variant(
            function=function,
            guards=guards,
            expected=tuple(guard.expected for guard in captured.guards),
            constants=captured.constants,
            outgoing=rewrite.outgoing,
            dtypes=_dtypes(leaves) if captured.asks_dtype else None,
            sizes=_sizes(leaves) if captured.pinned else None,
            captured=captured,
            rewrite=rewrite,
            sites=tuple(s for trunk in residuals.trunks for s in trunk.sites if s.key in self.wiring.targets),
        )
        self.variants.setdefault((training, key, arriving, leaving), []).append(variant)
        return variant


@dataclass
class Role:
    """What a converted module does besides its own forward.

    Attributes:
        carrier: rewritten forwards, if its forward holds residual adds.
        begins: streams that run inside its call.
        outer: streams whose trunk its result may hold: those of `begins` and of the modules inside it.
        reads: streams whose trunk it reads in the middle: it gets the mean.
    """

    name: str
    carrier: CarrierRole | None = None
    begins: list[Scope] = field(default_factory=list)
    outer: list[Scope] = field(default_factory=list)
    reads: list[Scope] = field(default_factory=list)

    def run(self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for scope in self.outer:
            scope.depth += 1
        try:
            for scope in self.begins:
                scope.begin()
            for scope in self.reads:
                args, kwargs = scope.collapsed(args), scope.collapsed(kwargs)
            if self.carrier is not None:
                result = self.carrier.call(module, original, args, kwargs)
            else:
                result = original(module, *args, **kwargs)
            for scope in self.begins:
                scope.check_closed(self.name)
            for scope in self.outer:
                result = scope.collapsed(result)
        finally:
            for scope in self.outer:
                scope.depth -= 1
                if scope.depth == 0:
                    scope.begin()  # keeps no tensor alive
        return result


# -- classes ---------------------------------------------------------------------------------------------------------


@functools.cache
def converted_class(base: type[nn.Module]) -> type[nn.Module]:
    """A subclass of `base` with the same name, whose forward asks the module's role."""
    original = base.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        role = self.__dict__.get(_ROLE)  # a slice of a Sequential has the class, but no role
        if role is None:
            return original(self, *args, **kwargs)
        return role.run(self, original, args, kwargs)

    def reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    namespace = {
        "forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "__qualname__": base.__qualname__,
        "__doc__": base.__doc__, "_mhc_base": base,
    }  # fmt: skip
    return type(base.__name__, (base,), namespace)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    cls = converted_class(base)
    return cls.__new__(cls)


def role_of(module: nn.Module) -> Role | None:
    """A converted module's role."""
    return module.__dict__.get(_ROLE)


def is_converted(model: nn.Module) -> bool:
    """Whether any module of the model has a role."""
    return any(role_of(module) is not None for module in model.modules())


# -- generated code --------------------------------------------------------------------------------------------------


def compile_graph(graph: fx.Graph, name: str) -> Callable[..., Any]:
    """A graph as a function `f(module, *leaves, *constants)`; graphs with the same text share one function."""
    code = graph.python_code("self")
    names = tuple(sorted(code.globals))
    return _compile(code.src, name, names, tuple(_ById(code.globals[n]) for n in names))


@dataclass(frozen=True)
class _ById:
    """A global of generated code, told apart by identity."""

    value: Any

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.value is self.value


@functools.cache
def _compile(source: str, name: str, names: tuple[str, ...], values: tuple[_ById, ...]) -> Callable[..., Any]:
    file = f"<mhc_rewrite {name} {abs(hash(source)):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = {key: value.value for key, value in zip(names, values, strict=True)}
    exec(compile(source, file, "exec"), scope)
    return scope["forward"]  # type: ignore[no-any-return]


def _guard_graph(captured: ModuleGraph) -> fx.Graph:
    graph = fx.Graph()
    needed: set[fx.Node] = set()
    todo = [guard.node for guard in captured.guards]
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    copies: dict[fx.Node, fx.Node] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder" or node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[guard.node] for guard in captured.guards))
    return graph


def _dtypes(leaves: dict[str, Any]) -> tuple[Any, ...]:
    tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
    autocast = {t.device.type for t in tensors} - {"meta"}
    return (
        *(t.dtype for t in tensors),
        *(torch.get_autocast_dtype(d) for d in sorted(autocast) if torch.is_autocast_enabled(d)),
    )


def _sizes(leaves: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(value.shape) for value in leaves.values() if isinstance(value, Tensor))


# -- putting in and taking out ---------------------------------------------------------------------------------------


def install(model: nn.Module, analysis: Analysis) -> None:
    """Converts the model in place; whatever fails, the model is as it was.

    Raises:
        UnsupportedModelError: a site would have to live where it can't.
    """
    added: list[tuple[nn.Module, str]] = []
    try:
        for stream in analysis.plan.streams:
            for index, site in enumerate(_each_site(stream)):
                if not site.excluded:
                    _add_site(model, site, index, analysis.plan.config)
                    added.append((model.get_submodule(site.holder), site.name.rpartition(".")[2]))
        roles = _roles(model, analysis)
        for name, role in roles.items():
            module = model.get_submodule(name)
            module.__dict__[_ROLE] = role
            module.__class__ = converted_class(type(module))
    except BaseException:
        _restore(model)
        for holder, name in added:
            holder._modules.pop(name, None)
        raise


def uninstall(model: nn.Module) -> None:
    """Takes sites and roles out again."""
    _restore(model)
    for module in model.modules():
        for name in [name for name, child in module._modules.items() if isinstance(child, HyperConnection)]:
            if name.startswith("mhc_"):
                del module._modules[name]


def _restore(model: nn.Module) -> None:
    for module in model.modules():
        if role_of(module) is not None:
            del module.__dict__[_ROLE]
            module.__class__ = type(module)._mhc_base  # type: ignore[attr-defined]


def _each_site(stream: ResidualStream) -> Iterable[ResidualSite]:
    return dict.fromkeys(stream.sites)


def _add_site(model: nn.Module, site: ResidualSite, index: int, config: MHCConfig) -> None:
    holder = model.get_submodule(site.holder)
    name = site.name.rpartition(".")[2]
    if isinstance(holder, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        raise UnsupportedModelError(
            f"{site.holder or 'The model'!r} holds a residual add ({site.source}) and is a {type(holder).__name__}, whose "
            "children are its forward: a site can't be one of them. Derive it from nn.Module."
        )
    if hasattr(holder, name):
        raise UnsupportedModelError(f"{site.holder or 'The model'!r} has an attribute {name!r} of its own; rename it.")
    tensor = next(itertools.chain(holder.parameters(), model.parameters()), None)
    double = site.dtype == "torch.float64"
    holder.add_module(
        name,
        HyperConnection(
            site.width, config, index=index, channel_dim=site.channel_dim,
            device=tensor.device if tensor is not None else None, dtype=torch.float64 if double else torch.float32,
        ),
    )  # fmt: skip


def _roles(model: nn.Module, analysis: Analysis) -> dict[str, Role]:
    config = analysis.plan.config
    scopes = [
        Scope(number, stream, config.collapse, may_end_early=number in analysis.may_end_early)
        for number, stream in enumerate(analysis.plan.streams)
    ]
    roles: dict[str, Role] = {}

    def role(name: str) -> Role:
        return roles.setdefault(name, Role(name))

    for name, wiring in analysis.carriers.items():
        inlined = tuple(sorted(part[len(name) :].lstrip(".") for part in wiring.inlined))
        mine = {number: scopes[number] for number in wiring.leaves}
        shape = CallShape.of(type(model.get_submodule(name)).forward)
        role(name).carrier = CarrierRole(name, config, wiring, inlined, shape, mine)
    for scope in scopes:
        top = scope.stream.scope
        if any(analysis.carriers[name].leaves[scope.number] != [False] for name in _carriers_of(scope.stream)):
            role(top).begins.append(scope)
            parts = top.split(".") if top else []
            for length in range(len(parts), -1, -1):
                role(".".join(parts[:length])).outer.append(scope)
            for reader in analysis.readers[scope.number]:
                role(reader).reads.append(scope)
    rewrites: Rewrites = {}
    for kind, captured in analysis.captures.by_kind.items():
        carrier = roles[kind.module].carrier if kind.module in roles else None
        if carrier is not None and not isinstance(captured, CaptureError):
            module = model.get_submodule(kind.module)
            _first_variants(module, carrier, kind, analysis.captures.leaves[kind], captured, rewrites)
    return roles


def _carriers_of(stream: ResidualStream) -> list[str]:
    return list(dict.fromkeys(site.carrier for site in stream.sites))


def _first_variants(
    module: nn.Module, carrier: CarrierRole, kind: CallKind, leaves: dict[str, Any], captured: Captured,
    rewrites: Rewrites,
) -> None:  # fmt: skip
    """The variants that the example's own calls need: streams arrive behind the first carrier and leave before the last."""
    numbers = list(carrier.wiring.leaves)
    ways = set()
    for position in range(max(len(goes_on) for goes_on in carrier.wiring.leaves.values())):
        leaving = tuple(n for n in numbers if carrier.wiring.leaves[n][min(position, len(carrier.wiring.leaves[n]) - 1)])
        arriving = tuple(
            number for _, number in carrier.wiring.entries.values()
            if not (position == 0 and _first_carrier(carrier.scopes[number].stream) == carrier.name)
        )  # fmt: skip
        ways.add((arriving, leaving))
    for arriving, leaving in ways:
        with contextlib.suppress(StreamError):  # a further call of ours may show other adds; a user's such call will say so
            carrier.add(module, kind.training, kind.key, leaves, *captured, arriving, leaving, rewrites)


def _first_carrier(stream: ResidualStream) -> str:
    return stream.sites[0].carrier

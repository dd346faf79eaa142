"""What converted modules do when they are called: choose a rewritten forward, and keep account of the streams."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite.capture.call import CallShape, describe, flatten, replace_leaves
from mhc_rewrite.capture.trace import ModuleGraph
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.conversion.analysis import CarrierWiring
from mhc_rewrite.conversion.captures import capture_forward, plain_attributes
from mhc_rewrite.conversion.generated import compile_graph, guard_graph
from mhc_rewrite.errors import MHCError, StreamError
from mhc_rewrite.passes.expand_streams import Rewrite, expand_streams
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals
from mhc_rewrite.passes.fuse_boundaries import fuse_site_calls
from mhc_rewrite.plans import ResidualStream
from mhc_rewrite.sites import recompute, streams
from mhc_rewrite.torch_private import MadeWhileTracing, outside_graphs, while_tracing

# Rewrites made so far, by captured graph and the streams that come in and go out: layers that are alike share them.
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
                f"In {where or 'the model'!r} a residual stream was not collapsed: {self.stream.exit!r}, which ends "
                "it, did not run. Layers that are skipped at the end (LayerDrop, another num_hidden_layers) need "
                "another conversion: unmhcify(model), then mhcify it as it runs now."
            )


@dataclass
class Variant:
    """One rewritten forward: for one kind of call, with the streams coming in and going out in one way.

    It holds where `guards` give what is `expected`, the leaves have these `dtypes` and `sizes`, if any are named, and
    the module has these plain `attributes`, which the captured code may have read.
    """

    function: Callable[..., Any]
    guards: Callable[..., Any] | None
    expected: tuple[Any, ...]
    constants: tuple[Any, ...]
    outgoing: tuple[int, ...]
    dtypes: tuple[Any, ...] | None
    sizes: tuple[Any, ...] | None
    attributes: tuple[tuple[str, str, Any], ...]
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
    traced: MadeWhileTracing = field(default_factory=MadeWhileTracing)  # variants of compiled code alone

    def __deepcopy__(self, memo: dict[int, Any]) -> CarrierRole:
        # Functions take the module as an argument, so copies of a model share them.
        return replace(
            self, scopes=copy.deepcopy(self.scopes, memo), variants=dict(self.variants), traced=MadeWhileTracing()
        )

    def __getstate__(self) -> dict[str, Any]:
        # Generated code is captured again at the first call.
        return {**self.__dict__, "variants": {}, "traced": MadeWhileTracing()}

    def call(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bound = self.shape.bind(args, kwargs)
        key, leaves = flatten(bound)
        arriving = self.arriving(leaves)
        leaving = self.leaving()
        variant = self.find(module, key, leaves, arriving, leaving)
        if variant is None:
            variant = self.learn(module, original, bound, key, leaves, arriving, leaving)
        result, outgoing = self.run(variant, module, *leaves.values(), *variant.constants)
        for number, tensor in zip(variant.outgoing, outgoing, strict=True):
            self.scopes[number].emit(tensor)
        for number in self.wiring.leaves:
            self.scopes[number].open = number in variant.outgoing
        return result

    def run(self, variant: Variant, *arguments: Any) -> Any:
        """The rewritten forward; under torch.compile the backend decides what is recomputed."""
        if self.config.recompute is None or torch.compiler.is_compiling():
            return variant.function(*arguments)
        try:
            with recompute.recomputation():
                return variant.function(*arguments)
        finally:
            if not any(scope.depth for scope in self.scopes.values()):
                recompute.forget()

    def arriving(self, leaves: dict[str, Any]) -> tuple[int, ...]:
        """The streams that come in as streams: their tensor has one axis more than the trunk."""
        found = []
        for path, (rank, number, may_arrive) in self.wiring.entries.items():
            value = leaves.get(path)
            if isinstance(value, Tensor) and may_arrive and value.dim() == rank + 1:
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
            if not _holds(module, variant.attributes) or not _has_dtypes(module, variant.captured.parameter_dtypes):
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
        if torch.compiler.is_dynamo_compiling():
            given = {name: replace_leaves(value, name, leaves) for name, value in bound.items()}
            made = while_tracing(self.traced, _made, self, module, original, given, arriving, leaving)
            if made is not None:
                return made  # the compiled code's alone: what Dynamo has looked at must not change while it traces
        elif torch.compiler.is_compiling():
            return self.capture(module, original, bound, key, leaves, arriving, leaving)  # on fake tensors
        return self.capture_and_add(module, original, bound, key, leaves, arriving, leaving)

    @outside_graphs
    def capture_and_add(
        self, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any], key: Any, leaves: dict[str, Any],
        arriving: tuple[int, ...], leaving: tuple[int, ...],
    ) -> Variant:  # fmt: skip
        variant = self.capture(module, original, bound, key, leaves, arriving, leaving)
        self.variants.setdefault((module.training, key, arriving, leaving), []).append(variant)
        return variant

    def capture(
        self, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any], key: Any, leaves: dict[str, Any],
        arriving: tuple[int, ...], leaving: tuple[int, ...],
    ) -> Variant:  # fmt: skip
        bound = dict(bound)
        for path, value in self.as_trunk(leaves, arriving, form_only=False).items():
            if value is not leaves[path]:
                bound[path] = value  # a trunk is an argument of its own
        inlined = [module.get_submodule(path) for path in self.inlined]
        captured, residuals = capture_forward(module, self.name, bound, inlined, module.training, original)
        trunk = self.as_trunk(leaves, arriving, form_only=True)
        return self.make(module, module.training, key, trunk, captured, residuals, arriving, leaving, {})

    def as_trunk(self, leaves: dict[str, Any], arriving: tuple[int, ...], form_only: bool) -> dict[str, Any]:
        """The leaves with one tensor of the trunk's shape for each that came in as streams."""
        found = dict(leaves)
        for path, (_, number, _) in self.wiring.entries.items():
            if number in arriving and path in found:
                channel_dim = self.scopes[number].channel_dim
                read = streams.one_stream if form_only else streams.read_mean
                found[path] = read(found[path], channel_dim)
        return found

    def add(
        self, module: nn.Module, training: bool, key: Any, leaves: dict[str, Any], captured: ModuleGraph,
        residuals: Residuals, arriving: tuple[int, ...], leaving: tuple[int, ...], rewrites: Rewrites,
    ) -> None:  # fmt: skip
        """Keeps what `make` makes."""
        made = self.make(module, training, key, leaves, captured, residuals, arriving, leaving, rewrites)
        self.variants.setdefault((training, key, arriving, leaving), []).append(made)

    def make(
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
            fuse_site_calls(rewrite.graph)
            guards = compile_graph(guard_graph(captured), "guards") if captured.guards else None
            rewrites[like] = rewrite, compile_graph(rewrite.graph, type(module).__name__), guards
        rewrite, function, guards = rewrites[like]
        return Variant(
            function=function,
            guards=guards,
            expected=tuple(guard.expected for guard in captured.guards),
            constants=captured.constants,
            outgoing=rewrite.outgoing,
            dtypes=_dtypes(leaves) if captured.asks_dtype else None,
            sizes=_sizes(leaves) if captured.pinned else None,
            attributes=plain_attributes(module, self.inlined),
            captured=captured,
            rewrite=rewrite,
            sites=tuple(s for trunk in residuals.trunks for s in trunk.sites if s.key in self.wiring.targets),
        )


@dataclass
class Role:
    """What a converted module does besides its own forward.

    Attributes:
        carrier: rewritten forwards, if its forward holds residual adds.
        begins: streams that run inside its call.
        outer: streams whose trunk its result may hold: those of `begins` and of the modules inside it.
        reads: streams whose trunk it reads: it gets the mean.
        settings: attributes of the module before the conversion, where it needs others.
    """

    name: str
    carrier: CarrierRole | None = None
    begins: list[Scope] = field(default_factory=list)
    outer: list[Scope] = field(default_factory=list)
    reads: list[Scope] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
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
                    if not torch.compiler.is_compiling():
                        recompute.forget()
        return result


def _made(
    role: CarrierRole, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any],
    arriving: tuple[int, ...], leaving: tuple[int, ...],
) -> Variant | None:  # fmt: skip
    """What Dynamo's trace of an unseen call runs; None where an ordinary call has to show why it can't be captured."""
    key, leaves = flatten(bound)
    try:
        return role.capture(module, original, bound, key, leaves, arriving, leaving)
    except MHCError:
        return None


def _dtypes(leaves: dict[str, Any]) -> tuple[Any, ...]:
    tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
    autocast = {t.device.type for t in tensors} - {"meta"}
    return (
        *(t.dtype for t in tensors),
        *(torch.get_autocast_dtype(d) for d in sorted(autocast) if torch.is_autocast_enabled(d)),
    )


def _holds(module: nn.Module, attributes: tuple[tuple[str, str, Any], ...]) -> bool:
    for path, name, value in attributes:
        owner = module.get_submodule(path) if path else module
        if getattr(owner, name) != value:
            return False
    return True


def _has_dtypes(module: nn.Module, dtypes: dict[str, torch.dtype]) -> bool:
    for path, dtype in dtypes.items():
        owner, _, name = path.rpartition(".")
        if getattr(module.get_submodule(owner), name).dtype != dtype:
            return False
    return True


def _sizes(leaves: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(value.shape) for value in leaves.values() if isinstance(value, Tensor))

"""What converted modules do when they are called: choose a rewritten forward, and hand streams on as states.

Nothing here remembers a call: what one call knows of a stream travels with the state. So threads, recursion and copies
of a model that share roles don't meet.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite.capture.call import CallShape, describe, flatten, replace_leaves
from mhc_rewrite.capture.decisions import Otherwise
from mhc_rewrite.capture.graph import ModuleGraph
from mhc_rewrite.capture.reads import holds
from mhc_rewrite.capture.state import alone, under_way
from mhc_rewrite.capture.values import TracedValue
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.conversion.again import Beginning
from mhc_rewrite.conversion.captures import capture_forward
from mhc_rewrite.conversion.generated import compile_graph, guard_graph
from mhc_rewrite.conversion.hooks import Places
from mhc_rewrite.conversion.naming import CarrierWiring
from mhc_rewrite.conversion.sharded import gathered
from mhc_rewrite.conversion.whole import check_whole
from mhc_rewrite.errors import MHCError, StreamError, UnsupportedModelError
from mhc_rewrite.passes.expand_streams import Rewrite, expand_streams
from mhc_rewrite.passes.find_residuals import FoundSite, Residuals
from mhc_rewrite.passes.fuse_boundaries import fuse_site_calls
from mhc_rewrite.sites import recompute, streams
from mhc_rewrite.sites import state as states
from mhc_rewrite.sites.state import KINDS, StreamState, is_state, plain, state, streams_of
from mhc_rewrite.torch_private import (
    MadeWhileTracing,
    has_hooks,
    never_an_input_of_graphs,
    outside_graphs,
    while_tracing,
)

# Variants that differ in nothing but what their Python read: so many are kept.
_KEPT = 8

# Rewrites made so far, by captured graph and the streams that come in and go out: layers that are alike share them.
Rewrites = dict[Any, tuple[Rewrite, Callable[..., Any], Callable[..., Any] | None]]


@dataclass
class Variant:
    """One rewritten forward: for one kind of call, with the streams coming in and going out in one way.

    It holds where `guards` give what is `expected`, the leaves have these `dtypes` and `sizes`, if any are named, and
    what the captured code read (`captured.reads`) is what it was.
    """

    function: Callable[..., Any]
    guards: Callable[..., Any] | None
    expected: tuple[Any, ...]
    constants: tuple[Any, ...]
    dtypes: tuple[Any, ...] | None
    sizes: tuple[Any, ...] | None
    captured: ModuleGraph
    rewrite: Rewrite
    sites: tuple[FoundSite, ...]

    def differs_in_reads(self, other: Variant) -> bool:
        """Whether both hold for the same calls, and what their Python read tells them apart."""
        mine, its = self.captured.outcomes, other.captured.outcomes
        return (self.sizes, self.dtypes, self.expected, mine) == (other.sizes, other.dtypes, other.expected, its)


@dataclass
class CarrierRole:
    """The rewritten forwards of one carrier.

    Attributes:
        channel_dims: of the streams that it holds sites of, by their numbers.
        places_in, places_out: where a trunk comes in and goes out.
    """

    name: str
    config: MHCConfig
    wiring: CarrierWiring
    inlined: tuple[str, ...]  # relative to the carrier
    shape: CallShape
    channel_dims: dict[int, int]
    variants: dict[Any, list[Variant]] = field(default_factory=dict)
    traced: MadeWhileTracing = field(default_factory=MadeWhileTracing)  # variants of compiled code alone
    places_in: Places = field(default_factory=dict)
    places_out: Places = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, (rank, number) in self.wiring.entries.items():
            if path in self.shape.names:
                self.places_in[self.shape.names.index(path)] = rank, self.channel_dims[number]

    def __deepcopy__(self, memo: dict[int, Any]) -> CarrierRole:
        # Functions take the module as an argument, so copies of a model share them.
        return replace(self, variants={key: list(v) for key, v in self.variants.items()}, traced=MadeWhileTracing())

    def __getstate__(self) -> dict[str, Any]:
        # Generated code is captured again at the first call.
        return {**self.__dict__, "variants": {}, "traced": MadeWhileTracing()}

    def call(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        bound = self.shape.bind(args, kwargs)
        key, given = flatten(bound)
        for value in given.values():
            if isinstance(value, fx.Proxy) and not isinstance(value, TracedValue):
                return self.as_leaf(module, value.tracer, args, kwargs)
        if not torch.compiler.is_compiling():
            self.warn_of_hooks(module)
        turns = self.turns(given)
        arriving, leaving = tuple(turns), self.leaving(turns)
        leaves = self.as_plain(given, turns)
        variant = self.find(module, key, leaves, arriving, leaving)
        if variant is None:
            variant = self.learn(module, original, bound, key, leaves, arriving, leaving)
        if variant.captured.outcomes:
            variant, (result, outgoing) = self.decide(
                variant, module, original, bound, key, given, leaves, arriving, leaving
            )
        else:
            result, outgoing = self.run(variant, module, given, leaves, arriving)
        if not outgoing or not self.name:  # nobody takes up the streams of a whole model
            return result
        # A reentrant checkpoint runs without gradients, and its result gets them later.
        in_graph = torch.is_grad_enabled() or not any(
            isinstance(x, Tensor) and x.requires_grad for x in leaves.values()
        )
        return self.as_states(variant.rewrite, result, outgoing, turns, in_graph)

    def run(
        self, variant: Variant, module: nn.Module, given: dict[str, Any], leaves: dict[str, Any],
        arriving: tuple[int, ...],
    ) -> Any:  # fmt: skip
        """The rewritten forward; under torch.compile the backend decides what is recomputed."""
        if not variant.sites:
            return self.pass_by(variant, module, given, self.as_trunk(leaves, arriving, streams.read_mean)), ()
        if self.config.recompute is None or torch.compiler.is_compiling():
            return variant.function(module, *leaves.values(), *variant.constants)
        with recompute.recomputation():
            return variant.function(module, *leaves.values(), *variant.constants)

    @staticmethod
    def pass_by(variant: Variant, module: nn.Module, given: dict[str, Any], read: dict[str, Any]) -> Any:
        """A call without sites, of a layer that is skipped say: what it returns as it came stays n streams."""
        result, _ = variant.function(module, *read.values(), *variant.constants)

        def typed(value: Any) -> Any:
            for path, tensor in read.items():
                if value is tensor:
                    return given[path]
            return value

        return typed(result) if isinstance(result, Tensor) else tree_map(typed, result)

    def decide(
        self, variant: Variant, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any], key: Any,
        given: dict[str, Any], leaves: dict[str, Any], arriving: tuple[int, ...], leaving: tuple[int, ...],
    ) -> tuple[Variant, Any]:  # fmt: skip
        """Runs a forward that branches on content; where it goes another way, from the beginning by that way's graph.

        Which graph is tried first is the same each time: a checkpoint finds in backward what it found in forward.
        """
        while True:
            beginning = Beginning(module, leaves)
            try:
                return variant, self.run(variant, module, given, leaves, arriving)
            except Otherwise as other:
                answers = (*variant.captured.outcomes[: other.index], other.outcome)
            beginning.put_back()
            found = self.find(module, key, leaves, arriving, leaving, answers)
            variant = found or self.capture_and_add(module, original, bound, key, leaves, arriving, leaving, answers)

    def as_leaf(self, module: nn.Module, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        """This call in a graph that somebody traces, a feature extractor say: what it does depends on its arguments."""
        if module is tracer.root:
            raise UnsupportedModelError(
                f"{type(module).__name__}, a converted model, can't be traced as one graph: its forward holds residual "
                "adds itself, and does what its arguments ask for. Trace the model first and convert what comes out."
            )
        proxy: fx.Proxy = tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
        return proxy

    def warn_of_hooks(self, module: nn.Module) -> None:
        """Modules that this forward runs as a part of itself are not called, so that their hooks don't run."""
        hooked = next((path for path in self.inlined if has_hooks(module.get_submodule(path))), None)
        if hooked is not None:
            warnings.warn(
                f"{hooked!r} in {self.name or 'the model'!r} has forward hooks, which do not run: with its residual "
                f"adds it is captured as part of {type(module).__name__}'s forward, and not called. What they collect "
                "stays empty (output_hidden_states of some transformers models, say). Hooks on "
                f"{self.name or 'the model'!r} itself and on modules without residual adds run.",
                stacklevel=2,
            )

    def turns(self, leaves: dict[str, Any]) -> dict[int, int]:
        """The streams that come in as streams, and how often each has passed the carrier that ends it."""
        found = {}
        for path, (rank, number) in self.wiring.entries.items():
            value = leaves.get(path)
            if isinstance(value, StreamState):
                if value.number != number or value.written is not None:
                    continue  # another stream, whose mean this one begins with
                if not is_state(value):
                    raise StreamError(
                        f"{self.name!r} gets in {path!r} what came out at the end of its own residual stream, which "
                        "went through its layers more often than in the example. Convert the model with an example "
                        "for which it does so as often."
                    )
                found[number] = value.turns
            elif isinstance(value, Tensor) and value.dim() != rank:
                raise StreamError(
                    f"{self.name or 'the model'!r} was converted for {rank} axes in {path!r} and got {value.dim()}. "
                    "Call it as the example inputs did, or convert again with others."
                )
        return found

    def leaving(self, turns: dict[int, int]) -> tuple[int, ...]:
        """The streams that go on behind this call, by the example."""
        return tuple(n for n, goes_on in self.wiring.leaves.items() if goes_on[min(turns.get(n, 0), len(goes_on) - 1)])

    def as_plain(self, leaves: dict[str, Any], arriving: Iterable[int]) -> dict[str, Any]:
        """The leaves as tensors: streams where streams come in, and what a state reads as elsewhere."""
        found = dict(leaves)
        for path, value in leaves.items():
            if isinstance(value, StreamState):
                _, number = self.wiring.entries.get(path, (0, -1))
                found[path] = streams_of(value) if number in arriving else plain(value)
        return found

    def as_states(
        self, rewrite: Rewrite, result: Any, outgoing: tuple[Tensor, ...], turns: dict[int, int], in_graph: bool
    ) -> Any:
        """The result with states in place of the tensors that go out."""
        states = []
        for number, tensor in zip(rewrite.outgoing, outgoing, strict=True):
            passed = turns.get(number, 0) + (not self.wiring.leaves[number][-1])
            reads_as = "itself" if number in rewrite.ended else "mean"
            states.append(state(tensor, self.channel_dims[number], reads_as, number, passed, in_graph))

        def typed(value: Any) -> Any:
            for tensor, made in zip(outgoing, states, strict=True):
                if value is tensor:
                    return made
            return value

        return typed(result) if isinstance(result, Tensor) else tree_map(typed, result)

    def find(
        self, module: nn.Module, key: Any, leaves: dict[str, Any], arriving: tuple[int, ...], leaving: tuple[int, ...],
        answers: tuple[Any, ...] = (),
    ) -> Variant | None:  # fmt: skip
        """A variant for this call, of those whose first branches on content went as `answers` say."""
        for variant in self.variants.get((module.training, key, arriving, leaving), ()):
            if variant.captured.outcomes[: len(answers)] == answers and self.fits(variant, module, leaves, arriving):
                return variant
        return None

    def fits(self, variant: Variant, module: nn.Module, leaves: dict[str, Any], arriving: tuple[int, ...]) -> bool:
        """Whether a variant for this kind of call holds for this one."""
        if variant.dtypes is not None and variant.dtypes != _dtypes(leaves):
            return False
        if not holds(module, variant.captured.reads) or not _has_dtypes(module, variant.captured.parameter_dtypes):
            return False
        if variant.guards is not None or variant.sizes is not None:
            trunk = self.as_trunk(leaves, arriving, streams.one_stream)
            if variant.sizes is not None and variant.sizes != _sizes(trunk):
                return False
            if variant.guards is not None:
                found = variant.guards(module, *trunk.values(), *variant.constants)
                return all(_agrees(value, expected) for value, expected in zip(found, variant.expected, strict=True))
        return True

    def learn(
        self, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any], key: Any, leaves: dict[str, Any],
        arriving: tuple[int, ...], leaving: tuple[int, ...],
    ) -> Variant:  # fmt: skip
        """Captures a call that was not seen before, from this call's own arguments."""
        if torch.compiler.is_dynamo_compiling():
            bound = {name: replace_leaves(value, name, leaves) for name, value in bound.items()}
            made = while_tracing(self.traced, _made, self, module, original, bound, arriving, leaving)
            if made is not None:  # the compiled code's alone: what Dynamo has looked at must not change while it traces
                if not self.fits(made, module, leaves, arriving):  # asked in the trace, so that Dynamo guards it
                    raise UnsupportedModelError(
                        f"{self.name or 'the model'!r}, called as {describe(key, module.training)}, is new under "
                        "torch.compile and asks something there that has another answer while Dynamo traces, "
                        "torch.compiler.is_dynamo_compiling say. Ask torch.compiler.is_compiling instead."
                    )
                return made
        elif torch.compiler.is_compiling():
            return self.capture(module, original, bound, leaves, arriving, leaving)  # on fake tensors
        return self.capture_and_add(module, original, bound, key, leaves, arriving, leaving)

    def capture_and_add(
        self, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any], key: Any, leaves: dict[str, Any],
        arriving: tuple[int, ...], leaving: tuple[int, ...], answers: tuple[Any, ...] = (),
    ) -> Variant:  # fmt: skip
        with alone():
            known = self.find(module, key, leaves, arriving, leaving, answers)
            if known is not None:  # another thread was faster
                return known
            made = self.capture(module, original, bound, leaves, arriving, leaving, answers)
            self.keep(made, (module.training, key, arriving, leaving))
            return made

    def capture(
        self, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any], leaves: dict[str, Any],
        arriving: tuple[int, ...], leaving: tuple[int, ...], answers: tuple[Any, ...] = (),
    ) -> Variant:  # fmt: skip
        with alone():
            read = self.as_trunk(leaves, arriving, streams.read_mean)
            bound = {name: replace_leaves(value, name, read) for name, value in bound.items()}
            inlined = [module.get_submodule(path) for path in self.inlined]
            with gathered(module, self.name):
                captured, residuals = capture_forward(
                    module, self.name, bound, inlined, module.training, original, self.wiring.known, answers
                )
            key, _ = flatten(bound)
            trunk = self.as_trunk(leaves, arriving, streams.one_stream)
            return self.make(module, module.training, key, trunk, captured, residuals, arriving, leaving, {})

    def unknown(self, residuals: Residuals) -> list[FoundSite]:
        """The adds that the example did not show, but for further ones on a trunk that was left alone."""
        found = []
        for trunk in residuals.trunks:
            keys = {site.key for site in trunk.sites}
            if keys.isdisjoint(self.wiring.known) or not keys.isdisjoint(self.wiring.targets):
                found += [site for site in trunk.sites if site.key not in self.wiring.known]
        return found

    def as_trunk(
        self, leaves: dict[str, Any], arriving: tuple[int, ...], read: Callable[[Tensor, int], Tensor]
    ) -> dict[str, Any]:
        """The leaves with one tensor of the trunk's shape for each that came in as streams."""
        found = dict(leaves)
        for path, (_, number) in self.wiring.entries.items():
            if number in arriving and path in found:
                found[path] = read(found[path], self.channel_dims[number])
        return found

    def add(
        self, module: nn.Module, training: bool, key: Any, leaves: dict[str, Any], captured: ModuleGraph,
        residuals: Residuals, arriving: tuple[int, ...], leaving: tuple[int, ...], rewrites: Rewrites,
    ) -> None:  # fmt: skip
        """Keeps what `make` makes."""
        made = self.make(module, training, key, leaves, captured, residuals, arriving, leaving, rewrites)
        self.keep(made, (training, key, arriving, leaving))

    def keep(self, made: Variant, kind: Any) -> None:
        """Keeps a variant for later calls of its kind."""
        known = self.variants.setdefault(kind, [])
        known.append(made)
        alike = [other for other in known if other.differs_in_reads(made)]
        if len(alike) > _KEPT:  # a number that changes at every call, a schedule's say, may not fill the memory
            known.remove(alike[0])

    def make(
        self, module: nn.Module, training: bool, key: Any, leaves: dict[str, Any], captured: ModuleGraph,
        residuals: Residuals, arriving: tuple[int, ...], leaving: tuple[int, ...], rewrites: Rewrites,
    ) -> Variant:  # fmt: skip
        """Rewrites a captured forward for one way of coming in and going out; `rewrites` are those made before."""
        found = {site.key for site in residuals.sites()}
        unknown = self.unknown(residuals)
        skips = found.isdisjoint(self.wiring.targets)
        if unknown or (skips and self.config.collapse == "sum"):  # the sum of a stream is taken at its last site
            new = sorted({str(site.add.meta.get("source")) for site in unknown})
            raise StreamError(
                f"{self.name or 'the model'!r}, called as {describe(key, training)}, "
                + (f"runs residual adds that the example inputs did not ({', '.join(new)})" if new else
                   "runs none of the residual adds that were converted")
                + ". Convert again with example inputs of this kind."
            )  # fmt: skip
        like = (id(captured), tuple(self.wiring.targets.items()), arriving, leaving)
        if like not in rewrites:
            on, ending = self.outgoing(residuals, leaving)
            n = None if self.config.stretches else self.config.n
            rewrite = expand_streams(
                captured, residuals, self.wiring.targets, n=n, collapse=self.config.collapse,
                arriving=frozenset(arriving), leaving=on, ending=ending,
            )  # fmt: skip
            fuse_site_calls(rewrite.graph)
            guards = compile_graph(guard_graph(captured), "guards") if captured.guards else None
            rewrites[like] = rewrite, compile_graph(rewrite.graph, type(module).__name__), guards
        for trunk in residuals.trunks:
            end = trunk.after[-1].node if trunk.after else trunk.sites[-1].add
            place = len(end.meta["shape"]), trunk.sites[-1].channel_dim
            self.places_out.update(dict.fromkeys(trunk.sinks, place))
        rewrite, function, guards = rewrites[like]
        return Variant(
            function=function,
            guards=guards,
            expected=tuple(guard.expected for guard in captured.guards),
            constants=captured.constants,
            dtypes=_dtypes(leaves) if captured.asks_dtype else None,
            sizes=_sizes(leaves) if captured.pinned else None,
            captured=captured,
            rewrite=rewrite,
            sites=tuple(s for trunk in residuals.trunks for s in trunk.sites if s.key in self.wiring.targets),
        )

    def outgoing(self, residuals: Residuals, leaving: tuple[int, ...]) -> tuple[frozenset[int], frozenset[int]]:
        """The streams that go out as streams, and those of which only the end goes out.

        A stream that ends by the example goes on all the same, where nothing but its mean is read at the end: another
        call may take it up. It can't where something lies behind its last site, a norm say, which acts on the mean
        there and on every stream elsewhere.
        """
        if not self.name:
            return frozenset(leaving), frozenset()
        lasts = {t.stream for trunk in residuals.trunks for s in trunk.sites if trunk.after and
                 (t := self.wiring.targets.get(s.key)) is not None}  # fmt: skip
        ending = {n for n in self.wiring.leaves if n not in leaving and (n in lasts or self.config.collapse == "sum")}
        return frozenset(self.wiring.leaves) - ending, frozenset(ending)


@dataclass
class Role:
    """What a converted module does besides its own forward.

    Attributes:
        carrier: rewritten forwards, if its forward holds residual adds.
        reads: whether it gets and gives plain tensors alone: it runs no part of a stream, or it is the whole model.
        settings: attributes of the module before the conversion, where it needs others.
        parts: of the whole model: the modules whose forwards are rewritten.
    """

    name: str
    carrier: CarrierRole | None = None
    reads: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if torch.compiler.is_compiling():
            return self._run(module, original, args, kwargs)
        if self.parts:
            check_whole(module, self.parts)
        with under_way() as outermost:
            try:
                return self._run(module, original, args, kwargs)
            finally:
                if outermost:
                    recompute.forget()  # keeps no tensor alive

    def _run(
        self, module: nn.Module, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.reads:
            args, kwargs = plain(args), plain(kwargs)
        if self.carrier is not None:
            result = self.carrier.call(module, original, args, kwargs)
        else:
            result = original(module, *args, **kwargs)
        if not self.name and any(isinstance(leaf, StreamState) for leaf in tree_leaves(result)):
            return tree_map(plain, result)
        return result


@functools.cache
def meet_dynamo() -> None:
    """Tells Dynamo of states and captures. At the first conversion: it takes more than a second to import."""
    for kind in KINDS.values():
        never_an_input_of_graphs(kind)
    CarrierRole.capture_and_add = outside_graphs(  # type: ignore[method-assign]
        CarrierRole.capture_and_add,
        "a converted module sees this kind of call for the first time; call the model so once without torch.compile",
    )
    states.in_eager = outside_graphs(states.in_eager, "streams come from a function of autograd that ran outside")


def _made(
    role: CarrierRole, module: nn.Module, original: Callable[..., Any], bound: dict[str, Any],
    arriving: tuple[int, ...], leaving: tuple[int, ...],
) -> Variant | None:  # fmt: skip
    """What Dynamo's trace of an unseen call runs; None where an ordinary call has to show why it can't be captured."""
    _, leaves = flatten(bound)
    try:
        return role.capture(module, original, bound, leaves, arriving, leaving)
    except MHCError:
        return None


def _agrees(value: Any, expected: Any) -> bool:
    if isinstance(expected, bool):  # by a branch, which Dynamo guards where sizes are free; it compares no such bools
        said = True if value else False
        return said is expected
    return bool(value == expected)


def _dtypes(leaves: dict[str, Any]) -> tuple[Any, ...]:
    tensors = [value for value in leaves.values() if isinstance(value, Tensor)]
    autocast = {t.device.type for t in tensors} - {"meta"}
    return (
        *(t.dtype for t in tensors),
        *(torch.get_autocast_dtype(d) for d in sorted(autocast) if torch.is_autocast_enabled(d)),
    )


def _has_dtypes(module: nn.Module, dtypes: dict[str, torch.dtype]) -> bool:
    for path, dtype in dtypes.items():
        owner, _, name = path.rpartition(".")
        if getattr(module.get_submodule(owner), name).dtype != dtype:
            return False
    return True


def _sizes(leaves: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(tuple(value.shape) for value in leaves.values() if isinstance(value, Tensor))

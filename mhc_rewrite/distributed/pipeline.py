"""Stages of a pipeline out of a converted model, between which its n streams pass."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from mhc_rewrite.capture.call import CallShape, as_now, flatten
from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.capture.graph import ModuleGraph
from mhc_rewrite.capture.state import undisturbed
from mhc_rewrite.conversion.captures import capture_forward
from mhc_rewrite.conversion.converted import Conversion, find_converted, remember
from mhc_rewrite.conversion.generated import compile_graph
from mhc_rewrite.conversion.install import original_forward
from mhc_rewrite.conversion.naming import CarrierWiring
from mhc_rewrite.distributed.objects import content_of
from mhc_rewrite.distributed.stage import Passing, Program, Stage
from mhc_rewrite.errors import CaptureError, UnsupportedModelError
from mhc_rewrite.passes.cut_stage import ForwardFacts, NoStages, called, cut_stage, within
from mhc_rewrite.passes.expand_streams import expand_streams
from mhc_rewrite.passes.fuse_boundaries import fuse_site_calls
from mhc_rewrite.sites.state import is_state, plain, streams_of
from mhc_rewrite.torch_private import frees_parameters

# How many of the modules that a stage may hold an error lists.
_LISTED = 40


def pipeline_stage(
    model: nn.Module,
    layers: Sequence[Sequence[str]],
    index: int,
    example_inputs: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> nn.Module:
    """One stage of a pipeline: a module that calls some of the modules which a converted model's forward calls.

    Between stages pass the n streams, a plain tensor (..., n, C), and whatever else is made before a cut and read
    behind it. What depends on the arguments of the model alone, masks and rotary tables, is made again in each stage.
    The first stage takes the model's arguments. The others take what the stage before returned, and by name the
    arguments that they need; others by name are ignored. The last one returns what the model does.

    To be called on a model that is not sharded yet, with the same layers and example on every rank.

    Args:
        model: converted. It is not changed, and need not be kept.
        layers: for each stage the names of its modules, as in `model.named_modules()`, in the order in which the
            forward calls them. The name of a container or of a part of the model stands for all that is called in it.
            Modules without parameters need no name.
        index: of this stage.
        example_inputs: as for `mhcify`, of one microbatch. Arguments that a call of a stage leaves out are as here.

    Returns:
        A module that holds the modules of the stage, the model's own, under the names that they have there.

    Raises:
        MHCError: the model is not converted.
        UnsupportedModelError: these modules are no stages of this model.
        CaptureError: the forward that calls them can't be captured.
    """
    _, model, conversion = find_converted(model)
    parts = [(names,) if isinstance(names, str) else tuple(names) for names in layers]
    _check_whole(model, parts, index)
    args, kwargs = example_call(model, example_inputs)
    programs = {mode: _program(model, conversion, parts, index, args, kwargs, mode) for mode in (False, True)}
    stage = Stage(programs)
    _fill(stage, model, parts[index], list(programs.values()))
    _check_tied(stage, model)
    remember(stage, _part_of(conversion, stage))
    return stage.train(model.training)


# -- analysis ----------------------------------------------------------------------------------------------------------


def _check_whole(model: nn.Module, parts: list[tuple[str, ...]], index: int) -> None:
    kind = type(model).__name__
    if not 0 <= index < len(parts):
        raise UnsupportedModelError(f"There is no stage {index} of {len(parts)}; the first one is 0.")
    there = dict(model.named_modules())
    for number, names in enumerate(parts):
        if not names:
            raise UnsupportedModelError(f"Stage {number} of {kind} names no module; each needs at least one.")
        for name in names:
            if name not in there or not name:
                raise UnsupportedModelError(
                    f"{kind} has no module {name!r}, which is in stage {number}. Name modules as model.named_modules() "
                    "does, on the whole converted model: a copy from which layers were deleted can't be cut."
                )
    for name, module in there.items():
        if frees_parameters(module) or any(hasattr(p, "full_tensor") for p in module.parameters(recurse=False)):
            raise UnsupportedModelError(
                f"{name or kind!r} is sharded already. Make stages first, then shard what pipeline_stage returns: its "
                "modules have the same names."
            )


def _program(
    model: nn.Module, conversion: Conversion, parts: list[tuple[str, ...]], index: int, args: tuple[Any, ...],
    kwargs: dict[str, Any], training: bool,
) -> Program:  # fmt: skip
    forward = original_forward(model)
    shape = CallShape.of(forward)
    bound = shape.bind(args, kwargs)
    captured = _captured(model, conversion, as_now(bound), training, forward)
    run = _values(model, captured, as_now(bound), training)
    values, facts = run.values, _facts(model, captured, run)
    _check_names(model, captured, parts, facts)
    _check_objects(captured, run, parts)
    try:
        cut = cut_stage(captured, parts, index, facts)
    except NoStages as why:
        raise UnsupportedModelError(f"{type(model).__name__} has no such stages: {why}.") from why
    for node in (*cut.arriving, *cut.leaving):
        if not isinstance(values[node.name], Tensor):
            ends = (index - 1, index) if node in cut.arriving else (index, index + 1)
            raise UnsupportedModelError(
                f"From stage {ends[0]} to {ends[1]} a {type(values[node.name]).__name__} would have to pass "
                f"({node.meta.get('source') or node.target}), and only tensors can. Cut elsewhere, or give an example "
                "in which there is none (use_cache=False for the caches of transformers)."
            )
    fuse_site_calls(cut.graph)
    mode = (("attr", "training"),)  # there is a program for each
    reads = tuple(read for read in captured.reads if read.root is not None or read.steps[-1:] != mode)
    return Program(
        cut, compile_graph(cut.graph, f"stage of {type(model).__name__}"),
        tuple(_passing(node, values[node.name]) for node in cut.arriving), shape, tree_map(_form, bound),
        captured.pinned or bool(captured.guards), captured.asks_dtype and _names_dtypes(cut.graph), reads,
        weakref.ref(model),
    )  # fmt: skip


def _captured(
    model: nn.Module, conversion: Conversion, bound: dict[str, Any], training: bool, forward: Callable[..., Any]
) -> ModuleGraph:
    """The forward that calls the layers, with all on the way to them as a part of it; on streams if it has sites."""
    ways: set[str] = set()
    for name in conversion.carriers:
        parts = name.split(".")
        ways.update(".".join(parts[:k]) for k in range(1, len(parts)))
    between = sorted(ways & conversion.carriers.keys())
    if between:
        raise UnsupportedModelError(
            f"The forward of {between[0]!r} adds to the residual stream of its layers itself, or changes it between "
            "them, and is not the model's own. Convert that module alone and cut it, or cut with "
            "torch.distributed.pipelining.pipeline."
        )
    mine = conversion.carriers.get("", CarrierWiring())
    inlined = [model.get_submodule(part) for part in ways | mine.inlined]
    try:
        captured, residuals = capture_forward(model, "", bound, inlined, training, forward, mine.known)
    except CaptureError as error:
        raise CaptureError(
            f"{error} A pipeline is cut in this forward; what it calls needs no capture. Or cut with "
            "torch.distributed.pipelining.pipeline.", error.module
        ) from error  # fmt: skip
    if not mine.targets:
        return captured
    config = conversion.plan.config
    rewrite = expand_streams(
        captured, residuals, mine.targets, n=None if config.stretches else config.n, collapse=config.collapse,
        arriving=frozenset(), leaving=frozenset(),
    )  # fmt: skip
    return replace(captured, graph=_late(rewrite.graph))


def _late(graph: fx.Graph) -> fx.Graph:
    """A rewritten forward in which sites read where their blocks do, and not as soon as the site before has written."""
    new, made = fx.Graph(), dict[fx.Node, fx.Node]()

    def waits(node: fx.Node) -> bool:
        source = node.args[0] if node.target is operator.getitem else node
        return node.op == "get_attr" or (isinstance(source, fx.Node) and source.meta.get("role") == "pre")

    def copy(node: fx.Node) -> fx.Node:
        if node not in made:
            made[node] = new.node_copy(node, copy)
        return made[node]

    for node in graph.nodes:
        if node.op == "output":
            result, _ = node.args[0]
            new.output(fx.node.map_arg(result, copy))
        elif not waits(node):
            copy(node)
    return new


def _names_dtypes(graph: fx.Graph) -> bool:
    """Whether something is made in a floating dtype that the forward may have looked up: a mask to be added, say."""
    values = [value for node in graph.nodes for value in tree_leaves((node.args, node.kwargs))]
    return any(isinstance(value, torch.dtype) and value.is_floating_point for value in values)


def _passing(node: fx.Node, value: Tensor) -> Passing:
    if not is_state(value):
        return Passing(node.name, tuple(value.shape), value.dtype, None)
    streams = streams_of(value)  # type: ignore[arg-type]
    kind: Any = value
    return Passing(node.name, tuple(streams.shape), streams.dtype, (kind.channel_dim, kind.number, kind.turns))


def _form(value: Any) -> Any:
    """A leaf of the example without memory of its own."""
    return value.new_empty(1).expand(value.shape) if isinstance(value, Tensor) else value


class _Values(fx.Interpreter):
    """Runs a captured forward and keeps what its nodes are on the example.

    Attributes:
        values: by the node's name.
        forms: (call, node that it reads): of modules without parameters, which return the same for other content.
        content: of objects, a cache say, when they came or were made; by the node's name.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.values: dict[str, Any] = {}
        self.forms: set[tuple[str, str]] = set()
        self.content: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        with torch.random.fork_rng(devices=[]):
            made = super().run_node(n)
        self.values[n.name] = made
        if not isinstance(made, (Tensor, nn.Module, tuple)):
            self.content[n.name] = content_of(made)
        if n.op == "call_module" and next(self.module.get_submodule(str(n.target)).parameters(), None) is None:
            for one in n.all_input_nodes:
                if isinstance(self.env[one], Tensor) and self.env[one].is_floating_point():
                    with torch.random.fork_rng(devices=[]):
                        again = self._on_other_content(n, one)
                    if _equal(made, again):
                        self.forms.add((n.name, one.name))
        return made

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        made = super().call_function(target, _mutable(args), _mutable(kwargs))
        return args[0] if target is operator.setitem else made

    def _on_other_content(self, call: fx.Node, changed: fx.Node) -> Any:
        def value(node: fx.Node) -> Any:
            return plain(self.env[node]) * 0.75 + 0.125 if node is changed else self.env[node]

        args, kwargs = fx.node.map_arg((call.args, call.kwargs), value)
        return self.call_module(str(call.target), args, kwargs)


def _mutable(value: Any) -> Any:
    """Arguments as generated code would give them; a node's own can't be written to."""
    if isinstance(value, dict):
        return {key: _mutable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mutable(item) for item in value]
    return tuple(map(_mutable, value)) if type(value) is tuple else value


def _equal(made: Any, again: Any) -> bool:
    left, right = ([plain(x) for x in tree_leaves(value)] for value in (made, again))
    return len(left) == len(right) and all(
        not x.is_meta and x.shape == y.shape and torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor)
        else type(x) is type(y) and x == y
        for x, y in zip(left, right, strict=True)
    )  # fmt: skip


def _values(model: nn.Module, captured: ModuleGraph, bound: dict[str, Any], training: bool) -> _Values:
    _, leaves = flatten(bound)
    with undisturbed(model):
        model.train(training)
        run = _Values(model, captured.graph)
        run.run(*(leaves[path] for path in captured.leaves), *captured.constants)
    return run


def _check_objects(captured: ModuleGraph, run: _Values, parts: list[tuple[str, ...]]) -> None:
    """Refuses an object that modules of several stages change: each stage has one of its own."""
    for node in captured.graph.nodes:
        readers = {str(user.target) for user in node.users if user.op == "call_module"}
        stages = [k for k, names in enumerate(parts) if any(within(path, name) for path in readers for name in names)]
        value = run.values.get(node.name)
        if len(stages) > 1 and node.name in run.content and run.content[node.name] != content_of(value):
            raise UnsupportedModelError(
                f"Modules of the stages {', '.join(map(str, stages))} change one {type(value).__name__} "
                f"({node.meta.get('source') or node.name}), and each stage would have another. Give an example in "
                "which there is none: use_cache=False for the caches of transformers."
            )


def _facts(model: nn.Module, captured: ModuleGraph, run: _Values) -> ForwardFacts:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    read = {str(node.target) for op in ("call_module", "get_attr") for node in captured.graph.find_nodes(op=op)}
    modules = {path: module for path, module in model.named_modules() if path in read}
    weighted = {path for path, module in modules.items() if next(module.parameters(), None) is not None}
    shapes = {tuple(value.shape) for value in run.values.values() if is_state(value)}
    return ForwardFacts(frozenset(weighted), frozenset(parameters), frozenset(run.forms), frozenset(shapes))


def _check_names(model: nn.Module, captured: ModuleGraph, parts: list[tuple[str, ...]], facts: ForwardFacts) -> None:
    """Refuses names of what the forward does not call, and calls of what has no name or two."""
    kind = type(model).__name__
    paths = called(captured, facts.weighted)
    everything = {str(node.target) for node in captured.graph.find_nodes(op="call_module")} | set(paths)
    for number, names in enumerate(parts):
        for name in names:
            if not any(within(path, name) for path in everything):
                outer = next((path for path in paths if within(name, path)), None)
                raise UnsupportedModelError(
                    (f"{name!r}, in stage {number}, is a part of {outer!r}, which the forward of {kind} calls as a "
                     "whole. " if outer else
                     f"The forward of {kind} does not call {name!r}, of stage {number}, on this example. ")
                    + f"A stage may have: {', '.join(paths[:_LISTED])}{', ...' * (len(paths) > _LISTED)}."
                )  # fmt: skip
    for path in paths:
        holders = [number for number, names in enumerate(parts) for name in names if within(path, name)]
        if len(holders) != 1:
            raise UnsupportedModelError(
                f"The forward of {kind} calls {path!r}, which is "
                + (f"named more than once, in the stages {', '.join(map(str, holders))}" if holders else "in no stage")
                + ". Each module with parameters that it calls belongs to one stage."
            )


# -- the stage as a module ---------------------------------------------------------------------------------------------


def _fill(stage: Stage, model: nn.Module, names: tuple[str, ...], programs: list[Program]) -> None:
    """Puts the model's own modules, and what the forward reads beside them, into the stage, under their names."""
    called = [str(n.target) for program in programs for n in program.cut.graph.find_nodes(op="call_module")]
    for path in dict.fromkeys((*names, *called)):
        if path in names or not any(within(path, name) for name in names):
            _way_to(stage, model, path).add_module(path.rpartition(".")[2], model.get_submodule(path))
    for path in dict.fromkeys(str(n.target) for p in programs for n in p.cut.graph.find_nodes(op="get_attr")):
        owner, _, name = path.rpartition(".")
        held, place = model.get_submodule(owner), _way_to(stage, model, path)
        value = getattr(held, name)
        if hasattr(place, name):
            continue
        if isinstance(value, nn.Parameter):
            place.register_parameter(name, value)
        elif isinstance(value, Tensor) and name in held._buffers:
            place.register_buffer(name, value, persistent=name not in held._non_persistent_buffers_set)
        elif isinstance(value, nn.Module):
            place.add_module(name, value)
        else:
            setattr(place, name, value)


def _part_of(conversion: Conversion, stage: nn.Module) -> Conversion:
    """What the stage knows of the conversion: the sites that it holds, for reports."""
    there = {name for name, _ in stage.named_modules()}
    streams = [
        replace(stream, sites=tuple(s for s in stream.sites if s.holder in there), reads=())
        for stream in conversion.plan.streams
    ]
    plan = replace(conversion.plan, streams=tuple(stream for stream in streams if stream.sites))
    carriers = {name: wiring for name, wiring in conversion.carriers.items() if name in there}
    return Conversion(plan, carriers, conversion.compared)


def _way_to(stage: nn.Module, model: nn.Module, path: str) -> nn.Module:
    """The module of the stage that holds what has this path; containers on the way are containers there too."""
    place, there = stage, model
    for name in path.split(".")[:-1]:
        there = there.get_submodule(name)
        if name not in place._modules:
            kind = next((kind for kind in _CONTAINERS if isinstance(there, kind)), nn.Module)
            place.add_module(name, kind())
        place = place.get_submodule(name)
    return place


_CONTAINERS: tuple[type[nn.Module], ...] = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def _check_tied(stage: nn.Module, model: nn.Module) -> None:
    """Refuses parameters that a module of another stage has too: nobody would add up their gradients."""
    mine = {name: id(p) for name, p in stage.named_parameters(remove_duplicate=False)}
    held = set(mine.values())
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in held and name not in mine:
            own = next(key for key, value in mine.items() if value == id(p))
            raise UnsupportedModelError(
                f"{own!r} is also {name!r}, which is in another stage: each would learn by its own part of the "
                "gradient alone. Untie them before the conversion, or put both into one stage."
            )

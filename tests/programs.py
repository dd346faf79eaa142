"""Random residual programs for hypothesis: a tree of statements is drawn, and told twice.

`Program.source` tells it as the Python text of an `nn.Module` (program_text.py), `Evaluator` in program_streams.py as
tensors, from the specification alone. Nothing here knows how the package under test finds or rewrites anything.
"""

from __future__ import annotations

import hashlib
import itertools
import linecache
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from program_ops import DECOYS, MIXERS, MLP, OPS, SAME_TENSOR, TAILS, Attention, B, C, T, angles
from program_text import CHILDREN, write
from program_tree import READ, Alias, Aux, Body, Boundary, Expr, Layers, Lift, Site, Sum

Draw = Callable[[st.SearchStrategy], Any]


@dataclass(frozen=True)
class Planted:
    """One call of one planted site.

    Attributes:
        key: tells the sites of a model apart; calls of one layer object share them.
        lines: where the add stands.
        stream: which stream it is in.
        place: its index there.
        length: number of sites called in the stream.
    """

    key: tuple[str, int]
    lines: frozenset[int]
    stream: int
    place: int
    length: int


class Program:
    """A root body as Python source, as a model, and as the list of what was planted in it."""

    def __init__(self, root: Body, dropout: float = 0.1, training: bool = False) -> None:
        self.root, self.training = root, training
        self.source, self.lines = write(root, dropout)
        digest = hashlib.sha1(self.source.encode()).hexdigest()[:12]
        self.name = f"residual_program_{digest}"
        self.filename = f"/residual_programs/{self.name}.py"
        self.planted = tuple(self._planted())

    def __repr__(self) -> str:
        numbered = (f"{i:3}  {line}" for i, line in enumerate(self.source.splitlines(), start=1))
        return "\n".join([f"a program in {'train' if self.training else 'eval'} mode:", *numbered, ""])

    def build(self, seed: int = 0) -> nn.Module:
        """The model in fp64, with random weights. Its source is known to inspect and to tracebacks."""
        if self.name not in sys.modules:
            module = types.ModuleType(self.name)
            module.__dict__.update(MLP=MLP, Attention=Attention, angles=angles, C=C, T=T)
            linecache.cache[self.filename] = (len(self.source), None, self.source.splitlines(True), self.filename)
            exec(compile(self.source, self.filename, "exec"), module.__dict__)
            sys.modules[self.name] = module
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes as long as the rest
        model = sys.modules[self.name].Model().double().train(self.training)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model

    @property
    def kept(self) -> list[Planted]:
        """The sites to be found: those of streams with at least two, each once, in execution order."""
        kept: dict[tuple[str, int], Planted] = {}
        for run in self.planted:
            if run.length >= 2:
                kept.setdefault(run.key, run)
        return list(kept.values())

    @property
    def features(self) -> set[str]:
        """What occurs in the program, for counting."""
        return set(features(self.root))

    def _planted(self) -> Iterator[Planted]:
        streams: list[list[tuple[str, Site]]] = [[]]
        for path, item in runs(self.root, ""):
            if isinstance(item, Boundary):
                streams.append([])
            elif isinstance(item, Site):
                streams[-1].append((path, item))
        for number, stream in enumerate(streams):
            for place, (path, site) in enumerate(stream):
                yield Planted((path, id(site)), self.lines[id(site)], number, place, len(stream))


def runs(body: Body, path: str) -> Iterator[tuple[str, Any]]:
    """(path of the call, item) in execution order, layers unrolled.

    Calls of one layer object have one path. Where the parent holds the adds, each turn of its loop has its own.
    """
    for item in body.items:
        if isinstance(item, Layers):
            for position, call in enumerate(item.calls):
                turn = position if item.style == "inline" else call
                yield from runs(item.bodies[item.made_of[call]], f"{path}{turn}.")
        else:
            yield path, item


def features(body: Body) -> Iterator[str]:
    for item in body.items:
        yield type(item).__name__.lower()
        if isinstance(item, Site):
            yield f"form {item.form}"
            yield f"{len(item.branches)} branches"
            yield f"naming {item.naming}"
            yield from (f"trunk {op}" for op in item.trunk.ops() if op != "read")
            if item.factors()[0] != 1:
                yield "alpha on the trunk"
            for expr in item.branches:
                yield from (f"branch {op}" for op in expr.ops() if op != "read")
        if isinstance(item, Lift):
            yield from (f"lift {op}" for op in item.expr.ops() if op != "read")
            if item.fused:
                yield "fused lift"
        if isinstance(item, Aux) and item.probe is None:
            yield "aux alias"
        if isinstance(item, Layers):
            yield f"layers {item.style}"
            yield from (f"layers {name}" for name in ("between", "collect") if getattr(item, name) is not None)
            for inner in item.bodies:
                yield from features(inner)


LIFTS = ("norm", "relu", "relu_module", "relu_", "tanh", "times", "affine", "cast", "double", "contiguous", "dropout")
FUSED = ("norm", "relu", "relu_module", "relu_", "tanh", "times", "affine")
# On the trunk beside a branch that does not read the result; at the first site only what needs no lifting.
FIRST_TRUNKS = ("times", "halve", "double", "cast", "dropout")
LATER_TRUNKS = ("relu", "tanh", "norm", "affine")
# A list of tokens and back; T first and back.
REGIONS = (
    *itertools.product(("view", "reshape", "flatten"), ("view_back", "reshape_back", "unflatten_back")),
    *(("transpose", "transpose"),) * 3,
)


@dataclass
class Options:
    """What may be drawn.

    Attributes:
        inputs: operations that use e, mask or the number of tokens.
        in_place: in-place adds and activations.
        region: a reshape of the trunk and back, or None.
        views: operations that may return their argument itself. Where the trunk is also an output as it is, an in-place
            add behind such an operation would change that output: legal Python, and nothing that a model does.
    """

    inputs: bool = True
    in_place: bool = True
    region: tuple[str, str] | None = None
    views: bool = True


def some(draw: Draw, chances: int = 3) -> bool:
    """True once in `chances`; shrinks to False."""
    return draw(st.integers(1, chances)) == chances


def pick(draw: Draw, body: Body, names: tuple[str, ...], inputs: bool, *args: Expr) -> Expr:
    """One of the named operations, with new attributes."""
    allowed = [name for name in names if inputs or not OPS[name].tokens]
    return body.expr(draw(st.sampled_from(allowed)), *args, inline=draw(st.booleans()))


def block(draw: Draw, body: Body, inputs: bool, start: Expr | None = None) -> Expr:
    """A branch: a norm perhaps, decoys, a mixing operation, a second block in parallel, scales and further norms."""
    expr = start if start is not None else body.expr("norm", READ) if draw(st.booleans()) else READ
    first = expr
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2)))):
        expr = pick(draw, body, tuple(DECOYS) + ("silu", "tanh", "relu_module"), inputs, expr)
    expr = pick(draw, body, tuple(MIXERS), inputs, expr)
    if some(draw, 5):
        first.once = first is not READ
        expr = body.expr("parallel", expr, pick(draw, body, tuple(MIXERS), inputs, first))
        if draw(st.booleans()):
            expr = pick(draw, body, ("linear", "norm"), inputs, expr)
    for _ in range(draw(st.sampled_from((0, 0, 1, 1, 2)))):
        expr = pick(draw, body, TAILS, inputs, expr)
    return expr


def total(draw: Draw, leaves: list[int]) -> Sum | int:
    """The leaves, in this order, summed in some association."""
    if len(leaves) == 1:
        return leaves[0]
    cut = draw(st.integers(1, len(leaves) - 1))
    left, right = total(draw, leaves[:cut]), total(draw, leaves[cut:])
    style = draw(st.sampled_from(("+", "+", "torch.add", ".add")))
    # With the trunk and a branch both on the right, alpha would scale a sum that is a residual add of its own.
    scaled = style != "+" and (right == 0 or 0 not in leaves[cut:])
    alpha = draw(st.sampled_from((1.0, 0.5, 1.5))) if scaled else 1.0
    return Sum(style, left, right, alpha, split=some(draw, 6))


def site(draw: Draw, body: Body, inputs: bool, in_place: bool, first: bool) -> Site:
    forms = ("rebind", "rebind", "rebind", "rebind", "child") + ("iadd", "add_", "branch_iadd") * in_place
    form = draw(st.sampled_from(forms))
    count = 1 if form in ("child", "branch_iadd") else draw(st.sampled_from((1, 1, 1, 1, 2, 3)))
    shared = body.expr("norm", READ, once=True) if count > 1 and draw(st.booleans()) else None
    branches = tuple(block(draw, body, inputs, shared) for _ in range(count))
    aliases = (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
    namings = ("inline", "named") + ("overwrite",) * (form == "rebind" and count == 1)
    naming, target = draw(st.sampled_from(namings)), draw(st.sampled_from(("x", "x", "x", "y")))
    leaves = list(range(1, count + 1))
    if form in ("iadd", "add_"):
        alpha = draw(st.sampled_from((1.0, 0.5))) if form == "add_" else 1.0
        return Site(branches, READ, total(draw, leaves), form, alpha, naming, target, aliases)
    trunk = READ
    if draw(st.booleans()):
        trunk = pick(draw, body, FIRST_TRUNKS if first else FIRST_TRUNKS + 2 * LATER_TRUNKS, inputs, READ)
    leaves = draw(st.permutations([0, *leaves])) if form == "rebind" else [0, 1]
    tree = total(draw, list(leaves)) if form == "rebind" else Sum("+", 0, 1)
    child_class = draw(st.sampled_from(sorted(CHILDREN))) if form == "child" else ""
    child = body.make(f"{child_class}()") if child_class else ""
    return Site(branches, trunk, tree, form, 1.0, naming, target, aliases, child, child_class)


def chain(draw: Draw, body: Body, count: int, options: Options, aux: bool = False) -> None:
    """Appends `count` sites to a body, with operations on the trunk between them and after the last."""
    region = options.region if count and not some(draw, 3) else None
    opens = draw(st.integers(0, count - 1)) if region else -1
    closes = draw(st.integers(opens, count - 1)) if region else -1
    inputs, items = options.inputs, body.items
    for k in range(count):
        if k == opens:
            items.append(Lift(body.expr(region[0], READ)))
            inputs = False
        if some(draw, 4):
            items.append(Alias(f"r{k}"))
        if aux and some(draw, 3):
            plain = not options.views and draw(st.booleans())
            items.append(Aux(None if plain else body.expr("linear", READ)))
        items.append(site(draw, body, inputs, options.in_place, k == 0))
        if some(draw, 3):
            left_out = ("relu_",) * (not options.in_place) + SAME_TENSOR * (not options.views)
            name = draw(st.sampled_from([name for name in LIFTS if name not in left_out]))
            fused = items[-1].form == "rebind" and name in FUSED and draw(st.booleans())
            items.append(Lift(body.expr(name, READ), draw(st.sampled_from(("x", "x", "z"))), fused))
        if k == closes:
            items.append(Lift(body.expr(region[1], READ)))
            inputs = options.inputs


def stem(draw: Draw, root: Body) -> None:
    """What comes before the first stream. A new tensor, so that an in-place add does not change the caller's input."""
    root.items.append(Lift(pick(draw, root, ("linear", "positions", "times", "norm"), True, READ)))
    for _ in range(draw(st.integers(0, 1))):
        root.items.append(Lift(pick(draw, root, ("positions", "rope", "gelu_polynomial", "dropout"), True, READ)))


def head(draw: Draw, root: Body) -> None:
    """What comes after the last stream."""
    for _ in range(draw(st.integers(0, 1))):
        root.items.append(Lift(root.expr("norm", READ)))
    if some(draw, 3):
        root.items.append(Lift(pick(draw, root, ("linear", "mlp"), True, READ)))
        root.items.append(Lift(pick(draw, root, ("gelu_polynomial", "positions", "relu", "modulate"), True, READ)))


def draw_options(draw: Draw) -> Options:
    views = draw(st.booleans())
    return Options(region=draw(st.sampled_from(REGIONS)) if views and draw(st.booleans()) else None, views=views)


def flat(draw: Draw, root: Body) -> None:
    """One forward that holds 2 to 5 sites."""
    options = draw_options(draw)
    options.in_place = not some(draw, 3)
    if options.in_place or draw(st.booleans()):
        stem(draw, root)
    chain(draw, root, draw(st.integers(2, 5)), options)


def streams(draw: Draw, root: Body) -> None:
    """Two streams around a projection shortcut, one of them perhaps too short; side readers of the trunk."""
    options = draw_options(draw)
    stem(draw, root)
    lengths = draw(st.sampled_from(((2, 2), (2, 0), (0, 2), (1, 2), (2, 1), (3, 2), (2, 3), (3, 1), (1, 3))))
    for k, length in enumerate(lengths):
        options.in_place = length >= 2  # plain in-place adds have no backward behind a Linear or a norm
        chain(draw, root, length, options, aux=True)
        if k == 0:
            d = pick(draw, root, ("linear", "functional", "matmul"), True, READ)
            # Without e: in `d(x) + (f(x) + e)` it could pass for a trunk that skips the first stream.
            root.items.append(Boundary(d, block(draw, root, False), draw(st.booleans())))


def layer_bodies(draw: Draw, style: str, options: Options) -> tuple[Body, ...]:
    count = 1 if style == "inline" else draw(st.integers(1, 2))
    bodies = tuple(Body(f"Layer{k}") for k in range(count))
    for body in bodies:
        chain(draw, body, draw(st.integers(1, 2)), options)
    return bodies


def layered(draw: Draw, root: Body, style: str, shared: bool = False, between: bool = False) -> None:
    """Layers in a parent's loop. `shared`: some are called more than once; `between`: with an operation after each."""
    options = draw_options(draw)
    options.inputs = style != "sequential"
    collect = style != "sequential" and not options.views and draw(st.booleans())
    if collect and style != "inline":
        options.in_place = False  # a layer would change the trunk that its caller has kept
    stem(draw, root)
    bodies = layer_bodies(draw, style, options)
    made_of = tuple(draw(st.lists(st.integers(0, len(bodies) - 1), min_size=2, max_size=3)))
    calls = tuple(range(len(made_of)))
    if shared:
        calls = tuple(draw(st.permutations([*calls, *draw(st.lists(st.sampled_from(calls), min_size=1, max_size=2))])))
    layers = Layers(bodies, made_of, calls, style)
    if between:
        ops = ("relu",) if style == "sequential" else ("relu", "tanh", "times", "norm")
        layers.between = pick(draw, root, ops, True, READ)
    if collect:
        layers.collect = draw(st.integers(0, len(calls) - 1))
    root.items.append(layers)


def layers(draw: Draw, root: Body) -> None:
    """Layers as modules of their own."""
    layered(draw, root, draw(st.sampled_from(("loop", "tuple", "sequential"))))


def between(draw: Draw, root: Body) -> None:
    """Layers as modules of their own, and an operation on the trunk after each of them that is not theirs."""
    layered(draw, root, draw(st.sampled_from(("loop", "tuple", "sequential"))), between=True)


def container(draw: Draw, root: Body) -> None:
    """A parent whose own forward holds the adds, in a loop over blocks."""
    layered(draw, root, "inline", shared=some(draw, 4))


def shared(draw: Draw, root: Body) -> None:
    """Layers that are called several times."""
    layered(draw, root, draw(st.sampled_from(("loop", "tuple", "sequential"))), shared=True)


def mixed(draw: Draw, root: Body) -> None:
    """Sites of the root's own before and after its layers."""
    stem(draw, root)
    options = Options()
    chain(draw, root, draw(st.integers(0, 2)), options)
    style = draw(st.sampled_from(("loop", "tuple")))
    bodies = layer_bodies(draw, style, options)
    made_of = tuple(draw(st.lists(st.integers(0, len(bodies) - 1), min_size=1, max_size=2)))
    root.items.append(Layers(bodies, made_of, tuple(range(len(made_of))), style))
    chain(draw, root, draw(st.integers(1, 2)), options)


KINDS = {kind.__name__: kind for kind in (flat, streams, layers, between, container, shared, mixed)}


@st.composite
def programs(draw: Draw, kind: str) -> Program:
    """Random programs of one of KINDS."""
    root = Body("Model")
    KINDS[kind](draw, root)
    head(draw, root)
    training = draw(st.booleans())
    return Program(root, dropout=0.0 if training else 0.1, training=training)


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x and e (B, T, C), mask (T, T), fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, C), (B, T, C), (T, T))
    x, e, mask = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, e, mask

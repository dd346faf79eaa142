"""The models that are refused, and what the refusal says: a table for tests/test_errors.py.

A message names the module, the line of the user's source where there is one, and what to do.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite import MHCConfig, mhcify
from mhc_rewrite.errors import (
    AlreadyConvertedError,
    CaptureError,
    ConfigError,
    ExampleInputsError,
    NoResidualError,
    UnsupportedModelError,
)

WIDTH = 8


# -- models ----------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """Changes a buffer with every call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x


class Block(nn.Module):
    """A residual block that draws random numbers and changes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.counter = nn.Dropout(0.5), Counter()

    def branch(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(self.counter(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Branching(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.abs().amax()) * self.branch(x)


class Flagged(Block):
    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y = self.branch(x)
        return x + (y * 2 if twice else y)


class Further(Block):
    """Adds once more where it is told to."""

    def forward(self, x: Tensor, further: bool = False) -> Tensor:
        x = x + self.branch(x)
        x = x + self.branch(x)
        return x + self.linear(x) if further else x


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, **options)
        return self.norm(x)


class Exchanging(nn.Module):
    """Long inputs go through another module than short ones, made at the first of them; as BigBird's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.kind = "long"

    def forward(self, x: Tensor) -> Tensor:
        kind = "short" if x.shape[1] < 8 else "long"
        if kind != self.kind:
            self.kind = kind
            for layer in self.layers:
                layer.linear = nn.Sequential(layer.linear, nn.Tanh())
        for layer in self.layers:
            x = layer(x)
        return x


class Carried(Block):
    """A block whose trunk lies in an object."""

    def forward(self, box: SimpleNamespace) -> None:  # type: ignore[override]
        box.x = box.x + self.branch(box.x)


class Boxed(Stack):
    def forward(self, x: Tensor) -> Tensor:
        box = SimpleNamespace(x=x)
        for layer in self.layers:
            layer(box)
        return self.norm(box.x)


def in_two_streams(*further: nn.Module) -> nn.Module:
    """A block twice, a projection that ends their stream, and the same block once."""
    block = Further()
    return Stack(block, block, nn.Linear(WIDTH, WIDTH), block, *further)


class Scripted(nn.Module):
    """Without anything that TorchScript can't take."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        return x + self.b(x)


class NearMisses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.positions = nn.Parameter(torch.zeros(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions
        x = self.a(x) + self.b(x)
        x = x + x * torch.tanh(x)
        return x + self.a(x)


class MiddleAxis(nn.Module):
    """The width is axis 2 of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.linear(x.transpose(2, 3)).transpose(2, 3)
        return x + self.linear(x.transpose(2, 3)).transpose(2, 3)


class TypedBlock(nn.Module):
    """A block whose trunk has a dtype of its own."""

    def __init__(self, trunk: torch.dtype, parameters: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.trunk, self.linear = trunk, nn.Linear(WIDTH, WIDTH, dtype=parameters)

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.linear.weight.dtype
        return (x.to(dtype) + self.linear(x.to(dtype))).to(self.trunk)


class TypedStack(nn.Module):
    def __init__(self, trunk: torch.dtype, parameters: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.trunk = trunk
        self.layers = nn.Sequential(*(TypedBlock(trunk, parameters) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.trunk))


class SomeHyperConnection(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def stack(count: int = 3) -> nn.Module:
    return Stack(*(Block() for _ in range(count)))


def features(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return (torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype),)


def with_attributes(model: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def with_replaced_forward(model: nn.Module, layer: int) -> nn.Module:
    """As quantisers and off-loaders do it."""
    module = model.layers[layer]
    original = module.forward
    module.forward = lambda *args, **kwargs: original(*args, **kwargs)
    return model


def line(code: Callable[..., Any], text: str) -> str:
    """`file:number` of a line of a class's or function's source."""
    lines, first = inspect.getsourcelines(code)
    return f"{inspect.getsourcefile(code)}:{first + next(i for i, found in enumerate(lines) if text in found)}"


# -- the refusals ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """A model that is refused.

    Attributes:
        build: () -> the model.
        error: the exception.
        says: what its message must have in it.
        inputs: example inputs.
        options: further arguments of `mhcify`.
    """

    build: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]
    inputs: Any = field(default_factory=features)
    options: dict[str, Any] = field(default_factory=dict)


ADD = line(Block.forward, "x + self.branch(x)")
SCRIPT = ("TorchScript", "Convert the model that it was made from")
FIELDS = ("n_streams", "init", "connection", "collapse", "include", "exclude", "min_sites")

REFUSALS = {
    # nothing to convert
    "no adds": Refusal(lambda: nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU()), NoResidualError,
                       ("Sequential has no residual stream", "no residual adds")),
    "near misses": Refusal(
        NearMisses, NoResidualError,
        ("NearMisses has no residual stream", "nearest misses",
         line(NearMisses.forward, "positions"), "broadcast", "(2, 5, 8) and (5, 8)",
         line(NearMisses.forward, "self.a(x) + self.b(x)"), "no-ancestor",
         line(NearMisses.forward, "tanh"), "no-mixing",
         line(NearMisses.forward, "return x + self.a(x)"), "single-site")),
    "a trunk in an object": Refusal(
        lambda: Boxed(Carried(), Carried()), NoResidualError,
        ("Boxed", "layers.0", "attribute of some object")),
    "one site": Refusal(lambda: stack(1), NoResidualError, ("Stack", "layers.0", ADD, "single-site", "min_sites=2")),
    "an axis in the middle": Refusal(
        MiddleAxis, NoResidualError,
        ("MiddleAxis", line(MiddleAxis.forward, "x = x +"), "axis 2 of 4", "the last one or axis 1"),
        inputs=(torch.randn(2, 3, 5, 7),)),
    "filter_fn leaves nothing": Refusal(stack, NoResidualError, ("Stack", "filter_fn", "all 3 sites are out"),
                                        options={"filter_fn": lambda site: False}),
    "exclude leaves nothing": Refusal(stack, NoResidualError, ("Stack", "exclude", "all 3 sites are out"),
                                      options={"exclude": "layers"}),
    "filter_fn leaves one": Refusal(
        stack, NoResidualError, ("Stack", "at least 2 sites", "layers.1", ADD, "1 site, fewer than min_sites=2"),
        options={"filter_fn": lambda site: site.holder == "layers.1"}),
    # converted before
    "hyper-connected": Refusal(lambda: Stack(Block(), Block(), SomeHyperConnection()), AlreadyConvertedError,
                               ("'layers.2'", "SomeHyperConnection", "hyper-connections of its own")),
    "converted": Refusal(lambda: mhcify(stack(), features()), AlreadyConvertedError,
                         ("Stack is converted already", "unmhcify(model)")),
    "a converted part": Refusal(lambda: Stack(Block(), mhcify(stack(), features())), AlreadyConvertedError,
                                ("converted already", "unmhcify")),
    # example inputs
    "no example": Refusal(stack, ExampleInputsError, ("Stack", "Pass example inputs", "mhcify(model, {"), inputs=None),
    "a number for an example": Refusal(stack, ExampleInputsError, ("a dict of keyword arguments or a tuple", "int"),
                                       inputs=3),
    "an unknown argument": Refusal(stack, ExampleInputsError,
                                   ("Stack", "(y=Tensor)", "'x'", "Pass example_inputs as", "Stack.forward"),
                                   inputs={"y": features()[0]}),
    "too many arguments": Refusal(stack, ExampleInputsError, ("Stack", "(Tensor, Tensor)", "Pass example_inputs as"),
                                  inputs=features() * 2),
    "a wrong width": Refusal(stack, ExampleInputsError, ("Stack", "[2, 5, 4]", "Pass example_inputs as"),
                             inputs=(torch.randn(2, 5, 4),)),
    # options
    "n_streams=0": Refusal(stack, ConfigError, ("n_streams", "1 to 16", "0"), options={"n_streams": 0}),
    "n_streams=17": Refusal(stack, ConfigError, ("n_streams", "1 to 16", "17"), options={"n_streams": 17}),
    "n_streams='4'": Refusal(stack, ConfigError, ("n_streams", "1 to 16", "'4'"), options={"n_streams": "4"}),
    "n_streams=True": Refusal(stack, ConfigError, ("n_streams", "1 to 16", "True"), options={"n_streams": True}),
    "config and fields": Refusal(stack, ConfigError, ("either config= or fields", "n_streams, init"),
                                 options={"config": MHCConfig(), "n_streams": 2, "init": "paper"}),
    "a dict for a config": Refusal(stack, ConfigError, ("config", "MHCConfig", "dict"),
                                   options={"config": {"n_streams": 2}}),
    "included and excluded": Refusal(stack, ConfigError, ("'layers.0' is both included and excluded", "one of the two"),
                                     options={"include": "layers.0", "exclude": ("layers.1", "layers.0")}),
    "sum and preserve": Refusal(stack, ConfigError,
                                ("collapse='sum'", "init='preserve'", "collapse='mean', or init='paper'"),
                                options={"collapse": "sum"}),
    "an unknown option": Refusal(stack, ConfigError, ("'streams'", "The options are", *FIELDS), options={"streams": 4}),
    "include matches nothing": Refusal(stack, ConfigError, ("include='layer.1'", "matches no site", "'layers.1'"),
                                       options={"include": "layer.1"}),
    "exclude matches nothing": Refusal(stack, ConfigError,
                                       ("exclude='layers.2.mhc'", "matches no site", "'layers.2.mhc_0'"),
                                       options={"exclude": "layers.2.mhc"}),
    "one pattern of two": Refusal(stack, ConfigError, ("exclude='layers.7'", "matches no site"),
                                  options={"exclude": ("layers.2", "layers.7")}),
    # models that have no streams
    "no module": Refusal(lambda: features, UnsupportedModelError, ("nn.Module", "function")),
    "scripted": Refusal(lambda: torch.jit.script(Scripted()), UnsupportedModelError, ("The model", *SCRIPT)),
    "traced": Refusal(lambda: torch.jit.trace(Scripted(), features()), UnsupportedModelError, ("The model", *SCRIPT)),
    "frozen": Refusal(lambda: torch.jit.freeze(torch.jit.script(Scripted()).eval()), UnsupportedModelError,
                      ("The model", *SCRIPT)),
    "a scripted layer": Refusal(lambda: Stack(Block(), torch.jit.script(Scripted()), Block()), UnsupportedModelError,
                                ("'layers.1'", *SCRIPT)),
    "float8": Refusal(
        lambda: TypedStack(torch.float8_e4m3fn), UnsupportedModelError,
        ("'layers.0.mhc_0'", line(TypedBlock.forward, "return"), "float8_e4m3fn", "torch.float32",
         "Convert the model to one of these")),
    "complex": Refusal(
        lambda: TypedStack(torch.complex64, torch.complex64), UnsupportedModelError,
        (line(TypedBlock.forward, "return"), "complex64", "torch.float32"),
        inputs=features(torch.complex64)),
    "a name that is taken": Refusal(lambda: Stack(Block(), with_attributes(Block(), mhc_0="mine")),
                                    UnsupportedModelError,
                                    ("'layers.1'", "'mhc_0'", "rename it")),
    "a module of two streams": Refusal(
        lambda: in_two_streams(Block(), Block()), UnsupportedModelError,
        ("'layers.0'", "two residual streams", line(Further.forward, "x = x"), "exclude=('layers.0',)")),
    "a module of two streams and nothing else": Refusal(
        in_two_streams, UnsupportedModelError,
        ("'layers.0'", "two residual streams", "give each stream a module of its own.")),
    "modules that are exchanged": Refusal(
        Exchanging, UnsupportedModelError, ("exchanges or adds the module 'layers.0.linear'", "Call it once with")),
    # forwards that can't be captured
    "a branch on content": Refusal(
        lambda: Stack(Block(), Branching(), Block(), Block()), CaptureError,
        ("'layers.1' (Branching)", line(Branching.forward, "x.abs()"), "content of a tensor",
         "exclude=('layers.1',)")),
    "a replaced forward": Refusal(lambda: with_replaced_forward(stack(), 0), CaptureError,
                                  ("'layers.0' (Block)", "replaced", "forward", "remove", "exclude=('layers.0',)")),
    # The layers before it are like it, and share their capture.
    "a replaced forward of a like layer": Refusal(
        lambda: with_replaced_forward(stack(), 1), CaptureError,
        ("'layers.1' (Block)", "replaced", "forward", "remove", "exclude=('layers.1',)")),
}  # fmt: skip

"""Every refusal: its exception, what its message names, and that the model is as it was.

A message says which module, which line of the user's source where there is one, and what to do.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import MHCConfig, graphs, mhcify, plan, report, unmhcify
from mhc_rewrite.errors import (
    AlreadyConvertedError,
    CaptureError,
    ConfigError,
    ExampleInputsError,
    MHCError,
    NoResidualError,
    StreamError,
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
        if x.abs().sum() > 1e9:
            return x - self.branch(x)
        return x + self.branch(x)


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


class Holder(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(x)
        return x


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
    return f"{__file__}:{first + next(i for i, found in enumerate(lines) if text in found)}"


# -- as it was -------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that a conversion could change: classes, attributes, hooks, modes, tensors, random states."""
    found: dict[str, Any] = {"random": (torch.get_rng_state().tolist(), random.getstate())}
    for name, module in model.named_modules():
        attributes = {}
        for key, value in module.__dict__.items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            attributes[key] = [(k, id(v)) for k, v in inner]
        found[name] = id(module), type(module), getattr(module, "training", None), attributes
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
        found[name, "tensor"] = id(tensor), tensor.dtype, tensor.tolist(), tensor.requires_grad, grad
    return found


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = snapshot(model)
    yield
    after = snapshot(model)
    assert list(after) == list(before)
    changed = [key for key in before if after[key] != before[key]]
    assert not changed, f"the failed conversion changed {changed}"


def lived_in(model: nn.Module) -> nn.Module:
    """A model with a past: hooks, modes that differ, gradients, frozen parameters, random state."""
    random.seed(3)
    torch.manual_seed(3)
    torch.rand(7)
    children = [module for module in model.modules() if not list(module.children())]
    if isinstance(model, torch.jit.ScriptModule) or any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return model
    model.register_forward_hook(lambda module, args, result: None)
    children[0].register_forward_pre_hook(lambda module, args: None)
    children[-1].eval()
    for number, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, 0.5)
        p.requires_grad_(number != 1)
    return model


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
    "one site": Refusal(lambda: stack(1), NoResidualError, ("Stack", "layers.0", ADD, "single-site", "min_sites=2")),
    "an axis in the middle": Refusal(
        MiddleAxis, NoResidualError, ("MiddleAxis", line(MiddleAxis.forward, "x = x +"), "axis 2 of 4", "the last one or axis 1"),
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
    "a number for an example": Refusal(stack, ExampleInputsError, ("a dict of keyword arguments or a tuple", "int"), inputs=3),
    "an unknown argument": Refusal(stack, ExampleInputsError, ("Stack", "(y=Tensor)", "'x'", "Pass example_inputs as", "Stack.forward"),
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
    "included and excluded": Refusal(stack, ConfigError, ("'layers.0' is both included and excluded", "one of the two"),
                                     options={"include": "layers.0", "exclude": ("layers.1", "layers.0")}),
    "sum and preserve": Refusal(stack, ConfigError, ("collapse='sum'", "init='preserve'", "collapse='mean', or init='paper'"),
                                options={"collapse": "sum"}),
    "an unknown option": Refusal(stack, ConfigError, ("'streams'", "The options are", *FIELDS), options={"streams": 4}),
    "include matches nothing": Refusal(stack, ConfigError, ("include='layer.1'", "matches no site", "'layers.1'"),
                                       options={"include": "layer.1"}),
    "exclude matches nothing": Refusal(stack, ConfigError, ("exclude='layers.2.mhc'", "matches no site", "'layers.2.mhc_0'"),
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
    "config.layerdrop": Refusal(lambda: with_attributes(stack(), config=SimpleNamespace(layerdrop=0.1)), UnsupportedModelError,
                                ("config.layerdrop=0.1", "Set config.layerdrop=0.0")),
    "config.decoder_layerdrop": Refusal(
        lambda: with_attributes(stack(), config=SimpleNamespace(layerdrop=0.0, decoder_layerdrop=0.2)), UnsupportedModelError,
        ("config.decoder_layerdrop=0.2", "Set config.decoder_layerdrop=0.0")),
    "model.layerdrop": Refusal(lambda: with_attributes(stack(), layerdrop=0.1), UnsupportedModelError,
                               ("layerdrop=0.1", "Set layerdrop=0.0")),
    "adds in a Sequential": Refusal(
        lambda: Stack(Block(), Holder(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))), UnsupportedModelError,
        ("'layers.1'", line(Holder.forward, "x + layer(x)"), "Derive it from nn.Module")),
    "a name that is taken": Refusal(lambda: Stack(Block(), with_attributes(Block(), mhc_0="mine")), UnsupportedModelError,
                                    ("'layers.1'", "'mhc_0'", "rename it")),
    # forwards that can't be captured
    "a branch on content": Refusal(
        lambda: Stack(Block(), Branching(), Block()), CaptureError,
        ("'layers.1' (Branching)", line(Branching.forward, "if x.abs()"), "content of a tensor", "exclude=('layers.1',)")),
    "a replaced forward": Refusal(lambda: with_replaced_forward(stack(), 0), CaptureError,
                                  ("'layers.0' (Block)", "replaced", "forward", "remove", "exclude=('layers.0',)")),
    # The layers before it are like it, and share their capture.
    "a replaced forward of a like layer": Refusal(
        lambda: with_replaced_forward(stack(), 1), CaptureError,
        ("'layers.1' (Block)", "replaced", "forward", "remove", "exclude=('layers.1',)")),
}  # fmt: skip


KNOWN = {
    "complex": "complex adds are passed over before anybody looks at their dtype",
    "filter_fn leaves one": "the message names the chain's first site, not the one that is left",
    "a replaced forward of a like layer": "a shared capture skips the check",
}


def known(name: str) -> Any:
    return pytest.param(name, marks=pytest.mark.xfail(reason=KNOWN[name], strict=True)) if name in KNOWN else name


@pytest.mark.parametrize("name", map(known, REFUSALS))
def test_refused(name: str) -> None:
    case = REFUSALS[name]
    model = case.build()
    guard = untouched(lived_in(model)) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with guard, pytest.raises(case.error) as caught:
        mhcify(model, case.inputs, **case.options)
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert not [text for text in case.says if text not in message], message


@pytest.mark.parametrize("name", ["near misses", "converted", "an unknown argument", "a branch on content", "float8"])
def test_plan_refuses_the_same(name: str) -> None:
    case = REFUSALS[name]
    model = case.build()
    with untouched(lived_in(model)), pytest.raises(case.error) as caught:
        plan(model, case.inputs, **case.options)
    assert not [text for text in case.says if text not in str(caught.value)]


def test_filter_fn_may_fail() -> None:
    """An error of the user's own comes out as it is."""

    def fail(site: Any) -> bool:
        raise LookupError(site.name)

    model = lived_in(stack())
    with untouched(model), pytest.raises(LookupError, match=r"layers\.0\.mhc_0"):
        mhcify(model, features(), filter_fn=fail)


def test_the_snapshot_sees_changes() -> None:
    """The check above can fail."""
    changes: list[Callable[[nn.Module], Any]] = [
        lambda model: model.layers[0].norm.weight.data.add_(1e-7),
        lambda model: model.layers[0].counter.count.add_(1),
        lambda model: model.layers[1].register_forward_hook(lambda *_: None),
        lambda model: model.layers[1].eval(),
        lambda model: model.__dict__.update(extra=1),
        lambda model: setattr(model.layers[2], "__class__", type("Block", (Block,), {})),
        lambda model: setattr(model.layers[2].linear.weight, "grad", None),
        lambda model: torch.rand(1),
        lambda model: random.random(),
        lambda model: model.layers[0].add_module("mhc_0", nn.Identity()),
    ]
    for change in changes:
        model = lived_in(stack())
        with pytest.raises(AssertionError), untouched(model):
            change(model)


# -- the ways out ----------------------------------------------------------------------------------------------------


def test_exclude_is_the_way_out_of_a_capture_error() -> None:
    torch.manual_seed(0)
    model = Stack(Block(), Block(), Branching(), Block(), Block()).eval()
    want = model(*features())
    mhcify(model, features(), exclude=("layers.2",))
    assert torch.allclose(model(*features()), want, atol=1e-5)
    found = report(model).plan
    names = [[site.name for site in stream.sites] for stream in found.streams]
    assert names == [["layers.0.mhc_0", "layers.1.mhc_0"], ["layers.3.mhc_0", "layers.4.mhc_0"]]
    split = {r.rule: r for r in found.rejections if r.module == "layers.2"}
    assert "excluded" in split and "can't be captured" in split["excluded"].reason
    assert line(Branching.forward, "if x.abs()") in split["excluded"].reason
    assert any("the stream ends there" in r.reason for r in found.rejections)
    assert "layers.2" in str(report(model)) and "the stream ends there" in " ".join(str(report(model)).split())


def test_one_stream_is_left_alone() -> None:
    """`n_streams=1` is the model as it is."""
    model = lived_in(stack())
    with untouched(model), pytest.warns(UserWarning, match="n_streams=1.*nothing was rewritten"):
        assert mhcify(model, features(), n_streams=1) is model
    assert mhcify(model, features(), n_streams=2) is model  # not taken to be converted


def test_layers_that_are_dropped_may_be_set_to_zero() -> None:
    model = with_attributes(stack(), config=SimpleNamespace(layerdrop=0.0, encoder_layerdrop=0))
    assert len(report(mhcify(model, features())).plan.sites) == 3


def test_min_sites_says_how_many_there_are() -> None:
    model = lived_in(stack())
    with untouched(model), pytest.raises(NoResidualError) as caught:
        mhcify(model, features(), min_sites=4)
    message = str(caught.value)
    assert "Stack" in message and ADD in message and "3 sites, fewer than min_sites=4" in message
    assert "one site alone" not in message and "single-site" not in message


@pytest.mark.parametrize("function", [unmhcify, report, graphs])
def test_not_converted(function: Callable[[nn.Module], Any]) -> None:
    model = lived_in(stack())
    with untouched(model), pytest.raises(MHCError, match=r"Stack is not converted; mhcify\(model\) does that"):
        function(model)


# -- at run time -----------------------------------------------------------------------------------------------------


def test_unseen_call_under_compile() -> None:
    """The text reaches the user, and does what it says."""
    model = mhcify(Stack(Flagged(), Flagged()).eval(), features())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(*features()), model(*features()), atol=1e-6)
    with pytest.raises(Exception) as caught:
        compiled(*features(), twice=True)
    assert "UnseenCallError" in str(caught.value)
    for text in ("'layers.0'", "eval(twice=True, x)", "torch.compile", "Call the model once in this way without torch.compile"):
        assert text in str(caught.value)
    want = model(*features(), twice=True)
    assert torch.allclose(compiled(*features(), twice=True), want, atol=1e-6)
    assert not torch.allclose(model(*features()), want, atol=1e-2)


def test_unseen_call_is_learnt_without_compile() -> None:
    model = mhcify(Stack(Flagged(), Flagged()).eval(), features())
    original = unmhcify(mhcify(Stack(Flagged(), Flagged()).eval(), features()))
    original.load_state_dict({k: v for k, v in model.state_dict().items() if "mhc_" not in k})
    want = original(*features(), twice=True)
    assert torch.allclose(model(*features(), twice=True), want, atol=1e-5)
    assert "twice=True" in str(report(model).calls["layers.0"])


@pytest.mark.parametrize("shape", [(5, WIDTH), (1, 2, 5, WIDTH), (1, 2, 4, WIDTH)], ids=str)
def test_another_rank(shape: tuple[int, ...]) -> None:
    """One axis more is no state either: not in the layer that the stream begins with."""
    model = mhcify(stack(), features(), n_streams=4).eval()
    with pytest.raises(StreamError) as caught:
        model(torch.randn(shape))
    message = str(caught.value)
    assert "'layers.0'" in message and "3 axes" in message and f"got {len(shape)}" in message
    assert "Call it as the example inputs did, or convert again" in message


def test_adds_that_the_example_did_not_show() -> None:
    model = mhcify(Stack(Further(), Further()), features())
    with pytest.raises(StreamError) as caught:
        model(*features(), further=True)
    message = str(caught.value)
    assert "'layers.0'" in message and line(Further.forward, "if further else x") in message
    assert "further=True" in message and "Convert again with example inputs of this kind" in message


def test_a_stream_that_is_not_collapsed() -> None:
    """The model is changed after the conversion: its last layer is gone, and its own code reads the trunk."""

    class Doubling(Stack):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            for layer in self.layers:
                x = layer(x, **options)
            return x * 2

    model = mhcify(Doubling(Block(), Block(), Block()), features())
    model.layers = model.layers[:2]
    with pytest.raises(StreamError) as caught:
        model(*features())
    message = str(caught.value)
    assert "the model" in message and "'layers.2'" in message and "unmhcify(model), then mhcify" in message

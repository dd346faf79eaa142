"""Every refusal: its exception, what its message names, and that the model is as it was."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import graphs, mhcify, plan, report, unmhcify
from mhc_rewrite.errors import MHCError, NoResidualError, StreamError
from refusals import (
    ADD,
    REFUSALS,
    WIDTH,
    Block,
    Branching,
    Flagged,
    Further,
    Stack,
    features,
    line,
    stack,
)

# -- as it was -------------------------------------------------------------------------------------------------------


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a conversion could change: classes, attributes, hooks, modes, tensors, random states."""
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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", list(REFUSALS))
def test_refused(name: str) -> None:
    case = REFUSALS[name]
    model = case.build()
    guard = untouched(lived_in(model)) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with guard, pytest.raises(case.error) as caught:
        mhcify(model, case.inputs, **case.options)
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert not [text for text in case.says if text not in message], message


@pytest.mark.parametrize(
    "name", ["near misses", "converted", "an unknown argument", "a branch on content", "exclude matches nothing"]
)
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
    assert line(Branching.forward, "x.abs()") in split["excluded"].reason
    assert any("the stream ends there" in r.reason for r in found.rejections)
    assert "layers.2" in str(report(model)) and "the stream ends there" in " ".join(str(report(model)).split())


def test_one_stream_is_left_alone() -> None:
    """`n_streams=1` is the model as it is."""
    model = lived_in(stack())
    with untouched(model), pytest.warns(UserWarning, match="n_streams=1.*nothing was rewritten"):
        assert mhcify(model, features(), n_streams=1) is model
    assert mhcify(model, features(), n_streams=2) is model  # not taken to be converted


def test_min_sites_says_how_many_there_are() -> None:
    model = lived_in(stack())
    with untouched(model), pytest.raises(NoResidualError) as caught:
        mhcify(model, features(), min_sites=4)
    message = str(caught.value)
    assert "Stack" in message and ADD in message and "3 sites, fewer than min_sites=4" in message
    assert "one site alone" not in message and "single-site" not in message


def test_a_float8_result_is_no_obstacle() -> None:
    """As the last thing that a model does, behind the streams."""

    class Quantising(Stack):
        def forward(self, x: Tensor, **options: Any) -> Tensor:
            return super().forward(x, **options).to(torch.float8_e4m3fn)

    assert mhcify(Quantising(Block(), Block()), features())(*features()).dtype == torch.float8_e4m3fn


@pytest.mark.parametrize("function", [unmhcify, report, graphs])
def test_not_converted(function: Callable[[nn.Module], Any]) -> None:
    model = lived_in(stack())
    with untouched(model), pytest.raises(MHCError, match=r"Stack is not converted; mhcify\(model\) does that"):
        function(model)


# -- at run time -----------------------------------------------------------------------------------------------------


def test_unseen_call_under_compile() -> None:
    """It is captured while the model is compiled."""
    model = mhcify(Stack(Flagged(), Flagged()).eval(), features())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(*features()), model(*features()), atol=1e-6)
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


@pytest.mark.parametrize(
    "shape",
    [
        (5, WIDTH),
        (1, 1, 2, 5, WIDTH),
        (1, 2, 5, WIDTH),
        (1, 2, 4, WIDTH),
    ],
    ids=str,
)
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

"""The converted model is still the model: to its callers, to hooks, to torch.compile and torch.export, to casts."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from families_vision import lively
from family import output, seeded
from mhc_rewrite import HyperConnection, mhcify, unmhcify
from oracle import perturb
from stays import CASES, GPT_CASE, TIGHT, Case, assert_same_gradients, gpt2, gradients, ids, relative, sites_of


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# Who it is


def test_class_and_signature(case: Case) -> None:
    original, model = case.original(), case.converted()
    assert isinstance(model, type(original))
    modules = dict(model.named_modules())
    for name, module in original.named_modules():
        twin = modules[name]
        assert isinstance(twin, type(module)) and type(twin).__name__ == type(module).__name__
        assert inspect.signature(twin.forward) == inspect.signature(module.forward), name
        assert type(twin).__module__ == type(module).__module__ and type(twin).__doc__ == type(module).__doc__
    assert "mhc_0" in repr(model) and "HyperConnection" in repr(model)


def test_same_object_in_place(case: Case) -> None:
    model = case.original()
    tensors = {name: id(p) for name, p in model.named_parameters()}
    assert mhcify(model, case.example()) is model
    assert tensors.items() <= {name: id(p) for name, p in model.named_parameters()}.items()


def test_state_dict(case: Case) -> None:
    original, model = case.original(), case.converted()
    before, after = original.state_dict(), model.state_dict()
    sites = sites_of(model)
    assert len(sites) == {"gpt": 6, "gpt2": 6, "resnet18": 2}[case.name]
    assert after.keys() - before.keys() == {
        f"{site}.{field}" for site in sites for field in ("phi", "alpha", "bias", "_extra_state")
    }
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(after[f"{site}.alpha"].shape == (3,) for site in sites)
    with seeded("other"):
        other = mhcify(lively(case.build()).double().eval(), case.example())
    assert relative(case.run(other), case.run(model)) > 0.01
    assert str(other.load_state_dict(after, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(case.run(other), case.run(model))


def test_tied_weights_stay_tied() -> None:
    model = mhcify(gpt2(), {"input_ids": ids()})
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.lm_head.weight is twin.transformer.wte.weight


# How it runs


def test_train_and_eval(case: Case) -> None:
    """Either mode may come first; at initialisation it draws and counts as the original does."""
    for first in (True, False):
        original = case.original().train(first)
        model = mhcify(copy.deepcopy(original), case.example())
        assert all(m.training is first for m in model.modules())
        for training in (first, not first, first):
            for twin in (original, model):
                assert twin.train(training) is twin
            assert all(m.training is training for m in model.modules())
            with seeded("mode"):
                want = case.run(original)
            with seeded("mode"):
                assert relative(case.run(model), want) <= TIGHT
        buffers = dict(model.named_buffers())
        assert all(torch.allclose(buffers[n], b, rtol=TIGHT, atol=TIGHT) for n, b in original.named_buffers())


def test_train_mode_of_a_part(case: Case) -> None:
    """Fine-tuning with one layer frozen in eval mode."""
    original = case.original().train()
    model = mhcify(copy.deepcopy(original), case.example())
    for twin in (original, model):
        twin.get_submodule(case.layers[1]).eval()
    with seeded("mode"):
        want = case.run(original)
    with seeded("mode"):
        assert relative(case.run(model), want) <= TIGHT


def test_any_batch_and_length(case: Case) -> None:
    small, large = case.original(), case.original()
    mhcify(small, case.example())
    mhcify(large, case.example(large=True))
    perturb(small)
    large.load_state_dict(small.state_dict())
    for size in (False, True):
        assert relative(case.run(small, size), case.run(large, size)) <= TIGHT


def test_positional_and_keyword_calls() -> None:
    model = GPT_CASE.converted()
    x = ids()
    want = model(ids=x)
    assert torch.equal(model(x), want)
    assert torch.equal(model(x, 2.0), 2 * want) and torch.equal(model(x, scale=0.5), 0.5 * want)


def test_functional_call(case: Case) -> None:
    model = case.converted()
    example = case.example()
    want = case.run(model)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert torch.equal(output(torch.func.functional_call(model, parameters, (), example)), want)
    site = sites_of(model)[-1]
    changed = {**parameters, f"{site}.bias": parameters[f"{site}.bias"] + 1}
    assert relative(output(torch.func.functional_call(model, changed, (), example)), want) > 1e-3
    assert torch.equal(case.run(model), want)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return output(torch.func.functional_call(model, parameters, (), example)).square().sum()

    got = torch.func.grad(loss)(parameters)
    case.run(model).square().sum().backward()
    assert_same_gradients(got, {name: p.grad for name, p in model.named_parameters()})


# What is compiled and exported is the sites' arithmetic, stream by stream: two show all that four do.
SHORT = {"n_streams": 2, "sinkhorn_iterations": 2}


def test_compile(case: Case) -> None:
    model = case.converted(**SHORT)
    want = case.run(model)
    gradient = gradients(model, want)
    torch.compiler.reset()
    got = case.run(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert relative(got, want) <= TIGHT
    assert_same_gradients(gradients(model, got), gradient)


def test_compile_for_any_batch_and_length() -> None:
    model = GPT_CASE.converted(**SHORT)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for size in ((2, 6), (3, 9)):
        assert relative(compiled(x := ids(*size)), model(x)) <= TIGHT


def test_export(case: Case) -> None:
    model = case.converted(**SHORT)
    exported = torch.export.export(model, (), case.example(), strict=False)
    assert relative(output(exported.module()(**case.example())), case.run(model)) <= TIGHT
    # A program has no modules, so it has their tensors and not the options that stand beside them.
    assert all(key in exported.state_dict for key in model.state_dict() if not key.endswith("._extra_state"))


def test_export_with_free_batch() -> None:
    model = GPT_CASE.converted(**SHORT)
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", min=2, max=32)
    program = torch.export.export(model, (ids(),), dynamic_shapes={"ids": {0: batch, 1: length}}, strict=False)
    for size in ((2, 6), (5, 11)):
        assert relative(program.module()(x := ids(*size)), model(x)) <= TIGHT


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(case: Case, when: str) -> None:
    model = case.converted().train()
    with seeded("mode"):
        want = gradients(model, case.run(model))
    other = case.original()
    if when == "before":
        case.checkpointing(other)
    mhcify(other.train(), case.example())
    other.load_state_dict(model.state_dict())
    if when == "after":
        case.checkpointing(other)
    calls = []
    for layer in case.layers:
        part = next(other.get_submodule(layer).children())
        part.register_forward_pre_hook(lambda *_, layer=layer: calls.append(layer))
    with seeded("mode"):
        assert_same_gradients(gradients(other, case.run(other)), want)
    assert len(calls) == 2 * len(case.layers), "the layers ran once: nothing was recomputed"


def test_hooks_see_the_trunk(case: Case) -> None:
    """Inside a stream hooks see the mean of n streams, in the original shapes."""
    model = case.converted()
    before = case.run(case.original()).shape
    shapes: dict[str, tuple[int, ...]] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            shapes[name] = tuple(output((result,) if isinstance(result, Tensor) else result).shape)

        return hook

    def double(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        return result * 2 if isinstance(result, Tensor) else (result[0] * 2, *result[1:])

    handles = [model.get_submodule(name).register_forward_hook(see(name)) for name in ("", *case.layers)]
    entered: list[tuple[int, ...]] = []
    second = model.get_submodule(case.layers[1])
    handles.append(second.register_forward_pre_hook(lambda module, args: entered.append(tuple(args[0].shape))))
    want = case.run(model)
    assert shapes[""] == before
    assert all(shapes[name] == case.trunk_shape for name in case.layers)
    assert entered == [case.trunk_shape]
    # A hook may replace what a layer gives.
    handles.append(model.get_submodule(case.layers[0]).register_forward_hook(double))
    assert relative(case.run(model), want) > 1e-3
    for handle in handles:
        handle.remove()
    assert torch.equal(case.run(model), want)


def test_earlier_hooks_survive(case: Case) -> None:
    model = case.original()
    seen: list[str] = []
    layer = model.get_submodule(case.layers[0])
    handles = [
        layer.register_forward_hook(lambda *_: seen.append("forward")),
        layer.register_forward_pre_hook(lambda *_: seen.append("pre")),
        layer.register_full_backward_hook(lambda *_: seen.append("backward")),
        model.register_forward_hook(lambda *_: seen.append("root")),
    ]
    mhcify(model, case.example())
    for convert in (lambda: None, lambda: unmhcify(model)):
        convert()
        seen.clear()
        case.run(model).sum().backward()
        assert seen == ["pre", "forward", "root", "backward"]
    for handle in handles:
        handle.remove()
    seen.clear()
    case.run(model).sum().backward()
    assert not seen


# What its numbers are


def test_autocast_keeps_coefficients_wide(case: Case) -> None:
    model = case.converted(torch.float32)
    dtypes: set[torch.dtype] = set()
    pre = HyperConnection.pre

    def spy(site: HyperConnection, streams: Tensor) -> Any:
        u, mix = pre(site, streams)
        dtypes.update((mix.post.dtype, mix.res.dtype))
        assert torch.allclose(mix.res.sum(-1), torch.ones(()), atol=1e-5)
        return u, mix

    want = case.run(model, dtype=torch.float32)
    with mock.patch.object(HyperConnection, "pre", spy), torch.autocast("cpu", torch.bfloat16):
        result = case.run(model, dtype=torch.float32)
        with torch.autocast("cpu", enabled=False):
            assert 1e-6 < relative(result.float(), want) < 0.1
    assert dtypes == {torch.float32}
    assert all(g.dtype == torch.float32 for g in gradients(model, result.float()).values())


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "to bfloat16": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "to float64": (lambda m: m.to(torch.float64), torch.float64),
    "there and back": (lambda m: m.bfloat16().float(), torch.float32),
}


@pytest.mark.parametrize("cast", CASTS)
def test_casts(case: Case, cast: str) -> None:
    """A narrow model keeps wide sites, a wide one widens them."""
    convert, dtype = CASTS[cast]
    model = case.converted(torch.float32)
    sites = {name: model.get_submodule(name).phi.clone() for name in sites_of(model)}
    assert convert(model) is model
    for name, p in model.named_parameters():
        assert p.dtype == (torch.promote_types(dtype, torch.float32) if ".mhc_" in name else dtype)
    for name, phi in sites.items():
        assert torch.equal(model.get_submodule(name).phi, phi.to(torch.promote_types(dtype, torch.float32)))
    result = case.run(model, dtype=dtype)
    assert result.dtype is dtype
    wide = case.run(case.converted(torch.float32).double())
    assert relative(result.double(), wide) < (TIGHT if dtype is torch.float64 else 0.15)

"""The converted model is copied, saved, loaded and converted back; a conversion that fails leaves no trace."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from family import seeded
from mhc_rewrite import HyperConnection, mhcify, unmhcify
from mhc_rewrite.errors import AlreadyConvertedError, CaptureError, ExampleInputsError, MHCError, NoResidualError
from oracle import perturb
from stays import (
    CASES,
    GPT,
    TIGHT,
    WIDTH,
    Branching,
    Case,
    assert_unchanged,
    gradients,
    ids,
    relative,
    sites_of,
    snapshot,
)

pytestmark = pytest.mark.slow  # `make test-fast` answers within two minutes


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


# Copies


def test_deepcopy(case: Case) -> None:
    model = case.converted()
    want = case.run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(case.run(twin), want)
    mine = {id(p) for p in model.parameters()}
    assert not any(id(p) in mine for p in twin.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(case.run(model), want)
    assert relative(case.run(twin), want) > 0.1
    unmhcify(twin)
    assert torch.equal(case.run(model), want) and len(sites_of(model)) > 0 and not sites_of(twin)


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_saved_and_loaded(case: Case, way: str) -> None:
    model = case.converted()
    buffer = io.BytesIO()
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(case.run(twin), case.run(model))
    assert relative(case.run(twin, large=True), case.run(model, large=True)) <= TIGHT
    # Training mode was captured too, or is now.
    with seeded("mode"):
        want = case.run(model.train())
    with seeded("mode"):
        assert relative(case.run(twin.train()), want) <= TIGHT
    original = case.original()
    assert type(unmhcify(twin)) is type(original) and twin.state_dict().keys() == original.state_dict().keys()


def test_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    """A model of torch's own layers, so that the other process need not know this one's modules."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, norm_first=True)
    x = torch.randn(2, 5, WIDTH)
    model = mhcify(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), (x,))
    perturb(model)
    torch.save((model, x, model(x)), tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "model, x, want = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.allclose(model(x), want, rtol=1e-5, atol=1e-6)\n"
        "assert torch.isfinite(model.train()(x[:1, :3])).all()\n"
        "from mhc_rewrite import unmhcify\n"
        "assert type(unmhcify(model).layers[0]) is torch.nn.TransformerEncoderLayer\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_safetensors(case: Case, tmp_path: Path) -> None:
    model = case.converted()
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, str(path))
    twin = mhcify(case.original(), case.example())
    safetensors.torch.load_model(twin, str(path), strict=True)
    assert torch.equal(case.run(twin), case.run(model))


def test_through_meta(case: Case) -> None:
    """A converted model loses its storage and gets it back."""
    model = case.converted()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = case.run(model)
    model.to("meta")
    assert all(t.is_meta for name, t in model.state_dict().items() if not name.endswith("._extra_state"))
    model.to_empty(device="cpu")
    for name in sites_of(model):
        model.get_submodule(name).reset_parameters()
    fresh = mhcify(case.original(), case.example()).state_dict()
    assert all(torch.equal(model.state_dict()[key], fresh[key]) for key in fresh.keys() - case.original().state_dict())
    model.load_state_dict(state)
    for name, buffer in case.original().named_buffers():
        model.get_buffer(name).copy_(buffer)
    assert torch.equal(case.run(model), want)


def test_built_on_meta() -> None:
    """Construction, conversion, storage, weights: the order in which large models come to life."""
    with torch.device("meta"):
        model = mhcify(GPT().eval(), {"ids": torch.zeros(2, 6, dtype=torch.long)})
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    original = GPT().eval()
    original.load_state_dict({key: value for key, value in model.state_dict().items() if ".mhc_" not in key})
    assert relative(model(x := ids()), original(x)) <= 1e-5
    assert len(sites_of(model)) == 6


# The way back


def test_unmhcify(case: Case) -> None:
    model = case.original()
    want = case.run(model)
    before = snapshot(model)
    mhcify(model, case.example())
    perturb(model)
    assert relative(case.run(model), want) > 0.1
    assert unmhcify(model) is model
    assert_unchanged(before, snapshot(model))
    assert list(model.state_dict()) == list(case.original().state_dict())
    assert torch.equal(case.run(model), want)
    mhcify(model, case.example())
    assert len(sites_of(model)) == len(sites_of(case.converted())) and relative(case.run(model), want) <= TIGHT


def test_unmhcify_of_an_unconverted_model() -> None:
    with pytest.raises(MHCError):
        unmhcify(GPT())


def test_twice_is_refused(case: Case) -> None:
    model = case.converted()
    before = snapshot(model)
    with pytest.raises(AlreadyConvertedError):
        mhcify(model, case.example())
    assert_unchanged(before, snapshot(model))


def prepared(case: Case, training: bool) -> nn.Module:
    """A model in the middle of its life: hooks, gradients, mixed modes."""
    model = case.original().train(training)
    model.get_submodule(case.layers[0]).train(not training)
    model.get_submodule(case.layers[1]).register_forward_hook(lambda *_: None)
    loss = case.run(model).square().mean()
    loss.backward()
    return model


class Interrupted(Exception):
    pass


Failure = tuple[type[BaseException], Callable[[nn.Module], object]]


@pytest.fixture(params=["inputs", "shapes", "filters", "pattern", "site", "late site"])
def failure(request: pytest.FixtureRequest, case: Case) -> Iterator[Failure]:
    """Ways to fail: what is raised, and the call."""
    kind = request.param
    if "site" not in kind:
        yield {
            "inputs": (ExampleInputsError, lambda m: mhcify(m, {"no such argument": 1})),
            "shapes": (ExampleInputsError, lambda m: mhcify(m, (torch.zeros(1, 2, 3, 4, 5),))),
            "filters": (NoResidualError, lambda m: mhcify(m, case.example(), filter_fn=lambda site: False)),
            "pattern": (MHCError, lambda m: mhcify(m, case.example(), exclude="no.such.layer")),
        }[kind]
        return
    made = HyperConnection.__init__
    left = [0 if kind == "site" else 1]

    def fail(self: HyperConnection, *args: Any, **kwargs: Any) -> None:
        if left[0] == 0:
            raise Interrupted
        left[0] -= 1
        made(self, *args, **kwargs)

    with mock.patch.object(HyperConnection, "__init__", fail):
        yield Interrupted, lambda m: mhcify(m, case.example())


def test_failure_leaves_no_trace(case: Case, failure: Failure) -> None:
    error, convert = failure
    for training in (True, False):
        model = prepared(case, training)
        before = snapshot(model)
        with pytest.raises(error):
            convert(model)
        assert_unchanged(before, snapshot(model))


def test_layer_that_cannot_be_traced_leaves_no_trace() -> None:
    model = GPT()
    model.blocks.insert(1, Branching())
    example = {"ids": ids()}
    before = snapshot(model)
    with pytest.raises(CaptureError, match=r"blocks\.1"):
        mhcify(model, example)
    assert_unchanged(before, snapshot(model))


@pytest.mark.parametrize("training", [True, False])
def test_example_run_leaves_no_trace(case: Case, training: bool) -> None:
    model = prepared(case, training)
    before = snapshot(model)
    example = case.example()
    kept = {key: (value, copy.deepcopy(value)) for key, value in example.items()}
    mhcify(model, example)
    after = snapshot(model)
    for key, (value, was) in kept.items():
        assert example[key] is value
        if isinstance(value, Tensor):
            assert torch.equal(value, was) and not value.requires_grad and value.grad is None
    lasting = ("torch", "python", "grad mode", "tensor", "grad", "hooks")
    before, after = (
        {key: value for key, value in state.items() if key.endswith(lasting) and ".mhc_" not in key}
        for state in (before, after)
    )
    assert_unchanged(before, after)
    for name, module in model.named_modules():
        assert module.training is (not training if name.startswith(case.layers[0]) else training), name


def test_frozen_parameters(case: Case) -> None:
    model = case.original().requires_grad_(False)
    mhcify(model, case.example())
    gradient = gradients(model, case.run(model))
    assert gradient.keys() == {f"{site}.{field}" for site in sites_of(model) for field in ("phi", "alpha", "bias")}
    assert any(bool(g.any()) for g in gradient.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_converted_without_gradients(case: Case, mode: Callable[[], Any]) -> None:
    """The mode of the conversion is not that of the model: it trains afterwards."""
    model = case.original()
    want = case.run(model)
    with mode():
        mhcify(model, case.example())
        assert relative(case.run(model), want) <= TIGHT
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    assert gradients(model, case.run(model)).keys() == {name for name, _ in model.named_parameters()}

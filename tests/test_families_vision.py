"""Vision families of transformers and timm, and torch's own stacks: the right sites, function and streams."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

from families_vision import FAMILIES, VIT, encoder, lively
from family import (
    PERTURBED_FP64,
    PRESERVE_FP64,
    Family,
    check_perturbed,
    check_preserve,
    check_structure,
    output,
    plan_streams,
    relative,
    seeded,
)
from mhc_rewrite import mhcify, plan
from oracle import perturb, site_names, site_params

pytestmark = pytest.mark.slow  # `make test-fast` answers within two minutes

BY_NAME = {family.name: family for family in FAMILIES}
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def by_hand(family: Family, original: nn.Module, converted: nn.Module) -> Callable[..., object]:
    """A hand-written n-stream model of the original, with the sites of the converted one."""
    state = converted.state_dict()
    return family.oracle(original, {name: site_params(state, name) for name in site_names(state)})


def perturbed(family: Family) -> tuple[nn.Module, Callable[..., object], nn.Module]:
    """A converted and perturbed model, its hand-written counterpart, and the module that the latter runs."""
    model = family.model()
    args, kwargs = family.arguments()
    with torch.no_grad():
        model(*args, **kwargs)  # transformers' Swin keeps the window size that fitted its first image
    original = copy.deepcopy(model)
    perturb(mhcify(model, family.example()))
    return model, by_hand(family, original, model), original


@every_family
def test_sites_and_streams(family: Family, record_property: Callable[[str, object], None]) -> None:
    check_structure(family, record_property)


@every_family
def test_preserves_the_function(family: Family, record_property: Callable[[str, object], None]) -> None:
    check_preserve(family, record_property)


@every_family
def test_perturbed_equals_streams_by_hand(family: Family, record_property: Callable[[str, object], None]) -> None:
    check_perturbed(family, record_property)


@every_family
def test_training_mode_draws_and_counts_as_the_original(family: Family) -> None:
    """Dropout and drop-path draw the same numbers; BatchNorm sees the same batches, once."""
    original = family.model().train()
    converted = mhcify(copy.deepcopy(original), family.example())
    args, kwargs = family.arguments()
    with seeded("training"):
        want = output(original(*args, **kwargs))
    with seeded("training"):
        got = output(converted(*args, **kwargs))
    assert relative(got.detach(), want.detach()) <= PRESERVE_FP64
    buffers = dict(converted.named_buffers())
    for name, buffer in original.named_buffers():
        assert torch.allclose(buffers[name], buffer, rtol=1e-10, atol=1e-10), name


@pytest.mark.parametrize(
    "name", ["hf CLIP", "hf Swin", "timm convnext", "torch decoder, norm last", "torch Transformer"]
)
def test_example_inputs_can_be_left_out(name: str) -> None:
    family = BY_NAME[name]
    assert plan_streams(plan(family.model(torch.float32))) == family.streams


@pytest.mark.parametrize(
    "name", ["hf ViT", "hf Swin", "hf ConvNeXt", "timm swin", "timm resnet18", "torch encoder, norm last"]
)
def test_gradient_of_the_input(name: str) -> None:
    family = BY_NAME[name]
    model, run, _ = perturbed(family)

    def gradient(call: Callable[..., object]) -> Tensor:
        args, kwargs = family.arguments()
        source = (args[0] if args else kwargs["pixel_values"]).requires_grad_()
        result = output(call(*args, **kwargs))
        with seeded("weights of the loss"):
            (result * torch.randn_like(result)).sum().backward()
        return source.grad

    assert relative(gradient(model), gradient(run)) <= PERTURBED_FP64


# Whoever else reads the trunk reads the mean of the streams.
HIDDEN = [
    ("hf ViT", lambda m: list(m.layers)),
    ("hf DINOv2", lambda m: list(m.encoder.layer)),
    ("hf SegFormer", lambda m: list(m.stages)),
    ("hf ConvNeXt", lambda m: list(m.encoder.stages)),
    ("hf Swin", lambda m: list(m.encoder.layers)),
]


@pytest.mark.parametrize(("name", "layers"), HIDDEN, ids=[name for name, _ in HIDDEN])
def test_hidden_states_are_means(name: str, layers: Callable[[nn.Module], list[nn.Module]]) -> None:
    family = BY_NAME[name]
    model, run, twin = perturbed(family)
    args, kwargs = family.arguments()

    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[object, ...], result: Tensor | tuple[Tensor, ...]) -> None:
        states.append(result[0] if isinstance(result, tuple) else result)

    for layer in layers(twin):
        layer.register_forward_hook(keep)
    with torch.no_grad():
        shapes = [state.shape for state in family.model()(*args, **kwargs, output_hidden_states=True).hidden_states]
        got = model(*args, **kwargs, output_hidden_states=True).hidden_states
        run(*args, **kwargs)
    assert [state.shape for state in got] == shapes
    # The first entry may be what the first layer reads.
    for mine, theirs in zip(got[-len(states) :], states, strict=True):
        assert relative(mine, theirs if theirs.dim() == mine.dim() else theirs.mean(-2)) <= PERTURBED_FP64


@pytest.mark.parametrize("name", ["timm resnet18", "timm vit", "timm convnext"])
def test_feature_pyramids(name: str) -> None:
    """timm's backbones collect the trunk between the stages."""
    architecture, options = {
        "timm resnet18": ("resnet18", {"channels": (64, 16, 24, 32)}),
        "timm vit": ("vit_tiny_patch16_224", VIT),
        "timm convnext": ("test_convnext", {}),
    }[name]
    with seeded(name):
        model = lively(timm.create_model(architecture, features_only=True, pretrained=False, **options)).double().eval()
    (x,) = BY_NAME[name].example()
    with torch.no_grad():
        want = model(x)
        got = mhcify(model, (x,))(x)
    assert max(relative(mine, theirs) for mine, theirs in zip(got, want, strict=True)) <= PRESERVE_FP64


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("call", ["plain", "padding", "causal"])
def test_torch_encoder_takes_no_fast_path(norm_first: bool, call: str) -> None:
    """Without gradients, in eval mode, torch fuses a whole encoder layer (nested tensors where there is padding): the
    residual adds would vanish, and the streams with them."""
    family = BY_NAME[f"torch encoder, norm {'first' if norm_first else 'last'}"]
    model = encoder(norm_first, dropout=0.0)().double().eval()
    original = copy.deepcopy(model)
    (x,) = family.example()
    padded = torch.arange(5).repeat(2, 1) >= torch.tensor([[5], [3]])
    options = {
        "plain": {},
        "padding": {"src_key_padding_mask": padded},
        "causal": {"mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype), "is_causal": True},
    }[call]
    kept = ~padded if call == "padding" else torch.ones_like(padded)
    mhcify(model, (x,))
    with torch.no_grad():
        # Past the padding the fast path writes zeros, and the ordinary one whatever comes.
        assert relative(model(x, **options)[kept], original(x, **options)[kept]) <= PRESERVE_FP64
        perturb(model)
        run = by_hand(family, original, model)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            want = run(x, **options)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        assert relative(model(x, **options)[kept], want[kept]) <= PERTURBED_FP64


def test_any_image_size() -> None:
    """Converted on one size and batch, called with others."""
    for name, size in (("timm resnet18", 48), ("hf ConvNeXt", 64), ("hf SegFormer", 64), ("hf Swin", 64)):
        family = BY_NAME[name]
        model, run, _ = perturbed(family)
        images = torch.randn(3, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            assert relative(output(model(images)), output(run(images))) <= PERTURBED_FP64, name

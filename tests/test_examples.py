"""Example inputs that nobody gave: each kind of input, what is learnt from errors, and that nothing is disturbed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_rewrite import mhcify, plan, report
from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.capture.examples.arguments import Arguments
from mhc_rewrite.capture.examples.search import search
from mhc_rewrite.cli.small import build
from mhc_rewrite.errors import ExampleInputsError

IMAGE = 7


class Part(SimpleNamespace):
    """A config, as far as the derivation looks at one."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def config(**fields: Any) -> Part:
    return Part(**{"model_type": "made up", "is_encoder_decoder": False, **fields})


class Model(nn.Module):
    """What the derivation takes for a transformers model."""

    main_input_name: Any = "input_ids"
    input_modalities: tuple[str, ...] = ("text",)

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = config(**{"vocab_size": 32, "hidden_size": 16, **fields})
        self.embed = nn.Embedding(32, 16)


class Pictures(Model):
    """Wants as many image tokens as there are patches."""

    input_modalities = ("image", "text")

    def __init__(self) -> None:
        super().__init__(image_token_id=IMAGE, vision_config=config(image_size=32, patch_size=16, num_channels=3))
        self.patch = nn.Conv2d(3, 16, 16, 16)

    def forward(self, input_ids: Any = None, pixel_values: Any = None) -> Any:
        x = self.embed(input_ids)
        if pixel_values is None:
            return x
        image_features = self.patch(pixel_values).flatten(2).transpose(1, 2)
        mask = input_ids == IMAGE
        if mask.sum() != image_features.shape[:-1].numel():
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {int(mask.sum())}, "
                f"features: {image_features.shape[0]}"  # some messages count something else than was compared
            )
        return x.masked_scatter(mask.unsqueeze(-1), image_features)


class Boxes(Model):
    """Says by name what it lacks."""

    def forward(self, input_ids: Any = None, bbox: Any = None, inputs_embeds: Any = None) -> Any:
        if bbox is None:
            raise ValueError("You have to specify bbox")
        return self.embed(input_ids) + self.embed(bbox.clamp_max(31)).sum(2)


class Silent(Model):
    """Fails on a None that has another name inside, in a call of several lines."""

    def inner(self, x: Tensor, ids: Any) -> Tensor:
        return x + self.embed(
            ids * 0,
        )

    def forward(self, input_ids: Any = None, entity_ids: Any = None) -> Any:
        return self.inner(self.embed(input_ids), entity_ids)


class Clips(Model):
    """Takes a picture in a form that is not the likeliest."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self) -> None:
        super().__init__(image_size=32, patch_size=16)

    def forward(self, pixel_values: Tensor, attention_mask: Any = None) -> Any:
        batch, several, _, _, _ = pixel_values.shape
        return self.embed.weight.sum() * pixel_values.sum() * several * batch


class Series(Model):
    """A time series, with what goes with it."""

    main_input_name = "past_values"
    input_modalities = ("time",)

    def __init__(self) -> None:
        super().__init__(context_length=6, prediction_length=3, lags_sequence=[1, 4], num_time_features=2, input_size=1)

    def forward(self, past_values: Tensor, past_time_features: Tensor, past_observed_mask: Any = None) -> Any:
        assert past_values.shape == past_observed_mask.shape == (2, 10), past_values.shape
        assert past_time_features.shape == (2, 10, 2)
        return past_values


class Speech(Model):
    """Mel frames with the bins first."""

    main_input_name = "input_features"
    input_modalities = ("audio",)

    def __init__(self) -> None:
        super().__init__(num_mel_bins=20)
        self.conv = nn.Conv1d(20, 16, 3)

    def forward(self, input_features: Tensor) -> Any:
        return self.conv(input_features)


MADE_UP = {
    Pictures: ("input_ids", "pixel_values"),
    Boxes: ("input_ids", "bbox"),
    Silent: ("input_ids", "entity_ids"),
    Clips: ("pixel_values",),
    Series: ("past_values", "past_time_features", "past_observed_mask"),
    Speech: ("input_features",),
}


@pytest.mark.parametrize("kind", MADE_UP, ids=lambda kind: kind.__name__)
def test_a_call_is_found(kind: type[Model]) -> None:
    """With exactly the arguments that are needed, and in a few tries."""
    model = kind()
    arguments = Arguments(model)
    found, errors = search(model, arguments.starts(), arguments)
    assert found is not None and tuple(found) == MADE_UP[kind], errors
    assert len(errors) <= 10
    model(**found)


def test_placeholders_are_those_of_the_config() -> None:
    args, kwargs = example_call(Pictures(), None)
    assert args == () and (kwargs["input_ids"] == IMAGE).sum(1).tolist() == [4, 4]
    assert kwargs["pixel_values"].shape == (2, 3, 32, 32)


def test_the_model_is_left_as_it_was() -> None:
    """Random state, mode and buffers, however many tries there were."""
    model = Clips().train()
    model.register_buffer("count", torch.zeros(()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    example_call(model, None)
    assert torch.equal(torch.get_rng_state(), before) and model.training and model.count == 0


def test_what_was_tried_is_said() -> None:
    class Picky(Model):
        def forward(self, input_ids: Any) -> Any:
            raise RuntimeError("never content")

    with pytest.raises(ExampleInputsError, match=r"Picky does not say what it takes.*first with: .*never content"):
        example_call(Picky(), None)


def test_an_interrupt_is_not_an_error_of_the_model() -> None:
    class Stopped(Model):
        def forward(self, input_ids: Any) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example_call(Stopped(), None)


# -- real models -------------------------------------------------------------------------------------------------------

TRANSFORMERS = {
    "gpt2": {"input_ids": (2, 8)},
    "t5": {"input_ids": (2, 8), "decoder_input_ids": (2, 4)},
    "llava": {"input_ids": None, "pixel_values": (2, 3, 56, 56)},
    "qwen2_vl": {"input_ids": None, "pixel_values": (32, 1176), "image_grid_thw": (2, 3)},
    "layoutlm": {"input_ids": (2, 8)},
    "wav2vec2": {"input_values": None},
    "whisper": {"input_features": None, "decoder_input_ids": (2, 4)},
    "informer": {"past_values": None, "past_time_features": None, "past_observed_mask": None},
    "vivit": {"pixel_values": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TRANSFORMERS)
def test_transformers_models_need_no_example(model_type: str) -> None:
    model = build(model_type, {})
    args, kwargs = example_call(model, None)
    wanted = TRANSFORMERS[model_type]
    assert not args and set(wanted) <= set(kwargs)
    assert all(shape is None or tuple(kwargs[name].shape) == shape for name, shape in wanted.items())
    assert plan(model).sites


@pytest.mark.slow
def test_a_language_model_inside_another_is_converted_alone() -> None:
    model = build("llava", {})
    inner = model.language_model
    mhcify(inner)
    assert len(report(inner).plan.sites) == 8
    args, kwargs = example_call(model, None)
    assert model(*args, **kwargs).last_hidden_state.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llava", "vit"])
def test_a_model_on_the_meta_device_converts(model_type: str) -> None:
    model = build(model_type, {}).to("meta")
    mhcify(model)
    assert report(model).plan.sites and all(p.is_meta for p in model.parameters())


def test_pictures_have_the_size_that_a_timm_model_was_built_for() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), in_chans=1, depth=2)
    (picture,), _ = example_call(model, None)
    assert picture.shape == (2, 1, 32, 48)
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert len(report(mhcify(model)).plan.sites) == 4


def test_pictures_of_torchvision_models() -> None:
    models = pytest.importorskip("torchvision").models
    assert example_call(models.vit_b_32(image_size=64), None)[0][0].shape == (2, 3, 64, 64)
    assert example_call(models.video.r3d_18(), None)[0][0].dim() == 5

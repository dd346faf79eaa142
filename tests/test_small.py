"""Small models of a type: what hangs together in a config still does, and what an error says is mended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.cli.small import build
from mhc_rewrite.cli.small_fields import small_fields
from mhc_rewrite.cli.small_repairs import repair, repair_run


class Config(SimpleNamespace):
    """A config, as far as the small builder looks at one."""

    attribute_map = {"many": "experts"}
    model_type = "made up"
    sub_configs: dict[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        return {k: v.to_dict() if isinstance(v, Config) else v for k, v in vars(self).items()}


class Text(Config):
    pass


class Whole(Config):
    sub_configs = {"text": Text}


class Text2(Text):
    def __init__(self, hidden_size: int = 512, num_attention_heads: int = 8) -> None:
        super().__init__(hidden_size=hidden_size, num_attention_heads=num_attention_heads)


class Frames(Text):
    def __init__(self, hidden_size: int = 768, num_attention_heads: int = 12) -> None:
        super().__init__(hidden_size=hidden_size, num_attention_heads=num_attention_heads)


class Both(Config):
    sub_configs = {"text": Text2, "frames": Frames}


def test_everything_shrinks_by_one_factor() -> None:
    """So a width that leads from one part to another still fits both, whatever they have in heads."""
    config = Both(text=Text2(), frames=Frames(), mit_hidden_size=512, mit_num_attention_heads=8, projection_dim=512)
    small = small_fields(config, heads="evenly")
    assert (small["text"]["hidden_size"], small["frames"]["hidden_size"]) == (128, 192)
    assert (small["text"]["num_attention_heads"], small["frames"]["num_attention_heads"]) == (2, 3)
    assert (small["mit_hidden_size"], small["projection_dim"], small["mit_num_attention_heads"]) == (128, 128, 2)


FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a vocabulary by another name": ({"hash_vocab": 500_000}, {"hash_vocab": 512}),
    "the width of a picture is none": ({"pos_width": 64, "pos_height": 64, "hidden_size": 512}, {"pos_width": None}),
    "a clip": ({"num_frames": 32}, {"num_frames": 4}),
    "one patch of a clip": ({"image_size": 224, "tubelet_size": [2, 16, 16]}, {"image_size": 64}),
    "layers whose states are read": ({"num_hidden_layers": 12, "hook_ids": [11, 8, 5, 2]}, {"hook_ids": [3, 2, 1, 0]}),
    "options by layer": ({"num_hidden_layers": 24, "per_layer_config": {2: 1, 20: 1}}, {"per_layer_config": {2: 1}}),
    "shared keys": ({"num_hidden_layers": 30, "num_kv_shared_layers": 15, "layer_types": ["a", "b"] * 15},
                    {"num_hidden_layers": 6, "num_kv_shared_layers": 2}),
    "experts a token left open": ({"num_experts_per_tok": None, "top_k_experts": None},
                                  {"num_experts_per_tok": 2, "top_k_experts": 2}),
    "pictures of convolutions": ({"image_size": 600}, {"image_size": 64}),
    "a picture of two sides": ({"image_size": [448, 448], "patch_size": [14, 14]}, {"image_size": [56, 56]}),
    "a picture in stages": ({"image_size": 224, "patch_size": 4, "depths": [2, 2]}, {"image_size": None}),
    "channels of a vocoder": ({"upsample_initial_channel": 512}, {"upsample_initial_channel": 128}),
    "latents that attend to themselves": ({"num_latents": 256, "num_self_attends_per_block": 26},
                                          {"num_latents": 16, "num_self_attends_per_block": 4}),
    "filters that many stages double": ({"num_filters": 32, "depths": [3, 3, 8]}, {"num_filters": 8}),
    "filters": ({"num_filters": 32}, {"num_filters": None}),
    "stages that are scaled": ({"depth_coefficient": 3.1}, {"depth_coefficient": 1.0}),
    "a side of codes": ({"num_patches": 32, "base_channels": 128}, {"num_patches": 4, "base_channels": 32}),
    "patches in all": ({"num_patches": 256, "patch_size": 16}, {"num_patches": 16}),
    "a picture in a frame": ({"max_img_size": 448, "visual_prompt_size": 96},
                             {"max_img_size": 112, "visual_prompt_size": 24}),
    "options by layer that are small now": (
        {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16,
         "per_layer_config": {2: {"num_attention_heads": 32, "other": 1}, 20: {}}},
        {"per_layer_config": {2: {"other": 1}}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS)
def test_small_fields(kind: str) -> None:
    fields, wanted = FIELDS[kind]
    small = small_fields(Config(**fields))
    assert {name: small.get(name) for name in wanted} == wanted


class Experts(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.number = config.many
        self.table = nn.Linear(4, self.number)


class Layer(nn.Module):
    def __init__(self, config: Any, index: int = 1) -> None:
        super().__init__()
        self.sparse = config.kinds[index] == "sparse"


class Inner(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.bottleneck)


def _error(make: Any, config: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        make(config)
    return caught.value


def test_what_a_config_leaves_open_is_found_in_the_line_that_fails() -> None:
    """By the option's name, by that of the attribute that was read from it, and for each layer."""
    config = Config(experts=None, kinds=None, num_hidden_layers=3, hidden_size=4, bottleneck=None)
    for make, name, value in ((Experts, "experts", 8), (Layer, "kinds", ["sparse"] * 3), (Inner, "bottleneck", 8)):
        fields: dict[str, Any] = {}
        if make is Experts:
            config.many = None  # as `attribute_map` gives it
        assert repair(config, fields, _error(make, config)) and fields == {name: value}
        make(Config(**{**vars(config), **fields, "many": fields.get("experts")}))


def test_what_a_part_leaves_open() -> None:
    whole = Whole(text=Text(hidden_size=4, bottleneck=None), other=1)
    fields: dict[str, Any] = {"text": {"hidden_size": 4}}
    assert repair(whole, fields, _error(Inner, whole.text))
    assert fields == {"text": {"hidden_size": 4, "bottleneck": 8}}


def test_what_has_to_match_does() -> None:
    whole = Whole(text=Text(hidden_size=64, adapter=256), other=1)
    fields: dict[str, Any] = {}
    assert repair(whole, fields, ValueError("adapter must match hidden_size"))
    assert fields == {"text": {"adapter": 64}}
    assert not repair(whole, fields, ValueError("adapter must match hidden_size"))


def test_an_error_that_names_nothing_open_is_not_mended() -> None:
    assert not repair(Config(hidden_size=4), {}, ValueError("`hidden_size` is wrong"))


SPLIT = "RuntimeError: split_with_sizes expects split_sizes to sum exactly to 16 (...), but got split_sizes=[8, 12, 12]"
WIDTHS = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (8x768 and 1408x4096)"


@pytest.mark.parametrize("message, options, wanted", [
    (SPLIT, {"rope_parameters": {"type": "x", "sections": [8, 12, 12]}}, {"sections": [4, 6, 6], "type": "x"}),
    (SPLIT, {"rope_parameters": {"type": "x"}}, {"mrope_section": [4, 6, 6], "type": "x"}),
])  # fmt: skip
def test_sections_of_a_rotary_embedding(message: str, options: dict[str, Any], wanted: dict[str, Any]) -> None:
    """The model's default for them stays hidden, so they are given it where the config has none."""
    fields: dict[str, Any] = {"text": {"hidden_size": 4}}
    assert repair_run(Whole(text=Text(**options)), fields, ["ValueError: other", message])
    assert fields == {"text": {"hidden_size": 4, "rope_parameters": wanted}}


CHANNELS = "RuntimeError: Given groups=1, ..., expected input[2, 768, 8, 8] to have 1408 channels, but got 768 channels"


@pytest.mark.parametrize("message", [WIDTHS, CHANNELS])
def test_a_width_that_contradicts_another(message: str) -> None:
    whole = Whole(text=Text(intermediate_size=1408, flag=True))
    fields: dict[str, Any] = {}
    assert repair_run(whole, fields, [message]) and fields == {"text": {"intermediate_size": 768}}
    assert not repair_run(whole, {}, [WIDTHS.replace("768", "77")])  # an input's


# -- real models -------------------------------------------------------------------------------------------------------

BUILT = {
    # model type -> class, and what the richest call gives it
    "xclip": ("XCLIPModel", {"input_ids", "pixel_values"}),
    "dots1": ("Dots1ForCausalLM", {"input_ids"}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"input_ids"}),
    "glm4v_moe": ("Glm4vMoeModel", {"input_ids", "pixel_values", "image_grid_thw"}),
    "depth_pro": ("DepthProModel", {"pixel_values"}),
    "gemma3n_text": ("Gemma3nForCausalLM", {"input_ids"}),
    "llama4_vision_model": ("Llama4VisionModel", {"pixel_values"}),
    "bamba": ("BambaForCausalLM", {"input_ids", "use_cache"}),
    "idefics2_perceiver": ("Idefics2PerceiverResampler", {"context", "attention_mask"}),
    "blt_local_encoder": ("BltLocalEncoder", {"input_ids", "patch_ids", "num_patches"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", BUILT)
def test_a_small_model_runs(model_type: str) -> None:
    name, given = BUILT[model_type]
    model = build(model_type, {})
    assert type(model).__name__ == name and sum(p.numel() for p in model.parameters()) < 100e6
    assert given <= set(example_call(model, None)[1])


@pytest.mark.slow
@pytest.mark.parametrize("model_type, message", [
    ("sam_mask_decoder", "SamMaskDecoderConfig is of a part of another model"),
    ("timm_backbone", "nor one of its default config: ValueError: backbone is not set"),
])  # fmt: skip
def test_why_there_is_no_model_is_said(model_type: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(model_type, {})

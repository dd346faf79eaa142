"""Small models whose sizes hang together in ways that only the whole config, or a run, shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhc_rewrite.cli.small import _first_line
from mhc_rewrite.cli.small_fields import small_fields
from mhc_rewrite.cli.small_repairs import repair, repair_run
from test_small import Config, Text, Whole


class Fixed(Config):
    """Has a list of kinds by default, however many layers there are."""

    def __init__(self, num_hidden_layers: int = 9, layers_block_type: list[str] | None = None) -> None:
        kinds = layers_block_type or ["mamba"] * 5 + ["hybrid"] + ["mamba"] * 3
        super().__init__(num_hidden_layers=num_hidden_layers, layers_block_type=kinds)


class Strict(Fixed):
    """Refuses another number of layers than it has kinds."""

    def __init__(self, num_hidden_layers: int = 9, layers_block_type: list[str] | None = None) -> None:
        super().__init__(num_hidden_layers, layers_block_type)
        assert len(self.layers_block_type) == num_hidden_layers


class Derived(Fixed):
    def __init__(self, num_hidden_layers: int = 9, layers_block_type: list[str] | None = None) -> None:
        super().__init__(num_hidden_layers, layers_block_type or (["a"] * 5 + ["b"] * 99)[:num_hidden_layers])


def test_kinds_of_layers_are_as_many_as_layers() -> None:
    """One of each at least; what the config makes itself is left to it."""
    for kind in (Fixed, Strict):
        assert small_fields(kind()) == {"num_hidden_layers": 6, "layers_block_type": ["mamba"] * 5 + ["hybrid"]}
    assert small_fields(Derived()) == {"num_hidden_layers": 6}


def test_layers_that_share_weights_are_two() -> None:
    """The error names no option; a second time it has nothing to mend."""
    error = ValueError("There is an issue with your definition of `tie_weights_keys` for layers.2")
    config, fields = Fixed(num_hidden_layers=9), {"num_hidden_layers": 6, "layers_block_type": ["mamba"] * 6}
    assert repair(config, fields, error)
    assert fields == {"num_hidden_layers": 9, "layers_block_type": ["mamba"] * 5 + ["hybrid"] + ["mamba"] * 3}
    assert not repair(config, fields, error)


def test_maps_are_as_large_as_the_pictures_of_a_part() -> None:
    config = Whole(text=Text(image_size=96 * 14, patch_size=14), map_feature_sizes=[[384, 384], [96, 48]])
    small = small_fields(config)
    assert small["text"]["image_size"] == 56 and small["map_feature_sizes"] == [[16, 16], [4, 2]]


def test_what_timm_stacks_is_shallow() -> None:
    """Where its constructor takes a depth; what else the config says of it stays."""
    pytest.importorskip("timm")
    vit = small_fields(Config(architecture="vit_small_patch16_224", model_args={"num_classes": 3}))
    assert vit["model_args"] == {"depth": 4, "img_size": 64, "num_classes": 3}
    assert small_fields(Config(architecture="resnet18", model_args=None))["model_args"] is None
    assert small_fields(Config(architecture="resnet18", model_args={"a": 1}))["model_args"] == {"a": 1}


CHANNELS = "RuntimeError: Given groups=1, ..., expected input[2, 512, 8, 8] to have 192 channels, but got 512 channels"
CONCATENATED = "RuntimeError: Sizes of tensors must match except in dimension 1. Expected size 896 but got size 512 for"


@pytest.mark.parametrize("message, options, wanted", [
    (CHANNELS, {"channels": [384, 192], "other": [True]}, {"channels": [384, 512]}),
    (CONCATENATED, {"out": [512, 896]}, {"out": [512, 512]}),
    (CONCATENATED, {"out": 512}, {"out": 896}),
])  # fmt: skip
def test_a_width_in_a_list(message: str, options: dict[str, Any], wanted: dict[str, Any]) -> None:
    fields: dict[str, Any] = {}
    assert repair_run(Whole(text=Text(**options)), fields, [message]) and fields == {"text": wanted}


def test_parts_that_hand_on_tokens_have_one_vocabulary() -> None:
    """The smallest, with their special tokens in it; a config with one vocabulary alone is not to blame."""
    message = "IndexError: index out of range in self"
    whole = Whole(text=Text(vocab_size=512, bos_token_id=511), other=Text(vocab_size=256))
    fields: dict[str, Any] = {}
    assert repair_run(whole, fields, [message])
    assert fields == {"text": {"vocab_size": 256, "bos_token_id": 1}}
    assert not repair_run(Whole(text=Text(vocab_size=256)), {}, [message])


def test_a_token_that_no_option_names_is_in_the_vocabulary() -> None:
    whole = Whole(text=Text(vocab_size=512, hidden_size=512), other=1)
    message = "IndexError: index {} is out of bounds for dimension 0 with size 512"
    fields: dict[str, Any] = {}
    assert repair_run(whole, fields, [message.format(10784)]) and fields == {"text": {"vocab_size": 10785}}
    assert not repair_run(whole, {}, [message.format(10**6)])


def test_an_option_that_a_run_misses_is_set() -> None:
    whole = Whole(text=Text(sliding_window=None, hidden_size=512), sliding_window=4)
    message = "ValueError: Could not find a `sliding_window` argument in the config, or it is not set"
    fields: dict[str, Any] = {}
    assert repair_run(whole, fields, [message]) and fields == {"text": {"sliding_window": 8}}
    assert not repair_run(Whole(text=Text(sliding_window=4)), {}, [message])


def test_an_error_is_said_whole() -> None:
    error = ValueError("Class validation error for validator 'x':\n    ValueError: a must be 0\nmore")
    assert _first_line(error) == "ValueError: Class validation error for validator 'x': ValueError: a must be 0"
    assert _first_line(torch.OutOfMemoryError()) == "OutOfMemoryError"

"""What each kind of error teaches about the next call, each on a model that fails with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.capture.examples.arguments import Arguments
from mhc_rewrite.capture.examples.calls import Call
from mhc_rewrite.capture.examples.search import search
from mhc_rewrite.errors import ExampleInputsError
from test_examples import Model


class Sound(Model):
    main_input_name = "input_features"
    input_modalities = ("audio",)


class ChannelsFirst(Sound):
    """A convolution names the channels that it wants: the frames are turned."""

    def __init__(self) -> None:
        super().__init__(num_mel_bins=20)
        self.conv = nn.Conv1d(20, 16, 3)

    def forward(self, input_features: Tensor) -> Any:
        return self.conv(input_features)


class MoreChannels(Sound):
    """Of another number of bins than the config says."""

    def __init__(self) -> None:
        super().__init__(num_mel_bins=20)
        self.conv = nn.Conv1d(24, 16, 3)

    def forward(self, input_features: Tensor) -> Any:
        return self.conv(input_features)


class WiderFrames(Sound):
    """Stacked frames: a linear layer behind something that no layer of it names."""

    def __init__(self) -> None:
        super().__init__(num_mel_bins=20)
        self.first = nn.Linear(3, 4)
        self.wide = nn.Linear(60, 16)

    def forward(self, input_features: Tensor) -> Any:
        return self.wide(input_features)


class Normalised(Sound):
    def __init__(self) -> None:
        super().__init__(num_mel_bins=20)
        self.first = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(28)

    def forward(self, input_features: Tensor) -> Any:
        return self.norm(input_features)


class Batched(Sound):
    """A table a frame, of a width that only the product says."""

    def __init__(self) -> None:
        super().__init__(num_mel_bins=20)
        self.first = nn.Linear(3, 4)
        self.table = nn.Parameter(torch.randn(2, 36, 5))

    def forward(self, input_features: Tensor) -> Any:
        return torch.bmm(input_features, self.table)


class InPieces(Sound):
    main_input_name = "input_values"

    def forward(self, input_values: Tensor) -> Any:
        if input_values.shape[1] % 150:
            raise ValueError(f"`input_values` length {input_values.shape[1]} is not a multiple of 150.")
        return input_values.unflatten(1, (-1, 150))


class Sized(Model):
    """Says which size of picture it was built for, and the config does not."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def forward(self, pixel_values: Tensor) -> Any:
        height, width = pixel_values.shape[-2:]
        if (height, width) != (48, 40):
            raise ValueError(f"Input image size ({height}*{width}) doesn't match model (48*40).")
        return pixel_values


class High(Sized):
    """As timm says it."""

    def forward(self, pixel_values: Tensor) -> Any:
        if pixel_values.shape[-2] != 96:
            raise AssertionError(f"Input height ({pixel_values.shape[-2]}) doesn't match model (96).")
        return pixel_values


class TooSmall(Sized):
    def forward(self, pixel_values: Tensor) -> Any:
        height, width = pixel_values.shape[-2:]
        if height < 900:
            raise ValueError(f"Image size {height}x{width} is too small to be scaled.")
        return pixel_values


class Counted(Sized):
    """Wants a picture of as many patches as it has a code book for."""

    def forward(self, pixel_values: Tensor) -> Any:
        tokens = pixel_values[:, 0, ::16, ::16].flatten(1)
        if tokens.shape[1] != 64:
            raise ValueError(
                f"Expected `image_tokens` to have shape `(batch_size, 64)`, but got shape `{tokens.shape}`."
            )
        return tokens


class Codebooks(Model):
    """Tokens of several channels, as its decoder unpacks them: expected 2, got 1."""

    def __init__(self) -> None:
        super().__init__(num_channels=3)

    def forward(self, input_ids: Tensor) -> Any:
        batch, length = input_ids.size()[:-1]
        return self.embed(input_ids.view(batch, length, 3)).sum(2)


class FewWords(Model):
    """The table is smaller than the vocabulary that the config names."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Embedding(4, 16)

    def forward(self, input_ids: Tensor) -> Any:
        return self.few(input_ids)


class Masked(Sound):
    """A mask that has to be boolean, and as long as the frames."""

    def forward(self, input_features: Tensor, input_features_mask: Tensor) -> Any:
        return input_features.masked_fill(~input_features_mask.unsqueeze(-1), 0.0)


class Resampler(Model):
    """A name that no rule knows, as a perceiver has it."""

    def forward(self, context: Tensor, attention_mask: Tensor) -> Any:
        return context @ self.embed.weight.T * attention_mask.unsqueeze(-1)


class Reduced(Model):
    """What the annotation alone tells: ids and a number."""

    def forward(self, input_ids: Any = None, patch_ids: Any = None, num_patches: int | None = None) -> Any:
        index = patch_ids.unsqueeze(-1).expand(-1, -1, 16)
        zeros = torch.zeros(2, num_patches, 16)
        return zeros.scatter_reduce(1, index, self.embed(input_ids), "amax", include_self=False)

    forward.__annotations__["patch_ids"] = "torch.LongTensor | None"


class FromStates(Model):
    """Runs on embeddings alone, which stand for ids elsewhere and are left out there."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Any:
        return inputs_embeds.shape[0] + self.embed.weight @ inputs_embeds.transpose(1, 2)


class NoIds(Model):
    """Says that what it is given is not to be given."""

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Any:
        if input_ids is not None:
            raise ValueError("`input_ids` is expected to be `None`")
        return self.embed.weight @ inputs_embeds.transpose(1, 2)


class CacheOfNothing(Model):
    """A hybrid without a layer of attention can't make its cache."""

    def __init__(self) -> None:
        super().__init__(use_cache=True)

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("use_cache", self.config.use_cache):
            raise ValueError("`length` can only be asked of attention, and the current Cache has none")
        return self.embed(input_ids)


class Attended(Model):
    """A mask of whole numbers where attention takes boolean ones only."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        x = self.embed(input_ids)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=attention_mask.unsqueeze(1))


LEARNT: dict[type[Model], dict[str, Any]] = {
    ChannelsFirst: {"input_features": (2, 20, 64)},
    MoreChannels: {"input_features": None},
    WiderFrames: {"input_features": (2, 64, 60)},
    Normalised: {"input_features": (2, 64, 28)},
    Batched: {"input_features": (2, 64, 36)},
    InPieces: {"input_values": (2, 2100)},
    Sized: {"pixel_values": (2, 3, 48, 40)},
    High: {"pixel_values": (2, 3, 96, 96)},
    TooSmall: {"pixel_values": (2, 3, 1024, 1024)},
    Counted: {"pixel_values": (2, 3, 128, 128)},
    Codebooks: {"input_ids": (2, 8, 3)},
    FewWords: {"input_ids": (2, 8)},
    Masked: {"input_features": None, "input_features_mask": None},
    Resampler: {"context": (2, 8, 16), "attention_mask": (2, 8)},
    Reduced: {"input_ids": (2, 8), "patch_ids": (2, 8), "num_patches": None},
    FromStates: {"input_ids": (2, 8), "inputs_embeds": (2, 8, 16)},
    NoIds: {"inputs_embeds": (2, 8, 16)},
    CacheOfNothing: {"input_ids": (2, 8), "use_cache": None},
    Attended: {"input_ids": (2, 8), "attention_mask": (2, 8)},
}


@pytest.mark.parametrize("kind", LEARNT, ids=lambda kind: kind.__name__)
def test_an_error_is_learnt_from(kind: type[Model]) -> None:
    """In a few tries, with these arguments of these shapes."""
    model = kind()
    arguments = Arguments(model)
    found, errors = search(model, arguments.starts(), arguments)
    assert found is not None and tuple(found) == tuple(LEARNT[kind]), errors
    assert 0 < len(errors) <= 5 or kind is Resampler, errors
    for name, shape in LEARNT[kind].items():
        assert shape is None or tuple(found[name].shape) == shape
    model(**found)


def test_what_a_model_writes_into_its_arguments_is_not_handed_on() -> None:
    class Writing(Model):
        def forward(self, input_ids: Tensor) -> Any:
            return self.embed(input_ids.clone()), input_ids.zero_()

    arguments = Arguments(model := Writing())
    found, _ = search(model, [Call(("input_ids",))], arguments)
    assert found is not None and bool(found["input_ids"].any())


def test_a_search_ends() -> None:
    """After some tries for each call to begin with, or some seconds for all of them."""

    class Never(Model):
        runs = 0

        def forward(self, input_ids: Any = None, bbox: Any = None, xpath_tags: Any = None, langs: Any = None) -> Any:
            type(self).runs += 1
            raise RuntimeError("bbox xpath_tags langs")

    arguments = Arguments(model := Never())
    assert search(model, [Call(("input_ids",))] * 2, arguments, trials=3)[0] is None and Never.runs == 6
    assert search(model, [Call(("input_ids",))] * 2, arguments, seconds=0.0)[0] is None and Never.runs == 8


def test_a_model_without_a_forward_says_so() -> None:
    """And names a part that has one."""

    class Runner(Model):
        forward = nn.Module.forward

    with pytest.raises(ExampleInputsError, match=r"Runner has no forward.*mhcify\(model\.embed\)"):
        example_call(Runner(), None)

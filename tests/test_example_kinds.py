"""Kinds of arguments that a name, an annotation or an error tells of, each on a model that takes nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.capture.examples.arguments import Arguments
from mhc_rewrite.capture.examples.images import of_images
from mhc_rewrite.capture.examples.search import search
from mhc_rewrite.errors import ExampleInputsError
from test_example_lessons import Sound
from test_examples import Model, config


class Seen(Model):
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image",)


class Padded(Seen):
    """Patches of each picture, padded, with the grid of each: the table of positions ends where the grid does."""

    def __init__(self) -> None:
        super().__init__(vision_config=config(patch_size=4, num_channels=3, num_patches=16))
        self.patch = nn.Linear(48, 16)

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Any = None, spatial_shapes: Any = None) -> Any:
        x = self.patch(pixel_values)
        if bool((spatial_shapes.prod(-1) != x.shape[1]).any()):
            raise ValueError("positions exceed the length")
        return x * pixel_attention_mask.unsqueeze(-1)


class Pooled(Seen):
    """Patches with their places, pooled by threes: a side of the grid is a multiple of three."""

    def __init__(self) -> None:
        super().__init__(patch_size=4, pooling_kernel_size=3)
        self.patch = nn.Linear(48, 16)

    def forward(self, pixel_values: Tensor, pixel_position_ids: Tensor) -> Any:
        side = int(pixel_position_ids.max()) + 1
        x = self.patch(pixel_values).unflatten(1, (side, side)).permute(0, 3, 1, 2)
        if side % 3:
            raise ValueError(f"Cannot pool {tuple(x.shape)} by 3")
        return F.avg_pool2d(x, 3)


class Merged(Seen):
    def __init__(self) -> None:
        super().__init__(patch_size=4, spatial_merge_size=2)
        self.patch = nn.Linear(48, 16)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, merge_sizes: Tensor) -> Any:
        lengths = (grid_thw.prod(-1) // merge_sizes**2).tolist()
        return self.patch(pixel_values).unflatten(0, (sum(lengths), -1)).mean(1).split(lengths)


class Boxes(Seen):
    """A picture is cut into boxes over time, whose channels are the last axis."""

    def __init__(self) -> None:
        super().__init__(patch_size=4, temporal_patch_size=2, num_channels=3)
        self.patch = nn.Linear(96, 16)

    def forward(self, pixel_values: Tensor) -> Any:
        count, frames, height, width, channels = pixel_values.shape
        return self.patch(pixel_values.reshape(count, frames * height * width * channels // 96, 96))


class Packed(Sound):
    """All sounds one after the other, bins first."""

    def __init__(self) -> None:
        super().__init__(num_mel_bins=20)

    def forward(self, input_features: Tensor, feature_lens: Any = None) -> Any:
        return input_features.mT.split((feature_lens / 1).long().tolist(), dim=0)


class Waves(Sound):
    """Calls its input `inputs`, and says that it hears."""

    main_input_name = "inputs"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 16, 10, 5)

    def forward(self, inputs: Tensor) -> Any:
        return self.conv(inputs[:, None])


class Levels(Seen):
    """Maps of several sizes in a list, and as many states as the map has places."""

    main_input_name = "queries"

    def forward(self, queries: Tensor, maps: list[Tensor], hidden_states: Tensor) -> Any:
        size = maps[-1].shape
        return torch.stack([hidden_states.transpose(1, 2).reshape(size) for _ in maps]).sum() + queries.sum()


class Long(Sound):
    """Many samples make a frame."""

    main_input_name = "hidden_states"

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(*(nn.Conv1d(1, 1, 8, 8) for _ in range(3)))

    def forward(self, hidden_states: Tensor) -> Any:
        return self.down(hidden_states)


class Which(Model):
    """A number that is looked up in a table."""

    def forward(self, input_ids: Tensor, freq: Tensor) -> Any:
        return self.embed(input_ids) + self.embed(freq)[:, None]


class Several(Model):
    """Compares what it is given, and takes the last with any of the others."""

    def forward(self, input_ids: Any = None, bbox: Any = None, xpath_tags_seq: Any = None) -> Any:
        if sum(x is not None for x in (input_ids, bbox, xpath_tags_seq)) < 2:
            raise ValueError("At least two of input_ids, bbox, or xpath_tags_seq must be provided")
        if xpath_tags_seq is None:
            raise AttributeError("'Output' object has no attribute 'states'")
        return self.embed(input_ids)


class OneAtATime(Model):
    """Forgets that there is a batch."""

    def forward(self, input_ids: Tensor) -> Any:
        return self.embed(input_ids[0]).view(*input_ids.shape, 16)


KINDS: dict[type[Model], dict[str, Any]] = {
    Padded: {"pixel_values": (2, 16, 48), "spatial_shapes": (2, 2), "pixel_attention_mask": (2, 16)},
    Pooled: {"pixel_values": (2, 36, 48), "pixel_position_ids": (2, 36, 2)},
    Merged: {"pixel_values": (32, 48), "grid_thw": (2, 3), "merge_sizes": (2,)},
    Boxes: {"pixel_values": (32, 2, 4, 4, 3)},
    Packed: {"input_features": (20, 128), "feature_lens": (2,)},
    Waves: {"inputs": (2, 2048)},
    Levels: {"queries": None, "maps": None, "hidden_states": (2, 64, 16)},
    Long: {"hidden_states": (2, 1, 2048)},
    Which: {"input_ids": (2, 8), "freq": (2,)},
    Several: {"input_ids": (2, 8), "bbox": (2, 8, 4), "xpath_tags_seq": (2, 8, 8)},
    OneAtATime: {"input_ids": (1, 8)},
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_a_kind_of_model_takes(kind: type[Model]) -> None:
    """In a few tries, with these arguments of these shapes."""
    model = kind()
    arguments = Arguments(model)
    found, errors = search(model, arguments.starts(), arguments)
    assert found is not None and len(errors) <= 4, errors
    assert set(found) == set(KINDS[kind])
    for name, shape in KINDS[kind].items():
        assert shape is None or tuple(found[name].shape) == shape
    model(**found)


def test_a_list_of_maps_is_one() -> None:
    arguments = Arguments(model := Levels())
    found, _ = search(model, arguments.starts(), arguments)
    assert found is not None and [one.dim() for one in found["maps"]] == [4]


class Session:
    pass


class Tracker(Model):
    def forward(self, session: Session, other: Any, input_ids: Any = None) -> Any:
        return session.of(input_ids)  # type: ignore[attr-defined]

    forward.__annotations__["other"] = "dict | None"


def test_what_nobody_can_derive_is_named() -> None:
    with pytest.raises(ExampleInputsError, match=r"Tracker does not say what it takes. It needs session \(Session\), "):
        example_call(Tracker(), None)


class Stem(nn.Module):
    """As timm's models are: its first convolution sees what something without weights has made of the picture."""

    default_cfg = {"input_size": (3, 32, 32)}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 16, 1)

    def forward(self, x: Tensor) -> Any:
        assert x.shape[1] == 3
        return self.conv(F.pixel_unshuffle(x, 2))


def test_a_picture_has_the_channels_that_are_stated() -> None:
    (picture,) = of_images(Stem()) or ()
    assert picture.shape == (2, 3, 32, 32)


def test_a_picture_is_large_where_it_has_to_be() -> None:
    """timm states the size of its weights; most models take another, and some say that they do not."""

    class Free(Stem):
        default_cfg = {"input_size": (3, 640, 640)}

    class Fixed(Free):
        def forward(self, x: Tensor) -> Any:
            assert x.shape[-1] == 640
            return super().forward(x)

    class Built(Fixed):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.ModuleDict({"embed": nn.Identity()})
            self.trunk["embed"].img_size = (48, 48)

        def forward(self, x: Tensor) -> Any:
            return Stem.forward(self, x)

    for kind, side in ((Free, 320), (Fixed, 640), (Built, 48)):
        (picture,) = of_images(kind()) or ()
        assert picture.shape == (2, 3, side, side)

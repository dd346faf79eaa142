"""Pictures and clips, whole or in patches, and what goes with them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.capture.examples.base import BATCH, FRAMES, GRID, LENGTH, Base, noise
from mhc_rewrite.capture.examples.calls import Call

_PICTURE_SIZES = ("image_size", "img_size", "input_size")


class Pictures(Base):
    """Arguments about what is seen."""

    def _sizes(self, name: str, call: Call) -> list[tuple[int, int]]:
        """Sizes of pictures: those that the config states, and small ones, first where nothing depends on the size."""
        stated: list[tuple[int, int]] = []
        sizes = self.parts.every("image", *_PICTURE_SIZES)
        if prefix := name.removesuffix("pixel_values"):  # high_res_pixel_values: of high_res_vision_config
            own = [getattr(part, "image_size", None) for named, part in self.parts.named if named.startswith(prefix)]
            sizes = [*own, *sizes]
        for size in sizes:
            if isinstance(size, dict):
                size = (size.get("height", 32), size.get("width", 32))
            if isinstance(size, int) and size > 0:
                size = (size, size)
            if isinstance(size, (list, tuple)) and len(size) == 2:
                stated.append((int(size[0]), int(size[1])))
        small = (max(64, 4 * self._patch()),) * 2
        alone = "input_ids" not in call.names and bool(stated) and stated[0][0] >= 2 * small[0]
        return list(dict.fromkeys([small, *stated] if alone else [*stated[:1], small, *stated[1:], (224, 224)]))[:3]

    def _patch(self) -> int:
        patch = self.parts.look("image", "patch_size", "patch_sizes", "spatial_patch_size", default=16)
        while isinstance(patch, (list, tuple)) and patch:
            patch = patch[-1]
        return patch if isinstance(patch, int) and patch > 0 else 16

    def _channels(self) -> int:
        return self.parts.number("image", "num_channels", "in_channels", "in_chans", "image_num_channels", default=3)

    def _merge(self) -> int:
        return self.parts.number(
            "image", "spatial_merge_size", "merge_size", "merge_kernel_size", "pooling_kernel_size", default=2
        )

    def _grid(self) -> tuple[int, int]:
        merge = self._merge()
        side = merge * max(2, GRID // merge)
        return side, side

    def patches(self, frames: int = 1) -> Tensor:
        """Patches as processors of grid models give them out: one row a patch, all images together."""
        temporal = self.parts.number("image", "temporal_patch_size", default=1)
        height, width = self._grid()
        return noise(BATCH * frames * height * width, self._channels() * temporal * self._patch() ** 2)

    def images(self, name: str, call: Call) -> list[Any]:
        channels, sizes, patch = self._channels(), self._sizes(name, call), self._patch()
        flat = [noise(BATCH, channels, *size) for size in sizes]
        height, width = self._grid()
        rows, merge = channels * patch**2, self._merge()
        as_patches = [
            self.patches(),
            noise(BATCH * height * width, channels, patch, patch),
            noise(1, BATCH * height * width, channels, patch, patch),
            noise(1, BATCH * height * width, rows),
            noise(BATCH * height * width, merge * patch, merge * patch, channels),
        ]
        padded = [noise(BATCH, height * width, rows)]
        several = [noise(BATCH, 1, channels, *size) for size in sizes]
        tiles = self.parts.number("image", "max_num_tiles", default=1)
        tiled = [noise(BATCH, 1, tiles, channels, *size) for size in sizes]
        clips = self.videos(name, call)
        if any(re.search(r"pixel_position_ids|image_position_ids", n) for n in call.names):
            return [*padded, *as_patches, *flat]
        if any("grid" in n for n in call.names):
            return [*as_patches, *padded, *flat]
        if "target_sizes" in call.names:  # the patches of all pictures side by side
            return [noise(1, channels, patch, BATCH * height * width * patch), *as_patches, *flat]
        if any(re.search(r"spatial_shapes|pixel_attention_mask", n) for n in call.names):
            return [*padded, *as_patches, *several, *flat]
        if any("aspect_ratio" in n for n in self.known):
            return [*tiled, *flat, *several]
        if self.parts.look("image", "num_frames") and not self.parts.look("image", "image_size_videos"):
            frames = self.parts.number("video", "num_frames", default=FRAMES)
            return [*clips, *(noise(BATCH * frames, channels, *size) for size in sizes), *flat, *several]
        boxes: list[Any] = []
        if not self.parts.look("image", *_PICTURE_SIZES) and hasattr(self.parts.config, "temporal_patch_size"):
            boxes = [noise(BATCH * height * width, self.parts.config.temporal_patch_size, patch, patch, channels)]
        return [*flat, *boxes, *several, *tiled, *as_patches, *padded, *clips[:1]]

    def videos(self, name: str, call: Call) -> list[Any]:
        channels, sizes = self._channels(), self._sizes(name, call)
        frames = self.parts.number("video", "num_frames", "frames_per_clip", default=FRAMES)
        grids = [self.patches()] if any("grid" in n for n in call.names) else []
        return [
            *grids,
            *(noise(BATCH, frames, channels, *size) for size in sizes),
            *(noise(BATCH, channels, frames, *size) for size in sizes),
        ]

    def grid(self, name: str, call: Call) -> list[Any]:
        height, width = self._grid()
        row = [height, width] if name.endswith("hw") and not name.endswith("thw") else [1, height, width]
        return [torch.tensor([row] * BATCH)]

    def image_sizes(self, name: str, call: Call) -> list[Any]:
        grid = [torch.tensor([self._grid()] * BATCH)]
        if "spatial" in name or "target" in name:
            return grid
        return [torch.tensor([size] * BATCH) for size in self._sizes(name, call)]

    def pixel_mask(self, name: str, call: Call) -> list[Any]:
        height, width = self._grid()
        if any(name == other + "_mask" for other in call.names):
            return self.frame_mask(name, call)
        masks = [torch.ones(BATCH, *size, dtype=torch.long) for size in self._sizes(name, call)]
        several = [torch.ones(BATCH, 1, *size, dtype=torch.bool) for size in self._sizes(name, call)]
        tiles = torch.ones(BATCH, 1, dtype=torch.bool)
        of_patches = torch.ones(BATCH, height * width, dtype=torch.long)
        if "spatial_shapes" in call.names:
            return [of_patches, *masks]
        return [*masks, of_patches, *several, tiles]

    def patch_positions(self, name: str, call: Call) -> list[Any]:
        height, width = self._grid()
        each = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        return [each.expand(BATCH, -1, -1).contiguous(), each.repeat(BATCH, 1)]

    def flattened_patches(self, name: str, call: Call) -> list[Any]:
        rows = self.parts.number("image", "patch_embed_hidden_size", default=self._channels() * self._patch() ** 2 + 2)
        numbers = torch.arange(1, LENGTH + 1).float().view(1, -1, 1).expand(BATCH, -1, 2)
        return [
            torch.cat([numbers, noise(BATCH, LENGTH, width)], -1)
            for width in (self._channels() * self._patch() ** 2, rows, rows - 2)
        ]

    def aspect_ratios(self, name: str, call: Call) -> list[Any]:
        tiles = self.parts.number("image", "max_num_tiles", default=1)
        if "mask" in name:
            return [torch.ones(BATCH, 1, tiles, dtype=torch.long)]
        return [torch.ones(BATCH, 1, dtype=torch.long)]

    def visual_features(self, name: str, call: Call) -> list[Any]:
        if name.endswith(("pos", "boxes")):
            return [noise(BATCH, 4, self.parts.number("image", "visual_pos_dim", default=4)).sigmoid()]
        width = self.parts.number("image", "visual_feat_dim", "visual_embedding_dim", default=16)
        return [noise(BATCH, 4, width)]

    def points(self, name: str, call: Call) -> list[Any]:
        return [torch.full((BATCH, 1, 1, 2), 8.0)] if name.endswith("points") else [torch.ones(BATCH, 1, 1).long()]

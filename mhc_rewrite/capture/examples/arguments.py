"""What the arguments of transformers models may look like, by their names and the model's config.

The names are those that transformers' processors give out: `pixel_values`, `image_grid_thw`, `input_features`,
`past_values`, `bbox`, ... A rule is for a name, never for a model.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.examples.parts import Parts
from mhc_rewrite.capture.examples.search import Call, chosen, random_generator

BATCH, LENGTH = 2, 8
FRAMES, GRID, SAMPLES = 2, 4, 2048


_INSTEAD = re.compile(r"embeds$|embeddings$|outputs$|cache|past_key_values|labels?$(?<!input_labels)")


class Arguments:
    """Candidates for the arguments of a model's forward."""

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        # What could be given instead of the inputs themselves is left out.
        self.known = [p.name for p in plain if p.default is p.empty or not _INSTEAD.search(p.name)]
        self.required = [p.name for p in plain if p.default is p.empty]
        self.parts = Parts(model.config)
        tensor = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.device = tensor.device if tensor is not None else torch.device("cpu")
        self.dtype = tensor.dtype if tensor is not None else torch.float32
        self.model = model

    def starts(self) -> list[Call]:
        """Calls to begin with: with all kinds of input that the model takes, then with its main one alone."""
        model, known = self.model, self.known
        main = model.main_input_name
        names = [name for name in ([main] if isinstance(main, str) else main) if name in known]
        modalities = getattr(model, "input_modalities", ())
        modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities or ())
        if not names and "input_ids" in known:
            names = ["input_ids"]
        names += [name for name in self.required if name not in names]
        if "decoder_input_ids" in known and (self.parts.config.is_encoder_decoder or not names):
            names.append("decoder_input_ids")
        base = tuple(dict.fromkeys(names))
        further = {
            "image": r"^(image_)?pixel_values(_images)?$|^image_grid_\w+$|^flattened_patches$",
            "audio": r"^(input_features|input_values|input_audio_features|audio_values|audio_input_features)$",
            "text": r"^input_ids$",
            "time": r"^(past_values|past_time_features|past_observed_mask)$",
            "video": r"^pixel_values_videos$|^video_grid_\w+$",
        }
        more = [
            name
            for name in known
            for kind in modalities
            if kind in further and re.search(further[kind], name) and (kind != "video" or not has_image(known))
        ]
        rich = tuple(dict.fromkeys((*base, *more)))
        starts = [Call(rich), Call(base)] if rich != base else [Call(base)]
        if "input_ids" in rich and "input_ids" not in base:
            starts.append(Call(("input_ids",)))
        return [call for call in starts if call.names] or [Call(tuple(known[:1]))]

    def candidates(self, name: str, call: Call) -> list[Any]:
        """What `name` may be, likeliest first."""
        for pattern, rule in _RULES:
            if re.search(pattern, name):
                return [self._cast(value) for value in rule(self, name, call)]
        return []

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.device, self.dtype) if value.is_floating_point() else value.to(self.device)
        if isinstance(value, (list, tuple)):
            return type(value)(self._cast(item) for item in value)
        return value

    # -- text --------------------------------------------------------------------------------------------------------

    def tokens(self, name: str, call: Call) -> list[Any]:
        kind = "text"
        # The parts may have vocabularies of their own.
        vocabulary = min(self.parts.all("vocab_size") or [self.parts.number(kind, "num_tokens", default=8)])
        codebooks = self.parts.number("text", "num_codebooks", "n_codebooks", "audio_channels", default=0)
        if "decoder" in name:
            length = LENGTH // 2
        else:
            length = LENGTH + max((-(-count // BATCH) for count in call.placeholders.values()), default=0)
        special = set(self.parts.matching(r"token_(id|index|idx)$|_tok_id$").values())
        usual = [i for i in range(min(3, vocabulary - 1), vocabulary) if i not in special] or [0]
        picked = torch.randint(len(usual), (BATCH, length), generator=random_generator())
        ids = torch.tensor(usual)[picked]
        if "decoder" not in name:
            at = 1
            for modality, count in call.placeholders.items():
                each = count // BATCH
                ids[:, at : at + each] = self._placeholder(modality)
                at += each
        found = [ids]
        eos = self.parts.look(kind, "eos_token_id")
        if isinstance(eos, int) and "decoder" not in name and 0 <= eos < vocabulary:
            with_end = ids.clone()
            with_end[:, -1] = eos
            found.append(with_end)
        if codebooks:
            found.append(ids.unsqueeze(-1).repeat(1, 1, codebooks) % 7)
            found.append(ids.unsqueeze(1).repeat(1, codebooks, 1) % 7)
        window = self.parts.number("text", "local_attn_chunk_length", "block_size", "attention_window", default=0)
        if longest := math.lcm(window or 1, self.parts.number("text", "lsh_attn_chunk_length", default=1)):
            if 1 < longest <= 1024:
                found.append(ids.repeat(1, -(-longest // length) + 1)[:, :longest])
        return found

    def _placeholder(self, modality: str) -> int:
        ids = self.parts.matching(rf"^{modality}_(token|tok|pad_token|latent_token|patch)_?(id|index|idx)$")
        other = self.parts.matching(r"^(image|media|img_context|audio|video)_token_(id|index)$")
        return next(iter([*ids.values(), *other.values()]), 0)

    def small_ids(self, name: str, call: Call) -> list[Any]:
        return [torch.zeros(BATCH, self._length(call), dtype=torch.long)]

    def _length(self, call: Call) -> int:
        if "input_ids" in call.names:
            return int(chosen(self, "input_ids", call).shape[1])
        return LENGTH

    def text_mask(self, name: str, call: Call) -> list[Any]:
        return [torch.ones(BATCH, self._length(call), dtype=torch.long)]

    def positions(self, name: str, call: Call) -> list[Any]:
        return [torch.arange(self._length(call)).expand(BATCH, -1).contiguous()]

    def boxes(self, name: str, call: Call) -> list[Any]:
        box = torch.tensor([0, 0, 8, 8])
        return [box.expand(BATCH, self._length(call), 4).contiguous()]

    def subscripts(self, name: str, call: Call) -> list[Any]:
        depth = self.parts.number("text", "max_depth", default=8)
        return [torch.zeros(BATCH, self._length(call), depth, dtype=torch.long)]

    def languages(self, name: str, call: Call) -> list[Any]:
        return [torch.zeros(BATCH, dtype=torch.long), torch.zeros(BATCH, self._length(call), dtype=torch.long)]

    def modality_types(self, name: str, call: Call) -> list[Any]:
        ids = self.candidates("input_ids", call)[0] if "input_ids" in self.known else torch.zeros(BATCH, LENGTH)
        types = torch.zeros(ids.shape[:2], dtype=torch.long)
        for number, modality in enumerate(("image", "video", "audio"), 1):
            if modality in call.placeholders:
                types[ids.cpu() == self._placeholder(modality)] = number
        return [types]

    def image_attention(self, name: str, call: Call) -> list[Any]:
        return [torch.ones(BATCH, self._length(call), 1, dtype=torch.long)]

    # -- images ------------------------------------------------------------------------------------------------------

    def _sizes(self, name: str = "") -> list[tuple[int, int]]:
        size = self.parts.look("image", "image_size", "img_size", "input_size")
        if prefix := name.removesuffix("pixel_values"):  # high_res_pixel_values: of high_res_vision_config
            own = (getattr(part, "image_size", None) for named, part in self.parts.named if named.startswith(prefix))
            size = next((one for one in own if one is not None), size)
        patch = self._patch()
        if isinstance(size, dict):
            size = (size.get("height", 32), size.get("width", 32))
        if isinstance(size, int) and size > 0:
            size = (size, size)
        usual = (max(64, 4 * patch),) * 2
        stated = [(int(size[0]), int(size[1]))] if isinstance(size, (list, tuple)) and len(size) == 2 else []
        return list(dict.fromkeys([*stated, usual, (224, 224)]))

    def _patch(self) -> int:
        patch = self.parts.look("image", "patch_size", "patch_sizes", "spatial_patch_size", default=16)
        while isinstance(patch, (list, tuple)) and patch:
            patch = patch[-1]
        return patch if isinstance(patch, int) and patch > 0 else 16

    def _channels(self) -> int:
        return self.parts.number("image", "num_channels", "in_channels", "in_chans", "image_num_channels", default=3)

    def _merge(self) -> int:
        return self.parts.number("image", "spatial_merge_size", "merge_size", "merge_kernel_size", default=2)

    def _grid(self) -> tuple[int, int]:
        merge = self._merge()
        side = merge * max(2, GRID // merge)
        return side, side

    def patches(self, frames: int = 1) -> Tensor:
        """Patches as processors of grid models give them out: one row a patch, all images together."""
        temporal = self.parts.number("image", "temporal_patch_size", default=1)
        height, width = self._grid()
        return _noise(BATCH * frames * height * width, self._channels() * temporal * self._patch() ** 2)

    def images(self, name: str, call: Call) -> list[Any]:
        channels, sizes, patch = self._channels(), self._sizes(name), self._patch()
        flat = [_noise(BATCH, channels, *size) for size in sizes]
        height, width = self._grid()
        rows = channels * patch**2
        as_patches = [
            self.patches(),
            _noise(BATCH * height * width, channels, patch, patch),
            _noise(1, BATCH * height * width, channels, patch, patch),
            _noise(1, BATCH * height * width, rows),
        ]
        padded = [_noise(BATCH, height * width, rows)]
        several = [_noise(BATCH, 1, channels, *size) for size in sizes]
        tiles = self.parts.number("image", "max_num_tiles", default=1)
        tiled = [_noise(BATCH, 1, tiles, channels, *size) for size in sizes]
        clips = self.videos(name, call)
        if any(re.search(r"grid|pixel_position_ids|image_position_ids", n) for n in call.names):
            return [*as_patches, *padded, *flat]
        if any(re.search(r"spatial_shapes|pixel_attention_mask", n) for n in call.names):
            return [*padded, *as_patches, *several, *flat]
        if any("aspect_ratio" in n for n in self.known):
            return [*tiled, *flat, *several]
        if self.parts.look("image", "num_frames") and not self.parts.look("image", "image_size_videos"):
            return [*clips, *flat, *several]
        return [*flat, *several, *tiled, *as_patches, *padded, *clips[:1]]

    def videos(self, name: str, call: Call) -> list[Any]:
        channels, sizes = self._channels(), self._sizes()
        frames = self.parts.number("video", "num_frames", "frames_per_clip", default=FRAMES)
        grids = [self.patches()] if any("grid" in n for n in call.names) else []
        return [
            *grids,
            *(_noise(BATCH, frames, channels, *size) for size in sizes),
            *(_noise(BATCH, channels, frames, *size) for size in sizes),
        ]

    def grid(self, name: str, call: Call) -> list[Any]:
        height, width = self._grid()
        row = [height, width] if name.endswith("hw") and not name.endswith("thw") else [1, height, width]
        return [torch.tensor([row] * BATCH)]

    def image_sizes(self, name: str, call: Call) -> list[Any]:
        if "spatial" in name:
            return [torch.tensor([self._grid()] * BATCH)]
        return [torch.tensor([size] * BATCH) for size in self._sizes()]

    def pixel_mask(self, name: str, call: Call) -> list[Any]:
        height, width = self._grid()
        if any(name == other + "_mask" for other in call.names):
            return self.sound_mask(name, call)
        masks = [torch.ones(BATCH, *size, dtype=torch.long) for size in self._sizes()]
        several = [torch.ones(BATCH, 1, *size, dtype=torch.bool) for size in self._sizes()]
        tiles = torch.ones(BATCH, 1, dtype=torch.bool)
        return [*masks, torch.ones(BATCH, height * width, dtype=torch.long), *several, tiles]

    def patch_positions(self, name: str, call: Call) -> list[Any]:
        height, width = self._grid()
        each = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
        return [each.expand(BATCH, -1, -1).contiguous(), each.repeat(BATCH, 1)]

    def flattened_patches(self, name: str, call: Call) -> list[Any]:
        rows = self.parts.number("image", "patch_embed_hidden_size", default=self._channels() * self._patch() ** 2 + 2)
        numbers = torch.arange(1, LENGTH + 1).float().view(1, -1, 1).expand(BATCH, -1, 2)
        return [
            torch.cat([numbers, _noise(BATCH, LENGTH, width)], -1)
            for width in (self._channels() * self._patch() ** 2, rows, rows - 2)
        ]

    def aspect_ratios(self, name: str, call: Call) -> list[Any]:
        tiles = self.parts.number("image", "max_num_tiles", default=1)
        if "mask" in name:
            return [torch.ones(BATCH, 1, tiles, dtype=torch.long)]
        return [torch.ones(BATCH, 1, dtype=torch.long)]

    def visual_features(self, name: str, call: Call) -> list[Any]:
        if name.endswith(("pos", "boxes")):
            return [_noise(BATCH, 4, self.parts.number("image", "visual_pos_dim", default=4)).sigmoid()]
        width = self.parts.number("image", "visual_feat_dim", "visual_embedding_dim", default=16)
        return [_noise(BATCH, 4, width)]

    def points(self, name: str, call: Call) -> list[Any]:
        return [torch.full((BATCH, 1, 1, 2), 8.0)] if name.endswith("points") else [torch.ones(BATCH, 1, 1).long()]

    # -- sound and time series ---------------------------------------------------------------------------------------

    def features(self, name: str, call: Call) -> list[Any]:
        """Log-mel frames, bins first or last, of the length that the model wants or of any."""
        bins = self.parts.number(
            "audio", "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "feature_dim", "input_dim",
            "num_mel_filters", "input_size", "mel_bins", "input_feat_size", default=80,
        )  # fmt: skip
        positions = self.parts.number("audio", "max_source_positions", default=50)
        lengths = list(dict.fromkeys([2 * positions, 64, 100, 128, 3000]))
        first = [_noise(BATCH, bins, length) for length in lengths]
        last = [_noise(BATCH, length, bins) for length in lengths[1:]]
        if (width := self._first_width("audio|speech|encoder")) not in (None, bins):
            last += [_noise(BATCH, length, width) for length in lengths[1:3]]
        stacked = [_noise(BATCH, 1, length, bins) for length in lengths[1:3]]
        spec = self.parts.number("audio", "spec_size", default=0)
        if spec:
            stacked.insert(0, _noise(BATCH, 1, 4 * spec, bins))
            return [*stacked, *first, *last]
        if self.parts.look("audio", "max_source_positions") and hasattr(self.parts.config, "num_mel_bins"):
            return [*first, *last, *stacked]
        return [*last, *first, *stacked]

    def waveform(self, name: str, call: Call) -> list[Any]:
        bins = self.parts.number("audio", "num_mel_bins", "input_size", "feature_size", default=0)
        length = self.parts.number("audio", "max_length", default=0)
        channels = self.parts.number("audio", "audio_channels", "channels", default=1)
        spectrum = [_noise(BATCH, length or 64, bins), _noise(BATCH, bins, 64)] if bins else []
        sizes = (SAMPLES, 8 * SAMPLES, 16 * SAMPLES)
        waves = [wave for size in sizes for wave in (_noise(BATCH, size), _noise(BATCH, channels, size))]
        if bins and length:
            return [*spectrum, *waves]
        if channels and self.parts.look("audio", "audio_channels"):
            waves = [_noise(BATCH, channels, size) for size in sizes] + waves
        return [*waves, *spectrum, _noise(BATCH, 64, 80), *self.tokens("input_ids", call)]

    def sound_mask(self, name: str, call: Call) -> list[Any]:
        lengths = {
            length
            for other in call.names
            if re.search(r"features$|values$", other)
            if isinstance(value := chosen(self, other, call), Tensor)
            for length in value.shape[1:]
        }
        return [torch.ones(BATCH, length, dtype=torch.long) for length in sorted(lengths, reverse=True)] or (
            self.text_mask(name, call)
        )

    def codes(self, name: str, call: Call) -> list[Any]:
        books = self.parts.number("audio", "num_codebooks", "num_quantizers", "n_codebooks", "n_q", default=4)
        generator = random_generator()
        size = min(8, self.parts.number("audio", "codebook_size", default=8))
        made = torch.randint(size, (BATCH, books, LENGTH), generator=generator)
        return [made, made[:, 0], made[None], made.transpose(1, 2).contiguous()]

    def series(self, name: str, call: Call) -> list[Any]:
        """Values, features and masks of time series, of the context's length and the longest lag."""
        parts = self.parts
        context = parts.number("time", "context_length", "seq_length", default=0) or parts.number(
            "time", "prediction_length", default=32
        )
        lags = parts.look("time", "lags_sequence", default=[]) if hasattr(parts.config, "lags_sequence") else []
        length = context + max(lags, default=0)
        ahead = parts.number("time", "prediction_length", default=context)
        size = parts.number("time", "input_size", "num_input_channels", default=1)
        steps = ahead if name.startswith("future") else length
        if name.endswith("time_features"):
            width = parts.number("time", "num_time_features", default=0)
            return [_noise(BATCH, steps, width)]
        if name.endswith("mask"):
            one = [torch.ones(BATCH, steps), torch.ones(BATCH, steps, size)]
        else:
            one = [_noise(BATCH, steps), _noise(BATCH, steps, size)]
        return one[::-1] if size > 1 or hasattr(parts.config, "num_input_channels") else one

    def static(self, name: str, call: Call) -> list[Any]:
        if "categorical" in name:
            return [torch.zeros(BATCH, self.parts.number("time", "num_static_categorical_features", default=1)).long()]
        return [_noise(BATCH, self.parts.number("time", "num_static_real_features", default=1))]

    # -- whatever is hidden, and the rest ----------------------------------------------------------------------------

    def hidden(self, name: str, call: Call) -> list[Any]:
        """States of a width that the config names: of the whole, then of its parts."""
        widths: list[int] = []
        for field in _WIDTHS:
            for part in (self.parts.config, *(part for _, part in self.parts.named)):
                value = getattr(part, field, None)
                if isinstance(value, int) and value > 0:
                    widths.append(value)
        first = self._first_width()
        widths = list(dict.fromkeys([*([first] if first else []), *widths])) or [16]
        flat = [_noise(BATCH, LENGTH, width) for width in widths[:4]]
        side = 8
        grids = [self.patches()] if any("grid" in other for other in call.names) else []
        return [
            *grids,
            *flat,
            *(_noise(BATCH, width, LENGTH) for width in widths[:2]),
            *(_noise(BATCH, width, side, side) for width in widths[:2]),
            *(_noise(BATCH, side, side, width) for width in widths[:1]),
            *(_noise(BATCH, width) for width in widths[:1]),
            *(_noise(LENGTH * BATCH, width) for width in widths[:1]),
        ]

    def _first_width(self, inside: str = "") -> int | None:
        """What the first layer that has weights takes, of the parts that are named so."""
        for name, module in self.model.named_modules():
            if not re.search(inside, name) and any(re.search(inside, other) for other, _ in self.parts.named):
                continue
            if isinstance(module, nn.Linear):
                return module.in_features
            if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                return module.in_channels
            if isinstance(module, nn.LayerNorm):
                return module.normalized_shape[-1]
        return None

    def decisions(self, name: str, call: Call) -> list[Any]:
        if name == "timesteps":
            return [torch.zeros(BATCH, LENGTH, dtype=torch.long)]
        size = {"states": "state_dim", "state": "max_state_dim", "actions": "act_dim"}.get(name)
        width = self.parts.number("", size, "state_dim", default=4) if size else 1
        return [_noise(BATCH, LENGTH, width), _noise(BATCH, width)]

    def one_number(self, name: str, call: Call) -> list[Any]:
        return [_noise(BATCH).sigmoid(), 1, _noise(1).sigmoid()]

    def frames(self, name: str, call: Call) -> list[Any]:
        return [FRAMES, [1] * BATCH, torch.tensor([1] * BATCH)]

    def lengths(self, name: str, call: Call) -> list[Any]:
        return [torch.full((BATCH,), self._length(call)), [self._length(call)] * BATCH]


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=random_generator())


def has_image(known: list[str]) -> bool:
    """Whether a forward takes images too: then videos are left out."""
    return any(re.search(r"^(image_)?pixel_values(_images)?$", name) for name in known)


_WIDTHS = (
    "hidden_size", "d_model", "dim", "embed_dim", "hidden_dim", "encoder_hidden_size", "latent_dim", "latent_size",
    "codebook_dim", "vae_dim", "d_latents", "backbone_hidden_size", "cross_attention_hidden_size", "projection_dim",
    "in_channels", "input_dim", "model_in_dim",
)  # fmt: skip

_RULES: tuple[tuple[str, Callable[[Arguments, str, Call], list[Any]]], ...] = (
    (r"labels$(?<!input_labels)", lambda *_: []),
    (r"^(past|future)_(values|time_features|observed_mask)$|^observed_mask$|^past_values_padding$", Arguments.series),
    (r"^static_", Arguments.static),
    (r"grid_(thw|hw|tchw)$|^patches_grid$", Arguments.grid),
    (r"mm_token_type_ids$|^image_token_type|_position_mask$|^images?_mask$", Arguments.modality_types),
    (r"^image_attention_mask$", Arguments.image_attention),
    (r"aspect_ratio_(ids|mask)$", Arguments.aspect_ratios),
    (r"(spatial_shapes|image_sizes|target_sizes)$", Arguments.image_sizes),
    (r"(pixel_position_ids|image_position_ids|pixel_position)$", Arguments.patch_positions),
    (r"^num_frames", Arguments.frames),
    (r"(pixel_(attention_)?mask|patch_attention_mask|padding_mask_videos)$", Arguments.pixel_mask),
    (r"^flattened_patches$", Arguments.flattened_patches),
    (r"(pixel_values_videos?|^videos?)$", Arguments.videos),
    (r"(pixel_values\w*|^images?|^inputs|^image_patches|_frames)$", Arguments.images),
    (r"^visual_|_feats$", Arguments.visual_features),
    (r"^input_(points|labels)$", Arguments.points),
    (r"(features|feature)_?(attention_)?mask$|audio_\w*mask$", Arguments.sound_mask),
    (r"(input_features|audio_features|audio_mel|spectrogram|input_audio)$", Arguments.features),
    (r"(input_values|audio_values|waveform|audio)$", Arguments.waveform),
    (r"(audio_codes|codes|codebook_idx|token_index)$", Arguments.codes),
    (r"^xpath_", Arguments.subscripts),
    (r"bbox$|^boxes$|^input_boxes$", Arguments.boxes),
    (r"^(lang_ids|langs|language_ids|speaker_ids?)$", Arguments.languages),
    (r"^lengths$|_lengths$", Arguments.lengths),
    (r"^(states?|actions?|rewards|returns_to_go|timesteps)$", Arguments.decisions),
    (r"^(freq|timestep|temperature|noise_level)$", Arguments.one_number),
    (r"position_ids$", Arguments.positions),
    (r"mask$", Arguments.text_mask),
    (r"(^|_)input_ids$|^tokens$|^tgt_|_input_ids$", Arguments.tokens),
    (r"_ids$", Arguments.small_ids),
    (r"(hidden_states?|embeds|latents?|embeddings?|features?|sample|^input|^x|query)$", Arguments.hidden),
)

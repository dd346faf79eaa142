"""What the arguments of transformers models may look like, by their names and the model's config.

The names are those that transformers' processors give out: `pixel_values`, `image_grid_thw`, `input_features`,
`past_values`, `bbox`, ... A rule is for a name, never for a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.capture.examples.base import BATCH, FRAMES, LENGTH, noise
from mhc_rewrite.capture.examples.calls import Call, chosen, random_generator
from mhc_rewrite.capture.examples.pictures import Pictures
from mhc_rewrite.capture.examples.sounds import Sounds, is_packed


class Arguments(Pictures, Sounds):
    """Candidates for the arguments of a model's forward."""

    def starts(self) -> list[Call]:
        """Calls to begin with: with all kinds of input that the model takes, then with its main one alone."""
        model, known = self.model, self.known
        main = model.main_input_name
        names = [name for name in ([main] if isinstance(main, str) else main) if name in known]
        if not names and "input_ids" in known:
            names = ["input_ids"]
        names += [name for name in self.required if name not in names]
        if "decoder_input_ids" in known and (self.parts.config.is_encoder_decoder or not names):
            names.append("decoder_input_ids")
        base = tuple(dict.fromkeys(names))
        further = {
            "image": r"^(image_)?pixel_values(_images)?$|^image_grid_\w+$|^flattened_patches$|^spatial_shapes$",
            "audio": r"^(input_features|input_values|input_audio_features|audio_values|audio_input_features)$",
            "text": r"^input_ids$",
            "time": r"^(past_values|past_time_features|past_observed_mask)$",
            "video": r"^pixel_values_videos$|^video_grid_\w+$",
        }
        more = [
            name
            for name in known
            for kind in self.modalities
            if kind in further and re.search(further[kind], name) and (kind != "video" or not has_image(known))
        ]
        rich = tuple(dict.fromkeys((*base, *more)))
        starts = [Call(rich), Call(base)] if rich != base else [Call(base)]
        if "input_ids" in rich and "input_ids" not in base:
            starts.append(Call(("input_ids",)))
        return [call for call in starts if call.names] or [Call(tuple(known[:1]))]

    def candidates(self, name: str, call: Call) -> list[Any]:
        """What `name` may be, likeliest first."""
        rule = next((rule for pattern, rule in _RULES if re.search(pattern, name)), Arguments._as_annotated)
        found = [self._cast(value) for value in rule(self, name, call)]
        if re.match(r"(typing\.)?list\[(torch\.)?Tensor\b", self.annotated.get(name, ""), re.IGNORECASE):
            # Maps of several sizes: of one size here, since one is enough.
            return [[value] for value in sorted(found, key=_dimensions, reverse=True)]
        return found

    def _as_annotated(self, name: str, call: Call) -> list[Any]:
        """What has a name that says nothing: by the type that the signature gives it."""
        kind = self.annotated.get(name, "Tensor" if name in self.required else "")
        if re.search(r"Long|Int", kind):
            return self.small_ids(name, call)
        if "BoolTensor" in kind:
            return self.text_mask(name, call)
        if "Tensor" in kind:
            return [*self.hidden(name, call), *self.small_ids(name, call)]
        plain = {"bool": False, "int": 1, "float": 1.0}
        return [value for word, value in plain.items() if re.search(rf"\b{word}\b", kind)][:1]

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
        if not codebooks and not self.parts.look("image", "image_size", "patch_size"):  # channels of sound
            codebooks = self.parts.number("text", "num_channels", default=0)
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
        return [torch.zeros(BATCH, self.length(call), dtype=torch.long)]

    def positions(self, name: str, call: Call) -> list[Any]:
        return [torch.arange(self.length(call)).expand(BATCH, -1).contiguous()]

    def boxes(self, name: str, call: Call) -> list[Any]:
        box = torch.tensor([0, 0, 8, 8])
        return [box.expand(BATCH, self.length(call), 4).contiguous()]

    def subscripts(self, name: str, call: Call) -> list[Any]:
        depth = self.parts.number("text", "max_depth", default=8)
        return [torch.zeros(BATCH, self.length(call), depth, dtype=torch.long)]

    def languages(self, name: str, call: Call) -> list[Any]:
        return [torch.zeros(BATCH, dtype=torch.long), torch.zeros(BATCH, self.length(call), dtype=torch.long)]

    def modality_types(self, name: str, call: Call) -> list[Any]:
        ids = self.candidates("input_ids", call)[0] if "input_ids" in self.known else torch.zeros(BATCH, LENGTH)
        types = torch.zeros(ids.shape[:2], dtype=torch.long)
        for number, modality in enumerate(("image", "video", "audio"), 1):
            if modality in call.placeholders:
                types[ids.cpu() == self._placeholder(modality)] = number
        return [types]

    def image_attention(self, name: str, call: Call) -> list[Any]:
        return [torch.ones(BATCH, self.length(call), 1, dtype=torch.long)]

    # -- whatever is hidden, and the rest ----------------------------------------------------------------------------

    def hidden(self, name: str, call: Call) -> list[Any]:
        """States of a width that the config names: of the whole, then of its parts."""
        widths: list[int] = []
        for field in _WIDTHS:
            for part in (self.parts.config, *(part for _, part in self.parts.named)):
                value = getattr(part, field, None)
                if isinstance(value, int) and value > 0:
                    widths.append(value)
        first = [width] if (width := self.first_width()) else []
        widths = list(dict.fromkeys([*widths[:1], *first, *widths] if name.endswith("embeds") else [*first, *widths]))
        widths = widths or [16]
        flat = [noise(BATCH, LENGTH, width) for width in widths[:4]]
        side = 8
        grids = [self.patches()] if any("grid" in other for other in call.names) else []
        return [
            *grids,
            *flat,
            *(noise(BATCH, width, LENGTH) for width in widths[:2]),
            *(noise(BATCH, width, side, side) for width in widths[:2]),
            *(noise(BATCH, side, side, width) for width in widths[:1]),
            *(noise(BATCH, width) for width in widths[:1]),
            *(noise(LENGTH * BATCH, width) for width in widths[:1]),
        ]

    def decisions(self, name: str, call: Call) -> list[Any]:
        if name == "timesteps":
            return [torch.zeros(BATCH, LENGTH, dtype=torch.long)]
        size = {"states": "state_dim", "state": "max_state_dim", "actions": "act_dim"}.get(name)
        width = self.parts.number("", size, "state_dim", default=4) if size else 1
        return [noise(BATCH, LENGTH, width), noise(BATCH, width)]

    def one_number(self, name: str, call: Call) -> list[Any]:
        numbers = torch.zeros(BATCH, dtype=torch.long)  # of one kind of several
        return [noise(BATCH).sigmoid(), 1, noise(1).sigmoid(), numbers, numbers[:, None]]

    def switched_off(self, name: str, call: Call) -> list[Any]:
        return [False]

    def frames(self, name: str, call: Call) -> list[Any]:
        return [FRAMES, [1] * BATCH, torch.tensor([1] * BATCH)]

    def merges(self, name: str, call: Call) -> list[Any]:
        return [torch.tensor([self._merge()] * BATCH)]

    def whatever(self, name: str, call: Call) -> list[Any]:
        """What a model calls its input and nothing else: of the kind that it says it takes."""
        if "audio" in self.modalities and "image" not in self.modalities:
            return [*self.waveform(name, call), *self.features(name, call)]
        return [*self.images(name, call), *self.tokens("input_ids", call)]

    def lengths(self, name: str, call: Call) -> list[Any]:
        if is_packed(name) and "input_features" in call.names:
            frames = chosen(self, "input_features", call).shape[-1] // BATCH
            return [torch.full((BATCH,), frames)]
        return [torch.full((BATCH,), self.length(call)), [self.length(call)] * BATCH]


def has_image(known: list[str]) -> bool:
    """Whether a forward takes images too: then videos are left out."""
    return any(re.search(r"^(image_)?pixel_values(_images)?$", name) for name in known)


def _dimensions(value: Any) -> int:
    return value.dim() if isinstance(value, Tensor) else 0


_WIDTHS = (
    "hidden_size", "d_model", "dim", "embed_dim", "hidden_dim", "encoder_hidden_size", "latent_dim", "latent_size",
    "codebook_dim", "vae_dim", "d_latents", "backbone_hidden_size", "cross_attention_hidden_size", "projection_dim",
    "in_channels", "input_dim", "model_in_dim",
)  # fmt: skip

_RULES: tuple[tuple[str, Callable[[Arguments, str, Call], list[Any]]], ...] = (
    (r"labels$(?<!input_labels)", lambda *_: []),
    (r"^use_", Arguments.switched_off),
    (r"^(past|future)_(values|time_features|observed_mask)$|^observed_mask$|^past_values_padding$", Arguments.series),
    (r"^static_", Arguments.static),
    (r"grid_(thw|hw|tchw)$|^patches_grid$", Arguments.grid),
    (r"mm_token_type_ids$|^image_token_type|_position_mask$|^images?_mask$", Arguments.modality_types),
    (r"^image_attention_mask$", Arguments.image_attention),
    (r"aspect_ratio_(ids|mask)$", Arguments.aspect_ratios),
    (r"(spatial_shapes|image_sizes|target_sizes)$", Arguments.image_sizes),
    (r"(pixel_position_ids|image_position_ids|pixel_position)$", Arguments.patch_positions),
    (r"^num_frames", Arguments.frames),
    (r"^merge_sizes$", Arguments.merges),
    (r"(pixel_(attention_)?mask|patch_attention_mask|padding_mask_videos)$", Arguments.pixel_mask),
    (r"^flattened_patches$", Arguments.flattened_patches),
    (r"(pixel_values_videos?|^videos?)$", Arguments.videos),
    (r"(pixel_values\w*|^images?|^image_patches|_frames)$", Arguments.images),
    (r"^inputs$", Arguments.whatever),
    (r"^visual_|_feats$", Arguments.visual_features),
    (r"^input_(points|labels)$", Arguments.points),
    (r"(features|feature)_?(attention_)?mask$|audio_\w*mask$", Arguments.frame_mask),
    (r"(input_features|audio_features|audio_mel|spectrogram|input_audio)$", Arguments.features),
    (r"(input_values|audio_values|waveform|audio)$", Arguments.waveform),
    (r"(audio_codes|codes|codebook_idx|token_index)$", Arguments.codes),
    (r"^xpath_", Arguments.subscripts),
    (r"bbox$|^boxes$|^input_boxes$", Arguments.boxes),
    (r"^(lang_ids|langs|language_ids|speaker_ids?)$", Arguments.languages),
    (r"^lengths$|_(lengths|lens)$", Arguments.lengths),
    (r"^(states?|actions?|rewards|returns_to_go|timesteps)$", Arguments.decisions),
    (r"^(freq|timestep|temperature|noise_level)$", Arguments.one_number),
    (r"position_ids$", Arguments.positions),
    (r"mask$", Arguments.text_mask),
    (r"(^|_)input_ids$|^tokens$|^tgt_|_input_ids$", Arguments.tokens),
    (r"_(ids|idx|index|indices|indexes)$", Arguments.small_ids),
    (r"(hidden_states?|embeds|latents?|embeddings?|features?|sample|^input|^x|query)$", Arguments.hidden),
)

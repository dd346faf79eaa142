"""Sound, as mel frames, waveforms or codes, and time series."""

from __future__ import annotations

import re
from typing import Any

import torch

from mhc_rewrite.capture.examples.base import BATCH, LENGTH, SAMPLES, Base, noise
from mhc_rewrite.capture.examples.calls import Call, random_generator


def is_packed(name: str) -> bool:
    """Whether an argument says where one sound ends in features of all of them, one after the other."""
    return re.search(r"^feature_(lens|lengths)$", name) is not None


class Sounds(Base):
    """Arguments about what is heard or counted."""

    def features(self, name: str, call: Call) -> list[Any]:
        """Log-mel frames, bins first or last, of the length that the model wants or of any."""
        bins = self.parts.number(
            "audio", "num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "feature_dim", "input_dim",
            "num_mel_filters", "input_size", "mel_bins", "input_feat_size", default=80,
        )  # fmt: skip
        positions = self.parts.number("audio", "max_source_positions", default=50)
        lengths = list(dict.fromkeys([2 * positions, 64, 100, 128, 3000]))
        first = [noise(BATCH, bins, length) for length in lengths]
        last = [noise(BATCH, length, bins) for length in lengths[1:]]
        if (width := self.first_width("audio|speech|encoder")) not in (None, bins):
            last += [noise(BATCH, length, width) for length in lengths[1:3]]
        stacked = [noise(BATCH, 1, length, bins) for length in lengths[1:3]]
        if any(is_packed(other) for other in call.names):
            return [noise(bins, BATCH * length) for length in (64, 2 * positions)]
        spec = self.parts.number("audio", "spec_size", default=0)
        if spec:
            stacked.insert(0, noise(BATCH, 1, 4 * spec, bins))
            return [*stacked, *first, *last]
        if self.parts.look("audio", "max_source_positions") and hasattr(self.parts.config, "num_mel_bins"):
            return [*first, *last, *stacked]
        return [*last, *first, *stacked]

    def waveform(self, name: str, call: Call) -> list[Any]:
        bins = self.parts.number("audio", "num_mel_bins", "input_size", "feature_size", default=0)
        length = self.parts.number("audio", "max_length", default=0)
        channels = self.parts.number("audio", "audio_channels", "channels", default=1)
        spectrum = [noise(BATCH, length or 64, bins), noise(BATCH, bins, 64)] if bins else []
        sizes = (SAMPLES, 8 * SAMPLES, 16 * SAMPLES)
        waves = [wave for size in sizes for wave in (noise(BATCH, size), noise(BATCH, channels, size))]
        if bins and length:
            return [*spectrum, *waves]
        if channels and self.parts.look("audio", "audio_channels"):
            waves = [noise(BATCH, channels, size) for size in sizes] + waves
        return [*waves, *spectrum, noise(BATCH, 64, 80), *self.candidates("input_ids", call)]

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
            return [noise(BATCH, steps, width)]
        if name.endswith("mask"):
            one = [torch.ones(BATCH, steps), torch.ones(BATCH, steps, size)]
        else:
            one = [noise(BATCH, steps), noise(BATCH, steps, size)]
        return one[::-1] if size > 1 or hasattr(parts.config, "num_input_channels") else one

    def static(self, name: str, call: Call) -> list[Any]:
        if "categorical" in name:
            return [torch.zeros(BATCH, self.parts.number("time", "num_static_categorical_features", default=1)).long()]
        return [noise(BATCH, self.parts.number("time", "num_static_real_features", default=1))]

"""What all kinds of arguments build on: the model's signature, its config, and the lengths that go together."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.examples.calls import BATCH, Call, chosen, random_generator
from mhc_rewrite.capture.examples.parts import Parts

LENGTH = 8
FRAMES, GRID, SAMPLES = 2, 4, 2048

_INSTEAD = re.compile(r"embeds$|embeddings$|outputs$|(?<!use_)cache|past_key_values|labels?$(?<!input_labels)")
_NEVER = re.compile(r"cache|past_key_values|labels?$")


class Base:
    """A model's signature and config."""

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(model.forward).parameters.values()
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if any(p.kind is p.VAR_KEYWORD for p in parameters) and hasattr(model.config, "use_cache"):
            plain.append(inspect.Parameter("use_cache", inspect.Parameter.KEYWORD_ONLY, default=None))
        # What could be given instead of the inputs themselves is left out.
        self.known = [p.name for p in plain if p.default is p.empty or not _INSTEAD.search(p.name)]
        self.instead = [p.name for p in plain if p.name not in self.known and not _NEVER.search(p.name)]
        self.required = [p.name for p in plain if p.default is p.empty]
        self.annotated = {p.name: str(p.annotation) for p in plain if p.annotation is not p.empty}
        modalities = getattr(model, "input_modalities", ())
        self.modalities = (modalities,) if isinstance(modalities, str) else tuple(modalities or ())
        self.parts = Parts(model.config)
        tensor = next((p for p in model.parameters() if p.is_floating_point()), None)
        self.device = tensor.device if tensor is not None else torch.device("cpu")
        self.dtype = tensor.dtype if tensor is not None else torch.float32
        self.model = model

    def candidates(self, name: str, call: Call) -> list[Any]:
        """What `name` may be, likeliest first."""
        raise NotImplementedError

    def unknown(self) -> list[str]:
        """The arguments without a default of which no candidate is known, with the types that they are said to have."""
        names = [name for name in self.required if not self.candidates(name, Call((name,)))]
        types = {name: re.sub(r"^<class '(.*)'>$|(?:\w+\.)+", r"\1", self.annotated.get(name, "")) for name in names}
        return [f"{name} ({types[name].rpartition('.')[2]})" if types[name] else name for name in names]

    def length(self, call: Call) -> int:
        if "input_ids" in call.names:
            return int(chosen(self, "input_ids", call).shape[1])
        return LENGTH

    def text_mask(self, name: str, call: Call) -> list[Any]:
        mask = torch.ones(BATCH, self.length(call), dtype=torch.long)
        return [mask, mask.bool()]

    def frame_mask(self, name: str, call: Call) -> list[Any]:
        """As long as what it is the mask of, whichever of its axes is time."""
        mine = [other for other in call.names if other != name and name.startswith(other)]
        mine = mine or [other for other in call.names if re.search(r"features$|values$", other)]
        shapes = [value.shape for other in mine if isinstance(value := chosen(self, other, call), Tensor)]
        lengths = sorted({length for shape in shapes for length in shape[1:]}, reverse=True)
        masks = [torch.ones(BATCH, length, dtype=torch.long) for length in lengths]
        return [*masks, *(mask.bool() for mask in masks)] or self.text_mask(name, call)

    def first_width(self, inside: str = "") -> int | None:
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


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=random_generator())

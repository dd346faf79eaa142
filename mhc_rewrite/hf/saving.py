"""`save_pretrained` of a converted model."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mhc_rewrite.conversion.converted import find_converted
from mhc_rewrite.conversion.install import is_converted
from mhc_rewrite.hf.config_file import KEY, mark
from mhc_rewrite.lifecycle.saved_plan import SavedPlan, renamed, saved_plan


def register() -> None:
    """Makes `save_pretrained` write what it takes to build a converted model again."""
    stock = PreTrainedModel.save_pretrained

    @functools.wraps(stock)
    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        if not is_converted(self):
            self.config.__dict__.pop(KEY, None)  # of a model that was built without its conversion
            return stock(self, save_directory, *args, **kwargs)
        saved = _conversion_of(self)
        config = self.config

        # In the place of the configuration's own function, so that what is written is there before an upload.
        def save_config(folder: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
            config.__dict__.pop("save_pretrained", None)
            config.save_pretrained(folder, *args, **kwargs)
            mark(Path(folder), saved)

        config.__dict__["save_pretrained"] = save_config
        try:
            return stock(self, save_directory, *args, **kwargs)
        finally:
            config.__dict__.pop("save_pretrained", None)

    PreTrainedModel.save_pretrained = save_pretrained  # type: ignore[method-assign]


def _conversion_of(model: PreTrainedModel) -> SavedPlan:
    """The conversion of a model, or of a part of it, by the names that modules have in the model."""
    where, _, _ = find_converted(model)
    saved = saved_plan(model)
    if where:
        saved = renamed(saved, lambda name: f"{where}.{name}" if name else where)
    return dataclasses.replace(saved, kind=type(model).__name__)

"""Example inputs: what the user gave, or what the model itself says it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.errors import ExampleInputsError

_BATCH, _LENGTH = 2, 8


def example_call(
    model: nn.Module, given: Mapping[str, Any] | tuple[Any, ...] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for one call of the model: (args, kwargs).

    Raises:
        ExampleInputsError: nothing was given and nothing can be derived, or it is no dict and no tuple.
    """
    if given is None:
        given = _derived(model)
    if given is None:
        raise ExampleInputsError(
            f"{type(model).__name__} does not say what it takes. Pass example inputs for one call, for instance "
            f"mhcify(model, {{'x': torch.randn(2, 16, 64)}}) for forward(x), or a tuple of positional arguments."
        )
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    if isinstance(given, Tensor):
        return (given,), {}
    raise ExampleInputsError(
        f"example_inputs must be a dict of keyword arguments or a tuple of positional ones, not {type(given).__name__}."
    )


def _derived(model: nn.Module) -> Mapping[str, Any] | tuple[Any, ...] | None:
    tensor = next(model.parameters(), None)
    device = tensor.device if tensor is not None else torch.device("cpu")
    dtype = tensor.dtype if tensor is not None else torch.float32
    if hasattr(model, "main_input_name") and hasattr(model, "config"):
        return _of_transformers(model, device, dtype)
    timm_config = getattr(model, "default_cfg", None)
    if isinstance(timm_config, Mapping) and "input_size" in timm_config:
        return (torch.randn(_BATCH, *timm_config["input_size"], device=device, dtype=dtype),)
    return _of_torch(model, device, dtype)


def _of_transformers(model: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any] | None:
    config, main = model.config, model.main_input_name
    text = getattr(config, "text_config", None) or config
    vision = getattr(config, "vision_config", None) or config

    def tokens(length: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        vocabulary = int(getattr(text, "vocab_size", 8))
        ids = torch.randint(min(3, vocabulary - 1), vocabulary, (_BATCH, length), generator=generator)
        return ids.to(device)

    def pixels() -> Tensor:
        size = getattr(vision, "image_size", 32)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return torch.randn(_BATCH, int(getattr(vision, "num_channels", 3)), height, width, device=device, dtype=dtype)

    inputs: dict[str, Any] = {}
    if main == "input_ids":
        inputs["input_ids"] = tokens(_LENGTH)
        if getattr(config, "vision_config", None) is not None:
            inputs["pixel_values"] = pixels()
    elif main == "pixel_values":
        inputs["pixel_values"] = pixels()
        if getattr(config, "text_config", None) is not None:
            inputs["input_ids"] = tokens(_LENGTH)
    elif main == "input_features" and hasattr(config, "num_mel_bins"):
        frames = 2 * int(getattr(config, "max_source_positions", 50))
        inputs["input_features"] = torch.randn(_BATCH, config.num_mel_bins, frames, device=device, dtype=dtype)
    else:
        return None
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens(_LENGTH // 2)
    return inputs


def _of_torch(model: nn.Module, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...] | None:
    stacks = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, nn.TransformerEncoderLayer,
              nn.TransformerDecoderLayer)  # fmt: skip
    if not isinstance(model, stacks):
        return None
    attention = next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    first, second = (_BATCH, _LENGTH) if attention.batch_first else (_LENGTH, _BATCH)
    source = torch.randn(first, second, attention.embed_dim, device=device, dtype=dtype)
    one_input = isinstance(model, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
    return (source,) if one_input else (source, torch.randn_like(source))


def further_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Other ways in which a transformers model is called: without a cache, and with padding.

    Under torch.compile its layers get a mask where eager calls without padding get none, so both have to be known.
    """
    if not (hasattr(model, "main_input_name") and hasattr(model, "config")):
        return []
    accepted = inspect.signature(model.forward).parameters
    changes: list[dict[str, Any]] = []
    tokens = kwargs.get("input_ids")
    if (
        "attention_mask" in accepted
        and isinstance(tokens, Tensor)
        and "attention_mask" not in kwargs
        and tokens.shape[-1] > 1
    ):
        mask = torch.ones_like(tokens)
        mask[0, 0] = 0
        if mask.is_meta:  # whether anything is masked can't be read there; a mask for each query is taken as it is
            mask = mask.bool()[:, None, None].expand(-1, 1, mask.shape[-1], -1)
        changes.append({"attention_mask": mask})
    if "use_cache" in accepted and "use_cache" not in kwargs:
        changes += [{"use_cache": False}, *({**change, "use_cache": False} for change in changes)]
    return [(args, {**kwargs, **change}) for change in changes]

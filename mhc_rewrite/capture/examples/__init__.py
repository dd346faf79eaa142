"""Example inputs: what the user gave, or what the model itself says it takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhc_rewrite.capture.examples.arguments import Arguments
from mhc_rewrite.capture.examples.calls import random_generator
from mhc_rewrite.capture.examples.images import of_images
from mhc_rewrite.capture.examples.search import search
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
        return _derived(model)
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, (tuple, list)):
        return tuple(given), {}
    if isinstance(given, Tensor):
        return (given,), {}
    raise ExampleInputsError(
        f"example_inputs must be a dict of keyword arguments or a tuple of positional ones, not {type(given).__name__}."
    )


def _derived(model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    errors: list[str] = []
    needs = ""
    if getattr(type(model), "forward", None) is nn.Module.forward:
        parts = [name for name, part in model.named_children() if type(part).forward is not nn.Module.forward]
        advice = f" Convert what it runs, for instance mhcify(model.{parts[0]})." if parts else ""
        raise ExampleInputsError(f"{type(model).__name__} has no forward: other methods of it run its parts.{advice}")
    if _of_transformers(model):
        arguments = Arguments(model)
        found, errors = search(model, arguments.starts(), arguments)
        if found is not None:
            return (), found
        if unknown := arguments.unknown():
            needs = f" It needs {', '.join(unknown)}, which its config does not tell how to make."
    elif (images := of_images(model)) is not None or (images := _of_torch(model)) is not None:
        return images, {}
    tried = f" What was tried failed, first with: {errors[0].splitlines()[0][:300]}." if errors else ""
    raise ExampleInputsError(
        f"{type(model).__name__} does not say what it takes.{needs}{tried} Pass example inputs for one call, for "
        "instance mhcify(model, {'x': torch.randn(2, 16, 64)}) for forward(x), or a tuple of positional arguments."
    )


def _of_transformers(model: nn.Module) -> bool:
    return hasattr(model, "main_input_name") and hasattr(model, "config")


def _of_torch(model: nn.Module) -> tuple[Any, ...] | None:
    stacks = (nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer, nn.TransformerEncoderLayer,
              nn.TransformerDecoderLayer)  # fmt: skip
    if not isinstance(model, stacks):
        return None
    attention = next(m for m in model.modules() if isinstance(m, nn.MultiheadAttention))
    weight = next(model.parameters())
    first, second = (_BATCH, _LENGTH) if attention.batch_first else (_LENGTH, _BATCH)
    generator = random_generator()
    source, target = (
        torch.randn(first, second, attention.embed_dim, generator=generator).to(weight.device, weight.dtype)
        for _ in range(2)
    )
    one_input = isinstance(model, (nn.TransformerEncoder, nn.TransformerEncoderLayer))
    return (source,) if one_input else (source, target)


def further_calls(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Other ways in which a transformers model is called: without a cache, and with padding.

    Under torch.compile its layers get a mask where eager calls without padding get none, so both have to be known.
    """
    if not _of_transformers(model):
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

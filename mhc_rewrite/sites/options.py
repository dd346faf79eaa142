"""The options of a site as a tensor that can stand among its weights in a state dict.

Libraries that move state dicts about expect tensors: safetensors refuses anything else. The text of the options is
stored as one number a byte, in fp32: a state dict that was cast to bf16 or fp16, averaged with others or smoothed by a
moving average still holds it, to the nearest whole number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.errors import SitesError

_BLOCK = 256  # one length for nearly all, as loaders compare shapes


def to_tensor(options: Mapping[str, Any], device: torch.device) -> Tensor:
    """Plain options as fp32 numbers, padded with blanks; on the CPU in place of the meta device."""
    text = json.dumps(dict(options), sort_keys=True).encode()
    padded = text.ljust(-len(text) // _BLOCK * -_BLOCK)
    return torch.tensor(list(padded), dtype=torch.float32, device=None if device.type == "meta" else device)


def from_tensor(tensor: Tensor) -> dict[str, Any]:
    """The inverse of `to_tensor`.

    Raises:
        SitesError: the numbers are no options.
    """
    try:
        return dict(json.loads(bytes(tensor.double().round().long().flatten().tolist())))
    except (ValueError, TypeError, RuntimeError) as error:
        raise SitesError(
            "What stands beside a site's weights as its options can't be read: weights of conversions with different "
            "options were mixed, or the file is damaged."
        ) from error

"""What every operator asks of its operands, whoever runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mhc_rewrite.errors import KernelError


def on_one_device(arguments: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which first refuses operands on different devices; `arguments` are those of the operator's schema.

    torch would not: with one operand on the meta device it takes the fake version, and hands out memory that nobody
    has written to.
    """
    names = [argument.split()[1] for argument in arguments.split(", ")]

    def checked(*args: Any) -> Any:
        places = [(name, value.device) for name, value in zip(names, args) if isinstance(value, Tensor)]
        if any(device != places[0][1] for _, device in places):
            where = ", ".join(f"{name} on {device}" for name, device in places)
            raise KernelError(
                f"The operands are on different devices: {where}. Move the model and its inputs to one device; convert "
                "a model before something offloads it, so that its sites are offloaded too."
            )
        return function(*args)

    return checked

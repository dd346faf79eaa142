"""Backward hooks of converted modules: they see the gradient of the trunk, which is the sum over its streams.

Forward hooks need nothing: what they see are states. Gradients come from autograd as plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mhc_rewrite.sites.streams import collapse_gradient, spread_gradient

# By position of an argument or a result: the axes of a trunk there, and its channels.
Places = dict[int, tuple[int, int]]


@dataclass
class OnTheTrunk:
    """A user's hook, called with the trunk's gradients; what it returns goes to the streams in equal parts."""

    hook: Callable[..., Any]

    def __call__(self, module: nn.Module, *gradients: tuple[Tensor | None, ...]) -> Any:
        role = module.__dict__.get("_mhc_role")
        if role is None or role.carrier is None:
            return self.hook(module, *gradients)
        # A hook gets (into, out), or (out) where it comes before; it may replace the first.
        places: list[Places] = [role.carrier.places_in, role.carrier.places_out][-len(gradients) :]
        seen = [_collapsed(given, where) for given, where in zip(gradients, places, strict=True)]
        other = self.hook(module, *seen)
        if other is None:
            return None
        given = other if isinstance(other, tuple) else (other,)
        return tuple(_spread(new, old, places[0].get(i)) for i, (new, old) in enumerate(zip(given, gradients[0])))


def adapt(module: nn.Module) -> None:
    """Puts `OnTheTrunk` around the hooks that a module has."""
    for hooks in (module._backward_hooks, module._backward_pre_hooks):
        for key, hook in hooks.items():
            hooks[key] = hook if isinstance(hook, OnTheTrunk) else OnTheTrunk(hook)


def give_back(module: nn.Module) -> None:
    """Takes it away again."""
    for hooks in (module._backward_hooks, module._backward_pre_hooks):
        for key, hook in hooks.items():
            hooks[key] = hook.hook if isinstance(hook, OnTheTrunk) else hook


def _streams(gradient: Tensor, place: tuple[int, int] | None) -> int:
    """The channels' axis, if this is the gradient of streams; 0 otherwise."""
    return place[1] if place is not None and gradient.dim() == place[0] + 1 else 0


def _collapsed(gradients: tuple[Tensor | None, ...], places: Places) -> tuple[Tensor | None, ...]:
    return tuple(
        collapse_gradient(gradient, dim) if gradient is not None and (dim := _streams(gradient, places.get(i)))
        else gradient
        for i, gradient in enumerate(gradients)
    )  # fmt: skip


def _spread(new: Tensor | None, old: Tensor | None, place: tuple[int, int] | None) -> Tensor | None:
    if new is None or old is None or not (dim := _streams(old, place)):
        return new
    return spread_gradient(new, old, dim)

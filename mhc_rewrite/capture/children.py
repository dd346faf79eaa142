"""What a child does with its tensors while it is called as a leaf: whether it mixes features, and with which axes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mhc_rewrite.capture import vocabulary
from mhc_rewrite.capture.axes import AxisFollower, Followed


class ChildWatch(TorchFunctionMode):
    """Sees the torch calls of a child, or of an opaque function (`child` None).

    Attributes:
        followers: id of a tensor that it was given -> what happens to the axes of that.
        mixes: whether anything that it called mixes.
    """

    def __init__(self, child: nn.Module | None, tensors: list[Tensor]) -> None:
        super().__init__()
        parameters = list(child.parameters()) if child is not None else []
        self.parameters: set[Any] = {id(p) for p in parameters}
        self.followers = {id(t): AxisFollower(t, _id, _shape, self.parameters) for t in tensors}
        self.mixes = False
        self.saw_anything = False
        self.has_matrices = any(p.dim() >= 2 for p in parameters)
        self.kept: list[Any] = list(tensors)

    def facts(self, given_back: bool) -> dict[str, Any]:
        """Node metadata: what torch functions do not show, a C++ extension say, is judged by its parameters."""
        unseen = self.has_matrices and not self.saw_anything and not given_back
        return {"mixes": self.mixes or unseen}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.saw_anything = True
        self.mixes = self.mixes or vocabulary.is_mixing(func)
        self.kept.append(result)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if inputs and all(id(t) in self.parameters for t in inputs):
            self.parameters.update(id(t) for t in tree_leaves(result))
        for follower in self.followers.values():
            follower.step(func, args, kwargs, result)
        return result

    def followed(self, tensor: Tensor, result: Any) -> Followed:
        """What happened to the axes of a tensor on the way to the result, or to each item of it."""
        follower = self.followers[id(tensor)]
        items = {None: result} if isinstance(result, Tensor) else dict(enumerate(_items(result)))
        ends = {i: follower.axes[id(item)] for i, item in items.items() if id(item) in follower.axes}
        return Followed(follower.evidence, ends)


def _id(value: Any) -> int | None:
    return id(value) if isinstance(value, (Tensor, tuple, list)) else None


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _items(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else ()

"""What a child does with its tensors while it is called as a leaf: whether it mixes features, and along which axis."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from mhc_rewrite.capture import vocabulary


class ChildWatch(TorchFunctionMode):
    """Sees the torch calls of a child, or of an opaque function (`child` None).

    Attributes:
        axes: id of a tensor that it was given -> its feature axis, where one showed.
        mixes: whether anything that it called mixes.
    """

    def __init__(self, child: nn.Module | None, tensors: list[Tensor]) -> None:
        super().__init__()
        self.followers = {id(t): vocabulary.AxisFollower(id(t), t.dim()) for t in tensors}
        self.axes: dict[int, int] = {}
        self.mixes = False
        self.saw_anything = False
        self.has_matrices = child is not None and any(p.dim() >= 2 for p in child.parameters())
        self.kept: list[Any] = list(tensors)

    def facts(self) -> dict[str, Any]:
        """Node metadata: what torch functions do not show, a C++ extension say, is judged by its parameters."""
        return {"mixes": self.mixes or (self.has_matrices and not self.saw_anything)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.saw_anything = True
        self.mixes = self.mixes or vocabulary.is_mixing(func)
        self.kept.append(result)
        inputs = [id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        rank = result.dim() if isinstance(result, Tensor) else None
        for key, follower in self.followers.items():
            if key not in self.axes:
                axis = follower.step(func, inputs, args, kwargs, id(result), rank)
                if axis is not None:
                    self.axes[key] = axis
        return result

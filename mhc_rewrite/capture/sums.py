"""Sums that do not look like one, spelled out as plain adds while a model is recorded or captured, and what is laid out
like another tensor, as what reads that one's shape.

    x - y                                torch.add(x, y, alpha=-1)
    torch.addmm(x, a, b)                 torch.add(x, torch.mm(a, b))
    torch.lerp(x, y, w)                  torch.add(x * (1 - w), y * w)
    torch.stack([x, y]).sum(0)           torch.add(x, y)
    x.index_add(0, rows, y)              torch.add(x, torch.zeros_like(x).index_add(0, rows, y))
    torch.add(x, y, out=z)               z.copy_(torch.add(x, y))
    torch.add(x, y).view_as(z)           torch.add(x, y).view(z.shape)
    x + y, where y lacks leading axes    torch.add(x, y.unsqueeze(0)), as long as these are of size 1

So whoever looks for residual adds has to know `add` alone. Only what could be a residual add is spelled out: where the
sum has the shape of the tensor that is added to, and is floating.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.capture import vocabulary

# Parameters of what adds a product of two tensors to a third, and the product.
_PRODUCTS: dict[str, tuple[tuple[str, str], Callable[..., Any]]] = {
    "addmm": (("mat1", "mat2"), lambda a, b: torch.mm(a, b)),
    "addmv": (("mat", "vec"), lambda a, b: torch.mv(a, b)),
    "baddbmm": (("batch1", "batch2"), lambda a, b: torch.bmm(a, b)),
    "addbmm": (("batch1", "batch2"), lambda a, b: torch.bmm(a, b).sum(0)),
    "addcmul": (("tensor1", "tensor2"), lambda a, b: torch.mul(a, b)),
    "addcdiv": (("tensor1", "tensor2"), lambda a, b: torch.div(a, b)),
}
# Parameters of what adds to some places of a tensor.
_PLACES = {
    "index_add": ("dim", "index", "source"),
    "scatter_add": ("dim", "index", "src"),
    "index_put": ("indices", "values", "accumulate"),
}
_NUMPY = {"axis": "dim", "keepdims": "keepdim"}  # numpy's names, which torch takes too
_DIFFERENCES = {"sub": False, "subtract": False, "isub": False, "rsub": True}  # whether the operands are turned round
_SHAPED = {"view_as": "view", "reshape_as": "reshape", "expand_as": "expand"}  # by a tensor of which they read no value
_SUMS = vocabulary.ADD | _DIFFERENCES.keys() | _PRODUCTS.keys() | _PLACES.keys() | {"lerp"}

Plain = Callable[[], Any]


@dataclass
class _Pile:
    """Tensors of one shape that lie in one along `dim`: an axis of their own, or of size 1 each where not `stacked`."""

    whole: Tensor  # kept, so that its id stays its own
    items: Sequence[Any]
    versions: tuple[int, ...]
    dim: int
    stacked: bool


class Sums:
    """What one run needs to know for it.

    Args:
        real: from a structure of what the run hands around to one of tensors.
    """

    def __init__(self, real: Callable[[Any], Any]) -> None:
        self.real = real
        self.piles: dict[int, _Pile] = {}
        self.spelling = False

    def plain(self, target: Any, args: Any, kwargs: Any) -> Plain | None:
        """The call as plain adds, to be called in its place; None for any other call."""
        name = vocabulary.name_of(target)
        in_place = name.endswith("_") or name == "isub"
        bare = name.rstrip("_")
        if self.spelling or not (bare in _SUMS or name in _SHAPED or (bare in ("sum", "mean") and self.piles)):
            return None
        with torch._C.DisableTorchFunction():
            plain = self._plain(target, bare, in_place, args, kwargs)
        return None if plain is None else functools.partial(self._spell, plain)

    def note(self, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Remembers tensors that are put side by side."""
        name = vocabulary.name_of(target)
        if not isinstance(result, Tensor):
            return
        if name in ("stack", "cat", "concat", "concatenate"):
            given = _bound(("tensors", "dim"), args, kwargs)
            items = given["tensors"]
            values = self.real(items)
            if not isinstance(items, (tuple, list)) or len({value.shape for value in values}) != 1 \
                    or not result.is_floating_point():  # fmt: skip
                return
            dim = self.real(given.get("dim", 0)) % result.dim()
            self._remember(result, items, dim, name == "stack")
        elif self.piles and name in ("view", "reshape", "unflatten") and args:
            pile = self._pile(self.real(args[0]))
            if pile is not None and not pile.stacked:
                shape = self.real(pile.items[0]).shape
                if result.shape == (*shape[: pile.dim], len(pile.items), *shape[pile.dim :]):
                    self._remember(result, pile.items, pile.dim, True)

    def _remember(self, whole: Tensor, items: Sequence[Any], dim: int, stacked: bool) -> None:
        self.piles[id(whole)] = _Pile(whole, tuple(items), self._versions(items), dim, stacked)

    def _versions(self, items: Sequence[Any]) -> tuple[int, ...]:
        """How often each was written to: a pile holds what they were when it was made."""
        return tuple(0 if value.is_inference() else value._version for value in self.real(list(items)))

    def _pile(self, whole: Any) -> _Pile | None:
        pile = self.piles.get(id(whole))
        return pile if pile is not None and self._versions([*pile.items]) == pile.versions else None

    def _spell(self, plain: Plain) -> Any:
        with self._once():
            return plain()

    @contextmanager
    def _once(self) -> Iterator[None]:
        self.spelling = True
        try:
            yield
        finally:
            self.spelling = False

    def _plain(self, target: Any, name: str, in_place: bool, args: Any, kwargs: Any) -> Plain | None:
        if name in ("sum", "mean"):
            return self._pile_summed(name, args, kwargs)
        if name in _SHAPED:
            given = _bound(("input", "other"), args, kwargs)
            return lambda: getattr(given["input"], _SHAPED[name])(given["other"].shape)
        x = args[0] if args else kwargs.get("input")
        value = self.real(x)
        out = self.real(kwargs.get("out"))
        if isinstance(out, Tensor):
            if not _alike(value, out) or value.dtype != out.dtype:
                return None
            rest = {key: item for key, item in kwargs.items() if key != "out"}
            inner = self._plain(target, name, False, args, rest) or (lambda: target(*args, **rest))
            return lambda: kwargs["out"].copy_(inner())
        if name in vocabulary.ADD:
            given = _bound(("input", "other"), args, kwargs)
            return _of_one_rank(given, self.real(given), in_place or name == "iadd")
        if name in _DIFFERENCES:
            given = _bound(("input", "other"), args, kwargs)
            return _difference(given, self.real(given), in_place, _DIFFERENCES[name])
        if not isinstance(value, Tensor) or not vocabulary.is_feature(value.dtype):
            return None
        if name in _PRODUCTS:
            (first, second), product = _PRODUCTS[name]
            given = _bound(("input", first, second), args, kwargs)
            beta, alpha = given.get("beta", 1), given.get("alpha", given.get("value", 1))
            a, b = (self.real(given[key]) for key in (first, second))
            if not _is_factor(beta) or not isinstance(alpha, (int, float)):
                return None
            if product(*(torch.empty_like(t, device="meta") for t in (a, b))).shape != value.shape:
                return None
            return lambda: _add(x, product(given[first], given[second]), beta, alpha, in_place)
        if name == "lerp":
            given = _bound(("input", "end", "weight"), args, kwargs)
            end, weight = given["end"], given["weight"]
            if not _alike(value, self.real(end)) or not (
                isinstance(self.real(weight), Tensor) or (_is_factor(weight) and _is_factor(1 - weight))
            ):
                return None
            return lambda: _add(x, end * weight, 1 - weight, 1, in_place)
        if name in _PLACES:
            return self._places(name, x, _bound(("input", *_PLACES[name]), args, kwargs), in_place)
        return None

    @staticmethod
    def _places(name: str, x: Any, given: dict[str, Any], in_place: bool) -> Plain | None:
        if name == "index_put" and not given.get("accumulate", False):
            return None
        more = {key: item for key, item in given.items() if key != "input"}
        return lambda: _add(x, getattr(torch, name)(torch.zeros_like(x), **more), 1, 1, in_place)

    def _pile_summed(self, name: str, args: Any, kwargs: Any) -> Plain | None:
        given = _bound(("input", "dim", "keepdim"), args, {_NUMPY.get(key, key): item for key, item in kwargs.items()})
        whole = self.real(given.get("input"))
        pile = self._pile(whole)
        if pile is None or not given.keys() <= {"input", "dim", "keepdim"}:
            return None
        dim = given.get("dim")
        dims = dim if isinstance(dim, (tuple, list)) else (dim,)
        if len(dims) != 1 or not isinstance(dims[0], int) or dims[0] % whole.dim() != pile.dim:
            return None
        if not pile.stacked and whole.shape[pile.dim] != len(pile.items):
            return None
        keep = given.get("keepdim", False)

        def summed() -> Any:
            total = functools.reduce(torch.add, pile.items)
            if name == "mean":
                total = total / len(pile.items)
            if keep is pile.stacked:
                total = total.unsqueeze(pile.dim) if keep else total.squeeze(pile.dim)
            return total

        return summed


def _bound(names: Sequence[str], args: Any, kwargs: Any) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _is_factor(value: Any) -> bool:
    """Whether a number leaves something of the trunk."""
    return isinstance(value, (int, float)) and value != 0


def _alike(left: Any, right: Any) -> bool:
    """Whether two are floating tensors of one shape."""
    return (isinstance(left, Tensor) and isinstance(right, Tensor) and left.shape == right.shape
            and vocabulary.is_feature(left.dtype) and vocabulary.is_feature(right.dtype))  # fmt: skip


def _of_one_rank(given: dict[str, Any], values: dict[str, Any], in_place: bool) -> Plain | None:
    left, right = values.get("input"), values.get("other")
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or left.dim() == right.dim():
        return None
    longer, shorter = ("input", "other") if left.dim() > right.dim() else ("other", "input")
    missing = values[longer].dim() - values[shorter].dim()
    if not _alike(values[longer][(0,) * missing], values[shorter]) or values[longer].shape[:missing].numel() != 1:
        return None

    def summed() -> Any:
        assert all(given[longer].shape[axis] == 1 for axis in range(missing))  # guards, where it is captured
        same = {**given, shorter: given[shorter][(None,) * missing]}
        return same.pop("input").add_(**same) if in_place else torch.add(**same)

    return summed


def _difference(given: dict[str, Any], values: dict[str, Any], in_place: bool, turned: bool) -> Plain | None:
    alpha = given.get("alpha", 1)
    if len(given) < 2 or not _alike(values.get("input"), values.get("other")) or not isinstance(alpha, (int, float)):
        return None
    left, right = given["input"], given["other"]
    if in_place:
        return lambda: left.add_(right, alpha=-alpha)
    if turned:
        left, right = right, left
    return lambda: torch.add(left, right, alpha=-alpha)


def _add(x: Any, branch: Any, scale: Any, factor: Any, in_place: bool) -> Any:
    """`scale * x + factor * branch`; a factor of 1 is left out."""
    plain = isinstance(scale, (int, float)) and scale == 1
    given = {} if isinstance(factor, (int, float)) and factor == 1 else {"alpha": factor}
    if in_place:
        return (x if plain else x.mul_(scale)).add_(branch, **given)
    return torch.add(x if plain else x * scale, branch, **given)

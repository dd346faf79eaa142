"""Blocks that hand on a trunk and a result which the next block adds to it, as kernels want it that fuse an add with a
norm; and trunks that receive something from each other."""

from __future__ import annotations

from torch import Tensor, nn

from handmade.common import WIDTH, Kind, features
from handmade.found import block
from oracle import Streams


class Pair(nn.Module):
    """Adds the last block's result to the trunk, and returns its own result beside it."""

    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.mixer, self.keyword = block(), keyword

    def forward(self, h: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        residual = h if residual is None else h + residual
        h = self.mixer(residual)
        return {"h": h, "residual": residual} if self.keyword else (h, residual)


class Pairs(nn.Module):
    """The first block's trunk is what it was given: no add of its own."""

    def __init__(self, keyword: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair(keyword) for _ in range(3))
        self.keyword = keyword

    def forward(self, h: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            out = layer(h, residual)
            h, residual = (out["h"], out["residual"]) if self.keyword else out
        assert residual is not None
        return h + residual


def pairs_by_hand(model: Pairs, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for name, layer in zip(("layers.1.mhc_0", "layers.2.mhc_0", "mhc_0"), model.layers, strict=True):
        X = hand.site(name, X, layer.mixer)
    return hand.collapse(X)


class Informed(nn.Module):
    """Two trunks; the second also receives a projection of the first, which is no residual of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.across = block(), block(), nn.Linear(WIDTH, WIDTH)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a = a + self.f(a)
        b = b + self.across(a)
        return a, b + self.g(b)


class InformedStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Informed() for _ in range(3))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            a, b = layer(a, b)
        return a, b


def informed_by_hand(model: InformedStack, hand: Streams, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    A, B = hand.expand(a), hand.expand(b)
    for i, layer in enumerate(model.layers):
        A = hand.site(f"layers.{i}.mhc_0", A, layer.f)
        given = layer.across(hand.collapse(A))
        B = hand.each(lambda b, given=given: b + given, B)
        B = hand.site(f"layers.{i}.mhc_1", B, layer.g)
    return hand.collapse(A), hand.collapse(B)


PAIRED = (("layers.1.mhc_0", "layers.2.mhc_0", "mhc_0"),)
KINDS: tuple[Kind, ...] = (
    Kind("pairs", Pairs, lambda: (features(2, 5, WIDTH),), pairs_by_hand, PAIRED),
    Kind("pairs in a dict", lambda: Pairs(True), lambda: (features(2, 5, WIDTH),), pairs_by_hand, PAIRED),
    Kind(
        "a trunk told of another", InformedStack, lambda: (features(2, 5, WIDTH), features(2, 5, WIDTH)),
        informed_by_hand, tuple(tuple(f"layers.{i}.mhc_{k}" for i in range(3)) for k in range(2)),
    ),
)  # fmt: skip

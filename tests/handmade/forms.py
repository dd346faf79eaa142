"""The ways in which people write a residual add: nested sums, in place, with a factor, with something on the trunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import (
    MLP,
    WIDTH,
    Attention,
    Kind,
    PreNorm,
    Stack,
    features,
    names,
    prenorm_by_hand,
    stack_of,
)
from oracle import Streams

SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "x + a + b": lambda x, a, b: x + a + b,
    "x + (a + b)": lambda x, a, b: x + (a + b),
    "(a + x) + b": lambda x, a, b: (a + x) + b,
    "a + (b + x)": lambda x, a, b: a + (b + x),
    "a + b + x": lambda x, a, b: a + b + x,
    "add, add_": lambda x, a, b: torch.add(x, a).add_(b),
    "x + (a + 0.5 b)": lambda x, a, b: x + torch.add(a, b, alpha=0.5),
}


class Parallel(nn.Module):
    """GPT-J's layer: both blocks read the same norm, one sum, one site."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp, self.form = nn.LayerNorm(WIDTH), Attention(), MLP(), form

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return SUMS[self.form](x, self.attn(normed), self.mlp(normed))


def parallel_by_hand(layer: Parallel, hand: Streams, name: str, X: Tensor) -> Tensor:
    def branch(u: Tensor) -> Tensor:
        normed = layer.norm(u)
        return layer.attn(normed) + layer.mlp(normed) * (0.5 if "0.5" in layer.form else 1)

    return hand.site(f"{name}.mhc_0", X, branch)


class ParallelTwoNorms(Parallel):
    """GPT-NeoX's: a norm for each block, and the sum in two statements."""

    def __init__(self) -> None:
        super().__init__("")
        self.norm2 = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.attn(self.norm(x))
        return y + self.mlp(self.norm2(x))


def two_norms_by_hand(layer: ParallelTwoNorms, hand: Streams, name: str, X: Tensor) -> Tensor:
    return hand.site(f"{name}.mhc_0", X, lambda u: layer.attn(layer.norm(u)) + layer.mlp(layer.norm2(u)))


class InPlace(PreNorm):
    """`x += f(x)`: the layer returns the tensor that it was given."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.norm1(x))
        x.add_(self.mlp(self.norm2(x)))
        return x


class InPlaceAlias(PreNorm):
    """After `x += f(x)` another name of x means the result too."""

    def forward(self, x: Tensor) -> Tensor:
        same = x
        x += self.attn(self.norm1(x))
        out = self.mlp(self.norm2(same))
        same += out
        return x


class InPlaceBranch(PreNorm):
    """`out += x`, as in torchvision: the branch is overwritten, the trunk is not."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.attn(self.norm1(x))
        out += x
        x, out = out, self.mlp(self.norm2(out))
        out.add_(x)
        return out


class Stemmed(nn.Module):
    """What the layers overwrite is not the model's input."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.stack = nn.Linear(WIDTH, WIDTH), Stack([layer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.stem(x))


def stemmed_by_hand(model: Stemmed, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(model.stem(x))
    for number, layer in enumerate(model.stack.layers):
        X = prenorm_by_hand(layer, hand, f"stack.layers.{number}", X)
    return model.stack.norm(hand.collapse(X))


def stemmed(name: str, layer: type[nn.Module]) -> Kind:
    """A kind whose layers overwrite their input."""
    streams = (names("stack.layers.{}", 2, 2),)
    return Kind(name, lambda: Stemmed(layer), lambda: (features(2, 5, WIDTH),), stemmed_by_hand, streams)


class Scaled(PreNorm):
    """A factor on the branch, then a factor on the trunk."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.attn(self.norm1(x)), alpha=0.5)
        return torch.add(self.mlp(self.norm2(x)), x, alpha=2)


def scaled_by_hand(layer: Scaled, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: 0.5 * layer.attn(layer.norm1(u)))
    return hand.site(f"{name}.mhc_1", X, lambda u: layer.mlp(layer.norm2(u)), trunk=lambda x: 2 * x)


class DeepNorm(PreNorm):
    """`norm(c x + f(x))`: the block reads x, the sum takes c x, the norm is on the trunk."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x * 1.7 + self.attn(x))
        return self.norm2(x * 1.7 + self.mlp(x))


class DeepNormStack(nn.Module):
    """DeepNorm layers, nothing after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DeepNorm() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def deepnorm_by_hand(model: DeepNormStack, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    first, last = model.layers
    X = hand.each(first.norm1, hand.site("layers.0.mhc_0", X, first.attn, trunk=lambda x: x * 1.7))
    X = hand.each(first.norm2, hand.site("layers.0.mhc_1", X, first.mlp, trunk=lambda x: x * 1.7))
    X = hand.each(last.norm1, hand.site("layers.1.mhc_0", X, last.attn, trunk=lambda x: x * 1.7))
    return last.norm2(hand.collapse(hand.site("layers.1.mhc_1", X, last.mlp, trunk=lambda x: x * 1.7)))


class Cast(PreNorm):
    """The trunk in a dtype of its own (here the same one: the arithmetic of a real cast is not fp64's)."""

    def forward(self, x: Tensor) -> Tensor:
        trunk = x.to(torch.float64)
        x = trunk + self.attn(self.norm1(x.to(self.norm1.weight.dtype)))
        x = x.double()
        return (x + self.mlp(self.norm2(x))).type_as(trunk)


class TrunkDropout(PreNorm):
    """Dropout after the add: on the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x + self.attn(self.norm1(x)))
        x = F.dropout(x, 0.3, self.training)
        return x + self.mlp(self.norm2(x))


def trunk_dropout_by_hand(layer: TrunkDropout, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.attn(layer.norm1(u)))
    ones = torch.ones_like(hand.collapse(X))
    for mask in (layer.drop(ones), F.dropout(ones, 0.3, layer.training)):
        X = hand.each(lambda x, mask=mask: mask * x, X)
    return hand.site(f"{name}.mhc_1", X, lambda u: layer.mlp(layer.norm2(u)))


class Reshaped(PreNorm):
    """OPT's layer: the tokens in one row from the middle of the layer to its end."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        shape = x.shape
        x = x.reshape(-1, x.size(-1))
        residual = x
        x = self.mlp(self.norm2(x))
        return (residual + x).view(shape)


def reshaped_by_hand(layer: Reshaped, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.attn(layer.norm1(u)))
    batch, length = X.shape[:2]
    X = hand.site(f"{name}.mhc_1", X.flatten(0, 1), lambda u: layer.mlp(layer.norm2(u)))
    return X.unflatten(0, (batch, length))


class NormThenAdd(nn.Module):
    """What the block reads is what the trunk became: the norm is before the fork."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(WIDTH), Attention(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        x = self.norm(x)
        return x + self.mlp(x)


def norm_then_add_by_hand(layer: NormThenAdd, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.each(layer.norm, hand.site(f"{name}.mhc_0", X, layer.attn))
    return hand.site(f"{name}.mhc_1", X, layer.mlp)


class DropPath(nn.Module):
    """Stochastic depth, a mask per sample."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(0.8)
        return x * mask / 0.8


class LayerScale(PreNorm):
    """A learned gain and drop-path on each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain1, self.gain2 = (nn.Parameter(torch.ones(WIDTH)) for _ in range(2))
        self.path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path(self.gain1 * self.attn(self.norm1(x)))
        return x + self.path(self.mlp(self.norm2(x)) * self.gain2)


def layer_scale_by_hand(layer: LayerScale, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.path(layer.gain1 * layer.attn(layer.norm1(u))))
    return hand.site(f"{name}.mhc_1", X, lambda u: layer.path(layer.gain2 * layer.mlp(layer.norm2(u))))


class Container(nn.Module):
    """`for block in self.blocks: x = x + block(x)`: the container holds the adds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), MLP()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Contained(nn.Module):
    """A container inside a model."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.trunk, self.head = nn.Linear(WIDTH, WIDTH), Container(), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(self.stem(x)))


def contained_by_hand(model: Contained, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(model.stem(x))
    for number, block in enumerate(model.trunk.blocks):
        X = hand.site(f"trunk.mhc_{number}", X, block)
    return model.head(hand.collapse(X))


class Flat(nn.Module):
    """One forward that holds everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 7)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.mix, self.last = (nn.Parameter(torch.randn(WIDTH, WIDTH) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        x = torch.tanh(x @ self.mix) + x
        x = x + F.linear(F.silu(F.layer_norm(x, (WIDTH,))), self.last)
        return self.head(x)


def flat_by_hand(model: Flat, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(model.embed(x))
    X = hand.site("mhc_0", X, lambda u: model.down(F.gelu(model.up(model.norm(u)))))
    X = hand.site("mhc_1", X, lambda u: torch.tanh(u @ model.mix))
    X = hand.site("mhc_2", X, lambda u: F.linear(F.silu(F.layer_norm(u, (WIDTH,))), model.last))
    return model.head(hand.collapse(X))


KINDS = (
    *(stack_of(f"parallel, {form}", lambda form=form: Parallel(form), parallel_by_hand, 1, 3) for form in SUMS),
    stack_of("parallel, two norms", ParallelTwoNorms, two_norms_by_hand, 1, 3),
    stemmed("in place", InPlace),
    stemmed("in place, alias", InPlaceAlias),
    stemmed("in place, branch", InPlaceBranch),
    stack_of("alpha", Scaled, scaled_by_hand, 2),
    Kind("DeepNorm", DeepNormStack, lambda: (features(2, 5, WIDTH),), deepnorm_by_hand, (names("layers.{}", 2, 2),)),
    stack_of("cast on the trunk", Cast, prenorm_by_hand, 2),
    stack_of("dropout on the trunk", TrunkDropout, trunk_dropout_by_hand, 2),
    stack_of("reshape on the trunk", Reshaped, reshaped_by_hand, 2),
    stack_of("norm on the trunk", NormThenAdd, norm_then_add_by_hand, 2),
    stack_of("LayerScale, drop-path", LayerScale, layer_scale_by_hand, 2),
    Kind("container", Contained, lambda: (features(2, 5, WIDTH),), contained_by_hand, (names("trunk", 1, 3),)),
    Kind("flat", Flat, lambda: (features(2, 5, 6),), flat_by_hand, (("mhc_0", "mhc_1", "mhc_2"),)),
)

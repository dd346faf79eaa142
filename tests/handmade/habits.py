"""Other habits of model authors: wrappers, tuples, keyword arguments, checkpoints, joint blocks, other conventions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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
    stack_by_hand,
    stack_of,
)
from oracle import Streams


class Residual(nn.Module):
    """A wrapper that holds the add, and any block."""

    def __init__(self, *block: nn.Module) -> None:
        super().__init__()
        self.block = nn.Sequential(*block)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + x


def wrapped() -> nn.Module:
    """An nn.Sequential of wrappers, in an nn.Sequential."""
    layers = [
        nn.Sequential(Residual(nn.LayerNorm(WIDTH), Attention()), Residual(nn.LayerNorm(WIDTH), MLP()))
        for _ in range(2)
    ]
    return nn.Sequential(nn.Linear(6, WIDTH), *layers, nn.LayerNorm(WIDTH))


def wrapped_by_hand(model: nn.Sequential, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(model[0](x))
    for layer in (1, 2):
        for k in (0, 1):
            X = hand.site(f"{layer}.{k}.mhc_0", X, model[layer][k].block)
    return model[3](hand.collapse(X))


class Sandwich(PreNorm):
    """Gemma-2's layer: a norm before and after each block."""

    def __init__(self) -> None:
        super().__init__()
        self.after1, self.after2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.after1(self.attn(self.norm1(x)))
        x = residual + x
        residual = x
        x = self.after2(self.mlp(self.norm2(x)))
        return residual + x


def sandwich_by_hand(layer: Sandwich, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.after1(layer.attn(layer.norm1(u))))
    return hand.site(f"{name}.mhc_1", X, lambda u: layer.after2(layer.mlp(layer.norm2(u))))


class ReZero(nn.Module):
    """A scalar gain on each branch, no norm but one written out by hand, rotary decoys in the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.weight = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(WIDTH))
        self.q, self.out, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), MLP()

    def branch(self, x: Tensor) -> Tensor:
        """The first block, for the model by hand."""
        q = self.q(self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)))
        angle = torch.arange(WIDTH, dtype=q.dtype)
        q = q * angle.cos() + torch.cat([-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]], -1) * angle.sin()
        return self.out(0.5 * q * (1 + torch.tanh(0.8 * (q + 0.04 * q**3))))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        q = self.q(normed)
        angle = torch.arange(WIDTH, dtype=q.dtype)
        q = q * angle.cos() + torch.cat([-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]], -1) * angle.sin()
        q = 0.5 * q * (1 + torch.tanh(0.8 * (q + 0.04 * q**3)))
        x = x + self.gain * self.out(q)
        return x + self.mlp(x) * self.gain


def rezero_by_hand(layer: ReZero, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.gain * layer.branch(u))
    return hand.site(f"{name}.mhc_1", X, lambda u: layer.mlp(u) * layer.gain)


class Conformer(nn.Module):
    """Half steps around attention and a convolution that runs over time; a norm at the layer's end."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(5)])
        self.first, self.attn, self.last = MLP(), Attention(), MLP()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = 0.5 * self.first(self.norms[0](x)) + x
        x = self.attn(self.norms[1](x)) + x
        x = self.conv(self.norms[2](x).transpose(1, 2)).transpose(1, 2) + x
        x = 0.5 * self.last(self.norms[3](x)) + x
        return self.norms[4](x)


def conformer_by_hand(model: Stack, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, at in enumerate(model.layers):
        blocks = (
            lambda u, at=at: 0.5 * at.first(at.norms[0](u)),
            lambda u, at=at: at.attn(at.norms[1](u)),
            lambda u, at=at: at.conv(at.norms[2](u).mT).mT,
            lambda u, at=at: 0.5 * at.last(at.norms[3](u)),
        )
        for k, block in enumerate(blocks):
            X = hand.site(f"layers.{number}.mhc_{k}", X, block)
        if number == 0:
            X = hand.each(at.norms[4], X)
    return model.norm(model.layers[-1].norms[4](hand.collapse(X)))


class Tupled(PreNorm):
    """A layer of transformers' older kind: keyword arguments in, a tuple out."""

    def forward(self, hidden: Tensor, *, bias: Tensor | None = None, flag: bool = False) -> tuple[Tensor, Tensor]:
        weights = self.attn(self.norm1(hidden))
        if flag:
            weights = weights * 2
        hidden = hidden + weights
        branch = self.mlp(self.norm2(hidden))
        if bias is not None:
            branch = branch + bias
        return hidden + branch, weights


class TupledStack(nn.Module):
    """Keeps the second entries, and gives the layers keyword arguments of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Tupled() for _ in range(3)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for number, layer in enumerate(self.layers):
            outputs = layer(hidden=x, bias=bias if number == 1 else None, flag=number == 2)
            x = outputs[0]
            kept.append(outputs[1])
        return (self.norm(x), *kept)


def tupled_by_hand(model: TupledStack, hand: Streams, x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    X, kept = hand.expand(x), []
    for number, layer in enumerate(model.layers):
        u, write = hand.read(f"layers.{number}.mhc_0", X)
        kept.append(layer.attn(layer.norm1(u)) * (2 if number == 2 else 1))
        u, write = hand.read(f"layers.{number}.mhc_1", write(kept[-1]))
        X = write(layer.mlp(layer.norm2(u)) + (bias if number == 1 else 0))
    return (model.norm(hand.collapse(X)), *kept)


class Checkpointed(Stack):
    """Every layer is recomputed in backward."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return self.norm(x)


class Joint(nn.Module):
    """MMDiT's block: two streams through one forward, an attention over both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp1, self.mlp2 = Attention(), MLP(), MLP()

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        mixed = self.attn(torch.cat([self.norm1(x), self.norm2(c)], 1))
        attended_x, attended_c = mixed.split([x.shape[1], c.shape[1]], 1)
        x = x + attended_x
        c = c + attended_c
        return x + self.mlp1(x), c + self.mlp2(c)


class JointStack(nn.Module):
    """Two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joint() for _ in range(2)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x, c = block(x, c)
        return self.head(x), self.head(c).tanh()


def joint_by_hand(model: JointStack, hand: Streams, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    X, C = hand.expand(x), hand.expand(c)
    for number, block in enumerate(model.blocks):
        name = f"blocks.{number}"
        u, write = hand.read(f"{name}.mhc_0", X)
        v, write_c = hand.read(f"{name}.mhc_1", C)
        mixed = block.attn(torch.cat([block.norm1(u), block.norm2(v)], 1))
        X, C = write(mixed[:, : x.shape[1]]), write_c(mixed[:, x.shape[1] :])
        X, C = hand.site(f"{name}.mhc_2", X, block.mlp1), hand.site(f"{name}.mhc_3", C, block.mlp2)
    return model.head(hand.collapse(X)), model.head(hand.collapse(C)).tanh()


class UViT(nn.Module):
    """A skip that is concatenated: it reads the mean, and the projection behind it begins a new stream."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = PreNorm(), PreNorm(), PreNorm()
        self.fuse = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = self.middle(skip)
        x = self.fuse(torch.cat([x, skip], -1))
        return self.last(x)


def uvit_by_hand(model: UViT, hand: Streams, x: Tensor) -> Tensor:
    X = prenorm_by_hand(model.first, hand, "first", hand.expand(x))
    skip = hand.collapse(X)
    X = prenorm_by_hand(model.middle, hand, "middle", X)
    X = hand.expand(model.fuse(torch.cat([hand.collapse(X), skip], -1)))
    return hand.collapse(prenorm_by_hand(model.last, hand, "last", X))


class PreActivation(nn.Module):
    """ResNet v2: norm and relu before each convolution, nothing on the trunk. Also in one dimension."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        self.bn1, self.conv1 = norm(8), conv(8, 12, 3, padding=1, bias=False)
        self.bn2, self.conv2 = norm(12), conv(12, 8, 3, padding=1)

    def branch(self, x: Tensor) -> Tensor:
        """The block without its add, for the model by hand."""
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return x + out


def preactivation(dims: int) -> nn.Module:
    """A stem, three blocks, a head."""
    conv = nn.Conv1d if dims == 1 else nn.Conv2d
    return nn.Sequential(conv(3, 8, 3, padding=1), *[PreActivation(dims) for _ in range(3)], nn.ReLU(), conv(8, 4, 1))


def preactivation_by_hand(model: nn.Sequential, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(model[0](x))
    for number in (1, 2, 3):
        X = hand.site(f"{number}.mhc_0", X, model[number].branch)
    return model[5](model[4](hand.collapse(X)))


def one() -> tuple[Tensor]:
    return (features(2, 5, WIDTH),)


KINDS = (
    Kind(
        "wrappers",
        wrapped,
        lambda: (features(2, 5, 6),),
        wrapped_by_hand,
        (tuple(f"{i}.{k}.mhc_0" for i in (1, 2) for k in (0, 1)),),
    ),
    stack_of("sandwich norms", Sandwich, sandwich_by_hand, 2),
    stack_of("ReZero, decoys", ReZero, rezero_by_hand, 2),
    Kind(
        "Conformer", lambda: Stack([Conformer() for _ in range(2)]), one, conformer_by_hand, (names("layers.{}", 2, 4),)
    ),
    Kind(
        "tuples, keywords",
        TupledStack,
        lambda: (features(2, 5, WIDTH), features(5, WIDTH)),
        tupled_by_hand,
        (names("layers.{}", 3, 2),),
    ),
    Kind(
        "checkpoints",
        lambda: Checkpointed([PreNorm() for _ in range(2)]),
        one,
        stack_by_hand(prenorm_by_hand),
        (names("layers.{}", 2, 2),),
    ),
    Kind(
        "joint block",
        JointStack,
        lambda: (features(2, 5, WIDTH), features(2, 3, WIDTH)),
        joint_by_hand,
        tuple(tuple(f"blocks.{i}.mhc_{k}" for i in range(2) for k in pair) for pair in ((0, 2), (1, 3))),
    ),
    Kind(
        "U-ViT",
        UViT,
        one,
        uvit_by_hand,
        (("first.mhc_0", "first.mhc_1", "middle.mhc_0", "middle.mhc_1"), ("last.mhc_0", "last.mhc_1")),
    ),
    *(
        Kind(
            f"pre-activation, {dims}d",
            lambda dims=dims: preactivation(dims),
            lambda dims=dims: (features(3, 3, *[5] * dims),),
            preactivation_by_hand,
            (("1.mhc_0", "2.mhc_0", "3.mhc_0"),),
            channel_dim=1,
        )
        for dims in (1, 2)
    ),
)

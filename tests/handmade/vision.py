"""Images: channels first and last, a relu after the add, projection shortcuts, gates."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Attention, Kind, features, names
from oracle import Streams


class BasicBlock(nn.Module):
    """torchvision's, written its way: `out += identity`, one relu in place, the norm in the branch."""

    def __init__(self, width: int, stride: int = 1, source: int | None = None) -> None:
        super().__init__()
        source = source or width
        self.conv1 = nn.Conv2d(source, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if source != width:
            self.downsample = nn.Sequential(nn.Conv2d(source, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def branch(self, x: Tensor) -> Tensor:
        """The block without its add, for the model by hand."""
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Two stages; the second begins with a projection shortcut, which ends the first one's stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, 1)
        self.stage1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.stage2 = nn.Sequential(BasicBlock(12, 2, 8), BasicBlock(12), BasicBlock(12))
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        return self.head(x.mean((2, 3)))


def resnet_by_hand(model: ResNet, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(model.stem(x))
    X = hand.site("stage1.0.mhc_0", X, model.stage1[0].branch)
    X = hand.site("stage1.1.mhc_0", hand.each(F.relu, X), model.stage1[1].branch)
    x = F.relu(hand.collapse(X))
    first = model.stage2[0]
    branch = first.branch(x)
    x = F.relu(branch + first.downsample(x))
    X = hand.expand(x)
    X = hand.site("stage2.1.mhc_0", X, model.stage2[1].branch)
    X = hand.site("stage2.2.mhc_0", hand.each(F.relu, X), model.stage2[2].branch)
    return model.head(F.relu(hand.collapse(X)).mean((2, 3)))


class TrunkNorm(nn.Module):
    """BatchNorm on the trunk: its statistics are those of one stream, so that the stream ends before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv1(F.relu(x))
        x = x + self.conv2(F.relu(x))
        return self.bn(x)


def trunk_norm_by_hand(model: nn.Sequential, hand: Streams, x: Tensor) -> Tensor:
    for number, block in enumerate(model):
        X = hand.site(f"{number}.mhc_0", hand.expand(x), lambda u, at=block: at.conv1(F.relu(u)))
        X = hand.site(f"{number}.mhc_1", X, lambda u, at=block: at.conv2(F.relu(u)))
        x = block.bn(hand.collapse(X))
    return x


class ConvNeXtBlock(nn.Module):
    """The trunk is NCHW, the branch is NHWC inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width=width)
        self.gain = nn.Parameter(torch.ones(width))

    def branch(self, x: Tensor) -> Tensor:
        """The block without its add, for the model by hand."""
        return (self.gain * self.mlp(self.norm(self.depthwise(x).movedim(1, -1)))).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        source = x
        x = self.depthwise(x)
        x = x.permute(0, 2, 3, 1)
        x = self.gain * self.mlp(self.norm(x))
        return source + x.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages with a downsampling between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 12, 2, 2)
        self.stages = nn.ModuleList([nn.Sequential(*[ConvNeXtBlock(c) for _ in range(2)]) for c in (8, 12)])
        self.head = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages[0](self.stem(x))
        x = self.stages[1](self.down(x))
        return self.head(x.mean((2, 3)))


def convnext_by_hand(model: ConvNeXt, hand: Streams, x: Tensor) -> Tensor:
    for stage, downsample in enumerate((model.stem, model.down)):
        X = hand.expand(downsample(x))
        for number, block in enumerate(model.stages[stage]):
            X = hand.site(f"stages.{stage}.{number}.mhc_0", X, block.branch)
        x = hand.collapse(X)
    return model.head(x.mean((2, 3)))


class ChannelsLast(nn.Module):
    """The trunk is NHWC, a convolution in the branch is NCHW inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv = nn.LayerNorm(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(self.norm1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.mlp(self.norm2(x))


class ChannelsLastStack(nn.Module):
    """Two of them in an nn.Sequential, no norm at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(ChannelsLast(), ChannelsLast())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def channels_last_by_hand(model: ChannelsLastStack, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        name = f"layers.{number}"
        X = hand.site(f"{name}.mhc_0", X, lambda u, at=layer: at.conv(at.norm1(u).movedim(-1, 1)).movedim(1, -1))
        X = hand.site(f"{name}.mhc_1", X, lambda u, at=layer: at.mlp(at.norm2(u)))
    return hand.collapse(X)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A decoy: an add of two tensors of the same shape that is no residual add."""
    return x * (1 + scale) + shift


class DiTBlock(nn.Module):
    """adaLN-zero with a condition for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH, elementwise_affine=False), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH, elementwise_affine=False), MLP()
        self.condition = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """The condition is a sum too, and the last layer is modulated. `pooled`: one condition for all tokens."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.time, self.label, self.pooled = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), pooled
        self.blocks = nn.ModuleList([DiTBlock() for _ in range(2)])
        self.norm, self.last = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, 2 * WIDTH)

    def condition(self, time: Tensor, label: Tensor) -> Tensor:
        c = self.time(time) + self.label(label)
        return c.mean(1, keepdim=True) if self.pooled else c

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        c = self.condition(time, label)
        for block in self.blocks:
            x = block(x, c)
        return modulate(self.norm(x), *self.last(c).chunk(2, dim=-1))


def dit_by_hand(model: DiT, hand: Streams, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
    c = model.condition(time, label)
    X = hand.expand(x)
    for number, block in enumerate(model.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.condition(c).chunk(6, dim=-1)

        def attend(u: Tensor, at=block, gate=gate1, shift=shift1, scale=scale1) -> Tensor:
            return gate * at.attn(modulate(at.norm1(u), shift, scale))

        def feed(u: Tensor, at=block, gate=gate2, shift=shift2, scale=scale2) -> Tensor:
            return gate * at.mlp(modulate(at.norm2(u), shift, scale))

        X = hand.site(f"blocks.{number}.mhc_0", X, attend)
        X = hand.site(f"blocks.{number}.mhc_1", X, feed)
    return modulate(model.norm(hand.collapse(X)), *model.last(c).chunk(2, dim=-1))


def conditioned() -> tuple[Tensor, Tensor, Tensor]:
    return features(2, 5, WIDTH), features(2, 5, WIDTH), features(2, 5, WIDTH)


KINDS = (
    Kind(
        "ResNet",
        ResNet,
        lambda: (features(3, 3, 6, 6),),
        resnet_by_hand,
        (("stage1.0.mhc_0", "stage1.1.mhc_0"), ("stage2.1.mhc_0", "stage2.2.mhc_0")),
        channel_dim=1,
    ),
    Kind(
        "BatchNorm on the trunk",
        lambda: nn.Sequential(TrunkNorm(), TrunkNorm()),
        lambda: (features(3, 8, 5, 5),),
        trunk_norm_by_hand,
        (names("0", 1, 2), names("1", 1, 2)),
        channel_dim=1,
    ),
    Kind(
        "ConvNeXt",
        ConvNeXt,
        lambda: (features(2, 3, 8, 8),),
        convnext_by_hand,
        tuple((f"stages.{s}.0.mhc_0", f"stages.{s}.1.mhc_0") for s in range(2)),
        channel_dim=1,
    ),
    Kind(
        "channels last",
        ChannelsLastStack,
        lambda: (features(2, 4, 3, WIDTH),),
        channels_last_by_hand,
        (names("layers.{}", 2, 2),),
    ),
    Kind("DiT", lambda: DiT(True), conditioned, dit_by_hand, (names("blocks.{}", 2, 2),)),
    Kind("DiT, a condition a token", lambda: DiT(False), conditioned, dit_by_hand, (names("blocks.{}", 2, 2),)),
)

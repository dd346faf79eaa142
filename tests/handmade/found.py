"""What the finder has to tell apart: adds that share a line, one add on several lines, axes that are moved before they
are mixed, states that are no trunks. Each with its n-stream counterpart by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Kind, features, names
from oracle import Streams

Branch = Callable[[Tensor], Tensor]


def block(width: int = WIDTH) -> nn.Module:
    """A branch: (..., C) -> (..., C)."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh())


def linear(width: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh())


class Layers(nn.Module):
    """Layers in a row."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def by_hand(*branches: str) -> Callable[..., Tensor]:
    """Every layer adds its methods of these names, one after the other."""

    def run(model: Any, hand: Streams, x: Tensor) -> Tensor:
        X = hand.expand(x)
        for i, layer in enumerate(model.layers):
            for k, name in enumerate(branches):
                X = hand.site(f"layers.{i}.mhc_{k}", X, getattr(layer, name))
        return hand.collapse(X)

    return run


def kind(
    name: str, layer: Callable[[], nn.Module], shape: tuple[int, ...], count: int = 3, channel_dim: int = -1
) -> Kind:
    """A model of layers whose branches are `first` and, where they have it, `second`."""
    branches = ("first", "second") if getattr(layer(), "second", None) is not None else ("first",)
    return Kind(
        name, lambda: Layers(*(layer() for _ in range(count))), lambda: (features(*shape),), by_hand(*branches),
        (names("layers.{}", count, len(branches)),), channel_dim,
    )  # fmt: skip


# -- two adds on one line --------------------------------------------------------------------------------------------


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


class Coupled(nn.Module):
    """One stream m, and a state z that reads it and is read by it."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h, self.k = (block() for _ in range(4))

    def forward(self, m: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        m = add(m, self.f(m) + self.g(z))
        m = add(m, self.h(m))
        return m, z + self.k(m)


class CoupledStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupled() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = z = x
        for layer in self.layers:
            m, z = layer(m, z)
        return m, z


def coupled_by_hand(model: CoupledStack, hand: Streams, x: Tensor) -> tuple[Tensor, Tensor]:
    """What comes from the trunk to a branch by way of z reads what the branch reads."""
    X, z = hand.expand(x), x
    for i, layer in enumerate(model.layers):
        u, write = hand.read(f"layers.{i}.mhc_0", X)
        z = z + model.layers[i - 1].k(u) if i else z
        X = write(layer.f(u) + layer.g(z if i else u))
        X = hand.site(f"layers.{i}.mhc_1", X, layer.h)
    x = hand.collapse(X)
    return x, z + model.layers[-1].k(x)


class Helpers(nn.Module):
    """A function, a lambda, a method and a module that add, each for several sites; two of them on one line."""

    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(block() for _ in range(8))
        self.sum = self.Sum()

    def residual(self, f: nn.Module, x: Tensor) -> Tensor:
        return x + f(x)

    def forward(self, x: Tensor) -> Tensor:
        into = lambda f, x: add(x, f(x))  # noqa: E731
        x = add(add(x, self.fs[0](x)), self.fs[1](x.sin()))
        x = into(self.fs[3], into(self.fs[2], x))
        x = self.residual(self.fs[5], self.residual(self.fs[4], x))
        x = self.sum(x, self.fs[6](x))
        return self.sum(x, self.fs[7](x))


def helpers_by_hand(model: Helpers, hand: Streams, x: Tensor) -> Tensor:
    X = hand.site("mhc_0", hand.expand(x), lambda u: model.fs[0](u) + model.fs[1](u.sin()))
    for k in range(2, 6):
        X = hand.site(f"mhc_{k - 1}", X, model.fs[k])
    X = hand.site("sum.mhc_0", X, model.fs[6])
    return hand.collapse(hand.site("sum.mhc_1", X, model.fs[7]))


class Turns(nn.Module):
    """Turns of a loop: modules of their own, and one that they share, by one line that adds."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.ModuleList(block() for _ in range(3))
        self.shared = block()

    def forward(self, x: Tensor) -> Tensor:
        for own in self.own:
            x = add(x, own(x))
            x = add(x, self.shared(x))
        return x


def turns_by_hand(model: Turns, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for i, own in enumerate(model.own):
        X = hand.site(f"mhc_{2 * i + 1}", hand.site(f"mhc_{2 * i}", X, own), model.shared)
    return hand.collapse(X)


# -- one add on two lines --------------------------------------------------------------------------------------------


class ByMode(nn.Module):
    """Another line in training, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.d = block(), block(), nn.Dropout(0.3)

    def first(self, x: Tensor) -> Tensor:
        return self.d(self.f(x))

    def second(self, x: Tensor) -> Tensor:
        return self.d(self.g(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.d(self.f(x))
            return x + self.second(x)
        y = self.f(x)
        x = y + x
        return torch.add(x, self.g(x))


class ByModeInOne(nn.Module):
    """The same where the model itself holds the adds, in a loop, and one add is on a line that both modes share."""

    def __init__(self) -> None:
        super().__init__()
        self.fs, self.g, self.d = nn.ModuleList(block() for _ in range(3)), block(), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            if self.training:
                x = x + self.d(f(x))
            else:
                x = x + f(x)
            x = x + self.g(x)
        return x


def by_mode_by_hand(model: ByModeInOne, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for i, f in enumerate(model.fs):
        X = hand.site(f"mhc_{2 * i}", X, lambda u, f=f: model.d(f(u)))
        X = hand.site(f"mhc_{2 * i + 1}", X, model.g)
    return hand.collapse(X)


class ByParent(nn.Module):
    """The layer adds in evaluation, and its parent in training."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.d = block(), nn.Dropout(0.3)

    def first(self, x: Tensor) -> Tensor:
        return self.d(self.f(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x) if self.training else x + self.f(x)


class ByParentStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(ByParent() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training:
                x = x + layer.d(layer(x))
            else:
                x = layer(x)
        return x


class PooledByMode(nn.Module):
    """Branches without parameters are told by their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        # What is dropped depends on how u lies in memory.
        self.conv, self.d = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1), nn.Dropout(0.0)

    def first(self, x: Tensor) -> Tensor:
        return self.d(F.avg_pool2d(x.sin(), 3, 1, 1))

    def second(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.d(F.avg_pool2d(x.sin(), 3, 1, 1))
        else:
            x = x + F.avg_pool2d(x.sin(), 3, 1, 1)
        return x + self.conv(x)


# -- the axis of features --------------------------------------------------------------------------------------------


class Adds(nn.Module):
    """Adds `first`, and then `second` if there is one."""

    second: Branch | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x if self.second is None else x + self.second(x)


class Flattened(Adds):
    """Attention over the places of an image: (B, C, H, W) -> (B, H W, C) -> back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def first(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(t).chunk(3, -1)
        t = self.out(F.scaled_dot_product_attention(q, k, v))
        return t.transpose(1, 2).reshape(b, c, h, w)


class Rearranged(Adds):
    """The same with einops, in another layer along the rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.rows = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), linear()

    def first(self, x: Tensor) -> Tensor:
        from einops import rearrange

        t = rearrange(x, "b c h w -> b (h w) c")
        q, k, v = (rearrange(i, "b n (h d) -> b h n d", h=4) for i in self.qkv(t).chunk(3, -1))
        weights = torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1)
        t = rearrange(torch.einsum("bhij,bhjd->bhid", weights, v), "b h n d -> b n (h d)")
        return rearrange(self.out(t), "b (h w) c -> b c h w", h=x.shape[2])

    def second(self, x: Tensor) -> Tensor:
        from einops import rearrange

        return rearrange(self.rows(rearrange(x, "b c h w -> (b h) w c")), "(b h) w c -> b c h w", b=x.shape[0])


class Windows(Adds):
    """Windows of an image with its channels last, and of one with them first."""

    def __init__(self, channels_first: bool) -> None:
        super().__init__()
        self.channels_first, self.mlp = channels_first, linear()

    def first(self, x: Tensor) -> Tensor:
        if self.channels_first:
            b, c, h, w = x.shape
            t = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
            t = self.mlp(t).view(b, h // 2, w // 2, 2, 2, c)
            return t.permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)
        b, h, w, c = x.shape
        t = x.view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).contiguous().view(-1, 4, c)
        return self.mlp(t).view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).contiguous().view(b, h, w, c)


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class ResMLP(Adds):
    """Mixes tokens first; its norm is an affine map."""

    def __init__(self, tokens: int = 6) -> None:
        super().__init__()
        self.norm1, self.norm2, self.tokens, self.mlp = Affine(), Affine(), nn.Linear(tokens, tokens), MLP()
        self.gamma = nn.Parameter(0.5 * torch.ones(WIDTH))

    def first(self, x: Tensor) -> Tensor:
        return self.gamma * self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)

    def second(self, x: Tensor) -> Tensor:
        return self.gamma * self.mlp(self.norm2(x))


class TSMixer(Adds):
    """Mixes time first, without a norm."""

    def __init__(self, times: int = 12, series: int = 7) -> None:
        super().__init__()
        self.time, self.series = linear(times), linear(series)

    def first(self, x: Tensor) -> Tensor:
        return self.time(x.transpose(1, 2)).transpose(1, 2)

    def second(self, x: Tensor) -> Tensor:
        return self.series(x)


class OverTime(Adds):
    """The first half of it, as a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = linear(12)

    def first(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)


class OverSeries(Adds):
    def __init__(self) -> None:
        super().__init__()
        self.mix = linear(7)

    def first(self, x: Tensor) -> Tensor:
        return self.mix(x)


class Fourier(Adds):
    """Mixes by a transform without parameters: the other layers show the axis."""

    def first(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real


class Einsums(Adds):
    """Channels and tokens by einsum, with heads and an ellipsis."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.randn(4, WIDTH // 4, WIDTH // 4) / 2)
        self.tokens = nn.Parameter(torch.randn(6, 6) / 2)

    def first(self, x: Tensor) -> Tensor:
        return torch.einsum("bnc,mn->bmc", x.sin(), self.tokens)

    def second(self, x: Tensor) -> Tensor:
        return torch.einsum("...hd,hde->...he", x.unflatten(-1, (4, -1)), self.heads).flatten(-2)


class Video(Adds):
    """(B, C, T, H, W), by children that rearrange."""

    def __init__(self) -> None:
        super().__init__()
        from einops.layers.torch import Rearrange

        self.run = nn.Sequential(
            Rearrange("b c t h w -> b t (h w) c"), linear(), Rearrange("b t (h w) c -> b c t h w", h=4)
        )

    def first(self, x: Tensor) -> Tensor:
        return self.run(x)


# -- states that are no trunks ---------------------------------------------------------------------------------------


class DeltaRule(nn.Module):
    """A recurrence over time with a state of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.w, self.k, self.v, self.a, self.b = (linear() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        S, out = x.new_zeros(x.shape[0], WIDTH, WIDTH), []
        r, k, v, a, b = (f(x) for f in (self.r, self.k, self.v, self.a, self.b))
        w = self.w(x).sigmoid()
        for t in range(x.shape[1]):
            decay, a_t, b_t = w[:, t, None, :], a[:, t, :, None], b[:, t, None, :]
            S = S * decay + S @ a_t @ b_t + v[:, t, :, None] @ k[:, t, None, :]
            out.append((S @ r[:, t, :, None])[..., 0])
        return torch.stack(out, 1)


class Recurrent(Adds):
    """A layer with a recurrence in its branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.time, self.mlp = nn.LayerNorm(WIDTH), DeltaRule(), block()

    def first(self, x: Tensor) -> Tensor:
        return self.time(self.norm(x))

    def second(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class ThenRecurrent(nn.Module):
    """Layers, and a recurrence in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fs, self.step = nn.ModuleList(block() for _ in range(3)), linear()

    def forward(self, x: Tensor) -> Tensor:
        for f in self.fs:
            x = x + f(x)
        return self.recur(x)

    def recur(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = 0.9 * h + self.step(h) + x[:, t]
        return h


def then_recurrent_by_hand(model: ThenRecurrent, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for k, f in enumerate(model.fs):
        X = hand.site(f"mhc_{k}", X, f)
    return model.recur(hand.collapse(X))


class AtEveryStep(nn.Module):
    """Layers at every step of a sequence: one stream a step, with the same sites."""

    def __init__(self) -> None:
        super().__init__()
        self.fs = nn.ModuleList(block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for x_t in x.unbind(1):
            for f in self.fs:
                x_t = x_t + f(x_t)
            out.append(x_t)
        return torch.stack(out, 1)


def at_every_step_by_hand(model: AtEveryStep, hand: Streams, x: Tensor) -> Tensor:
    out = []
    for x_t in x.unbind(1):
        X = hand.expand(x_t)
        for k, f in enumerate(model.fs):
            X = hand.site(f"mhc_{k}", X, f)
        out.append(hand.collapse(X))
    return torch.stack(out, 1)


class SharedSteps(nn.Module):
    """No recurrence: one block for all layers, an embedding a step, and slices that are the same at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.steps = block(), nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(3):
            x = x + self.f(x + self.steps[i]) * x[:, :1].sin()
        return x


def shared_steps_by_hand(model: SharedSteps, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for i in range(3):
        X = hand.site(f"mhc_{i}", X, lambda u, e=model.steps[i]: model.f(u + e) * u[:, :1].sin())
    return hand.collapse(X)


class StateSpace(Adds):
    """A mixer with a direct path `y + D * x` from its input to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.D, self.mix = nn.Parameter(torch.ones(2 * WIDTH)), nn.Linear(2 * WIDTH, 2 * WIDTH)

    def first(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.into(self.norm(x)))
        y = self.mix(x).cumsum(1)
        y = y + self.D * x
        y = self.mix(y).cumsum(1) + y * self.D
        return self.out(y)


class FromTheStart(nn.Module):
    """`x = a x + b x0` before each block, in the block, with its terms in either order."""

    def __init__(self, sites: int, flipped: bool) -> None:
        super().__init__()
        self.fs, self.flipped = nn.ModuleList(block() for _ in range(sites)), flipped
        self.lambdas = nn.Parameter(torch.tensor([0.9, 0.4]))

    def mix(self, x: Tensor, x0: Tensor) -> Tensor:
        if self.flipped:
            return self.lambdas[1] * x0 + self.lambdas[0] * x
        return self.lambdas[0] * x + self.lambdas[1] * x0

    def forward(self, x: Tensor, x0: Tensor) -> Tensor:
        x = self.mix(x, x0)
        for f in self.fs:
            x = x + f(x)
        return x


class StartStack(nn.Module):
    """`inline`: the model's own forward holds all of it."""

    def __init__(self, sites: int, flipped: bool = False, inline: bool = False) -> None:
        super().__init__()
        self.layers, self.inline = nn.ModuleList(FromTheStart(sites, flipped) for _ in range(3)), inline

    def forward(self, x: Tensor) -> Tensor:
        x0 = x = torch.tanh(x)
        for layer in self.layers:
            if not self.inline:
                x = layer(x, x0)
                continue
            if layer.flipped:
                x = layer.lambdas[1] * x0 + layer.lambdas[0] * x
            else:
                x = layer.lambdas[0] * x + layer.lambdas[1] * x0
            for f in layer.fs:
                x = x + f(x)
        return x


def start_by_hand(model: StartStack, hand: Streams, x: Tensor) -> Tensor:
    x0 = torch.tanh(x)
    X, number = hand.expand(model.layers[0].mix(x0, x0)), 0
    for i, layer in enumerate(model.layers):
        X = hand.each(lambda x, mix=layer.mix: mix(x, x0), X) if i else X
        for k, f in enumerate(layer.fs):
            X = hand.site(f"mhc_{number}" if model.inline else f"layers.{i}.mhc_{k}", X, f)
            number += 1
    return hand.collapse(X)


def start(sites: int, flipped: bool, inline: bool) -> Kind:
    found = tuple(f"mhc_{k}" for k in range(3 * sites)) if inline else names("layers.{}", 3, sites)
    order = "x0 + x" if flipped else "x + x0"
    return Kind(
        f"{order}, {sites} site{'s' if sites > 1 else ''} a block, {'inline' if inline else 'in blocks'}",
        lambda: StartStack(sites, flipped, inline), lambda: (features(2, 5, WIDTH),), start_by_hand, (found,),
    )  # fmt: skip


class Across(nn.Module):
    """The second half of the layers is given what came out of the first half, as in a U-Net without resolutions."""

    def __init__(self, layers: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Plain() for _ in range(layers))
        self.weights = nn.Parameter(torch.full((layers,), 0.6))

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        half = len(self.layers) // 2
        for i, layer in enumerate(self.layers):
            if i >= len(self.layers) - half:
                x = x + self.weights[i] * kept.pop()
            x = layer(x)
            if i < half:
                kept.append(x)
        return x


class Plain(Adds):
    def __init__(self) -> None:
        super().__init__()
        self.first = block()


def across_by_hand(model: Across, hand: Streams, x: Tensor) -> Tensor:
    X, kept = hand.expand(x), []
    for i, layer in enumerate(model.layers):
        if i >= 3:
            X = hand.each(lambda x, skip=model.weights[i] * kept.pop(): x + skip, X)
        X = hand.site(f"layers.{i}.mhc_0", X, layer.first)
        kept += [hand.collapse(X)] if i < 2 else []
    return hand.collapse(X)


class Equivariant(nn.Module):
    """A layer of an equivariant graph network: features are a trunk, coordinates are not."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.node, self.weight = linear(2 * WIDTH), linear(2 * WIDTH), nn.Linear(WIDTH, 1)
        self.distance, self.into = nn.Linear(1, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def message(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rel = x[:, :, None] - x[:, None]
        pair = torch.cat([h[:, :, None].expand(-1, -1, 5, -1), h[:, None].expand(-1, 5, -1, -1)], -1)
        return self.into(self.edge(pair + self.distance(rel.norm(dim=-1, keepdim=True).square()))), rel

    def first(self, h: Tensor, m: Tensor) -> Tensor:
        return self.into(self.node(torch.cat([h, m.sum(2)], -1)))

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        m, rel = self.message(h, x)
        x = x + (rel * self.weight(m)).sum(2)
        return h + self.first(h, m), x


class EquivariantStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Equivariant() for _ in range(3))

    def forward(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            h, x = layer(h, x)
        return h, x


def equivariant_by_hand(model: EquivariantStack, hand: Streams, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    X = hand.expand(h)
    for i, layer in enumerate(model.layers):
        u, write = hand.read(f"layers.{i}.mhc_0", X)
        m, rel = layer.message(u, x)
        x = x + (rel * layer.weight(m)).sum(2)
        X = write(layer.first(u, m))
    return hand.collapse(X), x


TOKENS, IMAGE = (2, 5, WIDTH), (2, WIDTH, 6, 4)


def tokens() -> tuple[Tensor, ...]:
    return (features(*TOKENS),)


KINDS = (
    Kind("one helper, two states", CoupledStack, tokens, coupled_by_hand, (names("layers.{}", 3, 2),)),
    Kind("helpers of many kinds", Helpers, tokens, helpers_by_hand,
         ((*(f"mhc_{k}" for k in range(5)), "sum.mhc_0", "sum.mhc_1"),)),
    Kind("a helper in a loop", Turns, tokens, turns_by_hand, (tuple(f"mhc_{k}" for k in range(6)),)),
    kind("another line in training", ByMode, TOKENS),
    Kind("another line in training, in a loop", ByModeInOne, tokens, by_mode_by_hand,
         (tuple(f"mhc_{k}" for k in range(6)),)),
    Kind("another module in training", ByParentStack, tokens, by_hand("first"), (names("layers.{}", 3, 1),)),
    kind("another line without parameters", PooledByMode, IMAGE, channel_dim=1),
    kind("flattened image", Flattened, IMAGE, channel_dim=1),
    kind("einops", Rearranged, IMAGE, channel_dim=1),
    kind("windows", lambda: Windows(False), (2, 6, 4, WIDTH)),
    kind("windows, channels first", lambda: Windows(True), IMAGE, channel_dim=1),
    kind("ResMLP", ResMLP, (2, 6, WIDTH), 2),
    kind("TSMixer", TSMixer, (2, 12, 7), 2),
    Kind("time and series in turns", lambda: Layers(OverTime(), OverSeries(), OverTime(), OverSeries()),
         lambda: (features(2, 12, 7),), by_hand("first"), (names("layers.{}", 4, 1),)),
    Kind("a transform between layers", lambda: Layers(OverSeries(), Fourier(), OverSeries()),
         lambda: (features(2, 12, 7),), by_hand("first"), (names("layers.{}", 3, 1),)),
    kind("einsums", Einsums, (2, 6, WIDTH), 2),
    kind("video", Video, (2, WIDTH, 3, 4, 2), channel_dim=1),
    kind("recurrence in a branch", Recurrent, TOKENS, 2),
    Kind("recurrence after layers", ThenRecurrent, tokens, then_recurrent_by_hand,
         (tuple(f"mhc_{k}" for k in range(3)),)),
    Kind("layers at every step", AtEveryStep, tokens, at_every_step_by_hand, (("mhc_0", "mhc_1", "mhc_2"),)),
    Kind("one block, several steps", SharedSteps, tokens, shared_steps_by_hand, (("mhc_0", "mhc_1", "mhc_2"),)),
    kind("state space with a skip", StateSpace, TOKENS),
    *(start(sites, flipped, inline) for sites in (1, 2) for flipped in (False, True) for inline in (False, True)),
    Kind("skips across layers", Across, tokens, across_by_hand, (names("layers.{}", 5, 1),)),
    Kind("equivariant", EquivariantStack, lambda: (features(*TOKENS), features(2, 5, 3)), equivariant_by_hand,
         (names("layers.{}", 3, 1),)),
)  # fmt: skip

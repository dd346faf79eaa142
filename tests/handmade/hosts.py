"""Where an add may stand: beside a callable, in a child that is handed the trunk twice, in a container, ..."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import MLP, WIDTH, Attention, Kind, features, names, stack_of
from oracle import Streams


class Sublayer(nn.Module):
    """The SublayerConnection of the Annotated Transformer: its block is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        return x + self.dropout(block(self.norm(x)))


class WithCallables(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.attn, self.mlp, self.form = Attention(), MLP(), form
        self.sublayers = nn.ModuleList(Sublayer() for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        return self.attn(x)

    def forward(self, x: Tensor) -> Tensor:
        memory = 2.0
        block: Callable[[Tensor], Tensor] = {
            "lambda": lambda y: self.attn(memory * y),
            "method": self.attend,
            "partial": functools.partial(self.attn, memory=None),
            "module": self.attn,
        }[self.form]
        x = self.sublayers[0](x, block)
        return self.sublayers[1](x, self.mlp)


def callables_by_hand(layer: WithCallables, hand: Streams, name: str, X: Tensor) -> Tensor:
    first, second = layer.sublayers
    factor = 2.0 if layer.form == "lambda" else 1.0
    X = hand.site(f"{name}.sublayers.0.mhc_0", X, lambda u: first.dropout(layer.attn(factor * first.norm(u))))
    return hand.site(f"{name}.sublayers.1.mhc_0", X, lambda u: second.dropout(layer.mlp(second.norm(u))))


class TakesBoth(nn.Module):
    """Bloom's attention and MLP: what they read and what they add to are two arguments."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + F.dropout(self.block(x), 0.1, self.training)


class AddsToTheNorm(nn.Module):
    """Bloom's layer with `apply_residual_connection_post_layernorm`: both arguments are the norm's output."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), TakesBoth(Attention())
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), TakesBoth(MLP())

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = self.attn(normed, residual=normed)
        normed = self.norm2(x)
        return self.mlp(normed, normed)


def adds_to_the_norm_by_hand(layer: AddsToTheNorm, hand: Streams, name: str, X: Tensor) -> Tensor:
    for part, norm in ((layer.attn, layer.norm1), (layer.mlp, layer.norm2)):
        X = hand.each(norm, X)
        site = f"{name}.{'attn' if part is layer.attn else 'mlp'}.mhc_0"
        X = hand.site(site, X, lambda u, part=part: F.dropout(part.block(u), 0.1, part.training))
    return X


class ResidualSequential(nn.Sequential):
    """`x + super().forward(x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ResidualList(nn.ModuleList):
    """An add for each of its modules."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = x + module(x)
        return x


class ResidualDict(nn.ModuleDict):
    """An add for each of its items, and one that indexes."""

    def forward(self, x: Tensor) -> Tensor:
        for _, module in self.items():
            x = x + module(x)
        return x + self["mlp"](x)


def sequential() -> ResidualSequential:
    return ResidualSequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


def sequential_by_hand(layer: ResidualSequential, hand: Streams, name: str, X: Tensor) -> Tensor:
    return hand.site(f"{name}.mhc_0", X, lambda u: nn.Sequential.forward(layer, u))


def list_by_hand(layer: ResidualList, hand: Streams, name: str, X: Tensor) -> Tensor:
    for k, module in enumerate(layer):
        X = hand.site(f"{name}.mhc_{k}", X, module)
    return X


def dict_by_hand(layer: ResidualDict, hand: Streams, name: str, X: Tensor) -> Tensor:
    for k, module in enumerate([*layer.values(), layer["mlp"]]):
        X = hand.site(f"{name}.mhc_{k}", X, module)
    return X


class Experts(nn.Module):
    """A mixture that begins with nothing and leaves out experts that no token goes to: no graph can hold it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.router, self.form = nn.Linear(WIDTH, 3), form
        self.experts = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        out = {
            "zeros_like": torch.zeros_like,
            "new_zeros": lambda x: x.new_zeros(x.shape),
            "full_like": lambda x: torch.full_like(x, 0.0),
            "empty_like": lambda x: torch.empty_like(x).zero_(),
        }[self.form](x)
        chosen = weights.argmax(-1)
        for k, expert in enumerate(self.experts):
            mine = chosen == k
            if not mine.any():
                continue
            if self.form in ("new_zeros", "empty_like"):
                out[mine] += weights[mine][:, k, None] * expert(x[mine])
            else:
                out = out + (mine.unsqueeze(-1) * weights[..., k, None]) * expert(x)
        return out


class MixtureLayer(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.experts = (
            nn.LayerNorm(WIDTH),
            Attention(),
            nn.LayerNorm(WIDTH),
            Experts(form),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.experts(self.norm2(x))


def mixture_by_hand(layer: MixtureLayer, hand: Streams, name: str, X: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.attn(layer.norm1(u)))
    return hand.site(f"{name}.mhc_1", X, lambda u: layer.experts(layer.norm2(u)))


class WritesToItsInput(nn.Module):
    """The first thing it does is to change what it was given, if that may be changed."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.position, self.form = nn.Parameter(torch.randn(5, WIDTH)), form
        self.layers = nn.ModuleList(sequential() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "x += p":
            x += self.position
        elif self.form == "mul_":
            x.mul_(2)
        elif self.form == "setitem":
            x[:, 0] = 1.0
        else:
            x.sub_(self.position).clamp_(-1, 1)
        for layer in self.layers:
            x = layer(x)
        return x


class InPlaceStage(nn.Module):
    """A stage of a ResNet whose relu is in place: after the add, or before the branch."""

    def __init__(self, first: bool, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.relu, self.first = nn.Conv2d(width, width, 3, padding=1), nn.ReLU(inplace=True), first

    def f(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.norm1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.relu(x)
            return x + self.conv2(self.relu(self.norm1(self.conv1(x))))
        out = self.conv2(self.relu(self.norm1(self.conv1(x))))
        out += x
        return self.relu(out)


class Stages(nn.Module):
    def __init__(self, first: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.stages = nn.Sequential(*(InPlaceStage(first) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


def stages_by_hand(model: Stages, hand: Streams, x: Tensor) -> Tensor:
    x = model.stem(x)
    X = hand.expand(F.relu(x) if model.stages[0].first else x)
    for k, stage in enumerate(model.stages):
        if k:
            X = hand.each(F.relu, X)
        X = hand.site(f"stages.{k}.mhc_0", X, stage.f)
    x = hand.collapse(X)
    return x if stage.first else F.relu(x)


def stages(first: bool, batch: int, size: int) -> Kind:
    return Kind(
        f"relu in place {'before' if first else 'after'}, {batch} of size {size}",
        lambda: Stages(first),
        lambda: (features(batch, 3, size, size),),
        stages_by_hand,
        (names("stages.{}", 3, 1),),
        channel_dim=1,
    )


KINDS = (
    *(
        Kind(
            f"{form} as block",
            stack_of("", lambda form=form: WithCallables(form), callables_by_hand, 1).build,
            lambda: (features(2, 5, WIDTH),),
            stack_of("", nn.Identity, callables_by_hand, 1).by_hand,
            (tuple(f"layers.{k}.sublayers.{j}.mhc_0" for k in range(2) for j in range(2)),),
        )
        for form in ("lambda", "method", "partial", "module")
    ),
    Kind(
        "trunk handed over twice",
        stack_of("", AddsToTheNorm, adds_to_the_norm_by_hand, 1).build,
        lambda: (features(2, 5, WIDTH),),
        stack_of("", AddsToTheNorm, adds_to_the_norm_by_hand, 1).by_hand,
        (tuple(f"layers.{k}.{part}.mhc_0" for k in range(2) for part in ("attn", "mlp")),),
    ),
    stack_of("a Sequential with an add", sequential, sequential_by_hand, 1, count=3),
    stack_of("a ModuleList with adds", lambda: ResidualList([MLP(), MLP()]), list_by_hand, 2),
    stack_of("a ModuleDict with adds", lambda: ResidualDict({"a": MLP(), "mlp": MLP()}), dict_by_hand, 3),
    Kind(
        "a root that is a ModuleList",
        lambda: ResidualList([MLP(0.1), MLP(), MLP()]),
        lambda: (features(2, 5, WIDTH),),
        lambda model, hand, x: hand.collapse(
            functools.reduce(lambda X, k: hand.site(f"mhc_{k}", X, model[k]), range(3), hand.expand(x))
        ),
        (("mhc_0", "mhc_1", "mhc_2"),),
    ),
    *(
        stack_of(f"experts in {form}", lambda form=form: MixtureLayer(form), mixture_by_hand, 2)
        for form in ("zeros_like", "new_zeros", "full_like", "empty_like")
    ),
    *(stages(first, batch, size) for first in (False, True) for batch, size in ((1, 5), (2, 5), (3, 1))),
)  # fmt: skip

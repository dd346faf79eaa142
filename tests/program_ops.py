"""Operations of random residual programs, each told twice: as Python text and as a function of tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, T, B = 8, 3, 2


class MLP(nn.Module):
    """A block as a module of its own: (..., C) -> (..., C)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, 12), nn.Linear(12, C)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Attention(nn.Module):
    """Attention with two heads as a module of its own: (B, T, C) -> (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (2, C // 2)).transpose(-2, -3) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(*heads)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


def angles() -> Tensor:
    """Rotary angles, (T, C), the same for both halves of the channels."""
    return torch.outer(torch.arange(1.0, T + 1), 1.0 / torch.arange(1.0, C // 2 + 1)).repeat(1, 2)


class Held(list):
    """What an operation may use besides its arguments: its attributes, and the program's other inputs e and mask."""

    e: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Op:
    """One operation, told twice.

    Attributes:
        text: Python lines, the last one an expression: {a}, {b} arguments, {0}, {1} ... attributes of the module,
            {x} the trunk's name, {t} a prefix of fresh names.
        value: (Held, arguments) -> result; written in another way than the text wherever there is one.
        makes: constructors of the attributes.
        tokens: needs the (B, T, C) layout, or the program's other inputs.
    """

    text: str
    value: Callable[..., Tensor]
    makes: tuple[str, ...] = ()
    tokens: bool = False


LINEAR, NORM, VECTOR = "nn.Linear(C, C)", "nn.LayerNorm(C)", "nn.Parameter(0.5 + torch.rand(C))"
SQUARE = "nn.Parameter(torch.randn({0}, {0}) / math.sqrt({0}))"
COS, SIN = "nn.Buffer(torch.cos(angles()))", "nn.Buffer(torch.sin(angles()))"


def linear(module: nn.Linear, a: Tensor) -> Tensor:
    return a @ module.weight.T + module.bias


def rotate(k: Held, a: Tensor) -> Tensor:
    half = C // 2
    turned = torch.complex(a[..., :half], a[..., half:]) * torch.complex(k[0][:, :half], k[1][:, :half])
    return torch.cat([turned.real, turned.imag], dim=-1)


def attend(k: Held, a: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(linear(m, a) for m in k), attn_mask=k.mask)


def inner_residual(k: Held, a: Tensor) -> Tensor:
    h = linear(k[0], a)
    return linear(k[2], h) + linear(k[2], linear(k[1], h)) - k[2].bias


# Mix features: each of these makes its argument a block's output. Nothing here or below grows faster than its argument:
# a chain of squares would leave the range of numbers.
MIXERS = {
    "linear": Op("{0}({a})", lambda k, a: linear(k[0], a), (LINEAR,)),
    "functional": Op("F.linear({a}, {0})", lambda k, a: a @ k[0].T, (SQUARE.format("C"),)),
    "matmul": Op("{a} @ {0}", lambda k, a: torch.einsum("...c,cd->...d", a, k[0]), (SQUARE.format("C"),)),
    "mlp": Op("{0}({a})", lambda k, a: linear(k[0].down, F.gelu(linear(k[0].up, a))), ("MLP()",)),
    "glu": Op(
        "{0}(torch.sigmoid({1}({a})) * {2}({a}))",
        lambda k, a: linear(k[0], linear(k[1], a).sigmoid() * linear(k[2], a)),
        (LINEAR,) * 3,
    ),
    "attention": Op("{0}({a})", lambda k, a: k[0](a), ("Attention()",)),
    "scores": Op(
        "{t}w = {0}({a}) @ {1}({a}).transpose(-2, -1) / math.sqrt(C) + mask\n{t}w.softmax(dim=-1) @ {2}({a})",
        attend,
        (LINEAR,) * 3,
        tokens=True,
    ),
    "tokens": Op("{0} @ {a}", lambda k, a: torch.einsum("ts,bsc->btc", k[0], a), (SQUARE.format("T"),), tokens=True),
}
# Look like residual adds and are none. Only what is safe after a block's last mixing operation stands in TAILS.
DECOYS = {
    "gelu_polynomial": Op(
        "0.5 * {a} * (1 + torch.tanh(math.sqrt(2 / math.pi) * ({a} + 0.044715 * {a} ** 3)))",
        lambda k, a: F.gelu(a, approximate="tanh"),
    ),
    "rope": Op("{a} * {0} + torch.cat((-{a}[..., C // 2 :], {a}[..., : C // 2]), -1) * {1}", rotate, (COS, SIN), True),
    "modulate": Op(
        "{a} * (1 + {0}(e)) + {1}(e)",
        lambda k, a: torch.addcmul(linear(k[1], k.e) + a, a, linear(k[0], k.e)),
        (LINEAR, LINEAR),
        tokens=True,
    ),
    "positions": Op("{a} + {0}", lambda k, a: a + k[0], ("nn.Parameter(torch.randn(T, C))",), tokens=True),
    "gating": Op(
        "{t}g = torch.sigmoid({0}({a}))\n{t}g * {a} + (1 - {t}g) * {1}({a})",
        lambda k, a: torch.lerp(linear(k[1], a), a, torch.sigmoid(linear(k[0], a))),
        (LINEAR, LINEAR),
    ),
    "self_modulate": Op(
        "{a} * (1 + torch.tanh({0}({a}))) + {1}({a})",
        lambda k, a: torch.addcmul(linear(k[1], a) + a, a, linear(k[0], a).tanh()),
        (LINEAR, LINEAR),
    ),
    "inner_residual": Op("{t}h = {0}({a})\n{t}h = {t}h + {1}({t}h)\n{2}({t}h)", inner_residual, (LINEAR,) * 3),
}
UNARY = {
    "relu": Op("F.relu({a})", lambda k, a: a.clamp(min=0)),
    "relu_module": Op("{0}({a})", lambda k, a: a.clamp(min=0), ("nn.ReLU()",)),
    "relu_": Op("F.relu({a}, inplace=True)", lambda k, a: a.clamp(min=0)),
    "tanh": Op("torch.tanh({a})", lambda k, a: a.tanh()),
    "norm": Op("{0}({a})", lambda k, a: F.layer_norm(a, (C,), k[0].weight, k[0].bias), (NORM,)),
    "times": Op("1.7 * {a}", lambda k, a: 1.7 * a),
    "halve": Op("{a} / 2", lambda k, a: 0.5 * a),
    "affine": Op("{0} * {a}", lambda k, a: a * k[0], (VECTOR,)),
    "cast": Op("{a}.to({x}.dtype)", lambda k, a: a),
    "double": Op("{a}.double()", lambda k, a: a),
    "contiguous": Op("{a}.contiguous()", lambda k, a: a),
    "dropout": Op("{0}({a})", lambda k, a: a, ("nn.Dropout(P)",)),
    "functional_dropout": Op("F.dropout({a}, P, self.training)", lambda k, a: a),
    "scalar_gate": Op("torch.sigmoid({0}) * {a}", lambda k, a: a * k[0].sigmoid(), ("nn.Parameter(torch.randn(()))",)),
    "adaln_gate": Op("{0}(e) * {a}", lambda k, a: a * linear(k[0], k.e), (LINEAR,), tokens=True),
    "own_gate": Op("torch.sigmoid({0}({a})) * {a}", lambda k, a: a * linear(k[0], a).sigmoid(), (LINEAR,)),
    "silu": Op("F.silu({a})", lambda k, a: a * a.sigmoid()),
    # The trunk as a list of tokens and back; T first and back. Both need the names b, t, c.
    "view": Op("{a}.view(b * t, c)", lambda k, a: a.flatten(0, 1)),
    "reshape": Op("{a}.reshape(-1, c)", lambda k, a: a.flatten(0, 1)),
    "flatten": Op("{a}.flatten(0, 1)", lambda k, a: a.flatten(0, 1)),
    "view_back": Op("{a}.view(b, t, c)", lambda k, a: a.unflatten(0, (B, T))),
    "reshape_back": Op("{a}.reshape(b, t, -1)", lambda k, a: a.unflatten(0, (B, T))),
    "unflatten_back": Op("{a}.unflatten(0, (b, t))", lambda k, a: a.unflatten(0, (B, T))),
    "transpose": Op("{a}.transpose(0, 1)", lambda k, a: a.movedim(0, 1)),
}
OTHER = {
    "read": Op("{x}", lambda k: None),
    "parallel": Op("{a} + {b}", lambda k, a, b: a + b),
}
OPS = MIXERS | DECOYS | UNARY | OTHER
TAILS = ("gelu_polynomial", "rope", "modulate", "norm", "times", "halve", "affine", "cast", "double",
         "dropout", "functional_dropout", "scalar_gate", "adaln_gate", "own_gate", "tanh")  # fmt: skip
# Results that are the argument itself, or share its memory: an in-place add shows through them.
SAME_TENSOR = ("cast", "double", "contiguous", "dropout", "functional_dropout")
# Need the names b, t, c of the trunk's sizes.
INTO_TOKENS = {"view", "reshape", "flatten"}

"""Three small models that the tests of "the converted model is still the model" share, and what they compare."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import family
from families_vision import lively
from family import output, seeded
from mhc_rewrite import mhcify
from oracle import perturb, site_names

TIGHT = 1e-10
WIDTH, VOCABULARY = 16, 31


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).flatten(2)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.checkpointing = False

    def forward(self, ids: Tensor, scale: float = 1.0) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return self.head(self.norm(x)) * scale


class Branching(nn.Module):
    """A block whose forward depends on values: it cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + float(x.amax()) * self.linear(x)


def gpt2() -> nn.Module:
    sizes = dict(n_embd=WIDTH, n_layer=3, n_head=2, n_positions=32, vocab_size=VOCABULARY)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def resnet18() -> nn.Module:
    return timm.create_model("resnet18", pretrained=False, num_classes=7, layers=(2, 1, 1, 1), channels=(64, 8, 8, 8))


def ids(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


@dataclass(frozen=True)
class Case:
    """A model; `inputs(large)` gives a call's keyword arguments, in another batch and length (size) where `large`."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[bool], dict[str, Any]]
    layers: tuple[str, ...]
    trunk_shape: tuple[int, ...]
    checkpointing: Callable[[nn.Module], object]

    def __str__(self) -> str:
        return self.name

    def original(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        with seeded(self.name):
            return lively(self.build()).to(dtype).eval()

    def example(self, dtype: torch.dtype = torch.float64, large: bool = False) -> dict[str, Any]:
        with seeded("inputs"):
            inputs = self.inputs(large)
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}

    def converted(self, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
        """Converted and perturbed."""
        model = mhcify(self.original(dtype), self.example(dtype), **fields)
        perturb(model)
        return model

    def run(self, model: nn.Module, large: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
        return output(model(**self.example(dtype, large)))


CASES = [
    Case(
        "gpt",
        GPT,
        lambda large: {"ids": ids(3, 9) if large else ids()},
        ("blocks.0", "blocks.1", "blocks.2"),
        (2, 6, WIDTH),
        lambda model: setattr(model, "checkpointing", True),
    ),
    Case(
        "gpt2",
        gpt2,
        lambda large: {"input_ids": ids(3, 9) if large else ids(), "use_cache": False},
        ("transformer.h.0", "transformer.h.1", "transformer.h.2"),
        (2, 6, WIDTH),
        lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),  # named so in all of 5
    ),
    Case(
        "resnet18",
        resnet18,
        lambda large: {"x": torch.randn(3, 3, 48, 40) if large else torch.randn(2, 3, 32, 32)},
        ("layer1.0", "layer1.1"),
        (2, 64, 8, 8),
        lambda model: model.set_grad_checkpointing(True),
    ),
]
GPT_CASE = CASES[0]


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest magnitude of `want`."""
    return family.relative(got.detach(), want.detach())


def sites_of(model: nn.Module) -> list[str]:
    """The names of a converted model's sites."""
    return site_names(model.state_dict())


def gradients(model: nn.Module, result: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    with seeded("weights of the loss"):
        (result * torch.randn_like(result)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys() and want
    floor = 1e-4 * max(float(g.abs().max()) for g in want.values())
    for name, gradient in want.items():
        assert float((got[name] - gradient).abs().max()) <= TIGHT * max(float(gradient.abs().max()), floor), name


HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a conversion could leave behind, bit for bit."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
    }
    for name, module in model.named_modules():
        state[f"{name} class"] = type(module)
        state[f"{name} attributes"] = {
            key: repr(value) if isinstance(value, (bool, int, float, str, type(None))) else id(value)
            for key, value in vars(module).items()
        }
        state[f"{name} hooks"] = {hooks: list(vars(module)[hooks].items()) for hooks in HOOKS if hooks in vars(module)}
        state[f"{name} children"] = {key: id(child) for key, child in module.named_children()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[f"{name} tensor"] = (id(tensor), tensor.requires_grad, tensor.detach().numpy().tobytes())
        state[f"{name} grad"] = None if tensor.grad is None else (id(tensor.grad), tensor.grad.numpy().tobytes())
    return state


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    different = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    assert not different, different

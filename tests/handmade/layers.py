"""Transformers: where the norms stand, who holds the add, who calls the layers, and how often."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handmade.common import (
    MLP,
    VOCABULARY,
    WIDTH,
    Attention,
    Kind,
    PreNorm,
    Stack,
    features,
    names,
    prenorm_by_hand,
    stack_of,
    tokens,
)
from oracle import Streams


class GPT(nn.Module):
    """nanoGPT. Its own forward reads the tokens' values, so that it can't be traced as a whole."""

    def __init__(self, layers: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(8, WIDTH)
        self.layers = nn.ModuleList([PreNorm(causal=True, dropout=dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        assert int(ids.max()) < VOCABULARY
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def gpt_by_hand(model: GPT, hand: Streams, ids: Tensor) -> Tensor:
    X = hand.expand(model.wte(ids) + model.wpe(torch.arange(ids.shape[1])))
    for number, layer in enumerate(model.layers):
        X = prenorm_by_hand(layer, hand, f"layers.{number}", X)
    return model.head(model.norm(hand.collapse(X)))


class PostNorm(nn.Module):
    """The layer of the first transformer: a norm after each add."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.norm1, self.mlp, self.norm2 = Attention(), nn.LayerNorm(WIDTH), MLP(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class PostNormStack(nn.Module):
    """Post-norm layers, nothing after the last."""

    def __init__(self, layer: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def postnorm_by_hand(model: PostNormStack, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        X = hand.site(f"layers.{number}.mhc_0", X, layer.attn)
        X = hand.each(layer.norm1, X)
        X = hand.site(f"layers.{number}.mhc_1", X, layer.mlp)
        if number < len(model.layers) - 1:
            X = hand.each(layer.norm2, X)
    return model.layers[-1].norm2(hand.collapse(X))


class Output(nn.Module):
    """BERT's: the add is in a child with two inputs."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(inner, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, hidden: Tensor, source: Tensor) -> Tensor:
        hidden = self.dense(hidden)
        return self.norm(hidden + source)


class Bert(nn.Module):
    """A post-norm layer whose two adds are in its children."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.attn_output = Attention(), Output(WIDTH)
        self.up, self.output = nn.Linear(WIDTH, 32), Output(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn_output(self.attn(x), x)
        return self.output(F.gelu(self.up(x)), x)


def bert_by_hand(model: PostNormStack, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        name = f"layers.{number}"
        X = hand.site(f"{name}.attn_output.mhc_0", X, lambda u, at=layer: at.attn_output.dense(at.attn(u)))
        X = hand.each(layer.attn_output.norm, X)
        X = hand.site(f"{name}.output.mhc_0", X, lambda u, at=layer: at.output.dense(F.gelu(at.up(u))))
        if number < len(model.layers) - 1:
            X = hand.each(layer.output.norm, X)
    return model.layers[-1].output.norm(hand.collapse(X))


class Cross(nn.Module):
    """A pre-norm decoder layer: three sites."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.self_attn = nn.LayerNorm(WIDTH), Attention(causal=True)
        self.norm2, self.cross_attn = nn.LayerNorm(WIDTH), Attention()
        self.norm3, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


def cross_by_hand(layer: Cross, hand: Streams, name: str, X: Tensor, memory: Tensor) -> Tensor:
    X = hand.site(f"{name}.mhc_0", X, lambda u: layer.self_attn(layer.norm1(u)))
    X = hand.site(f"{name}.mhc_1", X, lambda u: layer.cross_attn(layer.norm2(u), memory))
    return hand.site(f"{name}.mhc_2", X, lambda u: layer.mlp(layer.norm3(u)))


class EncoderDecoder(nn.Module):
    """T5's plan: an encoder's stream, a decoder's stream that reads what the encoder's became."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack([PreNorm() for _ in range(2)])
        self.decoder = Stack([Cross() for _ in range(2)])

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.decoder(target, self.encoder(source))


def encoder_decoder_by_hand(model: EncoderDecoder, hand: Streams, source: Tensor, target: Tensor) -> Tensor:
    X = hand.expand(source)
    for number, layer in enumerate(model.encoder.layers):
        X = prenorm_by_hand(layer, hand, f"encoder.layers.{number}", X)
    memory = model.encoder.norm(hand.collapse(X))
    X = hand.expand(target)
    for number, layer in enumerate(model.decoder.layers):
        X = cross_by_hand(layer, hand, f"decoder.layers.{number}", X, memory)
    return model.decoder.norm(hand.collapse(X))


class SharedLayer(nn.Module):
    """Universal transformer: one layer object, called three times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = PreNorm(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x)
        return self.norm(x)


def shared_by_hand(model: SharedLayer, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for _ in range(3):
        X = prenorm_by_hand(model.layer, hand, "layer", X)
    return model.norm(hand.collapse(X))


class Reused(nn.Module):
    """Two layers, called first, second, first: the first one begins the stream, and ends it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = PreNorm(), PreNorm(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.second(x)
        return self.norm(self.first(x))


def reused_by_hand(model: Reused, hand: Streams, x: Tensor) -> Tensor:
    X = hand.expand(x)
    for name in ("first", "second", "first"):
        X = prenorm_by_hand(getattr(model, name), hand, name, X)
    return model.norm(hand.collapse(X))


def torch_encoder(norm_first: bool) -> nn.Module:
    """torch's encoder without dropout."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)


def torch_decoder(norm_first: bool) -> nn.Module:
    """torch's decoder without dropout."""
    layer = nn.TransformerDecoderLayer(WIDTH, 2, 32, 0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))


def torch_transformer() -> nn.Module:
    """torch's encoder and decoder in one."""
    return nn.Transformer(WIDTH, 2, 2, 2, 32, 0.0, batch_first=True)


def torch_stack(model: nn.Module, hand: Streams, x: Tensor, prefix: str = "", memory: Tensor | None = None) -> Tensor:
    """A stack of torch's encoder layers, or of its decoder layers where there is a memory."""
    X = hand.expand(x)
    for number, layer in enumerate(model.layers):
        blocks = [lambda u, at=layer: at.self_attn(u, u, u)[0]]
        if memory is not None:
            blocks.append(lambda u, at=layer: at.multihead_attn(u, memory, memory)[0])
        blocks.append(lambda u, at=layer: at.linear2(at.activation(at.linear1(u))))
        norms = (
            [layer.norm1, layer.norm2, layer.norm3][: len(blocks)] if memory is not None else [layer.norm1, layer.norm2]
        )
        for k, (block, norm) in enumerate(zip(blocks, norms)):
            name = f"{prefix}layers.{number}.mhc_{k}"
            if layer.norm_first:
                X = hand.site(name, X, lambda u, block=block, norm=norm: block(norm(u)))
                continue
            X = hand.site(name, X, block)
            if (number, k) == (len(model.layers) - 1, len(blocks) - 1):
                return model.norm(norm(hand.collapse(X)))
            X = hand.each(norm, X)
    return model.norm(hand.collapse(X))


def torch_decoder_by_hand(model: nn.Module, hand: Streams, target: Tensor, memory: Tensor) -> Tensor:
    return torch_stack(model, hand, target, memory=memory)


def torch_transformer_by_hand(model: nn.Module, hand: Streams, source: Tensor, target: Tensor) -> Tensor:
    memory = torch_stack(model.encoder, hand, source, "encoder.")
    return torch_stack(model.decoder, hand, target, "decoder.", memory)


def excluded_by_hand(model: Stack, hand: Streams, x: Tensor) -> Tensor:
    X = prenorm_by_hand(model.layers[0], hand, "layers.0", hand.expand(x))
    X = hand.plain(X, lambda u: model.layers[1].attn(model.layers[1].norm1(u)))
    X = hand.site("layers.1.mhc_1", X, lambda u: model.layers[1].mlp(model.layers[1].norm2(u)))
    X = prenorm_by_hand(model.layers[2], hand, "layers.2", X)
    return model.norm(hand.collapse(X))


def excluding(excluded: frozenset[str]) -> Callable[..., Tensor]:
    """A `PostNormStack` without some sites: plain on the streams in the middle, outside of them before and after."""

    def run(model: PostNormStack, hand: Streams, x: Tensor) -> Tensor:
        sites = names("layers.{}", 2, 2)
        rewritten = [name for name in sites if name not in excluded]
        wide = False
        for number, name in enumerate(sites):
            layer = model.layers[number // 2]
            block, norm = (layer.mlp, layer.norm2) if number % 2 else (layer.attn, layer.norm1)
            if name == rewritten[0]:
                x, wide = hand.expand(x), True
            if name in rewritten:
                x = hand.site(name, x, block)
            else:
                x = hand.plain(x, block) if wide else x + block(x)
            if name == rewritten[-1]:
                x, wide = hand.collapse(x), False
            x = hand.each(norm, x) if wide else norm(x)
        return x

    return run


def postnorm_without(*excluded: str) -> Kind:
    """Post-norm with some sites left out; those at the ends are no part of the stream."""
    sites = names("layers.{}", 2, 2)
    inside = [k for k, name in enumerate(sites) if name not in excluded]
    stream = sites[inside[0] : inside[-1] + 1]
    return Kind(
        f"post-norm without {', '.join(excluded)}",
        lambda: PostNormStack(PostNorm),
        one,
        excluding(frozenset(excluded)),
        (stream,),
        options={"exclude": excluded},
        excluded=frozenset(excluded) & frozenset(stream),
    )


def two(length: int = 5, other: int = 7) -> tuple[Tensor, Tensor]:
    """Two inputs of different lengths."""
    return features(2, length, WIDTH), features(2, other, WIDTH)


def one() -> tuple[Tensor]:
    return (features(2, 5, WIDTH),)


KINDS = (
    Kind("nanogpt", GPT, lambda: (tokens(),), gpt_by_hand, (names("layers.{}", 3, 2),)),
    Kind("post-norm", lambda: PostNormStack(PostNorm), one, postnorm_by_hand, (names("layers.{}", 2, 2),)),
    Kind(
        "post-norm, add in a child",
        lambda: PostNormStack(Bert),
        one,
        bert_by_hand,
        (tuple(f"layers.{i}.{child}.mhc_0" for i in range(2) for child in ("attn_output", "output")),),
    ),
    Kind(
        "encoder-decoder",
        EncoderDecoder,
        two,
        encoder_decoder_by_hand,
        (names("encoder.layers.{}", 2, 2), names("decoder.layers.{}", 2, 3)),
    ),
    Kind("torch encoder, norm first", lambda: torch_encoder(True), one, torch_stack, (names("layers.{}", 2, 2),)),
    Kind("torch encoder, norm last", lambda: torch_encoder(False), one, torch_stack, (names("layers.{}", 2, 2),)),
    Kind(
        "torch decoder, norm first",
        lambda: torch_decoder(True),
        two,
        torch_decoder_by_hand,
        (names("layers.{}", 2, 3),),
    ),
    Kind(
        "torch decoder, norm last",
        lambda: torch_decoder(False),
        two,
        torch_decoder_by_hand,
        (names("layers.{}", 2, 3),),
    ),
    Kind(
        "torch transformer",
        torch_transformer,
        two,
        torch_transformer_by_hand,
        (names("encoder.layers.{}", 2, 2), names("decoder.layers.{}", 2, 3)),
    ),
    Kind("shared layer", SharedLayer, one, shared_by_hand, (("layer.mhc_0", "layer.mhc_1"),)),
    Kind(
        "layer reused", Reused, one, reused_by_hand, (("first.mhc_0", "first.mhc_1", "second.mhc_0", "second.mhc_1"),)
    ),
    Kind(
        "excluded, pre-norm",
        lambda: Stack([PreNorm() for _ in range(3)]),
        one,
        excluded_by_hand,
        (names("layers.{}", 3, 2),),
        options={"exclude": "layers.1.mhc_0"},
        excluded=frozenset({"layers.1.mhc_0"}),
    ),
    postnorm_without("layers.0.mhc_1"),
    postnorm_without("layers.0.mhc_1", "layers.1.mhc_0"),
    postnorm_without("layers.0.mhc_0", "layers.1.mhc_1"),
    stack_of("dropout in the branches", lambda: PreNorm(dropout=0.2), prenorm_by_hand, 2),
)

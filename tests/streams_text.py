"""transformers' text and speech families with n streams, written by hand in plain PyTorch.

`stack` replaces the forward of every layer of a fresh copy of the original. The layers' own submodules do the work of
the blocks; what a block reads, and where its result goes, is spelled out per kind of layer as steps in their order:
a step is one residual add, `x + branch(x)`, and `after` is what the original does to the sum.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import relu
from transformers.modeling_outputs import BaseModelOutput

from oracle import Params, Streams


class Step(NamedTuple):
    """One residual add of a layer: `after(x + branch(x))`."""

    branch: Callable[[Tensor], Tensor]
    after: Callable[[Tensor], Tensor] | None = None


class Call:
    """The arguments of one call of a layer, and what it returns beside its hidden states."""

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(forward).bind(None, *args, **kwargs)
        values = dict(bound.arguments)
        hidden, *_ = values
        del values[hidden]
        values.update(values.pop("kwargs", {}))
        self.arguments = values
        self.wrap: Callable[[Tensor], Any] = lambda hidden_states: hidden_states

    def without(self, *names: str) -> dict[str, Any]:
        """All arguments but the hidden states and `names`."""
        return {key: value for key, value in self.arguments.items() if key not in names}


Kind = Callable[[nn.Module, Call], list[Step]]


def streams_of(params: Mapping[str, Params]) -> Streams:
    """The site parameters as the scratch pad takes them; n from the n^2 + 2n biases."""
    state = {f"{name}.{field}": value for name, site in params.items() for field, value in site._asdict().items()}
    return Streams(state, math.isqrt(len(next(iter(params.values())).bias) + 1) - 1)


def run(streams: Streams, x: Tensor, steps: list[Step], names: tuple[str, ...], first: bool, last: bool) -> Tensor:
    """One layer: x is one stream in the first layer, n streams in the others, and one again behind the last site."""
    state = streams.expand(x) if first else x
    for index, (step, name) in enumerate(zip(steps, names, strict=True)):
        state = streams.site(name, state, step.branch)
        if last and index == len(steps) - 1:
            state = streams.collapse(state)
            return state if step.after is None else step.after(state)
        if step.after is not None:
            state = streams.each(step.after, state)
    return state


def stack(sides: Mapping[str, tuple[Kind, tuple[str, ...]]]) -> Callable[[nn.Module, dict[str, Params]], nn.Module]:
    """An oracle: {name of a list of layers: (kind of its layers, names of its sites in order)}, one stream each."""

    def oracle(model: nn.Module, params: dict[str, Params]) -> nn.Module:
        streams = streams_of(params)
        for path, (kind, sites) in sides.items():
            layers = list(model.get_submodule(path))
            each = len(sites) // len(layers)
            for index, layer in enumerate(layers):
                names = sites[index * each : (index + 1) * each]
                layer.forward = _forward(layer, kind, streams, names, index == 0, index == len(layers) - 1)
        return model

    return oracle


def _forward(
    layer: nn.Module, kind: Kind, streams: Streams, names: tuple[str, ...], first: bool, last: bool
) -> Callable[..., Any]:
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        # The hidden states come by name where a model passes everything so.
        if not args:
            hidden = next(iter(inspect.signature(original).parameters))
            args = (kwargs.pop(hidden),)
        call = Call(original, args[1:], kwargs)
        steps = kind(layer, call)
        return call.wrap(run(streams, args[0], steps, names, first, last))

    return forward


# Pre-norm: x + f(norm(x)), with a norm on the branch's result in some (Gemma), only there in others (OLMo-2).


def pre_norm(layer: Any, call: Call) -> list[Step]:
    """Llama and what was made after it: Qwen, Mistral, Phi-3, Mixtral, DeepSeek-V3, Starcoder2, Persimmon."""
    return [
        Step(lambda u: layer.self_attn(hidden_states=layer.input_layernorm(u), **call.arguments)[0]),
        Step(lambda u: layer.mlp(layer.post_attention_layernorm(u))),
    ]


def granite(layer: Any, call: Call) -> list[Step]:
    """The same, each branch times a constant."""
    return [Step(lambda u, step=step: layer.residual_multiplier * step.branch(u)) for step in pre_norm(layer, call)]


def sandwich(layer: Any, call: Call) -> list[Step]:
    """Gemma-2 and Gemma-3: a norm before and a norm behind each block, both on the branch."""

    def attention(u: Tensor) -> Tensor:
        y = layer.self_attn(hidden_states=layer.input_layernorm(u), **call.arguments)[0]
        return layer.post_attention_layernorm(y)

    def feed_forward(u: Tensor) -> Tensor:
        return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(u)))

    return [Step(attention), Step(feed_forward)]


def branch_norm(layer: Any, call: Call) -> list[Step]:
    """OLMo-2: only the norm behind each block."""
    return [
        Step(lambda u: layer.post_attention_layernorm(layer.self_attn(hidden_states=u, **call.arguments)[0])),
        Step(lambda u: layer.post_feedforward_layernorm(layer.mlp(u))),
    ]


def gpt2(layer: Any, call: Call) -> list[Step]:
    arguments = call.without("encoder_hidden_states", "encoder_attention_mask")
    return [Step(lambda u: layer.attn(layer.ln_1(u), **arguments)[0]), Step(lambda u: layer.mlp(layer.ln_2(u)))]


def gpt_neo(layer: Any, call: Call) -> list[Step]:
    call.wrap = _with_attention
    return gpt2(layer, call)


def opt(layer: Any, call: Call) -> list[Step]:
    """The original reshapes the trunk to (tokens, C) around the second block, which says nothing to the sites."""
    return [
        Step(lambda u: layer.self_attn(layer.self_attn_layer_norm(u), **call.without("use_cache"))[0]),
        Step(lambda u: layer.fc2(relu(layer.fc1(layer.final_layer_norm(u))))),
    ]


def neox(layer: Any, call: Call) -> list[Step]:
    return [
        Step(lambda u: layer.attention(layer.input_layernorm(u), **call.arguments)[0]),
        Step(lambda u: layer.mlp(layer.post_attention_layernorm(u))),
    ]


def falcon(layer: Any, call: Call) -> list[Step]:
    call.wrap = _with_attention
    return [
        Step(lambda u: layer.self_attention(layer.input_layernorm(u), **call.arguments)[0]),
        Step(lambda u: layer.mlp(layer.post_attention_layernorm(u))),
    ]


def mpt(layer: Any, call: Call) -> list[Step]:
    """The second add stands in the feed-forward module."""
    call.wrap = _with_attention
    arguments = {
        "position_bias": call.arguments["position_bias"],
        "attention_mask": call.arguments["attention_mask"],
        "past_key_values": call.arguments.get("layer_past"),
    }
    return [
        Step(lambda u: layer.attn(layer.norm_1(u), **arguments)[0]),
        Step(lambda u: layer.ffn.down_proj(layer.ffn.act(layer.ffn.up_proj(layer.norm_2(u))))),
    ]


def bloom(layer: Any, call: Call) -> list[Step]:
    """Both adds stand in the block's modules, which take the trunk as `residual`: given zeros they are the branch."""
    call.wrap = _with_attention
    return [
        Step(lambda u: layer.self_attention(layer.input_layernorm(u), u.new_zeros(u.shape), **call.arguments)[0]),
        Step(lambda u: layer.mlp(layer.post_attention_layernorm(u), u.new_zeros(u.shape))),
    ]


def mamba(layer: Any, call: Call) -> list[Step]:
    """Mamba and Mamba-2: one mixer a layer."""
    return [Step(lambda u: layer.mixer(layer.norm(u), **call.arguments))]


# Parallel: x + attn(norm(x)) + mlp(norm(x)), one site, both blocks read the same u.


def parallel(layer: Any, call: Call) -> list[Step]:
    """Phi, Cohere, StableLM: one norm for both."""

    def both(u: Tensor) -> Tensor:
        read = layer.input_layernorm(u)
        return layer.self_attn(hidden_states=read, **call.arguments)[0] + layer.mlp(read)

    return [Step(both)]


def neox_parallel(layer: Any, call: Call) -> list[Step]:
    """A norm for each."""
    attention, feed_forward = neox(layer, call)
    return [Step(lambda u: attention.branch(u) + feed_forward.branch(u))]


def gptj(layer: Any, call: Call) -> list[Step]:
    """GPT-J and CodeGen; from transformers 5.24 on, GPT-J's layers return their hidden states alone."""
    if inspect.signature(type(layer).forward).return_annotation is not Tensor:
        call.wrap = _with_attention

    def both(u: Tensor) -> Tensor:
        read = layer.ln_1(u)
        return layer.attn(hidden_states=read, **call.arguments)[0] + layer.mlp(read)

    return [Step(both)]


def falcon_parallel(layer: Any, call: Call) -> list[Step]:
    """One norm for both in the old architecture, a norm for each in the new one."""
    call.wrap = _with_attention

    def both(u: Tensor) -> Tensor:
        two_norms = hasattr(layer, "ln_attn")
        for_attention = layer.ln_attn(u) if two_norms else layer.input_layernorm(u)
        for_mlp = layer.ln_mlp(u) if two_norms else for_attention
        return layer.self_attention(for_attention, **call.arguments)[0] + layer.mlp(for_mlp)

    return [Step(both)]


# Post-norm: norm(x + f(x)). The norm is on the trunk, so it acts on each stream, behind the last site on the mean.


def bert(layer: Any, call: Call) -> list[Step]:
    """BERT, RoBERTa, ELECTRA: dense, add and norm stand in two-input children."""
    attention, out = layer.attention, layer.output
    return [
        Step(lambda u: attention.output.dense(attention.self(u, **call.arguments)[0]), attention.output.LayerNorm),
        Step(lambda u: out.dense(layer.intermediate(u)), out.LayerNorm),
    ]


def distilbert(layer: Any, call: Call) -> list[Step]:
    return [
        Step(lambda u: layer.attention(u, **call.arguments)[0], layer.sa_layer_norm),
        Step(lambda u: layer.ffn(u), layer.output_layer_norm),
    ]


def opt_post_norm(layer: Any, call: Call) -> list[Step]:
    """OPT-350m."""
    return [
        Step(lambda u: layer.self_attn(u, **call.without("use_cache"))[0], layer.self_attn_layer_norm),
        Step(lambda u: layer.fc2(relu(layer.fc1(u))), layer.final_layer_norm),
    ]


def albert(path: str, sites: tuple[str, str], calls: int) -> Callable[[nn.Module, dict[str, Params]], nn.Module]:
    """One layer, called several times: the first call expands, the last one collapses, all use the same parameters."""

    def oracle(model: nn.Module, params: dict[str, Params]) -> nn.Module:
        streams, layer, count = streams_of(params), model.get_submodule(path), [0]

        def attend(u: Tensor, mask: Tensor | None) -> Tensor:
            attention = layer.attention
            heads = (*u.shape[:-1], -1, attention.attention_head_size)
            q, k, v = (
                projection(u).view(heads).transpose(1, 2)
                for projection in (attention.query, attention.key, attention.value)
            )
            scores = q @ k.transpose(-1, -2) * attention.scaling
            if mask is not None:
                scores = scores + mask
            return attention.dense((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))

        def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
            call = count[0] % calls
            count[0] += 1
            steps = [
                Step(lambda u: attend(u, attention_mask), layer.attention.LayerNorm),
                Step(lambda u: layer.ffn_output(layer.activation(layer.ffn(u))), layer.full_layer_layer_norm),
            ]
            return run(streams, hidden_states, steps, sites, call == 0, call == calls - 1)

        layer.forward = forward
        return model

    return oracle


def wav2vec2(path: str, sites: tuple[str, ...]) -> Callable[[nn.Module, dict[str, Params]], nn.Module]:
    """The stream starts before the layers: the encoder adds a convolution to its input, and normalises the sum."""

    def oracle(model: nn.Module, params: dict[str, Params]) -> nn.Module:
        streams, encoder = streams_of(params), model.get_submodule(path)

        def forward(hidden_states: Tensor, **kwargs: Any) -> BaseModelOutput:
            steps = [Step(encoder.pos_conv_embed, encoder.layer_norm)]
            for layer in encoder.layers:
                steps.append(Step(lambda u, layer=layer: layer.attention(u)[0], layer.layer_norm))
                steps.append(Step(layer.feed_forward, layer.final_layer_norm))
            return BaseModelOutput(last_hidden_state=run(streams, hidden_states, steps, sites, True, True))

        encoder.forward = forward
        return model

    return oracle


# Encoder and decoder: a stream each; the decoder's cross-attention reads the encoder's collapsed output.


def t5(layer: Any, call: Call) -> list[Step]:
    """The first layer of a stack computes the position biases, the others receive them."""
    given = call.arguments
    biases: dict[str, Tensor | None] = {"self": None, "cross": None}
    attention, feed_forward = layer.layer[0], layer.layer[-1]

    def attend(u: Tensor) -> Tensor:
        y, biases["self"], _ = attention.SelfAttention(
            attention.layer_norm(u),
            mask=given.get("attention_mask"),
            position_bias=given.get("position_bias"),
            past_key_values=given.get("past_key_values"),
        )
        return y

    def attend_across(u: Tensor) -> Tensor:
        across = layer.layer[1]
        y, biases["cross"], _ = across.EncDecAttention(
            across.layer_norm(u),
            mask=given.get("encoder_attention_mask"),
            key_value_states=given["encoder_hidden_states"],
            position_bias=given.get("encoder_decoder_position_bias"),
            past_key_values=given.get("past_key_values"),
        )
        return y

    call.wrap = lambda hidden_states: (hidden_states, biases["self"], biases["cross"])
    steps = [Step(attend), Step(lambda u: feed_forward.DenseReluDense(feed_forward.layer_norm(u)))]
    return [steps[0], Step(attend_across), steps[1]] if layer.is_decoder else steps


def _feed_forward(layer: Any) -> Callable[[Tensor], Tensor]:
    return lambda u: layer.fc2(layer.activation_fn(layer.fc1(u)))


def _across(layer: Any, call: Call) -> Callable[[Tensor], Tensor]:
    given = call.arguments
    return lambda u: layer.encoder_attn(
        u,
        key_value_states=given["encoder_hidden_states"],
        attention_mask=given.get("encoder_attention_mask"),
        past_key_values=given.get("past_key_values"),
    )[0]


def _within(layer: Any, call: Call) -> Callable[[Tensor], Tensor]:
    given = {key: call.arguments[key] for key in ("attention_mask", "past_key_values") if key in call.arguments}
    return lambda u: layer.self_attn(u, **given)[0]


def whisper_encoder(layer: Any, call: Call) -> list[Step]:
    """Whisper and mBART: pre-norm."""
    within, feed_forward = _within(layer, call), _feed_forward(layer)
    return [
        Step(lambda u: within(layer.self_attn_layer_norm(u))),
        Step(lambda u: feed_forward(layer.final_layer_norm(u))),
    ]


def whisper_decoder(layer: Any, call: Call) -> list[Step]:
    across = _across(layer, call)
    attention, feed_forward = whisper_encoder(layer, call)
    return [attention, Step(lambda u: across(layer.encoder_attn_layer_norm(u))), feed_forward]


def bart_encoder(layer: Any, call: Call) -> list[Step]:
    """BART: post-norm."""
    return [Step(_within(layer, call), layer.self_attn_layer_norm), Step(_feed_forward(layer), layer.final_layer_norm)]


def bart_decoder(layer: Any, call: Call) -> list[Step]:
    attention, feed_forward = bart_encoder(layer, call)
    return [attention, Step(_across(layer, call), layer.encoder_attn_layer_norm), feed_forward]


def _with_attention(hidden_states: Tensor) -> tuple[Tensor, None]:
    """Layers that return their attention weights too, which nobody asked for here."""
    return hidden_states, None

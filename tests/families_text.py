"""The table of transformers' text and speech families: tiny, random weights, nothing downloaded.

Sites and streams are worked out from the modeling sources. `streams_text` runs each of them with n streams by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import streams_text as by_hand
from family import Family

VOCABULARY = 99
LAYERS = 3
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = SIZE | {"num_key_value_heads": 2}
OPENAI: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# The default, a grouped matrix product, knows no fp64.
LOOP = {"experts_implementation": "eager"}
EXPERTS = LOOP | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length))


def ids() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def pair() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(2, 5)}


def speech() -> dict[str, Tensor]:
    return {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": tokens(2, 5)}


def build(model: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    """() -> a model whose parameters are all random, norms and biases too: with gains of 1 and biases of 0 one norm
    could stand in for another unseen. Its modeling file is imported when it is built."""

    def built() -> nn.Module:
        made = getattr(hf, model)(getattr(hf, config)(**fields))
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.15)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return made

    return built


def names(pattern: str, per_layer: int, layers: int = LAYERS) -> tuple[str, ...]:
    """Site names of a stack: `pattern` takes the layer's index, the sites are counted within the layer."""
    return tuple(f"{pattern.format(i)}.mhc_{k}" for i in range(layers) for k in range(per_layer))


def child_names(pattern: str, children: tuple[str, ...], layers: int = LAYERS) -> tuple[str, ...]:
    """Site names of a stack whose adds stand in children of its layers; "" is the layer itself."""
    return tuple(f"{pattern.format(i)}{'.' * bool(child)}{child}.mhc_0" for i in range(layers) for child in children)


def decoder(
    name: str,
    model: str,
    layers: str,
    per_layer: int,
    kind: by_hand.Kind,
    *,
    config: str | None = None,
    **fields: Any,
) -> Family:
    """A row for a stack with one stream whose adds stand in the layers' own forwards."""
    made = build(model, config or model.removesuffix("ForCausalLM") + "Config", **fields)
    sites = names(layers + ".{}", per_layer)
    return Family(name, made, ids, per_layer * LAYERS, (sites,), by_hand.stack({layers: (kind, sites)}))


def post_norm_encoder(name: str, model: str, config: str, prefix: str) -> Family:
    """A row for BERT and its kin: the adds stand in two children of each layer."""
    layers = f"{prefix}.encoder.layer"
    sites = child_names(layers + ".{}", ("attention.output", "output"))
    made = build(model, config, **SIZE)
    return Family(name, made, ids, 2 * LAYERS, (sites,), by_hand.stack({layers: (by_hand.bert, sites)}))


def encoder_decoder(
    name: str,
    made: Callable[[], nn.Module],
    inputs: Callable[[], dict[str, Tensor]],
    sides: dict[str, tuple[by_hand.Kind, tuple[str, ...]]],
) -> Family:
    """A row with two streams."""
    streams = tuple(sites for _, sites in sides.values())
    return Family(name, made, inputs, sum(map(len, streams)), streams, by_hand.stack(sides))


def bart_like(
    name: str, model: str, config: str, kind_in: by_hand.Kind, kind_out: by_hand.Kind, **fields: Any
) -> Family:
    """A row whose encoder layers hold two adds and whose decoder layers hold three."""
    sides = {
        "model.encoder.layers": (kind_in, names("model.encoder.layers.{}", 2, 2)),
        "model.decoder.layers": (kind_out, names("model.decoder.layers.{}", 3, 2)),
    }
    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
    inputs = speech if "num_mel_bins" in fields else pair
    made = build(model, config, **(sizes | heads | ends | fields))
    return encoder_decoder(name, made, inputs, sides)


T5_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
WHISPER: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 64}
DEEPSEEK: dict[str, Any] = LOOP | {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MAMBA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "state_size": 8,
    "num_hidden_layers": LAYERS,
    "residual_in_fp32": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MAMBA_2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
FALCON = SIZE | {"alibi": False}
NEOX = SIZE | {"rotary_pct": 0.5}
GPTJ = OPENAI | {"rotary_dim": 4}


def t5(name: str, model: str, config: str, **fields: Any) -> Family:
    """A row for T5: every sublayer is a module that holds its own add."""
    sides = {
        "encoder.block": (by_hand.t5, child_names("encoder.block.{}", ("layer.0", "layer.1"), 2)),
        "decoder.block": (by_hand.t5, child_names("decoder.block.{}", ("layer.0", "layer.1", "layer.2"), 2)),
    }
    return encoder_decoder(name, build(model, config, **(T5_SIZE | fields)), pair, sides)


def gemma(name: str, model: str, config: str) -> Family:
    fields = GROUPED | {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    }
    return decoder(name, model, "model.layers", 2, by_hand.sandwich, config=config, **fields)


LISTED: tuple[Family, ...] = (
    decoder("GPT-2", "GPT2LMHeadModel", "transformer.h", 2, by_hand.gpt2, config="GPT2Config", **OPENAI),
    decoder("Llama", "LlamaForCausalLM", "model.layers", 2, by_hand.pre_norm, **GROUPED),
    decoder("Qwen3", "Qwen3ForCausalLM", "model.layers", 2, by_hand.pre_norm, head_dim=8, **GROUPED),
    decoder("Mistral", "MistralForCausalLM", "model.layers", 2, by_hand.pre_norm, sliding_window=4, **GROUPED),
    gemma("Gemma-2", "Gemma2ForCausalLM", "Gemma2Config"),
    gemma("Gemma-3", "Gemma3ForCausalLM", "Gemma3TextConfig"),
    decoder(
        "OPT", "OPTForCausalLM", "model.decoder.layers", 2, by_hand.opt, ffn_dim=48, word_embed_proj_dim=32, **SIZE
    ),
    decoder("GPT-NeoX parallel", "GPTNeoXForCausalLM", "gpt_neox.layers", 1, by_hand.neox_parallel, **NEOX),
    decoder("GPT-NeoX", "GPTNeoXForCausalLM", "gpt_neox.layers", 2, by_hand.neox, use_parallel_residual=False, **NEOX),
    decoder("GPT-J", "GPTJForCausalLM", "transformer.h", 1, by_hand.gptj, **GPTJ),
    decoder("Falcon parallel", "FalconForCausalLM", "transformer.h", 1, by_hand.falcon_parallel, **FALCON),
    decoder(
        "Falcon sequential", "FalconForCausalLM", "transformer.h", 2, by_hand.falcon, parallel_attn=False, **FALCON
    ),
    decoder(
        "Falcon new decoder",
        "FalconForCausalLM",
        "transformer.h",
        1,
        by_hand.falcon_parallel,
        new_decoder_architecture=True,
        num_kv_heads=2,
        **FALCON,
    ),
    decoder("Phi", "PhiForCausalLM", "model.layers", 1, by_hand.parallel, **SIZE),
    decoder("Phi-3", "Phi3ForCausalLM", "model.layers", 2, by_hand.pre_norm, **GROUPED),
    post_norm_encoder("BERT", "BertForMaskedLM", "BertConfig", "bert"),
    t5("T5", "T5ForConditionalGeneration", "T5Config"),
    bart_like(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        by_hand.whisper_encoder,
        by_hand.whisper_decoder,
        **WHISPER,
    ),
    decoder(
        "Mixtral", "MixtralForCausalLM", "model.layers", 2, by_hand.pre_norm, num_local_experts=4, **LOOP, **GROUPED
    ),
    decoder("Qwen3-MoE", "Qwen3MoeForCausalLM", "model.layers", 2, by_hand.pre_norm, head_dim=8, **EXPERTS, **GROUPED),
    decoder("DeepSeek-V3", "DeepseekV3ForCausalLM", "model.layers", 2, by_hand.pre_norm, **DEEPSEEK, **SIZE),
    decoder("Mamba", "MambaForCausalLM", "backbone.layers", 1, by_hand.mamba, **MAMBA),
    decoder("Mamba-2", "Mamba2ForCausalLM", "backbone.layers", 1, by_hand.mamba, **MAMBA_2, **MAMBA),
)


def albert() -> Family:
    """One layer, called `LAYERS` times: one set of parameters, each call its own place in the stream."""
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    sites = (f"{layer}.attention.mhc_0", f"{layer}.mhc_0")
    made = build("AlbertForMaskedLM", "AlbertConfig", embedding_size=16, **SIZE)
    return Family("ALBERT", made, ids, 2, (sites * LAYERS,), by_hand.albert(layer, sites, LAYERS))


def distilbert() -> Family:
    fields = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": LAYERS, "n_heads": 4}
    layers = "distilbert.transformer.layer"
    sites = names(layers + ".{}", 2)
    made = build("DistilBertForMaskedLM", "DistilBertConfig", max_position_embeddings=64, **fields)
    return Family("DistilBERT", made, ids, 2 * LAYERS, (sites,), by_hand.stack({layers: (by_hand.distilbert, sites)}))


def in_children(
    name: str, model: str, layers: str, children: tuple[str, ...], kind: by_hand.Kind, config: str, **fields: Any
) -> Family:
    """A row for stacks some of whose adds stand in two-input children of the layers."""
    sites = child_names(layers + ".{}", children)
    made = build(model, config, **fields)
    return Family(name, made, ids, len(children) * LAYERS, (sites,), by_hand.stack({layers: (kind, sites)}))


def wav2vec2() -> Family:
    """Speech, with a residual convolution of the encoder's own in front of the layers: `x + pos_conv_embed(x)`."""
    fields = {
        "conv_dim": (16, 16),
        "conv_kernel": (10, 3),
        "conv_stride": (5, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2,
        "layerdrop": 0.0,
    }
    encoder = "wav2vec2.encoder"
    sites = (f"{encoder}.mhc_0", *names(encoder + ".layers.{}", 2))
    made = build("Wav2Vec2ForCTC", "Wav2Vec2Config", **SIZE, **fields)

    def wave() -> dict[str, Tensor]:
        return {"input_values": torch.randn(2, 200)}

    return Family("Wav2Vec2", made, wave, 1 + 2 * LAYERS, (sites,), by_hand.wav2vec2(encoder, sites))


BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4}
MPT = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": LAYERS, "n_heads": 4, "expansion_ratio": 2}
GPT_NEO = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": LAYERS,
    "num_heads": 4,
    "attention_types": [[["global", "local", "global"], 1]],
    "window_size": 4,
}

OTHERS: tuple[Family, ...] = (
    bart_like("BART", "BartForConditionalGeneration", "BartConfig", by_hand.bart_encoder, by_hand.bart_decoder),
    bart_like(
        "mBART", "MBartForConditionalGeneration", "MBartConfig", by_hand.whisper_encoder, by_hand.whisper_decoder
    ),
    post_norm_encoder("RoBERTa", "RobertaForMaskedLM", "RobertaConfig", "roberta"),
    post_norm_encoder("XLM-R", "XLMRobertaForMaskedLM", "XLMRobertaConfig", "roberta"),
    post_norm_encoder("ELECTRA", "ElectraForPreTraining", "ElectraConfig", "electra"),
    distilbert(),
    albert(),
    decoder("OLMo-2", "Olmo2ForCausalLM", "model.layers", 2, by_hand.branch_norm, **GROUPED),
    decoder("Cohere", "CohereForCausalLM", "model.layers", 1, by_hand.parallel, **GROUPED),
    decoder("StableLM", "StableLmForCausalLM", "model.layers", 2, by_hand.pre_norm, **GROUPED),
    decoder(
        "StableLM parallel",
        "StableLmForCausalLM",
        "model.layers",
        1,
        by_hand.parallel,
        use_parallel_residual=True,
        **GROUPED,
    ),
    decoder("Granite", "GraniteForCausalLM", "model.layers", 2, by_hand.granite, residual_multiplier=0.7, **GROUPED),
    decoder("Starcoder2", "Starcoder2ForCausalLM", "model.layers", 2, by_hand.pre_norm, **GROUPED),
    decoder("Qwen2", "Qwen2ForCausalLM", "model.layers", 2, by_hand.pre_norm, **GROUPED),
    decoder("Persimmon", "PersimmonForCausalLM", "model.layers", 2, by_hand.pre_norm, **SIZE),
    decoder("GPT-Neo", "GPTNeoForCausalLM", "transformer.h", 2, by_hand.gpt_neo, **GPT_NEO),
    decoder("CodeGen", "CodeGenForCausalLM", "transformer.h", 1, by_hand.gptj, **GPTJ),
    in_children(
        "BLOOM", "BloomForCausalLM", "transformer.h", ("self_attention", "mlp"), by_hand.bloom, "BloomConfig", **BLOOM
    ),
    in_children("MPT", "MptForCausalLM", "transformer.blocks", ("", "ffn"), by_hand.mpt, "MptConfig", **MPT),
    decoder(
        "OPT post-norm",
        "OPTForCausalLM",
        "model.decoder.layers",
        2,
        by_hand.opt_post_norm,
        ffn_dim=48,
        word_embed_proj_dim=16,
        do_layer_norm_before=False,
        **SIZE,
    ),
    decoder("Gemma", "GemmaForCausalLM", "model.layers", 2, by_hand.pre_norm, head_dim=8, **GROUPED),
    decoder("Nemotron", "NemotronForCausalLM", "model.layers", 2, by_hand.pre_norm, **GROUPED),
    decoder("OLMoE", "OlmoeForCausalLM", "model.layers", 2, by_hand.pre_norm, **EXPERTS, **GROUPED),
    bart_like("Marian", "MarianMTModel", "MarianConfig", by_hand.bart_encoder, by_hand.bart_decoder),
    wav2vec2(),
    t5("Flan-T5", "T5ForConditionalGeneration", "T5Config", feed_forward_proj="gated-gelu", tie_word_embeddings=False),
)

TEXT: tuple[Family, ...] = LISTED + OTHERS
BY_NAME: dict[str, Family] = {family.name: family for family in TEXT}

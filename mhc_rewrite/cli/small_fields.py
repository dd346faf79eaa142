"""The fields of a config, small: fewer words, layers, experts and heads, and what hangs together still does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

HEADS, LAYERS, VOCABULARY, EXPERTS, WIDTH, QUERIES = 4, 4, 512, 16, 128, 16
MOST_LAYERS, FRAMES, MOST_ALIKE, SHARED, PATCHES, SIDE_PATCHES, FILTERS = 12, 64, 4, 2, 16, 4, 8
Heads = int | None | Literal["evenly"]

_LAYERS = re.compile(r"(^|_)(layers?|depth|num_blocks|attends_per_block)$")
_SHARED = re.compile(r"kv_shared_layers$")  # whose keys are those of layers before them
_HEADS = re.compile(r"(^|_)(n_heads?|num_heads|attention_heads)$")
_KV_HEADS = re.compile(r"(^|_)(key_value_heads|kv_heads|head_kv|kv_n_heads)$")
_EXPERTS = re.compile(r"(^|_)(n|num|moe_num)_(routed_|local_)?experts$")
_EXPERTS_A_TOKEN = re.compile(r"experts_per_tok$|^top_k_experts$")
_WIDTHS = re.compile(
    r"((hidden|intermediate|coordinate|shape)_size|(hidden|embed|proj|ffn|mlp)_dim|_width|n_embd|n_inner)$"
)
_WIDTH_NAMES = ("d_model", "d_ff", "dim", "emb_dim", "embedding_size", "ffn_hidden_size")
_VOCABULARY = re.compile(r"^vocab_size|_vocab$")
_LAYER_TYPES = re.compile(r"layers?_(block_)?types?$|^layers_block_type$|^layer_kinds$")
_MAIN_WIDTHS = ("hidden_size", "d_model", "hidden_dim", "embed_dim", "n_embd")
_LANGUAGE = r"^(text|language|llm|thinker|decoder|lm)(_config|_model_config)?$"
_HANDED_OVER = re.compile(
    r"^(encoder|vision|image|audio|speech|text|llm|language|lm|decoder|backbone|cross_attention|qformer|out|output|input)"
    r"_(hidden_size|hidden_dim|dim|embed_dim|d_model|width)$|^projection_dim$"
)
_TO_LANGUAGE = re.compile(r"^(out|output|text|llm|language|lm)_(hidden_size|hidden_dim|dim|embed_dim|d_model)$")
_TOKEN_IDS = re.compile(r"_token_(id|index)$")
_CLIP = re.compile(r"^(num_frames|frames_per_clip)$")
_TAPPED = re.compile(r"hook_ids$|^out_indices$|feature_layers?$|^intermediate_layers_indices$")
_STAGES = ("depths", "hidden_sizes")
_CHANNELS = {"base_channels": 32, "upsample_initial_channel": 128}  # those that are multiplied, or halved, by stages
_PLACEHOLDERS = re.compile(r"^(image|video|audio)_token_(id|index)$")
_FIRST_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def small_fields(config: Any, *, shallow: bool = True, heads: Heads = HEADS) -> dict[str, Any]:
    """Keyword arguments that make a config of the same class small.

    Fewer words; with `shallow` fewer layers and experts; with `heads` no more heads than those. What one head has is
    left as it is, and every width shrinks in proportion to the heads: relations like `heads * head_dim == expand *
    hidden_size` hold. With `heads="evenly"` all shrinks by one factor, in all parts: so do relations between parts.
    """
    return _small_fields(config, shallow, heads, _factor(config))


def _small_fields(config: Any, shallow: bool, heads: Heads, factor: int) -> dict[str, Any]:
    fields = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    parts = {
        name: sub
        for name in getattr(type(config), "sub_configs", {})
        if (sub := getattr(config, name, None)) is not None and hasattr(sub, "to_dict")
    }
    small: dict[str, Any] = {
        name: part_fields(sub, _small_fields(sub, shallow, heads, factor)) for name, sub in parts.items()
    }
    depth = _depth(config, fields)
    if any(_SHARED.search(name) for name, _ in _numbers(fields)):
        depth += SHARED  # behind those that have one of each kind
    for name, value in _numbers(fields):
        if _SHARED.search(name) and shallow:
            small[name] = min(value, SHARED)
        elif _LAYERS.search(name) and "feat_extract" not in name and shallow:
            small[name] = min(value, depth)
        elif _EXPERTS.search(name) and shallow:
            small[name] = min(value, EXPERTS)
        elif _VOCABULARY.search(name):
            small[name] = min(value, VOCABULARY)
        elif name in ("num_queries", "num_latents") and shallow:
            small[name] = min(value, QUERIES)
        elif name == "num_filters" and "depths" in fields and heads is not None:
            small[name] = min(value, FILTERS)  # doubled by each of many stages
        elif name in _CHANNELS and heads is not None:
            small[name] = min(value, _CHANNELS[name])
        elif name == "num_patches" and shallow:  # in all, or, where the patch has no size of its own, along a side
            small[name] = min(value, PATCHES if "patch_size" in fields else SIDE_PATCHES)
        elif shallow and name in ("max_img_size", "visual_prompt_size"):  # a picture, and its frame
            small[name] = value // SIDE_PATCHES
        elif name == "max_source_positions" and shallow:
            small[name] = min(value, FRAMES)
        elif shallow and (name.endswith("tokens_per_image") or _CLIP.search(name)):
            small[name] = min(value, 4)
    if fields.get("vocab_size", 0) is None:
        small["vocab_size"] = VOCABULARY
    small |= {name: 2 for name, value in fields.items() if value is None and _EXPERTS_A_TOKEN.search(name)}
    if shallow and (side := _side(fields.get("image_size"))):
        patch = _patch(fields)
        if patch or "patch_size" not in fields:  # of convolutions, any side that can be halved is one
            side = min(side, 4 * (patch or PATCHES))
            small["image_size"] = side if isinstance(fields["image_size"], int) else [side, side]
    if shallow and isinstance(architecture := fields.get("architecture"), str) and "model_args" in fields:
        small["model_args"] = {**_of_timm(architecture), **(fields["model_args"] or {})} or None
    if shallow and isinstance(times := fields.get("depth_coefficient"), float):
        small["depth_coefficient"] = min(times, 1.0)
    if shallow and "num_mel_bins" in fields and isinstance(longest := fields.get("max_length"), int):
        small["max_length"] = min(longest, 2 * FRAMES)
    if shallow and isinstance(depths := fields.get("depths"), (list, tuple)):
        # A stage of a residual network begins with a projection: three layers leave two adds that follow one another.
        most = 3 if "layer_type" in fields else 2
        small["depths"] = [min(depth, most) for depth in depths]
    if heads is not None:
        counts = {value: small[name] for name, value in _numbers(fields) if _LAYERS.search(name) and name in small}
        for name, value in _narrow_fields(config, fields, heads, factor).items():
            small[name] = value[: counts.get(len(value))] if isinstance(value, list) else value
    if shallow:
        small |= _kinds_of_layers(config, fields, depth)
    if shallow and isinstance(of_layers := fields.get("per_layer_config"), dict):  # what is small now is so in each
        small["per_layer_config"] = {
            key: {name: one for name, one in value.items() if name not in small} if isinstance(value, dict) else value
            for key, value in of_layers.items()
            if int(key) < depth
        }
    for name, value in fields.items():
        if (
            name.endswith("feature_sizes")
            and isinstance(value, (list, tuple))
            and (ratio := _picture_ratio(parts, small))
        ):
            small[name] = [[max(1, round(side * ratio)) for side in size] for size in value]
    for name, value in fields.items():  # numbers of layers whose states are read
        if _TAPPED.search(name) and isinstance(value, (list, tuple)) and max(value, default=0) > LAYERS and shallow:
            small[name] = [layer * LAYERS // (max(value) + 1) for layer in value]
            small |= {"out_features": None} if "out_features" in fields else {}  # their names
    for part, inner in parts.items():  # pictures that are cut into ones of a part's size
        if isinstance(size := fields.get("patch_size"), int) and size == getattr(inner, "image_size", None):
            small["patch_size"] = small[part].get("image_size", size)
    if heads != "evenly":
        _agree(config, parts, small)
    if words := small.get("vocab_size", _words(small)):
        small |= token_ids(fields, words)
    # What is small already is made as it always is: not all configs take what they give out.
    return {name: value for name, value in small.items() if name not in parts or value != part_fields(parts[name], {})}


def _patch(fields: Mapping[str, Any]) -> int | None:
    """The patch into which a picture is cut, where it is cut once: a pyramid needs a size that it can halve."""
    patch = fields.get("patch_size", fields.get("tubelet_size"))
    if isinstance(patch, (list, tuple)) and patch:
        patch = patch[-1]
    return patch if isinstance(patch, int) and not any(name in fields for name in _STAGES) else None


def _side(size: Any) -> int | None:
    """The side of a square picture."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return size if isinstance(size, int) else None


def _of_timm(architecture: str) -> dict[str, Any]:
    """What makes a model of timm small, where it is a stack of equal layers on patches of one size."""
    try:
        import timm

        with torch.device("meta"):
            small: dict[str, Any] = {"depth": LAYERS}
            model: Any = timm.create_model(architecture, **small)
            small["img_size"] = 4 * model.patch_embed.patch_size[-1]
            timm.create_model(architecture, **small)
    except Exception:  # no such options, or no timm
        return {}
    return small


def _picture_ratio(parts: Mapping[str, Any], small: Mapping[str, Any]) -> float | None:
    """How much smaller the pictures of a part have become."""
    for name, part in parts.items():
        before, after = _side(getattr(part, "image_size", None)), _side(small[name].get("image_size"))
        if before and after:
            return after / before
    return None


def _depth(config: Any, fields: Mapping[str, Any]) -> int:
    """How many layers have one of each kind: a hybrid's first layers may all be of one."""
    depth = LAYERS
    for _, _, kinds in _layer_types(config, fields):
        depth = max(depth, *(kinds.index(kind) + 1 for kind in kinds))
    return min(depth, MOST_LAYERS)


def _layer_types(config: Any, fields: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Options that say of which kind each layer is, with the one that says how many there are."""
    layers = {value: name for name, value in _numbers(fields) if _LAYERS.search(name)}
    for name in (name for name in dir(config) if _LAYER_TYPES.search(name)):
        kinds = getattr(config, name)
        if isinstance(kinds, (list, tuple)) and len(kinds) in layers and all(isinstance(kind, str) for kind in kinds):
            yield name, layers[len(kinds)], list(kinds)


def more_layers(config: Any) -> Iterator[tuple[str, Any]]:
    """Options for as many layers as a small model may have, of the kinds that the first of the config are."""
    fields = config.to_dict()
    for name, number, kinds in _layer_types(config, fields):
        yield number, min(len(kinds), MOST_LAYERS)
        if name in fields:
            yield name, kinds[:MOST_LAYERS]


def _kinds_of_layers(config: Any, fields: Mapping[str, Any], depth: int) -> dict[str, list[str]]:
    """The kinds of the first layers, where the config does not make them from the number of layers."""
    found = {}
    for name, number, kinds in _layer_types(config, fields):
        if name in fields and len(kinds) > depth:
            try:
                made = len(getattr(type(config)(**{number: depth}), name))
            except Exception:  # it says that they are not as many
                made = len(kinds)
            if made == len(kinds):
                found[name] = kinds[:depth]
    return found


def part_fields(config: Any, small: Mapping[str, Any]) -> dict[str, Any]:
    """A config inside another as fields: small, and with what the outer one chose for it."""
    usual = type(config)().to_dict()
    chosen = {k: v for k, v in _labelled(config.to_dict()).items() if k not in usual or usual[k] != v}
    sizes = {value: small[name] for name, value in _numbers(config.to_dict()) if _LAYERS.search(name) and name in small}
    for name, value in chosen.items():
        if isinstance(value, (list, tuple)) and len(value) in sizes:  # one entry a layer
            chosen[name] = value[: sizes[len(value)]]
    return {**chosen, **small, "model_type": config.model_type}


def _labelled(fields: dict[str, Any]) -> dict[str, Any]:
    """Without a number of labels that is None: configs give it out and do not take it."""
    inner = {k: _labelled(v) if isinstance(v, dict) else v for k, v in fields.items()}
    return {k: v for k, v in inner.items() if k not in ("num_labels", "num_classes") or v is not None}


def _agree(config: Any, parts: Mapping[str, Any], small: dict[str, Any]) -> None:
    """The widths at which one part of a config hands over to another.

    What had the width of another part has it again; what leads to the language model has its width.
    """
    changed: dict[int, int] = {}
    width: int | None = None
    for name, whole, fields in (*((n, parts[n], small[n]) for n in parts), ("", config, small)):
        for field in _MAIN_WIDTHS:
            if isinstance(before := getattr(whole, field, None), int) and isinstance(fields.get(field), int):
                changed.setdefault(before, fields[field])
                if re.search(_LANGUAGE, name) or (not name and width is None):
                    width = fields[field]
                break
    for whole, fields in (*((parts[n], small[n]) for n in parts), (config, small)):
        for field, before in _numbers(whole.to_dict()):
            if (
                width is not None
                and fields is not small
                and (re.search(_TO_LANGUAGE, field) or (field == "hidden_size" and hasattr(whole, "embed_dim")))
            ):
                fields[field] = width
            elif before in changed and re.search(_HANDED_OVER, field):
                fields[field] = changed[before]


def _numbers(fields: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    return ((k, v) for k, v in fields.items() if isinstance(v, int) and not isinstance(v, bool) and v > 0)


def _words(small: Mapping[str, Any]) -> int | None:
    nested = (v.get("vocab_size") for v in small.values() if isinstance(v, dict))
    return next((words for words in nested if words), None)


def _factor(config: Any) -> int:
    """The power of two that divides the heads of all parts."""
    parts = [config, *(getattr(config, name, None) for name in getattr(type(config), "sub_configs", {}))]
    heads = [value for part in parts if hasattr(part, "to_dict") for name, value in _numbers(part.to_dict())
             if _HEADS.search(name) and value > 1]  # fmt: skip
    return math.gcd(MOST_ALIKE, *heads)


def _narrow_fields(config: Any, fields: Mapping[str, Any], most: Heads, factor: int) -> dict[str, Any]:
    """Heads and widths; none for a pyramid, whose widths and heads are lists: those are small enough."""
    aliases = getattr(config, "attribute_map", {})
    if any(isinstance(fields.get(name), (list, tuple)) for name in (*_STAGES, "num_heads", "embed_dim")):
        return {}
    width = fields.get(aliases.get("hidden_size", "hidden_size"))
    heads = fields.get(aliases.get("num_attention_heads", "num_attention_heads"), fields.get("num_heads"))
    if not isinstance(most, int):
        heads = heads if isinstance(heads, int) else 0
        return _scaled(fields, 1, factor, max(1, heads // factor), heads)
    if not isinstance(width, int) or width <= WIDTH:
        return {}
    if not isinstance(heads, int) or heads <= 1 or width % heads:
        narrow = _scaled(fields, WIDTH, width, None, None)
        if fields.get("head_dim") is None and WIDTH % narrow.get("num_attention_heads", 1):
            narrow["num_attention_heads"] = HEADS
        return narrow
    # Two heads rather than four where one head alone is wide, as in Gemma.
    few = min(heads, most if width // heads <= WIDTH else most // 2)
    narrow = _scaled(fields, few, heads, few, heads)
    # Left open by default, and some models read them as they are.
    missing = {"head_dim": width // heads, "num_key_value_heads": few}
    return narrow | {name: value for name, value in missing.items() if name in fields and fields[name] is None}


def _scaled(
    fields: Mapping[str, Any], numerator: int, denominator: int, few: int | None, heads: int | None
) -> dict[str, Any]:
    """Widths times a ratio, and heads, of which there were `heads` and are `few`, where their number is known."""
    narrow: dict[str, Any] = {}
    evenly = numerator == 1
    for name, value in _numbers(fields):
        if _KV_HEADS.search(name):
            least = min(2, few or numerator)
            narrow[name] = value if value == 1 else few or numerator if value == heads else least
        elif _HEADS.search(name):
            narrow[name] = value if heads is None else max(1, value * numerator // denominator)
        elif name.endswith("n_groups"):
            narrow[name] = min(value, few or numerator)
        elif name.endswith("width") and name.removesuffix("width") + "height" in fields:
            continue  # of a picture
        elif (_WIDTHS.search(name) or name in _WIDTH_NAMES or (evenly and _HANDED_OVER.search(name))) and value > 8:
            narrow[name] = _times(value, numerator, denominator)
    layers = {value for name, value in _numbers(fields) if _LAYERS.search(name)}
    for name, value in fields.items():
        if _WIDTHS.search(name) and isinstance(value, (list, tuple)) and len(value) in layers:  # one a layer
            narrow[name] = [_times(one, numerator, denominator) for one in value]
    return narrow


def _times(width: int, numerator: int, denominator: int) -> int:
    exact = width * numerator / denominator
    return int(exact) if exact == int(exact) else max(8, round(exact / 8) * 8)


def token_ids(fields: Mapping[str, Any], words: int) -> dict[str, Any]:
    """Ids of special tokens that lie beyond the smaller vocabulary, brought inside it, each its own."""
    ids: dict[str, Any] = {}
    free = words - 1
    for name, value in fields.items():
        if value is None and _PLACEHOLDERS.search(name):
            value = words
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if _TOKEN_IDS.search(name) and isinstance(first, int) and first >= words:
            ids[name] = _FIRST_IDS.get(name, free)
            free -= name not in _FIRST_IDS
    return ids

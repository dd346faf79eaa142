"""Small models of any transformers model type, with random weights: nothing is downloaded."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.errors import ExampleInputsError

HEADS, LAYERS, VOCABULARY, EXPERTS, WIDTH, SMALL = 4, 4, 512, 16, 128, 8
MOST_LAYERS, FRAMES = 12, 64
MAX_PARAMETERS, LARGE = 500_000_000, 60_000_000

_LAYERS = re.compile(r"(^|_)(layers?|depth|num_blocks)$")
_HEADS = re.compile(r"(^|_)(n_heads?|num_heads|attention_heads)$")
_KV_HEADS = re.compile(r"(^|_)(key_value_heads|kv_heads|head_kv|kv_n_heads)$")
_EXPERTS = re.compile(r"(^|_)(n|num|moe_num)_(routed_|local_)?experts$")
_WIDTHS = re.compile(
    r"((hidden|intermediate|coordinate|shape)_size|(hidden|embed|proj|ffn|mlp)_dim|_width|n_embd|n_inner)$"
)
_WIDTH_NAMES = ("d_model", "d_ff", "dim", "emb_dim", "embedding_size", "ffn_hidden_size")
_LAYER_TYPES = re.compile(r"layers?_(block_)?types?$|^layers_block_type$|^layer_kinds$")
_MAIN_WIDTHS = ("hidden_size", "d_model", "hidden_dim", "embed_dim", "n_embd")
_LANGUAGE = r"^(text|language|llm|thinker|decoder|lm)(_config|_model_config)?$"
_HANDED_OVER = re.compile(
    r"^(encoder|vision|image|audio|speech|text|llm|language|lm|decoder|backbone|cross_attention|qformer|out|output|input)"
    r"_(hidden_size|hidden_dim|dim|embed_dim|d_model|width)$|^projection_dim$"
)
_TO_LANGUAGE = re.compile(r"^(out|output|text|llm|language|lm)_(hidden_size|hidden_dim|dim|embed_dim|d_model)$")
_TOKEN_IDS = re.compile(r"_token_(id|index)$")
_STAGES = ("depths", "hidden_sizes")
_PLACEHOLDERS = re.compile(r"^(image|video|audio)_token_(id|index)$")
_FIRST_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def small_fields(config: Any, *, shallow: bool = True, heads: int | None = HEADS) -> dict[str, Any]:
    """Keyword arguments that make a config of the same class small.

    Fewer words; with `shallow` fewer layers and experts; with `heads` no more heads than those. What one head has is
    left as it is, and every width shrinks in proportion to the heads: relations like `heads * head_dim == expand *
    hidden_size` hold.
    """
    fields = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    parts = {
        name: sub
        for name in getattr(type(config), "sub_configs", {})
        if (sub := getattr(config, name, None)) is not None and hasattr(sub, "to_dict")
    }
    small: dict[str, Any] = {
        name: _part(sub, small_fields(sub, shallow=shallow, heads=heads)) for name, sub in parts.items()
    }
    depth = _depth(config, fields)
    for name, value in _numbers(fields):
        if _LAYERS.search(name) and "feat_extract" not in name and shallow:
            small[name] = min(value, depth)
        elif _EXPERTS.search(name) and shallow:
            small[name] = min(value, EXPERTS)
        elif name == "vocab_size":
            small[name] = min(value, VOCABULARY)
        elif name == "max_source_positions" and shallow:
            small[name] = min(value, FRAMES)
        elif name.endswith("tokens_per_image") and shallow:
            small[name] = min(value, 4)
    if fields.get("vocab_size", 0) is None:
        small["vocab_size"] = VOCABULARY
    if fields.get("num_experts_per_tok", 0) is None:
        small["num_experts_per_tok"] = 2
    if shallow and _one_size(fields):
        small["image_size"] = min(fields["image_size"], 4 * fields["patch_size"])
    if shallow and isinstance(depths := fields.get("depths"), (list, tuple)):
        small["depths"] = [min(depth, 2) for depth in depths]
    if heads is not None:
        small |= _narrow_fields(config, fields, heads)
    _agree(config, parts, small)
    if words := small.get("vocab_size", _words(small)):
        small |= _token_ids(fields, words)
    return small


def _one_size(fields: Mapping[str, Any]) -> bool:
    """Whether a picture is cut into patches once: a pyramid needs a size that it can halve."""
    sizes = (fields.get("image_size"), fields.get("patch_size"))
    return all(isinstance(size, int) for size in sizes) and not any(name in fields for name in _STAGES)


def _depth(config: Any, fields: Mapping[str, Any]) -> int:
    """How many layers have one of each kind: a hybrid's first layers may all be of one."""
    depth = LAYERS
    layers = {value for name, value in _numbers(fields) if _LAYERS.search(name)}
    for name in (name for name in dir(config) if _LAYER_TYPES.search(name)):
        kinds = getattr(config, name)
        if isinstance(kinds, (list, tuple)) and len(kinds) in layers and all(isinstance(kind, str) for kind in kinds):
            depth = max(depth, *(kinds.index(kind) + 1 for kind in kinds))
    return min(depth, MOST_LAYERS)


def _part(config: Any, small: Mapping[str, Any]) -> dict[str, Any]:
    """A config inside another as fields: small, and with what the outer one chose for it."""
    usual = type(config)().to_dict()
    chosen = {k: v for k, v in config.to_dict().items() if k not in usual or usual[k] != v}
    sizes = {value: small[name] for name, value in _numbers(config.to_dict()) if _LAYERS.search(name) and name in small}
    for name, value in chosen.items():
        if isinstance(value, (list, tuple)) and len(value) in sizes:  # one entry a layer
            chosen[name] = value[: sizes[len(value)]]
    return {**chosen, **small, "model_type": config.model_type}


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


def _narrow_fields(config: Any, fields: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Heads and widths; none for a pyramid, whose widths and heads are lists: those are small enough."""
    aliases = getattr(config, "attribute_map", {})
    if any(isinstance(fields.get(name), (list, tuple)) for name in (*_STAGES, "num_heads", "embed_dim")):
        return {}
    width = fields.get(aliases.get("hidden_size", "hidden_size"))
    heads = fields.get(aliases.get("num_attention_heads", "num_attention_heads"), fields.get("num_heads"))
    if not isinstance(width, int) or width <= WIDTH:
        return {}
    if isinstance(heads, int) and heads > 1 and width % heads == 0:
        # Two heads rather than four where one head alone is wide, as in Gemma.
        numerator, denominator = min(heads, most if width // heads <= WIDTH else most // 2), heads
    else:
        heads, numerator, denominator = None, WIDTH, width
    narrow: dict[str, Any] = {}
    for name, value in _numbers(fields):
        if _KV_HEADS.search(name):
            narrow[name] = value if value == 1 else numerator if value == heads else min(2, numerator)
        elif _HEADS.search(name):
            narrow[name] = max(1, value * numerator // denominator) if heads else value
        elif name.endswith("n_groups"):
            narrow[name] = min(value, numerator)
        elif (_WIDTHS.search(name) or name in _WIDTH_NAMES) and value > 8:
            exact = value * numerator / denominator
            narrow[name] = int(exact) if exact == int(exact) else max(8, round(exact / 8) * 8)
    if heads:
        # Left open by default, and some models read them as they are.
        missing = {"head_dim": width // heads, "num_key_value_heads": numerator}
        narrow |= {name: value for name, value in missing.items() if name in fields and fields[name] is None}
    elif fields.get("head_dim") is None and WIDTH % narrow.get("num_attention_heads", 1):
        narrow["num_attention_heads"] = HEADS
    return narrow


def _token_ids(fields: Mapping[str, Any], words: int) -> dict[str, Any]:
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


def apply_overrides(config: Any, fields: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with the user's values; `text_config.hidden_size` reaches into a part of the config.

    Raises:
        UsageError: the config has no such option.
    """
    merged = dict(fields)
    for key, value in overrides.items():
        name, _, rest = key.partition(".")
        if rest and name in getattr(config, "sub_configs", {}):
            merged[name] = apply_overrides(getattr(config, name), merged.get(name, {}), {rest: value})
            continue
        known = sorted({*config.to_dict(), *getattr(config, "attribute_map", {})})
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else f" It has: {', '.join(known)}."
            raise UsageError(f"--config {key}: {type(config).__name__} has no such option.{hint}")
        merged[getattr(config, "attribute_map", {}).get(key, key)] = value
    return merged


def build(model_type: str, overrides: Mapping[str, Any]) -> Any:
    """A small model of a transformers model type, in eval mode.

    Raises:
        UsageError: an unknown type or option, or a config that the model does not accept.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        hint = f" Did you mean {' or '.join('hf:' + name for name in near)}?" if near else ""
        raise UsageError(f"transformers knows no model type {model_type!r}.{hint}")
    config_class = CONFIG_MAPPING[model_type]
    try:
        default = config_class()
    except ModuleNotFoundError:
        raise
    except Exception as error:
        raise UsageError(f"hf:{model_type}: {config_class.__name__} has no defaults ({_first_line(error)}).") from error
    failure: Exception | None = None
    built: Any = None
    for shallow, heads in _WAYS:
        fields = apply_overrides(default, small_fields(default, shallow=shallow, heads=heads), overrides)
        for _ in range(4):
            try:
                model = _made(config_class(**fields), MAX_PARAMETERS if built is None else LARGE)
            except ModuleNotFoundError:  # the installation, not the config
                raise
            except Exception as error:
                failure = failure or error
                if not (missing := _left_open(default, fields, str(error))):
                    break
                fields |= dict.fromkeys(missing, SMALL)
                continue
            if _runs(model):
                return model
            built = built or model
            break
    if built is not None:
        return built
    assert failure is not None
    raise UsageError(
        f"hf:{model_type}: no small model of this type could be built: {_first_line(failure)}. "
        "Set sizes that fit with --config key=value, or write a function that returns the model: path/file.py:function."
    ) from failure


# Whether there are fewer layers, and how many heads: the first that gives a model that runs.
_WAYS = ((True, HEADS), (True, HEADS + 2), (True, 2 * HEADS), (True, None), (False, HEADS), (False, None))


def _runs(model: Any) -> bool:
    """Whether some example runs through it: the parts of a config may contradict each other once they are small."""
    try:
        example_call(model, None)
    except ExampleInputsError:
        return False
    return True


def _left_open(default: Any, fields: Mapping[str, Any], message: str) -> list[str]:
    """Options that an error names and that nobody has given a value: lengths, mostly."""
    values = {**default.to_dict(), **fields}
    return [name for name in re.findall(r"`(\w+)`", message) if name in values and values[name] is None]


def _made(config: Any, most: int) -> Any:
    import torch

    if config.architectures is None:  # a type with several classifiers iterates over it
        config.architectures = []
    make = maker(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in make().parameters())
    if size > most:
        raise ValueError(f"it would have {size:,} parameters; make it smaller with --config")
    return make().eval()


def maker(config: Any) -> Callable[[], Any]:
    """Makes a model of a config, by transformers' Auto classes or, of a part of a larger model, by its own class."""
    auto = auto_class(config)
    if auto is not None:
        return lambda: auto.from_config(copy.deepcopy(config))
    package = type(config).__module__.replace("configuration_", "modeling_")
    module = importlib.import_module(package)
    kinds: list[Any] = [
        kind
        for kind in vars(module).values()
        if inspect.isclass(kind) and getattr(kind, "config_class", None) is type(config) and kind.__module__ == package
        and not kind.__name__.endswith("PreTrainedModel")
    ]  # fmt: skip
    if not kinds:
        raise ValueError(f"no class of {package} is made from a {type(config).__name__} alone")
    return lambda: kinds[0](copy.deepcopy(config))


def auto_class(config: Any) -> Any:
    """The transformers Auto class for a config: a language model, an image classifier, the base model, else any."""
    import transformers as hf
    from transformers.models.auto import modeling_auto

    order: tuple[Any, ...]
    if getattr(config, "is_encoder_decoder", False):
        order = (hf.AutoModelForSeq2SeqLM, hf.AutoModelForSpeechSeq2Seq)
    elif getattr(config, "is_decoder", False):
        order = (hf.AutoModelForCausalLM,)
    else:
        # An encoder such as BERT also has a causal class, which wants is_decoder: the masked one comes first.
        order = (hf.AutoModelForMaskedLM, hf.AutoModelForCausalLM, hf.AutoModelForImageClassification)
    others = [auto for name, auto in vars(modeling_auto).items() if name.startswith("Auto") and inspect.isclass(auto)]
    order = (*order, hf.AutoModel, *(auto for auto in others if hasattr(auto, "_model_mapping")))
    return next((auto for auto in order if type(config) in auto._model_mapping), None)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__

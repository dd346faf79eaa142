"""Small models of any transformers model type, with random weights: nothing is downloaded."""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mhc_rewrite.capture.examples.arguments import Arguments
from mhc_rewrite.capture.examples.search import search
from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.cli.small_fields import HEADS, Heads, part_fields, small_fields
from mhc_rewrite.cli.small_repairs import repair, repair_run

MAX_PARAMETERS, LARGE = 500_000_000, 100_000_000
REPAIRS, TRIALS, SECONDS, ALL_SECONDS = 9, 14, 5.0, 25.0  # the last two for one config, and for all of them


def apply_overrides(config: Any, fields: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with the user's values; `text_config.hidden_size` reaches into a part of the config.

    Raises:
        UsageError: the config has no such option.
    """
    merged = dict(fields)
    for key, value in overrides.items():
        name, _, rest = key.partition(".")
        if rest and name in getattr(config, "sub_configs", {}):
            part = getattr(config, name)
            merged[name] = apply_overrides(part, merged.get(name, part_fields(part, {})), {rest: value})
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
    running: Any = None
    end = time.monotonic() + ALL_SECONDS
    for shallow, heads in _WAYS:
        if built is not None and time.monotonic() > end:
            break
        fields = apply_overrides(default, small_fields(default, shallow=shallow, heads=heads), overrides)
        most = MAX_PARAMETERS if built is None else LARGE
        for _ in range(REPAIRS):
            try:
                model = _made(config_class(**fields), most)
            except (ModuleNotFoundError, UsageError):  # the installation, or the type, and not the config
                raise
            except ImportError as error:
                raise UsageError(f"hf:{model_type}: {_first_line(error)}") from error
            except Exception as error:
                failure = failure or error
                if not repair(default, fields, error):
                    break
                continue
            built = built or model
            ran, errors = _tried(model)
            if ran:
                running = model
            if not errors or not repair_run(default, fields, errors):
                break
        if running is not None:
            return running
    if built is not None:
        return built
    assert failure is not None
    nor = ", nor one of its default config" if _fails(default) else ""
    raise UsageError(
        f"hf:{model_type}: no small model of this type could be built{nor}: {_first_line(failure)}. "
        "Set sizes that fit with --config key=value, or write a function that returns the model: path/file.py:function."
    ) from failure


# Whether there are fewer layers, and how many heads: the first that gives a model that runs.
_WAYS: tuple[tuple[bool, Heads], ...] = (
    (True, HEADS), (True, "evenly"), (True, HEADS + 2), (True, 2 * HEADS), (True, None), (False, HEADS), (False, None),
)  # fmt: skip


def _tried(model: Any) -> tuple[bool, list[str]]:
    """Whether an example runs, and the errors before it: parts of a config may contradict each other once small."""
    arguments = Arguments(model)
    found, errors = search(model, arguments.starts(), arguments, TRIALS, SECONDS)
    return found is not None, errors


def _fails(config: Any) -> bool:
    try:
        with torch.device("meta"):
            maker(config)
    except Exception:
        return True
    return False


def _made(config: Any, most: int) -> Any:
    if config.architectures is None:  # a type with several classifiers iterates over it
        config.architectures = []
    make, size = maker(config)
    if size > most:
        raise ValueError(f"it would have {size:,} parameters; make it smaller with --config")
    return make().eval()


def maker(config: Any) -> tuple[Callable[[], Any], int]:
    """What makes a model of a config, and how many parameters it has: the first class that accepts the config."""
    failure: Exception | None = None
    for make in _makers(config):
        try:
            with torch.device("meta"):
                return make, sum(p.numel() for p in make().parameters())
        except ImportError:
            raise
        except Exception as error:
            failure = failure or error
    raise failure or UsageError(
        f"hf:{config.model_type}: {type(config).__name__} is of a part of another model, and no model is made of it. "
        "Name the model that it is a part of."
    )


def _makers(config: Any) -> Iterator[Callable[[], Any]]:
    """By transformers' Auto classes, or, of a part of a larger model, by its own classes, with a forward first."""
    kinds = [*auto_classes(config), *sorted(_own_classes(config), key=lambda kind: kind.forward is nn.Module.forward)]
    for kind in kinds:
        make = getattr(kind, "from_config", kind)
        yield functools.partial(_from, make, config)


def _from(make: Callable[[Any], Any], config: Any) -> Any:
    return make(copy.deepcopy(config))


def _own_classes(config: Any) -> Iterator[Any]:
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    for _, name, _ in pkgutil.iter_modules(package.__path__):
        if name.startswith("modeling_"):
            module = importlib.import_module(f"{package.__name__}.{name}")
            for kind in vars(module).values():
                if inspect.isclass(kind) and kind.__module__ == module.__name__:
                    mine = getattr(kind, "config_class", None) is type(config)
                    if mine and "PreTrainedModel" not in kind.__name__:
                        yield kind


def auto_classes(config: Any) -> list[Any]:
    """transformers' Auto classes for a config: a language model, an image classifier, the base model, then any."""
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
    return [auto for auto in dict.fromkeys(order) if type(config) in auto._model_mapping]


def _first_line(error: Exception) -> str:
    text = [line.strip() for line in str(error).strip().splitlines()]
    while len(text) > 1 and text[0].endswith(":"):  # "Class validation error for ...:", and what it is
        text[:2] = [f"{text[0]} {text[1]}"]
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__

"""`from_pretrained` of a converted model: built with its sites in place, then loaded as any other."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import find_adapter_config_file

from mhc_rewrite.conversion.converted import sites_in_use
from mhc_rewrite.conversion.install import is_converted
from mhc_rewrite.errors import MHCError, SitesError
from mhc_rewrite.hf.config_file import KEY, conversion_in, unmark
from mhc_rewrite.lifecycle.saved_plan import SavedPlan, install_saved, renamed

_SITE_TENSOR = re.compile(r"(^|\.)(mhc_\d+)\.(phi|alpha|bias|_extra_state)$")
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")


class ConvertedConfig(PreTrainedConfig):
    """What `auto_map` names: gives the configuration of the original, with its conversion."""

    model_type = "mhc_rewrite"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=True, **kwargs)


def register() -> None:
    """Makes transformers' loading know conversions."""
    read_file = PreTrainedConfig._dict_from_json_file  # what every way to read a configuration goes through
    from_pretrained = PreTrainedModel.from_pretrained
    from_config: Any = PreTrainedModel._from_config

    @functools.wraps(read_file)
    def reading(cls: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        data = read_file.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]
        return unmark(data) if KEY in data else data

    @functools.wraps(from_pretrained)
    def loading(
        cls: Any, path: Any, *args: Any, config: Any = None, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        saved = _conversion(path, config, kwargs)
        model, info = from_pretrained.__func__(  # type: ignore[attr-defined]
            _with_sites(cls, saved) if saved else cls,
            path, *args, config=config, output_loading_info=True, **kwargs,
        )  # fmt: skip
        _finish(model, info, path)
        return (model, info) if output_loading_info else model

    @functools.wraps(from_config)
    def building(cls: Any, config: Any, **kwargs: Any) -> Any:
        saved = getattr(config, KEY, None)
        if saved is not None:
            cls, config = _with_sites(cls, conversion_in(saved)), copy.deepcopy(config)
        return from_config.__func__(cls, config, **kwargs)

    PreTrainedConfig._dict_from_json_file = classmethod(reading)  # type: ignore[assignment, method-assign]
    PreTrainedModel.from_pretrained = classmethod(loading)  # type: ignore[assignment, method-assign]
    PreTrainedModel._from_config = classmethod(building)  # type: ignore[assignment, method-assign]


def _conversion(path: Any, config: Any, kwargs: dict[str, Any]) -> SavedPlan | None:
    """The conversion in a configuration, or in that of the folder where none was given."""
    if isinstance(config, PreTrainedConfig):
        saved = getattr(config, KEY, None)
    else:
        place = path if config is None else config
        saved = None if place is None else _read(place, {k: kwargs[k] for k in _WHERE if k in kwargs}).get(KEY)
    return None if saved is None else conversion_in(saved)


def _read(place: Any, where: dict[str, Any]) -> dict[str, Any]:
    """A `config.json`; an adapter's is its base model's. Empty where there is none, as transformers will say."""
    with contextlib.suppress(OSError, ValueError):
        if data := PreTrainedConfig.get_config_dict(place, **where)[0]:
            return data
    with contextlib.suppress(OSError, ValueError, KeyError):
        adapter = find_adapter_config_file(place, **where)
        if adapter is not None:
            base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
            return PreTrainedConfig.get_config_dict(base)[0]
    return {}


def _with_sites(kind: Any, saved: SavedPlan) -> Any:
    """A model class whose instances are built with their sites, and are of the class itself from then on."""

    def __init__(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        config.__dict__.pop(KEY, None)  # what is converted knows it by itself
        kind.__init__(self, config, *args, **kwargs)
        self.__class__ = kind
        install_saved(self, fitted(saved, self))

    namespace = {"__init__": __init__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), namespace)


def fitted(saved: SavedPlan, model: PreTrainedModel) -> SavedPlan:
    """A conversion by the names of a model with another head than the one that was converted, or with none.

    Streams of parts that such a model does not have (a decoder, where only the encoder is loaded) are left out.

    Raises:
        SitesError: none of its streams is in the model.
    """
    if type(model).__name__ == saved.kind:
        return saved
    names = {name for name, _ in model.named_modules()}
    prefix = model.base_model_prefix

    def with_prefix(name: str) -> str:
        return f"{prefix}.{name}" if name else prefix

    def without_prefix(name: str) -> str | None:
        return "" if name == prefix else name[len(prefix) + 1 :] if name.startswith(prefix + ".") else None

    def existing(way: Callable[[str], str | None], name: str) -> str | None:
        new = way(name)
        return new if new in names else None

    found = []
    for way in (lambda name: name, without_prefix, with_prefix):
        with contextlib.suppress(SitesError):
            found.append(renamed(saved, functools.partial(existing, way)))
    if not found:
        raise SitesError(
            f"This checkpoint is a converted {saved.kind}, and none of its residual streams is in "
            f"{type(model).__name__}. Load it as {saved.kind}."
        )
    return max(found, key=lambda other: len(other.plan.streams))


def _finish(model: PreTrainedModel, info: dict[str, Any], path: Any) -> None:
    """Starts the sites that the checkpoint did not have, and says which sites of it the model has no place for."""
    if getattr(model.config, KEY, None) is not None:
        raise MHCError(f"{path!r} is converted and was read as something else; load the model's own folder.")
    missing = set(info["missing_keys"])
    for name, site in sites_in_use(model).items():
        if any(f"{name}.{field}" in missing for field, _ in site.named_parameters()):
            site.reset_parameters()
        site.__dict__.pop("_extra_state", None)  # where transformers puts what it did not find
    lost = {key.rpartition(".")[0] for key in info["unexpected_keys"] if _SITE_TENSOR.search(key)}
    if lost and not is_converted(model):  # one that is has those that it can have
        names = sorted(lost)
        warnings.warn(
            f"{path!r} holds {len(names)} sites of mhc_rewrite that this {type(model).__name__} has no place for "
            f"({', '.join(names[:3])}, ...): they were left out, and it computes something else than the converted "
            "model. Load it with the configuration of the same folder.",
            stacklevel=4,
        )

"""From what the user typed to a model: `hf:`, `timm:`, `module:callable` or `file.py:callable`."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from mhc_rewrite.cli.errors import CommandError, UsageError

FORMS = "hf:gpt2, timm:resnet18, package.module:callable or path/file.py:callable"
# Command -> extra that brings it.
EXTRAS = {"transformers": "hf", "timm": "vision"}


def load(spec: str, settings: Sequence[str] = ()) -> tuple[Any, Any]:
    """The model of a SPEC, and its example inputs or None. `settings` are `key=value` texts.

    Raises:
        UsageError: no such SPEC, model or option.
        CommandError: a library or the user's callable failed.
    """
    options = parse_settings(settings)
    kind, colon, rest = spec.partition(":")
    if not colon or not rest:
        raise UsageError(f"{spec!r} is no model. Write {FORMS}.{_near_forms(spec)}")
    if kind == "hf":
        return load_transformers(rest, options), None
    if kind == "timm":
        return load_timm(rest, options), None
    return load_callable(spec, options)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """`["n_layer=2", "activation=relu"]` -> `{"n_layer": 2, "activation": "relu"}`: Python literals, or one bare word.

    Raises:
        UsageError: no `key=value`, or a value that is neither.
    """
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key or not text:
            raise UsageError(f"--config takes key=value, such as --config num_hidden_layers=2, not {setting!r}.")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            if literal := {"true": "True", "false": "False", "none": "None", "null": "None"}.get(text.lower()):
                raise UsageError(f"--config {setting}: write {key}={literal}, as in Python.") from None
            if not re.fullmatch(r"[A-Za-z_][\w./-]*", text):
                raise UsageError(f"--config {setting}: {text!r} is not a Python literal.") from None
            options[key] = text
    return options


def load_transformers(model_type: str, options: Mapping[str, Any]) -> Any:
    """A small, randomly initialised transformers model."""
    _import("transformers")
    from mhc_rewrite.cli.small import build

    try:
        return build(model_type, options)
    except ModuleNotFoundError as error:  # transformers imports a model's file, and all that it needs, only now
        raise _broken("transformers", error) from error


def load_timm(name: str, options: Mapping[str, Any]) -> Any:
    """A randomly initialised timm model."""
    timm = _import("timm")
    if name not in (known := timm.list_models()) and name.split(".")[0] not in known:
        raise UsageError(f"timm knows no model {name!r}.{_did_you_mean(name, known, 'timm:')}")
    try:
        return timm.create_model(name, pretrained=False, **options).eval()
    except TypeError as error:
        if not options:
            raise
        raise UsageError(f"timm:{name} does not take these --config options: {error}") from error


def load_callable(spec: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model that a module's or a file's callable returns, with its example inputs if it returns a pair."""
    from torch import nn

    place, _, path = spec.rpartition(":")
    module = _load_file(place) if place.endswith(".py") or os.sep in place else _load_module(place)
    made: Any = module
    for name in path.split("."):
        if not hasattr(made, name):
            known = [known for known in vars(made) if not known.startswith("_")] if hasattr(made, "__dict__") else []
            raise UsageError(f"{place} has no {path!r}.{_did_you_mean(name, known, place + ':')}")
        made = getattr(made, name)
    if isinstance(made, nn.Module):
        if options:
            raise UsageError(f"{spec} is a model already; --config is for callables that take keyword arguments.")
    elif callable(made):
        _check_call(made, spec, options)
        try:
            made = made(**options)
        except Exception as error:
            _raise_failed(f"{spec} failed", error)
    inputs = None
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"{spec} gives {_a(made)}, not a model. It should be a torch.nn.Module, or a callable that returns one, "
            "or the pair (model, example_inputs)."
        )
    if inputs is not None and not isinstance(inputs, (dict, tuple)):
        raise UsageError(
            f"{spec} gives example inputs of type {type(inputs).__name__}; "
            "a dict of keyword arguments or a tuple of positional ones is wanted."
        )
    return made, inputs


def _check_call(function: Any, spec: str, options: Mapping[str, Any]) -> None:
    try:
        inspect.signature(function).bind(**options)
    except ValueError:  # no signature to be had
        return
    except TypeError as error:
        raise UsageError(f"{spec} cannot be called with {dict(options) or 'no arguments'}: {error}.") from error


def _load_file(place: str) -> ModuleType:
    path = Path(place)
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")], n=3)
        hint = f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
        raise UsageError(f"There is no file {place}.{hint}")
    # What `python file.py` does: the file's own folder comes first, so that it can import its neighbours.
    sys.path.insert(0, str(path.resolve().parent))
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_file"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{place} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        _raise_failed(f"{place} could not be run", error)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except Exception as error:
        missing = getattr(error, "name", None)
        if isinstance(error, ModuleNotFoundError) and missing and (name == missing or name.startswith(missing + ".")):
            hint = f"A model is given as {FORMS}.{_near_forms(name)}"
            raise UsageError(f"There is no module {missing!r}. {hint}") from error
        _raise_failed(f"{name} could not be imported", error)


def _import(library: str) -> Any:
    """A model library, or an error that says how to get it."""
    if library == "transformers":
        _leave_out_broken_torchvision()
    try:
        return importlib.import_module(library)
    except Exception as error:
        raise _broken(library, error) from error


def _leave_out_broken_torchvision() -> None:
    """transformers works without torchvision, but not beside one that was built for another torch."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        return
    except RuntimeError:  # its operators do not load
        sys.modules["torchvision"] = None  # type: ignore[assignment]


def _broken(library: str, error: BaseException) -> CommandError:
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    install = f'pip install "mhc-rewrite[{EXTRAS[library]}]"'
    if isinstance(root, ModuleNotFoundError) and root.name == library:
        return CommandError(f"{library} is not installed. Install it with: {install}")
    message = f"{library} is installed but cannot be imported: {type(root).__name__}: {root}."
    if "torchvision" in str(root):
        message += (
            "\nThe installed torchvision was built for another torch. Take both from one package index, with: "
            'pip install --force-reinstall "mhc-rewrite[vision]"; without torchvision, hf: models work too.'
        )
    else:
        message += f"\nInstall the tested version with: {install}"
    return CommandError(message)


def _raise_failed(what: str, error: Exception) -> NoReturn:
    """The user's own code failed: the exception and its line, without the frames between."""
    message = f"{what}: {type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        message = f"{what}: {type(error).__name__}: {error.msg} ({error.filename}:{error.lineno})"
    elif frames := traceback.extract_tb(error.__traceback__):
        message += f"\n  at {frames[-1].filename}:{frames[-1].lineno} `{frames[-1].line}`"
    raise CommandError(message) from error


def _near_forms(text: str) -> str:
    """The prefix that is missing, where the name alone says which."""
    if re.fullmatch(r"[\w.-]+", text) is None:
        return ""
    if text.endswith(".py"):
        return f" Name the function in the file: {text}:function."
    if text.partition(":")[0] == text and text.isidentifier():
        return f" Did you mean hf:{text} or timm:{text}?"
    return ""


def _did_you_mean(name: str, known: Sequence[str], prefix: str) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(prefix + n for n in near)}?" if near else ""


def _a(thing: Any) -> str:
    return "None" if thing is None else f"a {type(thing).__name__}"

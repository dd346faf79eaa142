"""What an error says of the fields of a config: what was left open, and what does not add up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from mhc_rewrite.capture.examples.lessons import failing_lines

SMALL = 8


def repair(default: Any, fields: dict[str, Any], error: Exception) -> bool:
    """Gives values to the options that an error names and that nobody has given one. Whether there were any."""
    values = {**default.to_dict(), **fields}
    changes = {name: SMALL for name in re.findall(r"`(\w+)`", str(error)) if name in values and values[name] is None}
    if not changes:
        for config, name, value in _unset(error):
            if type(config) is type(default):
                changes[name] = value
            for part, inner in vars(default).items():
                if type(inner) is type(config) and isinstance(fields.get(part), dict):
                    fields[part] = {**fields[part], name: value}
                    return True
            if changes:
                break
    fields |= changes
    return bool(changes)


def _unset(error: Exception) -> Iterator[tuple[Any, str, Any]]:
    """Configs with the options that are None in the lines that failed, innermost first, and values for these."""
    for frame, text in reversed(failing_lines(error)):
        owners = {"config": frame.f_locals.get("config"), "self": frame.f_locals.get("self")}
        for owner, name in re.findall(r"(\w*config|self)\.(\w+)", text):
            config = frame.f_locals.get(owner, getattr(owners["self"], owner, None))
            if owner == "self":  # an attribute of the module that was read from an option of that name
                config = owners["config"]
            if hasattr(config, "to_dict") and getattr(config, name, 0) is None:
                yield config, name, _value(config, name, text)


def _value(config: Any, name: str, text: str) -> Any:
    """A number, or, for what is looked up by layer, the same for all layers: what it is compared with."""
    if f"{name}[" in text and (literal := re.search(r"[=!]= *[\"'](\w+)[\"']", text)):
        return [literal[1]] * config.num_hidden_layers
    return SMALL


def repair_split(default: Any, fields: dict[str, Any], message: str) -> bool:
    """Scales a list of sizes to the sum that a split wants. Whether some option is that list."""
    found = re.search(r"split_sizes to sum exactly to (\d+) .*split_sizes=\[([\d, ]+)\]", message)
    if found is None:
        return False
    total, sizes = int(found[1]), [int(size) for size in found[2].split(",")]
    scaled = [size * total // sum(sizes) for size in sizes]
    scaled[-1] += total - sum(scaled)
    options = _merged(default.to_dict(), fields)
    changed = _replaced(options, sizes, scaled) or _with_section(options, scaled)
    fields |= {name: _merged(fields.get(name), value) for name, value in changed.items()}
    return bool(changed)


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}
    return above


def _replaced(tree: dict[str, Any], old: list[int], new: list[int]) -> dict[str, Any]:
    """The parts of nested options that hold a list, with another in its place; other options beside it stay."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, (list, tuple)) and list(value) == old:
            found[key] = new
        elif isinstance(value, dict) and (inner := _replaced(value, old, new)):
            found[key] = {**value, **inner} if key == "rope_parameters" else inner
    return found


def _with_section(tree: dict[str, Any], section: list[int]) -> dict[str, Any]:
    """The parts of nested options about rotary embeddings, with sections that were left to the model."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if key == "rope_parameters" and isinstance(value, dict) and "mrope_section" not in value:
            found[key] = {**value, "mrope_section": section}
        elif isinstance(value, dict) and (inner := _with_section(value, section)):
            found[key] = inner
    return found

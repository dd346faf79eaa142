"""What an error says of the fields of a config: what was left open, and what does not add up."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator
from typing import Any

from mhc_rewrite.capture.examples.lessons import failing_lines
from mhc_rewrite.cli.small_fields import more_layers, token_ids

SMALL, WORDS = 8, 50_000
_WIDTHS = re.compile(
    r"shapes cannot be multiplied \(\d+x(?P<got>\d+) and (?P<layer>\d+)x\d+\)"
    r"|to have (?P<channels>\d+) channels, but got (?P<gives>\d+) channels"
)


def repair(default: Any, fields: dict[str, Any], error: Exception) -> bool:
    """Gives values to the options that an error names, or names in the code that failed. Whether there were any.

    What nobody has given a value gets one; what "must match" another option is made to.
    """
    values = _merged(default.to_dict(), fields)
    if found := re.search(r"\b(\w+) must match (\w+)", str(error)):
        changed = _alike(values, found[1], found[2])
        fields |= {name: _merged(fields.get(name), value) for name, value in changed.items()}
        return bool(changed)
    if "tie_weights_keys" in str(error):  # a layer's weights are another's of its kind, and there is one of it
        deeper = dict(more_layers(default))
        changed = {name: value for name, value in deeper.items() if fields.get(name, value) != value}
        fields |= deeper if changed else {}
        return bool(changed)
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
        module = frame.f_locals.get("self")
        for owner, name in re.findall(r"(\w*config|self)\.(\w+)", text):
            config = frame.f_locals.get(owner, getattr(module, owner, None))
            option = name
            if owner == "self" and getattr(module, name, 0) is None:  # it was read from an option
                config = frame.f_locals.get("config")
                source = "".join(linecache.getlines(frame.f_code.co_filename)[frame.f_code.co_firstlineno - 1 :])
                read = re.search(rf"self\.{name} = config\.(\w+)", source)
                option = read[1] if read else name
            if config is not None and hasattr(config, "to_dict"):
                option = config.attribute_map.get(option, option)
                if vars(config).get(option, 0) is None:
                    yield config, option, _value(config, option, text)


def _value(config: Any, name: str, text: str) -> Any:
    """A number, or, for what is looked up by layer, the same for all layers: what it is compared with."""
    if f"{name}[" in text and (literal := re.search(r"[=!]= *[\"'](\w+)[\"']", text)):
        return [literal[1]] * config.num_hidden_layers
    return SMALL


def repair_run(default: Any, fields: dict[str, Any], errors: list[str]) -> bool:
    """Changes the options that contradict others in a run: sizes of a split, or a width. Whether there were any."""
    options = _merged(default.to_dict(), fields)
    for message in dict.fromkeys(errors):
        if found := re.search(r"split_sizes to sum exactly to (\d+) .*split_sizes=\[([\d, ]+)\]", message):
            total, sizes = int(found[1]), [int(size) for size in found[2].split(",")]
            scaled = [size * total // sum(sizes) for size in sizes]
            scaled[-1] += total - sum(scaled)
            changed = _replaced(options, sizes, scaled) or _with_section(options, scaled)
        elif found := re.search(_WIDTHS, message):
            wanted, got = (
                int(number) for number in (found["layer"] or found["channels"], found["got"] or found["gives"])
            )
            # A width inside the model is a round number; others are inputs'.
            changed = _replaced(options, wanted, got) if got % 32 == 0 else {}
        elif found := re.search(r"must match except in dimension \d\. Expected size (\d+) but got size (\d+)", message):
            one, other = int(found[1]), int(found[2])
            changed = _replaced(options, one, other) or _replaced(options, other, one)
        elif found := re.search(r"`(\w+)` argument in the config, or it is not set", message):
            changed = _set(options, found[1])
        elif "index out of range in self" in message:  # a part is given what another one puts out
            least = min(_vocabularies(options), default=0)
            changed = _with_vocabulary(options, least, above=least)
        elif found := re.search(r"index (\d+) is out of bounds for dimension \d with size (\d+)", message):
            beyond, size = int(found[1]) + 1, int(found[2])  # a token that the code names, and no option
            changed = _with_vocabulary(options, beyond, only=size) if beyond <= WORDS else {}
        else:
            continue
        fields |= {name: _merged(fields.get(name), value) for name, value in changed.items()}
        if changed:
            return True
    return False


def _merged(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {**below, **{key: _merged(below.get(key), value) for key, value in above.items()}}
    return above


def _replaced(tree: dict[str, Any], old: Any, new: Any) -> dict[str, Any]:
    """The parts of nested options that are `old`, as `new`; what stands beside them in a dict of theirs stays."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if (list(value) if isinstance(value, tuple) else value) == old and not isinstance(value, bool):
            found[key] = new
        elif isinstance(value, (list, tuple)) and any(type(one) is int and one == old for one in value):
            found[key] = [new if one == old else one for one in value]
        elif isinstance(value, dict) and (inner := _replaced(value, old, new)):
            found[key] = {**value, **inner} if key == "rope_parameters" else inner
    return found


def _set(tree: dict[str, Any], name: str) -> dict[str, Any]:
    """The parts of nested options that leave one open, with a value for it."""
    found: dict[str, Any] = {name: SMALL} if name in tree and tree[name] is None else {}
    for key, value in tree.items():
        if isinstance(value, dict) and (inner := _set(value, name)):
            found[key] = inner
    return found


def _vocabularies(tree: dict[str, Any]) -> Iterator[int]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _vocabularies(value)
        elif key == "vocab_size" and isinstance(value, int):
            yield value


def _with_vocabulary(tree: dict[str, Any], words: int, above: int = -1, only: int | None = None) -> dict[str, Any]:
    """The parts of nested options with a vocabulary above a number, or of one size only, with this one.

    Their special tokens are in it.
    """
    found: dict[str, Any] = {}
    if isinstance(mine := tree.get("vocab_size"), int) and mine > above and only in (None, mine):
        found = {"vocab_size": words, **token_ids(tree, words)}
    for key, value in tree.items():
        if isinstance(value, dict) and (inner := _with_vocabulary(value, words, above, only)):
            found[key] = inner
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


def _alike(tree: dict[str, Any], name: str, other: str) -> dict[str, Any]:
    """The parts of nested options that have two of these names and other values for them, with one value."""
    found = {name: tree[other]} if name in tree and other in tree and tree[name] != tree[other] else {}
    for key, value in tree.items():
        if isinstance(value, dict) and (inner := _alike(value, name, other)):
            found[key] = inner
    return found

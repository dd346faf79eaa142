"""What the error of a call teaches about the next one.

It is what a person would read: which argument is missing, which name is None in the line that failed, how many
placeholders the features want, which width a layer takes.
"""

from __future__ import annotations

import itertools
import linecache
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mhc_rewrite.capture.examples.calls import Call, Supplier


def further(call: Call, given: Mapping[str, Any], error: Exception, supplier: Supplier) -> Iterator[tuple[float, Call]]:
    """Calls to try next, with what each costs: little for what the error speaks of."""
    if (counted := _wanted_placeholders(call, error)) is not None:
        yield -1.0, counted
        return
    if (unwanted := re.search(r"`?(\w+)`? (?:is expected to|must|should) be `?None", str(error))) is not None:
        if unwanted[1] in call.names:
            yield -1.0, replace(call, names=tuple(name for name in call.names if name != unwanted[1]))
            return
    named, spare = _named(str(error), call, supplier)
    if spare and re.search(r"\bat least (two|three)\b", str(error), re.IGNORECASE):
        yield -1.5, replace(call, names=(*call.names, *named, *spare))
    unset = [*_none_in_frames(error, call, supplier, supplier.known)]
    about_none = "None" in str(error)
    if about_none and not (named or unset):
        unset = [*_none_in_frames(error, call, supplier, supplier.instead)]
    missing = dict.fromkeys([*named, *sorted(unset, key=lambda name: name == "attention_mask"), *spare])
    for place, name in enumerate(missing):
        likely = name in named or (about_none and name not in spare)  # what else is None there may well be left out
        cost, names = place / 10 + (-0.5 if name in spare else 0.3), (*call.names, name)
        cost = place - 1.0 if likely else cost
        yield cost, replace(call, names=names)
        if call.shapes:  # learnt without it: there may be a candidate that goes with it
            yield cost + 0.1, replace(call, names=names, shapes={})
    if (viewed := _viewed(error)) is not None and viewed[0][0] > 1 and viewed[0][0] * viewed[1] == math.prod(viewed[0]):
        yield -1.0, replace(call, alone=True)  # it has lost its batch, which goes well where that is one
    blamed = _blamed(given, error)
    for name, number in _beyond(given, error):
        yield -1.0, replace(call, below={**call.below, name: number})
    for name, shape in _wanted_shapes(given, blamed, str(error)):
        yield -0.9, replace(call, shapes={**call.shapes, name: shape})
    boolean = "bool" in str(error)
    whole = re.search(r"scalar types: Long, Int; but got", str(error)) is not None
    for name in call.names:
        candidates = supplier.candidates(name, call)
        number = call.choices.get(name, 0) + 1
        unshaped = {key: shape for key, shape in call.shapes.items() if key != name}
        fitting: list[int] = []
        if name in blamed and (rank := _wanted_rank(given[name], str(error))):
            fitting = [place for place, one in enumerate(candidates) if isinstance(one, Tensor) and one.dim() == rank]
        elif boolean and isinstance(given[name], Tensor):
            fitting = [place for place, one in enumerate(candidates) if getattr(one, "dtype", None) == torch.bool]
        elif whole and isinstance(given[name], Tensor) and given[name].is_floating_point():
            fitting = [place for place, one in enumerate(candidates) if getattr(one, "dtype", None) == torch.long]
        for cost, place in zip((-0.8, -0.4, 0.1), fitting):
            yield cost, replace(call, choices={**call.choices, name: place}, shapes=unshaped)
        if number < len(candidates):
            yield (
                0.2 if name in blamed else 1.0,
                replace(call, choices={**call.choices, name: number}, shapes=unshaped),
            )


def _blamed(given: Mapping[str, Any], error: Exception) -> set[str]:
    """The arguments that the innermost failing function holds, of those that any does, and those of a named shape."""
    message = re.sub(r"\s", "", str(error))
    shaped = {name: str(list(value.shape)) for name, value in given.items() if isinstance(value, Tensor)}
    named = {name for name, shape in shaped.items() if "," in shape and shape.replace(" ", "") in message}
    held: set[str] = set()
    for frame, _ in failing_lines(error):
        values = list(frame.f_locals.values())
        mine = {name for name, value in given.items() if any(value is one for one in values)}
        if 0 < len(mine) < len(given) or len(given) == 1:
            held = mine or held
    return named or held


# -- what is missing ---------------------------------------------------------------------------------------------------


def _suppliable(name: str, call: Call, supplier: Supplier) -> bool:
    return name not in call.names and bool(supplier.candidates(name, call))


def _named(message: str, call: Call, supplier: Supplier) -> tuple[list[str], list[str]]:
    """Arguments that the message names and the call lacks; and those that it names as another way."""
    words = dict.fromkeys(re.findall(r"[A-Za-z_]\w*", message))
    named = [word for word in words if word in supplier.known]
    missing = [name for name in named if _suppliable(name, call, supplier)]
    if not named:  # "... the current Cache seems to contain ...": use_cache
        switches = (f"use_{word.lower()}" for word in words)
        missing = [name for name in switches if name in supplier.known and _suppliable(name, call, supplier)]
    # "either input_ids or inputs_embeds": one of them is enough, and the first is the usual one.
    return (missing[:1], missing[1:]) if " or " in message else (missing, [])


def _none_in_frames(error: Exception, call: Call, supplier: Supplier, names: list[str]) -> Iterator[str]:
    """Arguments that are None in the lines that failed, innermost first; an inner name may be the end of one."""
    for frame, text in reversed(failing_lines(error)):
        for word in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", text)):
            if word in frame.f_locals and frame.f_locals[word] is None:
                for name in names:
                    if (name == word or name.endswith("_" + word)) and _suppliable(name, call, supplier):
                        yield name
                        break


def failing_lines(error: Exception) -> list[tuple[FrameType, str]]:
    """The frames that the error came through, outermost first, each with the text of the call that failed."""
    frames = []
    trace = error.__traceback__
    while trace is not None:
        code, first = trace.tb_frame.f_code, trace.tb_lineno
        last = first
        if hasattr(code, "co_positions"):  # Python 3.11
            position = next(itertools.islice(code.co_positions(), trace.tb_lasti // 2, None), (None, None))
            last = max(first, position[1] or first)
        lines = range(first, min(last, first + 20) + 1)
        frames.append((trace.tb_frame, " ".join(linecache.getline(code.co_filename, line) for line in lines)))
        trace = trace.tb_next
    return frames


# -- what has another form ---------------------------------------------------------------------------------------------


def _wanted_rank(value: Any, message: str) -> int | None:
    """How many dimensions the error asks for."""
    if not isinstance(value, Tensor):
        return None
    if found := re.search(r"values to unpack \(expected (\d), got (\d)\)", message):
        return value.dim() + int(found[1]) - int(found[2])
    found = re.search(r"values to unpack \(expected (\d)|\(unbatched\) or (\d)D \(batched\)", message)
    return int(found[1] or found[2]) if found else None


def _wanted_shapes(given: Mapping[str, Any], blamed: set[str], message: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Arguments in the shape that the error asks for; it gives the shape, or the width, that it has got."""
    shapes = {name: tuple(value.shape) for name, value in given.items() if isinstance(value, Tensor) and value.dim()}
    if found := re.search(r"expected input\[([\d, ]+)\] to have (\d+) channels", message):
        got, channels = tuple(map(int, found[1].split(","))), int(found[2])
        for name, shape in shapes.items():
            if shape == got:
                yield name, _with_channels(shape, channels)
    elif found := re.search(r"shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x\d+\)", message):
        rows, width, wanted = map(int, found.groups())
        for name, shape in shapes.items():
            if shape[-1] == width and math.prod(shape[:-1]) == rows:
                yield name, (*shape[:-1], wanted)
                if len(shape) == 3:
                    yield name, (shape[0], wanted)
    elif found := re.search(r"dimensions of batch2 tensor to be: \[\d+, (\d+)\] but got: \[\d+, (\d+)\]", message):
        for name, shape in shapes.items():
            if shape[-1] == int(found[1]) and name in (blamed or shapes):
                yield name, (*shape[:-1], int(found[2]))
    elif found := re.search(r"\b(\d+)\D* (?:a multiple of|divisible by) \D*(\d+)", message):
        length, divisor = int(found[1]), int(found[2])
        for name, shape in shapes.items():
            if length in shape[1:] and divisor:
                axis = shape.index(length, 1)
                yield name, (*shape[:axis], -(-length // divisor) * divisor, *shape[axis + 1 :])
    elif found := re.search(r"normalized_shape=\[(\d+)\].*size\[([\d, ]+)\]", message):
        got, wanted = tuple(map(int, found[2].split(","))), int(found[1])
        for name, shape in shapes.items():
            if shape == got:
                yield name, (*shape[:-1], wanted)
    elif found := re.search(r"\((\d+)\s*\*\s*(\d+)\) doesn't match model \((\d+)\s*\*\s*(\d+)\)", message):
        a, b, *wanted_size = map(int, found.groups())
        for name, shape in shapes.items():
            if shape[-2:] == (a, b):
                yield name, (*shape[:-2], *wanted_size)
    elif found := re.search(r"(?:height|width) \((\d+)\) doesn't match model \((\d+)\)", message):
        for name, shape in shapes.items():
            if int(found[1]) in shape[-2:]:
                yield name, (*shape[:-2], int(found[2]), int(found[2]))
    elif "Kernel size can't be greater than actual input size" in message:
        for name in blamed or shapes:  # of a sound, many samples make a frame
            if len(shape := shapes.get(name, ())) == 3:
                yield name, (*shape[:2], 16 * shape[2])
    elif found := re.search(r"size (\d+)x(\d+) is too small", message):
        for name, shape in shapes.items():
            if shape[-2:] == (int(found[1]), int(found[2])):
                yield name, (*shape[:-2], 4 * shape[-2], 4 * shape[-1])
    elif found := re.search(
        r"tensor a \((\d+)\) must match .* tensor b \((\d+)\) at non-singleton dimension (\d)", message
    ):
        one, other, axis = map(int, found.groups())
        for name in blamed & set(shapes):
            shape = shapes[name]
            for got_size, size in ((one, other), (other, one)):
                if axis < len(shape) and shape[axis] == got_size:
                    yield name, (*shape[:axis], size, *shape[axis + 1 :])
    elif found := re.search(r"Expected size (\d+) but got size (\d+)", message):
        for name, shape in shapes.items():
            for got_size, size in ((int(found[1]), int(found[2])), (int(found[2]), int(found[1]))):
                if got_size in shape[1:]:
                    axis = shape.index(got_size, 1)
                    yield name, (*shape[:axis], size, *shape[axis + 1 :])
    elif (viewed := _viewed(message)) is not None:
        size, times = viewed[1], math.prod(viewed[0]) // viewed[1] if viewed[1] else 0
        for name, shape in shapes.items():  # as many states as a map has places
            if len(shape) == 3 and math.prod(shape) == size and times * size == math.prod(viewed[0]) > 0:
                yield name, (shape[0], shape[1] * times, shape[2])
    elif found := re.search(r"shape `?\(batch_size, (\d+)\).*\[\d+, (\d+)\]", message):  # patches, in all
        scale = math.isqrt(int(found[1]) // max(1, int(found[2])))
        for name, shape in shapes.items():
            if len(shape) == 4 and scale > 1 and scale**2 * int(found[2]) == int(found[1]):
                yield name, (*shape[:2], scale * shape[2], scale * shape[3])


def _viewed(message: object) -> tuple[tuple[int, ...], int] | None:
    """The shape that something was to be viewed in, and how many elements it has."""
    found = re.search(r"shape '\[([\d, ]+)\]' is invalid for input of size (\d+)", str(message))
    return None if found is None else (tuple(map(int, found[1].split(","))), int(found[2]))


def _with_channels(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """The same shape with its channels where a convolution has them, at axis 1: moved there, or as many as it wants."""
    if channels in shape[2:]:
        place = shape.index(channels, 2)
        return (shape[0], channels, *(size for axis, size in enumerate(shape) if axis not in (0, place)))
    return (shape[0], channels, *shape[2:])


def _beyond(given: Mapping[str, Any], error: Exception) -> Iterator[tuple[str, int]]:
    """Arguments that hold numbers beyond the table in which they are looked up, with its size."""
    for frame, _ in failing_lines(error):
        weight, index = frame.f_locals.get("weight"), frame.f_locals.get("input")
        if frame.f_code.co_name == "embedding" and isinstance(weight, Tensor) and isinstance(index, Tensor):
            if index.numel() and not index.is_meta and int(index.max()) >= len(weight) > 0:
                for name, value in given.items():
                    if isinstance(value, Tensor) and not value.is_floating_point() and value.numel():
                        if int(value.max()) >= len(weight):
                            yield name, len(weight)


# -- what stands for features ------------------------------------------------------------------------------------------


def _wanted_placeholders(call: Call, error: Exception) -> Call | None:
    """The call with as many placeholder tokens as there are features, where the error counts both."""
    message = str(error)
    found = re.search(r"tokens\W+(\d+)\D+features\D*(\d+)", message)
    if found is None:
        found = re.search(r"tokens \((\d+)\) and features \((\d+)\)", message)
    if found is not None:
        tokens, features = int(found[1]), int(found[2])
    elif found := re.search(r"value tensor of shape \[(\d+),.*indexing result of shape \[(\d+),", message):
        features, tokens = int(found[1]), int(found[2])  # features put in at a mask
    else:
        return None
    kind = re.search(r"image|video|audio", message.lower())
    name = kind[0] if kind else "image"
    for count in (*_counted_features(error, name), features):
        if count != tokens and call.placeholders.get(name) != count:
            return replace(call, placeholders={**call.placeholders, name: count})
    return None


def _counted_features(error: Exception, kind: str) -> Iterator[int]:
    """How many features the function that complained had: some messages give another number than was compared."""
    for frame, _ in failing_lines(error):
        for name, value in frame.f_locals.items():
            if name == "features" or (kind in name and name.endswith("features")):
                if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                    yield math.prod(value.shape[:-1])

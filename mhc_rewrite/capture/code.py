"""What code is, as a capture has to know it: whose it is, what it names, and which questions and draws it may make."""

from __future__ import annotations

import dis
import functools
import inspect
import os
import sysconfig
import types
from collections.abc import Callable
from typing import Any

import torch

# As code objects have it: a Path would leave out the "." of an entry of sys.path.
_OWN_CODE = os.path.dirname(os.path.dirname(__file__)) + "/"
_TORCH_CODE = os.path.dirname(torch.__file__) + "/"
WRAPPERS = (_TORCH_CODE + "_compile.py", _TORCH_CODE + "_dynamo/")
_STANDARD = sysconfig.get_paths()["stdlib"] + "/"
_PACKAGES = sysconfig.get_paths()["purelib"] + "/"

# What a forward may ask torch about its surroundings: the same question is asked again at each call.
QUESTIONS: dict[Callable[..., Any], tuple[tuple[Any, ...], ...]] = {
    torch.is_grad_enabled: ((),),
    torch.is_inference_mode_enabled: ((),),
    torch.is_autocast_enabled: (("cpu",), ("cuda",)),
    torch.get_autocast_dtype: (("cpu",), ("cuda",)),
    torch.is_autocast_cache_enabled: ((),),
    torch.get_default_dtype: ((),),
    torch.are_deterministic_algorithms_enabled: ((),),
    torch.get_float32_matmul_precision: ((),),
    torch.get_num_threads: ((),),
    torch.initial_seed: ((),),
    torch.compiler.is_compiling: ((),),
    torch.compiler.is_dynamo_compiling: ((),),
}
ASKED = {getattr(function, "__code__", function): function for function in QUESTIONS}
# What reads or sets the state of torch's random numbers, which a graph would not repeat.
RANDOM_STATE = {
    inspect.unwrap(function).__code__
    for function in (torch.get_rng_state, torch.set_rng_state, torch.manual_seed, torch.seed)
}
# C functions that answer differently each time: by the type of what they are bound to, or their module, and their name.
CLOCKS = frozenset({"time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time",
                     "process_time_ns", "thread_time", "thread_time_ns"})  # fmt: skip
DATES = frozenset({"now", "today", "utcnow"})


def is_machinery(file: str) -> bool:
    """Whether code of this file is no part of a user's forward: torch's but its modules, this package's, Python's."""
    if file.startswith(_TORCH_CODE):
        return not file.startswith(_TORCH_CODE + "nn/modules/") or file.endswith("/module.py")
    if file.startswith("<frozen "):
        return file != "<frozen os>"
    if file.startswith(_STANDARD) and not file.startswith(_PACKAGES):
        return not file.endswith("/os.py")
    return file.startswith((_OWN_CODE, _PACKAGES + "numpy/", "<mhc_rewrite"))


@functools.cache
def chains_of(code: types.CodeType) -> tuple[tuple[str, ...], ...]:
    """The globals that code names, each with the attributes that it reads directly behind."""
    chains: list[list[str]] = []
    open_chain = False
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            chains.append([step.argval])
            open_chain = True
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and open_chain:
            chains[-1].append(step.argval)
        elif step.opname not in ("CACHE", "PRECALL", "PUSH_NULL"):
            open_chain = False
    return tuple(tuple(chain) for chain in chains)


def names_of(code: types.CodeType) -> set[str]:
    """Names of attributes that code mentions, also in quotes."""
    return {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}

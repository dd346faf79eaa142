"""A training step of a converted GPT-2 over its original's, as demos/gpu_all.py measures it: time, memory, launches.

bf16 weights, random and untrained; a step is forward, backward and the gradients set to none. The optimiser, which does
not know of conversions, is left out.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from gpu_models import VOCABULARY
from torch import nn

import mhc_rewrite
from mhc_rewrite import mhcify


class Shape(NamedTuple):
    layers: int = 4
    heads: int = 20
    width: int = 2560
    batch: int = 8
    length: int = 1024


TINY = Shape(1, 2, 16, 1, 8)
SITES_A_LAYER = 2


class Variant(NamedTuple):
    """`recompute`: None, or as the option of that name."""

    converted: bool
    compiled: bool
    recompute: str | None = None

    def __str__(self) -> str:
        said = ["converted" if self.converted else "original", "compiled" if self.compiled else "eager"]
        return ", ".join([*said, "recomputed"] if self.recompute else said)


VARIANTS = [
    Variant(False, False), Variant(True, False), Variant(True, False, "auto"),
    Variant(False, True), Variant(True, True), Variant(True, True, "auto"),
]  # fmt: skip


def warm(variant: Variant, device: str, shape: Shape) -> dict[str, Any]:
    """One step, which leaves what is compiled in the caches on disk."""
    started = time.perf_counter()
    row = {"shape": " x ".join(map(str, shape)), "variant": str(variant)}
    try:
        _step(variant, device, shape)()
        _wait(device)
    except Exception as error:
        row["failed"] = f"{type(error).__name__}: {error}"[:600]
    return {**row, "s": round(time.perf_counter() - started, 1)}


def training_rows(device: str, shape: Shape, rounds: int = 7) -> Iterator[dict[str, Any]]:
    for variant in VARIANTS:
        row = {"shape": " x ".join(map(str, shape)), "variant": str(variant)}
        try:
            yield {**row, **measured(variant, device, shape, rounds)}
        except Exception as error:
            yield {**row, "failed": f"{type(error).__name__}: {error}"[:600]}
        torch._dynamo.reset()
        if device == "cuda":
            torch.cuda.empty_cache()


def measured(variant: Variant, device: str, shape: Shape, rounds: int) -> dict[str, Any]:
    step = _step(variant, device, shape)
    started = time.perf_counter()
    for _ in range(3):
        step()
    _wait(device)
    row: dict[str, Any] = {"first_s": time.perf_counter() - started}
    taken = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        started = time.perf_counter()
        step()
        _wait(device)
        taken.append(time.perf_counter() - started)
    row["ms"] = 1e3 * statistics.median(taken)
    if device == "cuda":
        row["peak_MB"] = torch.cuda.max_memory_allocated() / 2**20
        row |= _profiled(step)
    return row


def _step(variant: Variant, device: str, shape: Shape) -> Callable[[], None]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, vocab_size=VOCABULARY, n_positions=shape.length,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False, bos_token_id=0,
        eos_token_id=0,
    )).to(device, torch.bfloat16)  # fmt: skip
    ids = torch.randint(VOCABULARY, (shape.batch, shape.length), device=device)
    if variant.converted:
        eager = {} if variant.compiled else {"recompute": variant.recompute}
        with contextlib.redirect_stdout(None):
            mhcify(model, {"input_ids": ids[:1, :8]}, **eager)
    run = _run(model, variant)

    def step() -> None:
        run(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def _run(model: nn.Module, variant: Variant) -> Callable[..., Any]:
    if not variant.compiled:
        return model
    if not variant.converted:
        return torch.compile(model)
    return mhc_rewrite.compile(model, options={"recompute": variant.recompute})


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of one step: how many, how long together, and this package's by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    count: Counter[str] = Counter()
    micro: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            micro[event.name] += event.self_device_time_total
    own = {
        name: [count[name], micro[name]]
        for name in count
        if name.startswith("_") and name.endswith("_kernel") and "::" not in name
    }
    top = [[name[:80], count[name], us] for name, us in micro.most_common(12)]
    return {"launches": count.total(), "device_ms": micro.total() / 1e3, "own": own, "top": top}

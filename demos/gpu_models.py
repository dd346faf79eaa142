"""Converted transformers on a GPU, as demos/gpu_all.py checks them: equality at the start, perturbed values and
gradients against plain PyTorch, generation, CUDA graphs, another stream than the default one, and the bits of two equal
steps.

Models are built here with random weights; nothing is fetched. On a CPU the same code runs, without what only CUDA has.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mhc_rewrite
from mhc_rewrite import HyperConnection, mhcify
from mhc_rewrite.kernels import cpu, gpu

VOCABULARY = 512


class Sizes(NamedTuple):
    layers: int = 3
    heads: int = 4
    width: int = 256
    batch: int = 2
    length: int = 96


TINY = Sizes(1, 2, 16, 1, 24)


class Precision(NamedTuple):
    """Weights of one dtype, and the dtype of autocast, if any; `close`: the relative error allowed of values and
    gradients, which two orders of the same sums have in this precision."""

    weights: torch.dtype
    autocast: torch.dtype | None
    close: float


PRECISIONS = {
    "fp32": Precision(torch.float32, None, 1e-3),
    "bf16 autocast": Precision(torch.float32, torch.bfloat16, 5e-2),
    "bf16 weights": Precision(torch.bfloat16, None, 1e-1),
}


def gpt2(sizes: Sizes) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        n_layer=sizes.layers, n_head=sizes.heads, n_embd=sizes.width, vocab_size=VOCABULARY, n_positions=256,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ))  # fmt: skip


def llama(sizes: Sizes) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.heads // 2,
        hidden_size=sizes.width, intermediate_size=3 * sizes.width, vocab_size=VOCABULARY, max_position_embeddings=256,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ))  # fmt: skip


MODELS = {"GPT-2": gpt2, "Llama": llama}


def model_rows(device: str, sizes: Sizes, part: int = 0, of: int = 1) -> Iterator[dict[str, Any]]:
    """A row for each model, precision and check: its error or what it found, and whether that is right. Of `of` equal
    parts of the models and precisions, one."""
    for name, precision_name in list(itertools.product(MODELS, PRECISIONS))[part::of]:
        setting = _Setting(MODELS[name], PRECISIONS[precision_name], device, sizes)
        for check in CHECKS:
            if check in CUDA_ONLY and device != "cuda":
                continue
            started = time.perf_counter()
            try:
                found = CHECKS[check](setting)
            except Exception as error:
                found = {"right": False, "found": f"{type(error).__name__}: {error}"[:600]}
            seconds = round(time.perf_counter() - started, 1)
            yield {"model": name, "precision": precision_name, "check": check, **found, "s": seconds}


class _Setting:
    """One model in one precision, before and after its conversion, with perturbed sites."""

    def __init__(self, build: Callable[[Sizes], nn.Module], precision: Precision, device: str, sizes: Sizes) -> None:
        torch.manual_seed(0)
        self.precision, self.device = precision, device
        self.original = build(sizes).to(device, precision.weights).eval()
        self.ids = torch.randint(1, VOCABULARY, (sizes.batch, sizes.length), device=device)

    def converted(self, perturbed: bool = True) -> nn.Module:
        with contextlib.redirect_stdout(None):
            model = mhcify(copy.deepcopy(self.original), {"input_ids": self.ids})
        if perturbed:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for module in model.modules():
                    if isinstance(module, HyperConnection):
                        for scale, parameter in zip((0.02, 0.5, 0.5), (module.phi, module.alpha, module.bias)):
                            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter))
        return model

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.precision.autocast)

    def logits(self, model: Callable[..., Any]) -> Tensor:
        with torch.no_grad(), self.autocast():
            return model(input_ids=self.ids, use_cache=False).logits.float()

    def step(self, model: nn.Module, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """The loss and all gradients of one training step."""
        model.zero_grad()
        with self.autocast():
            loss = (model if run is None else run)(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach().float().clone(), **gradients}


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """Inside, every operator runs its aten: neither Triton nor C++."""
    on_gpu, on_cpu = gpu.AVAILABLE, cpu.available
    gpu.AVAILABLE, cpu.available = False, lambda: False  # type: ignore[assignment]
    try:
        yield
    finally:
        gpu.AVAILABLE, cpu.available = on_gpu, on_cpu


def _close(error: float, allowed: float) -> dict[str, Any]:
    return {"right": error <= allowed, "found": f"{error:.1e} (allowed {allowed:.0e})"}


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm().clamp_min(1e-12))


def _worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Of the sites' parameters together and of the model's own together: a single gradient may be all rounding."""
    errors = []
    for own in (True, False):
        names = [name for name in want if (".mhc_" not in name) == own]
        errors.append(_distance(*(torch.cat([one[name].flatten() for name in names]) for one in (got, want))))
    return max(errors)


def start(setting: _Setting) -> dict[str, Any]:
    want, got = setting.logits(setting.original), setting.logits(setting.converted(perturbed=False))
    return _close(_distance(got, want), setting.precision.close)


def values(setting: _Setting) -> dict[str, Any]:
    model = setting.converted()
    with plain_pytorch():
        want = setting.logits(model)
    return _close(_distance(setting.logits(model), want), setting.precision.close)


def gradients(setting: _Setting) -> dict[str, Any]:
    model = setting.converted().train()
    with plain_pytorch():
        want = setting.step(model)
    return _close(_worst(setting.step(model), want), setting.precision.close)


def compiled(setting: _Setting, **options: Any) -> dict[str, Any]:
    torch._dynamo.reset()
    model = setting.converted().train()
    want = setting.step(model)
    run = torch.compile(model, **options) if options else mhc_rewrite.compile(model)
    setting.step(model, run)
    return _close(_worst(setting.step(model, run), want), setting.precision.close)


def reduced_overhead(setting: _Setting) -> dict[str, Any]:
    return compiled(setting, mode="reduce-overhead")


def cuda_graph(setting: _Setting) -> dict[str, Any]:
    """A forward captured by torch.cuda.graph and replayed on another input."""
    model = setting.converted()
    ids = setting.ids.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), setting.autocast():
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(input_ids=ids, use_cache=False)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(input_ids=ids, use_cache=False).logits
        ids.copy_(setting.ids.flip(0))
        graph.replay()
        want = model(input_ids=ids, use_cache=False).logits
    return _close(_distance(out.float(), want.float()), setting.precision.close)


def other_stream(setting: _Setting) -> dict[str, Any]:
    model = setting.converted().train()
    want = setting.step(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = setting.step(model)
    torch.cuda.current_stream().wait_stream(stream)
    return _close(_worst(got, want), setting.precision.close)


def repeated(setting: _Setting) -> dict[str, Any]:
    """Two equal steps, sites' gradients to the bit; the model's own may come from atomic additions of torch."""
    model = setting.converted().train()
    first, second = setting.step(model), setting.step(model)
    other = [name for name in first if not torch.equal(first[name], second[name])]
    return {"right": not other, "found": f"{len(other)} of {len(first)} differ: {other[:3]}" if other else "equal bits"}


def generation(setting: _Setting) -> dict[str, Any]:
    """Greedy tokens with a cache, each held against the whole sequence's own logits: within rounding of the best."""
    model = setting.converted()
    prompt = setting.ids[:, :16]
    with torch.no_grad(), setting.autocast():
        tokens = model.generate(prompt, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
        logits = model(input_ids=tokens, use_cache=False).logits.float()[:, 15:-1]
    chosen = logits.gather(-1, tokens[:, 16:, None]).squeeze(-1)
    behind = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
    return _close(behind, setting.precision.close)


CHECKS: dict[str, Callable[[_Setting], dict[str, Any]]] = {
    "equal at the start": start,
    "perturbed values": values,
    "perturbed gradients": gradients,
    "generate": generation,
    "compiled, mhc": compiled,
    "compiled, reduce-overhead": reduced_overhead,
    "CUDA graph": cuda_graph,
    "another stream": other_stream,
    "two steps": repeated,
}
CUDA_ONLY = {"compiled, reduce-overhead", "CUDA graph", "another stream"}

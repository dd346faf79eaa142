"""A Llama-shaped model becomes an mHC model and is still that model: it generates, is saved, loaded and given back.

    python demos/convert_llama.py
    python demos/convert_llama.py --quick

A Llama of transformers with random weights, on the CPU in fp32. Every step is a check and prints one line; the script
ends with status 1 if one of them fails. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from convert_gpt import TOLERANCE, show, start_section
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mhc_rewrite import HyperConnection, mhcify, plan, unmhcify

VOCABULARY, BATCH, PROMPT = 512, 2, 12
# Below this the perturbed sites would hardly show in the logits, and the checks that follow would prove little.
MOVED = 0.1


class Generated(NamedTuple):
    """tokens (batch, prompt + new), logits (new, batch, words), positions that a layer worked on, seconds."""

    tokens: Tensor
    logits: Tensor
    positions: int
    seconds: float


@dataclass
class Checks:
    """Prints each check as a line and remembers how it went."""

    console: Console
    passed: list[bool] = field(default_factory=list)

    def add(self, passed: bool, text: str) -> None:
        self.passed.append(passed)
        mark = "[green]ok[/green]    " if passed else "[bold red]FAILED[/bold red]"
        self.console.print(f"{mark}  {text}", highlight=False, soft_wrap=True)


def main(
    tokens: Annotated[int, typer.Option(min=2, help="New tokens in each generation.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the weights, the prompt and the perturbation.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Two layers and at most 8 new tokens.")] = False,
) -> None:
    """Convert a small Llama and check that it still generates, saves, loads and converts back."""
    console = Console()
    torch.set_num_threads(threads)
    layers, tokens = (2, min(tokens, 8)) if quick else (6, tokens)
    original = small_llama(layers, seed)
    prompt = torch.randint(VOCABULARY, (BATCH, PROMPT), generator=torch.Generator().manual_seed(seed))
    checks = Checks(console)
    console.print(
        f"Llama, random weights: {layers} layers, {sum(p.numel() for p in original.parameters()):,} parameters, fp32, "
        f"CPU, threads: {threads}, torch {torch.__version__}; {BATCH} prompts of {PROMPT} tokens, {tokens} new ones "
        "each",
        highlight=False,
    )

    start_section(console, "What will be rewritten: plan(model)")
    show(console, plan(original))

    start_section(console, "Conversion: mhcify(model)")
    before = time.perf_counter()
    converted = mhcify(copy.deepcopy(original))
    console.print(f"converted in {time.perf_counter() - before:.2f} s", highlight=False)
    expected = logits_of(original, prompt)
    error = relative(logits_of(converted, prompt), expected)
    checks.add(
        error <= TOLERANCE, f"logits equal the original's: relative error {error:.1e} (allowed: {TOLERANCE:.0e})"
    )
    plain, start = (generate(model, prompt, tokens, use_cache=True) for model in (original, converted))
    checks.add(torch.equal(plain.tokens, start.tokens), "greedy generation with KV cache gives the original's tokens")

    start_section(console, "Every site parameter perturbed")
    perturb(converted, seed)
    moved = relative(logits_of(converted, prompt), expected)
    checks.add(moved >= MOVED, f"the sites show in the logits: they moved by {moved:.2f} (wanted: {MOVED} or more)")
    cached, uncached = (generate(converted, prompt, tokens, use_cache=use) for use in (True, False))
    checks.add(torch.equal(cached.tokens, uncached.tokens), "generation with KV cache gives the tokens of that without")
    error = relative(cached.logits, uncached.logits)
    checks.add(error <= TOLERANCE, f"and its logits: relative error {error:.1e} (allowed: {TOLERANCE:.0e})")
    checks.add(
        cached.positions < uncached.positions,
        f"the cache was in use: {cached.positions} positions went through a layer, without it {uncached.positions}",
    )

    start_section(console, "Saved, loaded, given back")
    fresh = mhcify(small_llama(layers, seed + 1))
    size = save_and_load(converted, fresh)
    same = torch.equal(logits_of(fresh, prompt), logits_of(converted, prompt))
    checks.add(same, f"saved to safetensors ({size / 1e6:.1f} MB), loaded into another converted model: equal logits")
    given_back = unmhcify(converted)
    same = torch.equal(logits_of(given_back, prompt), expected)
    checks.add(same, "unmhcify(model): the original's logits, bit for bit")
    same = given_back.state_dict().keys() == original.state_dict().keys()
    checks.add(same, "unmhcify(model): the original's parameter names, none more")

    start_section(console, "Result")
    console.print(
        times_table(
            {"original, cache": plain, "mHC, cache": start, "perturbed, cache": cached, "perturbed, no cache": uncached}
        )
    )
    console.print(f"{sum(checks.passed)} of {len(checks.passed)} checks passed", highlight=False)
    raise typer.Exit(0 if all(checks.passed) else 1)


def small_llama(layers: int, seed: int) -> nn.Module:
    """Llama's layout with grouped key-value heads."""
    # A text model needs no torchvision, and a torchvision made for another build of torch stops transformers' import.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,  # with the default, the branches of so narrow a model hardly move the trunk
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits_of(model: nn.Module, prompt: Tensor) -> Tensor:
    return model(input_ids=prompt).logits


def generate(model: nn.Module, prompt: Tensor, tokens: int, *, use_cache: bool) -> Generated:
    """Greedily."""
    lengths: list[int] = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    start = time.perf_counter()
    result = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    hook.remove()
    return Generated(result.sequences, torch.stack(result.logits), sum(lengths), seconds)


def relative(actual: Tensor, expected: Tensor) -> float:
    """max |difference| over max |expected|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def perturb(model: nn.Module, seed: int) -> None:
    """Draws the parameters of every site at random, far from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for site in (module for module in model.modules() if isinstance(module, HyperConnection)):
        for p in site.parameters():
            noise = torch.randn(p.shape, generator=generator)
            # A quarter of the start is kept: the biases' -8 off the diagonal of H_res would leave the streams unmixed.
            p.copy_(0.25 * p + (noise / p.shape[0] ** 0.5 if p.dim() == 2 else noise))


def save_and_load(source: nn.Module, target: nn.Module) -> int:
    """Bytes of the file between them."""
    from safetensors.torch import load_model, save_model

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_model(source, str(file))
        load_model(target, str(file))
        return file.stat().st_size


def times_table(runs: dict[str, Generated]) -> Table:
    table = Table("generation", "seconds", "new tokens a second", "positions in a layer")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, run in runs.items():
        new = run.logits.shape[0] * run.logits.shape[1]
        table.add_row(name, f"{run.seconds:.2f}", f"{new / run.seconds:.0f}", str(run.positions))
    table.caption = "one run each, beside whatever else this machine does"
    return table


if __name__ == "__main__":
    typer.run(main)

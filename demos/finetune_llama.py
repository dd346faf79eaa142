"""A pretrained Llama gets streams, learns them together with LoRA in Trainer, and comes back in a fresh process.

    python demos/finetune_llama.py
    python demos/finetune_llama.py --quick

The pretrained model is made here: a small byte-level Llama, trained by Trainer on Python's own sources. Then, as with a
model of one's own: `from_pretrained`, `mhcify`, an adapter that LoRA and the sites are in, `MHCTrainer`,
`save_pretrained`, and in another process `AutoPeftModelForCausalLM.from_pretrained` and `generate`. LoRA alone is
trained beside it, on the same batches. On the CPU; nothing is downloaded.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from convert_gpt import EVERY_NTH_FILE_HELD_OUT, LENGTH, as_bytes, batches, standard_library, start_section
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

# The text is bytes: no torchvision is needed, and one made for another build of torch stops transformers' import.
sys.modules["torchvision"] = None  # type: ignore[assignment]

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

from mhc_rewrite import mhcify, modules_to_save, report, site_parameters  # noqa: E402
from mhc_rewrite.hf import MHCTrainer  # noqa: E402

BATCH, HELD_OUT_BATCHES = 16, 8
RATES = {"pretraining": 2e-3, "adapters": 1e-3, "sites": 1e-2}
PROMPT, NEW_BYTES = b"aliases = {", 40
LOADING = """\
import sys
import mhc_rewrite.hf  # tells transformers of converted models
import torch
from peft import AutoPeftModelForCausalLM

adapter, prompt, new_bytes, out = sys.argv[1:]
model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
tokens = torch.tensor([list(prompt.encode())])
with torch.no_grad():
    logits = model(input_ids=tokens).logits
written = model.generate(input_ids=tokens, max_new_tokens=int(new_bytes), do_sample=False)
torch.save({"logits": logits, "written": written}, out)
"""


def main(
    steps: Annotated[int, typer.Option(min=1, help="Training steps with the adapters, half as many as before.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the weights and the batches.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch on the CPU.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="At most 4 steps: shows that it runs.")] = False,
) -> None:
    """Fine-tune a small Llama by LoRA and sites, save it, and generate in a fresh process."""
    console = Console()
    logging.disable_progress_bar()  # of loading and saving; Trainer's losses stay
    torch.set_num_threads(threads)
    steps = min(steps, 4) if quick else steps
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, _ = standard_library()
        tuned_on, held_out = encodings()
        console.print(
            f"Llama over bytes, 4 layers, width 128; pretrained for {2 * steps} steps of {BATCH} x {LENGTH} bytes of "
            f"Python's modules, then {steps} steps on its encodings, mostly tables ({len(tuned_on):,} bytes; "
            f"{len(held_out):,} held out); AdamW, learning rates {RATES}; CPU, threads: {threads}, torch "
            f"{torch.__version__}, seed {seed}",
            highlight=False,
        )

        start_section(console, "A pretrained model")
        torch.manual_seed(seed)
        base = small_llama()
        train(Trainer, base, text, 2 * steps, seed, RATES["pretraining"], folder)
        base.save_pretrained(folder / "base")
        losses = {"pretrained": held_out_loss(base, held_out)}

        start_section(console, "LoRA alone: what it is held against")
        plain = with_lora(AutoModelForCausalLM.from_pretrained(folder / "base"), seed)
        train(Trainer, plain, tuned_on, steps, seed, RATES["adapters"], folder)
        losses["LoRA"] = held_out_loss(plain, held_out)

        start_section(console, "from_pretrained, mhcify, save_pretrained: a base for adapters")
        model: Any = mhcify(AutoModelForCausalLM.from_pretrained(folder / "base"))
        model.save_pretrained(folder / "converted")
        converted = AutoModelForCausalLM.from_pretrained(folder / "converted")
        console.print(str(report(converted)).splitlines()[0], highlight=False)
        losses["converted"] = held_out_loss(converted, held_out)

        start_section(console, "LoRA and the sites: modules_to_save, MHCTrainer")
        tuned = with_lora(converted, seed, modules_to_save=modules_to_save(converted))
        train(MHCTrainer, tuned, tuned_on, steps, seed, RATES["adapters"], folder, site_lr=RATES["sites"])
        losses["LoRA and sites"] = held_out_loss(tuned, held_out)
        tuned.save_pretrained(folder / "adapter")
        console.print(losses_table(losses, plain, tuned))

        start_section(console, "A fresh process")
        console.print(LOADING, markup=False, highlight=False, soft_wrap=True)
        there = in_a_fresh_process(folder, threads)
        tokens = torch.tensor([list(PROMPT)])
        with torch.no_grad():
            here = tuned.eval()(input_ids=tokens).logits
        same = torch.equal(here, there["logits"])
        console.print(f"it writes {bytes(there['written'][0].tolist())!r}", highlight=False, markup=False)
        console.print(f"its logits are equal to those of this process, to the last bit: {same}", highlight=False)
        if not same:
            raise typer.Exit(1)


def small_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encodings() -> tuple[Tensor, Tensor]:
    """The sources of Python's encodings as bytes: those to train on, and those held out (every tenth file)."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"], "encodings").glob("*.py"))
    texts = [path.read_bytes() for path in paths]
    parts = [[t for k, t in enumerate(texts) if bool(k % EVERY_NTH_FILE_HELD_OUT) is train] for train in (True, False)]
    train_on, held_out = (as_bytes(b"\n".join(part)) for part in parts)
    return train_on, held_out


def with_lora(model: Any, seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options))


def train(
    trainer: type[Trainer], model: nn.Module, text: Tensor, steps: int, seed: int, rate: float, folder: Path,
    **more: Any,
) -> None:  # fmt: skip
    """`steps` steps of whichever Trainer, on the same batches for the same seed."""
    rows: list[Tensor] = []
    for some in batches(text, seed):
        rows += some
        if len(rows) >= steps * BATCH:
            break
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=rate,
        weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=min(10, steps), logging_steps=max(1, steps // 4),
        save_strategy="no", report_to=[], use_cpu=True, seed=seed, dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer(model=model, args=settings, train_dataset=data, **more).train()


@torch.no_grad()
def held_out_loss(model: nn.Module, text: Tensor) -> float:
    """Nats a byte."""
    model.eval()
    some = batches(text, seed=0)
    parts = [next(some) for _ in range(HELD_OUT_BATCHES)]
    return sum(model(input_ids=part, labels=part).loss.item() for part in parts) / HELD_OUT_BATCHES


def losses_table(losses: dict[str, float], plain: nn.Module, tuned: nn.Module) -> Table:
    trained = {"LoRA": plain, "LoRA and sites": tuned}
    table = Table("", "held-out loss", "parameters trained", "of these of sites")
    for name, loss in losses.items():
        counts = ["-", "-"]
        if name in trained:
            parameters = [p for p in trained[name].parameters() if p.requires_grad]
            sites = site_parameters(trained[name]).values() if name == "LoRA and sites" else ()
            counts = [f"{sum(p.numel() for p in some):,}" for some in (parameters, sites)]
        table.add_row(name, f"{loss:.4f}", *counts)
    table.caption = (
        "nats per byte of encodings not trained on; one run of a small model, a few steps: it shows that both train, "
        "not which is better"
    )
    return table


def in_a_fresh_process(folder: Path, threads: int) -> dict[str, Tensor]:
    """What LOADING computes, with as many threads: matrix products over other parts differ in the last bit."""
    code = "import sys; sys.modules['torchvision'] = None\n" + LOADING
    out = folder / "there.pt"
    arguments = [str(folder / "adapter"), PROMPT.decode(), str(NEW_BYTES), str(out)]
    subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
    )
    there: dict[str, Tensor] = torch.load(out)
    return there


if __name__ == "__main__":
    typer.run(main)

"""Watching a run in all the ways in which models are trained: always the figures of the plain step."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision_operators import define_torchvision_operators
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import oracle
import ranks
from handmade import BY_NAME
from handmade.common import WIDTH, PreNorm, Stack
from mhc_rewrite import mhcify, watch
from mhc_rewrite.hf import MHCTrainer
from mhc_rewrite.insight.watching.format import read
from watched_models import X, agree, line_of, loss_of, model

# -- checkpoints, recomputation, autocast, accumulation ----------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, dropout: float) -> None:
    plain, other = model(dropout=dropout), model(dropout=dropout)
    other.reentrant = reentrant
    agree(line_of(other), line_of(plain))


@pytest.mark.parametrize("length", [1, 2, "auto"])
def test_recompute(length: Any) -> None:
    agree(line_of(model(recompute=length)), line_of(model()))


def test_autocast() -> None:
    converted = model(torch.float32)
    expected = line_of(converted, X.float())
    converted.zero_grad()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return converted(x)

    line = line_of(converted, X.float(), run)
    assert max(line["figures"]["row_error_99"]) < 1e-5, "H_res stays fp32"
    floors = {name: 0.05 * max(map(abs, filter(None, row)), default=1) for name, row in expected["figures"].items()}
    for name, row in expected["figures"].items():
        if not name.startswith(("row_", "column_", "pre_argmax")):
            agree(line["figures"][name], row, rel=0.1, floor=floors[name], where=name)


def test_accumulated_steps_show_the_first_batch_and_all_gradients() -> None:
    plain, other = model(), model()
    first, second = X[:2], X[2:]
    expected = line_of(plain, first)
    with watch(other, tokens=1000) as seen:
        for part in (first, second):
            loss_of(other(part.clone().requires_grad_())).backward()
            assert len(other.layers[0].mhc_0._forward_hooks) == 1
        seen.step(1.0)
    line: Any = seen.line
    assert line["maps"] == expected["maps"] and line["composite"] == expected["composite"]
    for name in ("spread", "pre_entropy", "trunk_gradient", "state_gradient", "composite_backward_99"):
        assert line["figures"][name] == expected["figures"][name]
    site = other.layers[0].mhc_1
    assert line["figures"]["bias_post_gradient"][1] == pytest.approx(float(site.bias.grad[4:8].norm()), rel=6e-3)
    assert line["figures"]["bias_post_gradient"] != expected["figures"]["bias_post_gradient"]


def test_fewer_tokens_are_some_of_them() -> None:
    x = torch.randn(8, 64, WIDTH, dtype=torch.float64)
    whole, part = (line_of(model(), x, tokens=tokens)["figures"] for tokens in (512, 64))
    for name in ("from_identity", "pre_entropy", "spread", "rank", "dominant", "trunk_gradient", "state_gradient"):
        agree(part[name][1:], whole[name][1:], rel=0.3, where=name)
        assert part[name][1:] != whole[name][1:], name


# -- kinds of models ---------------------------------------------------------------------------------------------------


KINDS = [
    "shared layer",
    "torch transformer",
    "encoder-decoder",
    "ConvNeXt",
    "BatchNorm on the trunk",
    "pre-activation, 2d",
    "two streams in turn",
    "joint block",
    "U-ViT",
]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str) -> None:
    found = BY_NAME[kind]
    args = found.arguments()
    converted = mhcify(found.model(), args, **found.options)
    oracle.perturb(converted)
    with watch(converted, tokens=1000) as seen:
        result = converted(*args)
        results = [result] if isinstance(result, Tensor) else result
        sum(loss_of(one) for one in results).backward()
        seen.step()
    line: Any = seen.line
    assert len(line["composite"]) == len(found.streams) and None not in line["composite"] and "notes" not in line
    assert len(set(seen.header.sites)) == len(seen.header.sites)
    first = {numbers[0] for numbers in seen.header.streams}
    for name, row in line["figures"].items():
        unknown = {number for number, value in enumerate(row) if value is None}
        assert unknown <= (first if name in ("state_gradient", "trunk_gradient") else set()), name


@pytest.mark.long
@pytest.mark.parametrize("kind", sorted(set(BY_NAME) - set(KINDS)))
def test_gradients_are_the_same_to_the_last_bit(kind: str) -> None:
    found = BY_NAME[kind]
    converted = mhcify(found.model(), found.arguments(), **found.options)
    oracle.perturb(converted)

    def gradients(seen: Any = None) -> list[Tensor | None]:
        converted.zero_grad()
        args = found.arguments()
        results = [x for x in tree_leaves(converted(*args)) if isinstance(x, Tensor) and x.requires_grad]
        sum(x.sin().mean() for x in results).backward()  # type: ignore[union-attr]
        if seen is not None:
            seen.step()
        return [p.grad for p in (*converted.parameters(), *(x for x in args if x.is_floating_point()))]

    expected = [None if gradient is None else gradient.clone() for gradient in gradients()]
    with watch(converted, tokens=1000) as seen:
        same = gradients(seen)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(same, expected, strict=True))  # type: ignore[arg-type]
    line: Any = seen.line
    assert len(line["composite"]) == len(found.streams) and None not in line["composite"] and "notes" not in line


def test_a_layer_that_is_called_several_times_has_figures_for_each_call() -> None:
    found = BY_NAME["shared layer"]
    converted: Any = mhcify(found.model(), found.arguments(), **found.options)
    oracle.perturb(converted)
    with watch(converted, tokens=1000) as seen:
        states: list[Tensor] = []
        hook = converted.layer.mhc_0.register_forward_hook(lambda m, args, out: states.append(args[0].detach()))
        converted(*found.arguments()).sum().backward()
        hook.remove()
        seen.step()
    line: Any = seen.line
    calls = [number for number, site in enumerate(seen.header.sites) if site.name == "layer.mhc_0"]
    assert [seen.header.sites[number].call for number in calls] == list(range(len(states))) and len(states) > 1
    for number, state in zip(calls, states):
        mean = converted.layer.mhc_0.coefficients(state).pre.flatten(0, -2).mean(0)
        assert line["maps"]["pre"][number] == pytest.approx(mean.tolist(), rel=6e-3)


def test_streams_by_stretches() -> None:
    torch.manual_seed(0)
    converted = mhcify(
        Stack([PreNorm() for _ in range(3)]).double(), (X,), n_streams={"layers.0-1": 4, "layers.2": 2}
    )  # fmt: skip
    line = line_of(converted)
    assert [site.n for site in watch(converted).header.sites] == [4, 4, 4, 4, 2, 2]
    assert line["composite"][0]["shape"] == [2, 4] and len(line["maps"]["res"][5]) == 4


def test_excluded_sites_and_no_projection() -> None:
    torch.manual_seed(0)
    stack = Stack([PreNorm() for _ in range(3)]).double()
    line = line_of(mhcify(stack, (X,), exclude=("layers.1",), dynamic=False))
    assert len(line["figures"]["spread"]) == 4 and line["figures"]["phi_pre_gradient"] == [None] * 4
    assert None not in line["figures"]["bias_res_gradient"]


# -- wrappers and trainers ---------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Hands calls on to the model's forward itself, past its hooks, as PEFT does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner.forward(x)


def test_the_outermost_module() -> None:
    converted = model()
    wrapper = Wrapper(converted)
    expected = line_of(converted)
    converted.zero_grad()
    agree(line_of(converted, forward=wrapper, watched=wrapper), expected)
    with watch(converted) as seen, pytest.warns(UserWarning, match="Give watch the outermost module"):
        wrapper(X).sum().backward()
        seen.step()


@pytest.mark.slow
def test_compiled_code_is_paused_in_sampled_steps() -> None:
    converted = model(torch.float32)
    x = X.float()
    expected = line_of(converted, x)
    converted.zero_grad()
    compiled = torch.compile(converted, backend="aot_eager")
    with pytest.warns(UserWarning, match="Compiled code is paused"):
        agree(line_of(converted, x, compiled, watched=compiled), expected, rel=1e-3, floor=1e-6)
    torch._dynamo.utils.counters.clear()
    found = []
    with watch(converted, every=2) as seen:
        for _ in range(4):
            compiled(x).square().mean().backward()
            found.append(torch._dynamo.utils.counters["frames"]["ok"])
            seen.step()
    assert found[0] == 0 and found[1] > 0 and found[3] == found[1], "compiled at the second step, and never again"
    assert seen.line is not None and seen.line["step"] == 2


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    ranks.run("watch_cases", "ddp", "ddp_in_a_checkpoint", "fsdp", "files", folder=tmp_path)


def small_bert() -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    return mhcify(BertForSequenceClassification(config))


@pytest.mark.parametrize("kind", [Trainer, MHCTrainer])
def test_transformers_trainer(kind: Any, tmp_path: Path) -> None:
    ids = torch.randint(3, 64, (8, 7), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in ids]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=1e-3,
    )  # fmt: skip
    converted = small_bert()
    trainer = kind(model=converted, args=args, train_dataset=data)
    with watch(converted, every=2, to=tmp_path / "run.jsonl") as seen:
        seen.attach(trainer)
        trainer.train()
    run = read(tmp_path / "run.jsonl")
    assert run.steps == [0, 2, 4] and run.end == "finished" and run.header.settings["epsilon"] == args.adam_epsilon
    assert all(sample["loss"] is not None for sample in run.samples)
    assert None not in run.figure("bias_post_gradient")[1] and min(run.figure("trunk_gradient")[2][1:]) > 0  # type: ignore[type-var]
    logged = [entry["step"] for entry in trainer.state.log_history if "mhc/forward_gain" in entry]
    assert logged == [1, 3, 5]


def test_trainers_reporters_get_the_figures(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        got: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
            self.got.append(dict(logs))

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    row = torch.arange(3, 10)
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": 1}] * 8
    converted = small_bert()
    trainer = Trainer(model=converted, args=args, train_dataset=data, callbacks=[Reporter()])
    watch(converted).attach(trainer)
    trainer.train()
    assert any("mhc/dead_mappings" in logs for logs in Reporter.got)


def test_adapters() -> None:
    import peft

    options = peft.LoraConfig(target_modules=["query"], r=2, modules_to_save=["mhc_0", "mhc_1"])
    adapted = peft.get_peft_model(small_bert(), options)
    ids = torch.randint(3, 64, (2, 7))
    with watch(adapted) as seen:
        adapted(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        seen.step()
    line: Any = seen.line
    assert None not in line["figures"]["phi_post_gradient"] and line["loss"] is not None and "notes" not in line


@pytest.mark.long
def test_the_demo_of_its_cost(tmp_path: Path) -> None:
    demo = Path(__file__).parents[1] / "demos" / "watch_cost.py"
    small = "--layers 1 --width 32 --batch 2 --length 16 --rounds 2 --every 2".split()
    environment = {**os.environ, "PYTHONPATH": str(demo.parents[1])}
    done = subprocess.run(
        [sys.executable, str(demo), *small], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "more in a sampled step" in done.stdout and "2 sites" in done.stdout.replace("\n", " ")


def test_lightning(tmp_path: Path) -> None:
    define_torchvision_operators()
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model(torch.float32)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-3, eps=1e-7)

    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_model_summary=False, accumulate_grad_batches=2,
        enable_progress_bar=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.randn(8, 5, WIDTH), batch_size=1)
    with watch(module, every=3, to=tmp_path / "run.jsonl") as seen:
        seen.attach(trainer)
        trainer.fit(module, data)
    run = read(tmp_path / "run.jsonl")
    assert run.steps == [0, 3] and run.end == "finished" and run.header.settings["epsilon"] == 1e-7
    assert all(sample["loss"] is not None for sample in run.samples)
    assert "mhc/spread" in trainer.callback_metrics

"""The demos that convert and train a model, in their quick setting: what they print, write and return."""

from __future__ import annotations

import copy
import csv
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
DEMOS = ROOT / "demos"

pytestmark = pytest.mark.slow


def run(name: str, folder: Path, *arguments: str) -> str:
    """What a demo prints in its short setting, started in another folder."""
    command = [sys.executable, str(DEMOS / name), *(arguments or ["--quick"])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Long enough for the C++ kernels to be built where that has not been done yet.
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    return done.stdout


def cells(printed: str, row: str) -> list[str]:
    """The cells of a printed table's row, without its name."""
    (line,) = [line for line in printed.splitlines() if re.match(rf"│ +{re.escape(row)} +│", line)]
    return [cell.strip() for cell in line.strip("│ ").split("│")][1:]


def errors(printed: str) -> list[float]:
    return [float(error) for error in re.findall(r"largest relative error of the logits, fp32: (\S+)", printed)]


def test_convert_vit(tmp_path: Path) -> None:
    printed = run("convert_vit.py", tmp_path)
    assert "ViTForImageClassification: 8 sites in 1 stream" in printed
    (error,) = errors(printed)
    assert 0 < error <= 1e-5
    assert "6/6" in printed
    before, after = map(float, cells(printed, "loss at step 1"))
    assert before == pytest.approx(after, rel=1e-3)
    accuracies = cells(printed, "accuracy on 1000 held-out images")
    assert all(0 <= float(share.rstrip("%")) <= 100 for share in accuracies)
    assert all(float(seconds) > 0 for seconds in cells(printed, "seconds per step"))
    original, spread = cells(printed, "spread of the streams")
    assert original == "-"
    assert float(spread) > 0


def test_shapes_differ_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At one place each kind covers other pixels, no shape is cut off, and the seed decides."""
    vit = script(monkeypatch, "convert_vit")
    kinds, count = len(vit.SHAPES), 400
    same = torch.full((kinds, 2), 0.5)
    pictures = vit.drawn(torch.arange(kinds), same, same[:, 0], same[:, 0])
    for one, other in itertools.combinations(pictures, 2):
        assert (one - other).abs().mean() >= 0.03
    place, scale, angle = torch.rand(3, count, 2, generator=torch.Generator().manual_seed(0))
    images = vit.drawn(torch.arange(count) % kinds, place, scale[:, 0], angle[:, 0])
    assert set(images.unique().tolist()) == {0.0, 1.0}
    assert not images[:, [0, -1]].any() and not images[:, :, [0, -1]].any()
    first, again, other = (next(vit.batches(seed, 8))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_convert_llama(tmp_path: Path) -> None:
    printed = run("convert_llama.py", tmp_path)
    assert "LlamaForCausalLM: 4 sites in 1 stream" in printed
    assert "9 of 9 checks passed" in printed
    lines = [line for line in printed.splitlines() if line.startswith("ok ")]
    assert len(lines) == 9
    for decisive in ("the original's tokens", "the tokens of that without", "safetensors", "bit for bit"):
        assert any(decisive in line for line in lines), decisive
    assert not list(tmp_path.iterdir())


def test_convert_llama_fails_on_a_model_whose_cache_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = script(monkeypatch, "convert_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=llama.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.2, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    broken = LlamaForCausalLM(config).eval()

    def turn_cached_steps_round(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            output.logits.neg_()

    broken.register_forward_hook(turn_cached_steps_round, with_kwargs=True)
    monkeypatch.setattr(llama, "small_llama", lambda layers, seed: copy.deepcopy(broken))
    with pytest.raises(typer.Exit) as raised:
        llama.main(tokens=8, seed=0, threads=1, quick=True)
    assert raised.value.exit_code == 1
    printed = capsys.readouterr().out
    failed = [line for line in printed.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 2
    assert "generation with KV cache gives the tokens of that without" in failed[0]
    assert "logits" in failed[1]
    assert "7 of 9 checks passed" in printed


def test_train_bytes(tmp_path: Path) -> None:
    printed = run("train_bytes.py", tmp_path, "--quick", "--output", "curves")
    assert "Decoder: 8 sites in 1 stream" in printed
    found = errors(printed)
    assert len(found) == 2 and max(found) <= 1e-5
    assert "6/6" in printed
    (sampled,) = re.findall(r"What they write(.*)Result ─", printed, re.DOTALL)
    assert sampled.count("\ndef ") == 3
    assert len(cells(printed, "seconds per step")) == 3
    original, *spreads = cells(printed, "spread of the streams")
    assert original == "-"
    assert all(float(spread) > 0 for spread in spreads)
    assert (tmp_path / "curves" / "train_bytes.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "curves" / "train_bytes.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "original", "mHC", "hc"]
    losses = [[float(value) for value in row[1:]] for row in rows]
    assert len(losses) == 6
    assert losses[0] == pytest.approx([losses[0][0]] * 3, rel=1e-4)
    assert all(after < before for before, after in zip(losses[0], losses[-1]))
    printed_last = [float(loss) for loss in cells(printed, "6")]
    assert printed_last == pytest.approx([sum(run) / 6 for run in zip(*losses)], abs=1e-4)


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A demo as a module."""
    monkeypatch.syspath_prepend(str(DEMOS))
    return importlib.import_module(name)


SMALL = "--layers", "1", "--width", "24", "--length", "8", "--threads", "1"


@pytest.mark.long
def test_compile_and_bench(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    printed = run("compile_and_bench.py", tmp_path, *SMALL, "--rounds", "1", "--no-fresh", "--json", str(figures))
    measured = json.loads(figures.read_text())
    workloads = list(dict.fromkeys(row["workload"] for row in measured))
    assert len(workloads) == 4 and all(f"\n{workload}\n" in printed for workload in workloads)
    ways = [(row["model"], row["backend"]) for row in measured[:4]]
    assert ways == [("original", "eager"), ("original", "inductor"), ("converted", "eager"), ("converted", "mhc")]
    assert all(row["seconds"] > 0 and row["ratio"] > 0 for row in measured)


@pytest.mark.long
def test_memory(tmp_path: Path) -> None:
    """The states that are kept are those that the cost model says, and the rest does not depend on L_r."""
    printed = run("memory.py", tmp_path, "--layers", "4", "--width", "24", "--length", "8", "--no-memory")
    rows = [cells(printed, name) for name in ("L_r = 1", "L_r = 2", "L_r = 4", "L_r = auto")]
    assert [float(row[0]) for row in rows] == [12.0, 4.0, 0.0, 4.0]
    assert all(float(row[0]) == float(row[-1]) for row in rows) and len({tuple(row[1:4]) for row in rows}) == 1


def test_finetune_llama(tmp_path: Path) -> None:
    printed = run("finetune_llama.py", tmp_path)
    assert "LlamaForCausalLM: 8 sites in 1 stream" in printed
    losses = {name: float(cells(printed, name)[0]) for name in ("pretrained", "LoRA", "converted", "LoRA and sites")}
    assert losses["converted"] == pytest.approx(losses["pretrained"], rel=1e-4)
    assert len(set(losses.values())) >= 3  # both kinds of adapters moved
    assert "equal to those of this process, to the last bit: True" in printed
    assert "it writes b'aliases = {" in printed


def test_share_sites(tmp_path: Path) -> None:
    printed = run("share_sites.py", tmp_path)
    assert printed.count("to the last bit: True") == 2
    assert "saved with sinkhorn_iterations=20 and has sinkhorn_iterations=5 here" in " ".join(printed.split())


def test_lightning_vit(tmp_path: Path) -> None:
    printed = " ".join(run("lightning_vit.py", tmp_path).split())
    assert "VisionTransformer: 8 sites in 1 stream" in printed
    assert printed.count("to the last bit: True") == 2 and "stopped in the middle and resumed" in printed

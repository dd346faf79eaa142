"""The command line: what is printed, where it goes, exit codes. The models are tiny; most are not even converted."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mhc_rewrite.cli import spec
from mhc_rewrite.cli.errors import CommandError, UsageError
from mhc_rewrite.cli.main import app

ROOT = Path(__file__).resolve().parent.parent

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.mlp(self.norm(x))

class Net(nn.Module):
    def __init__(self, width=8, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

def make(width=8, depth=3):
    print("building the model")
    return Net(width, depth), (torch.zeros(2, 4, width),)

def plain():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.zeros(2, 8),)

def broken():
    raise RuntimeError("no such weights")

def needs(width):
    return Net(width)

def odd_inputs():
    return Net(), [1]

def seven():
    return 7

net = Net()
number = 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's, current, with `nets.py` in it; imports and the path are undone afterwards."""
    (tmp_path / "nets.py").write_text(MODEL)
    (tmp_path / "bad.py").write_text("import torch\nvalue = 1 / 0\n")
    (tmp_path / "worse.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in ("nets", "bad", "worse"):
        if name not in before:
            sys.modules.pop(name, None)


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": None, **environment}).invoke(app, list(arguments))


# What is meant by a SPEC ---------------------------------------------------------------------------------------------

SETTINGS = {
    ("n_layer=2",): {"n_layer": 2},
    ("a=1e-3", "b=[1, 2]", "c=None", "d='x y'"): {"a": 1e-3, "b": [1, 2], "c": None, "d": "x y"},
    ("hidden_act=relu", "text_config.n=3"): {"hidden_act": "relu", "text_config.n": 3},
    ("a==b",): None,
    ("a=1", "a=2"): {"a": 2},
    ("a",): None,
    ("=1",): None,
    ("a=",): None,
    ("a=[1",): None,
    ("a=true",): None,
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_settings(settings: tuple[str, ...]) -> None:
    if (expected := SETTINGS[settings]) is not None:
        assert spec.parse_settings(settings) == expected
        return
    with pytest.raises(UsageError, match="--config"):
        spec.parse_settings(settings)


@pytest.mark.parametrize("text", ["nets.py:make", "nets:make", "./nets.py:make"])
def test_a_callable_gives_a_model_and_its_inputs(folder: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = spec.load(text, ["depth=5"])
    assert len(model.layers) == 5 and inputs[0].shape == (2, 4, 8)


def test_an_instance_and_a_class_are_models_too(folder: Path) -> None:
    for text in ("nets.py:net", "nets.py:Net"):
        model, inputs = spec.load(text)
        assert type(model).__name__ == "Net" and inputs is None


def test_a_file_named_as_a_loaded_module_is_itself(folder: Path) -> None:
    (folder / "json.py").write_text("from nets import make")
    model, _ = spec.load("json.py:make")
    assert len(model.layers) == 3 and sys.modules["json"] is json
    del sys.modules["json_file"]


WRONG = {
    # SPEC -> exit code, what the message holds
    "gpt2": (2, "Did you mean hf:gpt2"),
    "nets.py": (2, "nets.py:function"),
    "hf:": (2, "is no model"),
    "nest.py:make": (2, "There is no file nest.py. Did you mean nets.py"),
    "nets.py:mak": (2, "Did you mean nets.py:make"),
    "nets:mak": (2, "Did you mean nets:make"),
    "nets:Net.forwards": (2, "no 'Net.forwards'"),
    "no_such.module:f": (2, "There is no module 'no_such'"),
    "nets.inner:f": (2, "There is no module 'nets.inner'"),
    "nets.py:needs": (2, "cannot be called with no arguments"),
    "nets.py:seven": (2, "gives a int, not a model"),
    "nets.py:number": (2, "not a model"),
    "nets.py:odd_inputs": (2, "example inputs of type list"),
    "nets.py:net": (1, "name a callable that returns the pair (model, example_inputs)"),
    "nets.py:broken": (1, "RuntimeError: no such weights"),
    "bad.py:f": (1, "bad.py:2 `value = 1 / 0`"),
    "bad:f": (1, "bad.py:2 `value = 1 / 0`"),
    "worse.py:f": (1, "worse.py:1"),
}


@pytest.mark.parametrize("text", WRONG)
@pytest.mark.parametrize("command", ["print", "sites"])
def test_a_wrong_spec_is_one_readable_message(folder: Path, text: str, command: str) -> None:
    code, message = WRONG[text]
    result = run(command, text)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.stderr


def test_options_of_an_instance_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="is a model already"):
        spec.load("nets.py:net", ["depth=1"])
    with pytest.raises(UsageError, match="unexpected keyword"):
        spec.load("nets.py:make", ["dept=1"])


@pytest.mark.parametrize(
    "library, text, extra", [("timm", "timm:resnet18", "vision"), ("transformers", "hf:gpt2", "hf")]
)
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, library: str, text: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    result = run("sites", text)
    assert result.exit_code == 1
    assert f'{library} is not installed. Install it with: pip install "mhc-rewrite[{extra}]"' in result.stderr


def test_a_library_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(CommandError, match=r"torchvision::nms does not exist.*\n.*mhc-rewrite\[vision\]"):
        spec.load("timm:resnet18")


# The command itself --------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert re.fullmatch(r"mhc-rewrite \d+\.\d+\S*\n", run("--version").stdout)
    assert run("--help").exit_code == 0
    for arguments in (["print"], ["sites", "a:b", "--n", "17"], ["print", "a:b", "--format", "svg"], ["prnt", "a:b"]):
        assert run(*arguments).exit_code == 2


class TestConverted:
    def test_sites(self, folder: Path) -> None:
        result = run("sites", "nets.py:make")
        assert result.exit_code == 0, result.stderr
        assert "3 sites in 1 stream" in result.stdout and "layers.{0..2}.mhc_0" in result.stdout
        assert "x + self.mlp(self.norm(x))" in result.stdout
        assert "building the model" in result.stderr and "building the model" not in result.stdout

    def test_sites_as_json(self, folder: Path) -> None:
        data = json.loads(run("sites", "nets.py:make", "--format", "json", "--n", "2", "--config", "depth=4").stdout)
        assert [site["name"] for site in data["streams"][0]["sites"]] == [f"layers.{i}.mhc_0" for i in range(4)]
        assert data["config"]["n_streams"] == 2
        assert {"model", "config", "streams", "rejections", "notes"} <= set(data)

    @pytest.mark.parametrize("format", ["rich", "text"])
    def test_print(self, folder: Path, format: str) -> None:
        original = run("print", "nets.py:make", "--stage", "original", "--format", format).stdout
        rewritten = run("print", "nets.py:make", "--format", format).stdout
        assert "residual add" in original and "residual add" not in rewritten
        assert "mhc_0" not in original and "mhc_0" in rewritten
        assert original.count("nets.py:11") >= 1 and "layers.{0..2}  Block x3" in original

    def test_diff(self, folder: Path) -> None:
        lines = run("print", "nets.py:make", "--stage", "diff", "--format", "text", "--layer", "layers.1").stdout
        removed = [line for line in lines.splitlines() if line.startswith("-") and "residual add" in line]
        added = [line for line in lines.splitlines() if line.startswith("+") and "mhc_0" in line]
        assert len(removed) == 1 and len(added) >= 2
        assert "layers.1  Block" in lines and "layers.0" not in lines

    def test_json(self, folder: Path) -> None:
        data = json.loads(
            run("print", "nets.py:make", "--format", "json", "--stage", "diff", "--config", "depth=5").stdout
        )
        graphs = [graph for graph in data["graphs"] if graph["kind"] == "Block"]
        modules = [["layers.0"], ["layers.1", "layers.2", "layers.3", "layers.4"]]
        assert [graph["modules"] for graph in graphs] == modules  # the first expands
        assert [graph["count"] for graph in graphs] == [1, 4]
        assert {"spec": "nets.py:make", "model": "Net", "n_streams": 4, "stage": "diff"}.items() <= data.items()
        graph = graphs[1]
        add = next(node for node in graph["original"] if node["role"] == "residual add")
        assert add["shape"] == [2, 4, 8] and add["source"]["text"].startswith("return x + self.mlp")
        post = next(node for node in graph["rewritten"] if node["role"] == "post")
        assert 4 in post["shape"] and post["shape"][-1] == 8
        assert "original" not in json.loads(run("print", "nets.py:make", "--format", "json").stdout)["graphs"][0]

    def test_dot(self, folder: Path) -> None:
        text = run("print", "nets.py:make", "--format", "dot").stdout
        assert text.startswith("digraph") and text.rstrip().endswith("}")
        assert text.count("palegreen") >= 2 and "->" in text

    def test_a_model_without_residuals(self, folder: Path) -> None:
        result = run("print", "nets.py:plain")
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr

    def test_one_stream_rewrites_nothing(self, folder: Path) -> None:
        result = run("print", "nets.py:make", "--n", "1")
        assert result.exit_code == 0 and "nothing was rewritten" in result.stderr and result.stdout.strip() == ""

    def test_an_unknown_layer(self, folder: Path) -> None:
        result = run("print", "nets.py:make", "--layer", "layers.9")
        assert result.exit_code == 2 and "Did you mean layers." in result.stderr

    def test_exclude(self, folder: Path) -> None:
        data = json.loads(run("sites", "nets.py:make", "--format", "json", "--exclude", "layers.1").stdout)
        assert [site["excluded"] for site in data["streams"][0]["sites"]] == [False, True, False]


# Processes -----------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mhc_rewrite.cli.main", *arguments]


def environment(**changes: str) -> dict[str, str]:
    """Of a shell without preferences about colour."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS")}
    return {**kept, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **changes}


def on_a_terminal(*arguments: str, **changes: str) -> str:
    """What the command writes to stdout where that is a terminal."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command(*arguments), stdout=theirs, stderr=subprocess.DEVNULL, env=environment(**changes)
    ) as p:
        os.close(theirs)
        written = b""
        with open(ours, "rb", buffering=0) as terminal:
            try:
                while chunk := terminal.read(65536):
                    written += chunk
            except OSError:  # how Linux says that the other end is closed
                pass
    assert p.returncode == 0
    return written.decode()


@pytest.mark.slow
class TestProcess:
    def test_a_pipe_gets_plain_text_and_is_not_wrapped(self, folder: Path) -> None:
        line = command("print", "nets.py:make", "--format", "text")
        done = subprocess.run(line, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "building the model" in done.stderr and "building the model" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) > 80

    def test_exit_codes(self, folder: Path) -> None:
        for text, code in (("nets.py:plain", 1), ("nets.py:nothing", 2)):
            done = subprocess.run(command("sites", text), capture_output=True, text=True, env=environment())
            assert (done.returncode, done.stdout) == (code, "")
            assert "Traceback" not in done.stderr and "\x1b" not in done.stderr

    def test_a_reader_that_leaves_early_is_no_error(self, folder: Path) -> None:
        line = " ".join(command("print", "nets.py:make", "--format", "json")) + " | head -1"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment())
        assert done.stdout == "{\n" and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr

    def test_a_terminal_gets_colours_unless_refused(self, folder: Path) -> None:
        coloured = r"\x1b\[[0-9;]*3[0-7]"
        arguments = ("print", "nets.py:make", "--stage", "diff")
        assert re.search(coloured, on_a_terminal(*arguments))
        assert not re.search(coloured, on_a_terminal(*arguments, NO_COLOR="1"))


# Libraries -----------------------------------------------------------------------------------------------------------

SMALL = {
    # model type -> class, options, what must hold
    "gpt2": ("GPT2LMHeadModel", (), lambda c: c.n_layer == 4),
    "llama": ("LlamaForCausalLM", ("n_layers=2",), None),
    "qwen3": ("Qwen3ForCausalLM", ("num_hidden_layers=2",), lambda c: c.num_hidden_layers == 2),
    "bert": ("BertForMaskedLM", (), lambda c: c.num_hidden_layers == 4),
    "t5": ("T5ForConditionalGeneration", ("num_layers=1",), lambda c: (c.num_layers, c.num_decoder_layers) == (1, 4)),
    "whisper": ("WhisperForConditionalGeneration", (), lambda c: c.pad_token_id < c.vocab_size),
    "deepseek_v3": ("DeepseekV3ForCausalLM", (), lambda c: c.n_routed_experts == 16),
    "mamba2": ("Mamba2ForCausalLM", (), lambda c: c.num_heads * c.head_dim == c.expand * c.hidden_size),
    "swin": ("SwinForImageClassification", (), lambda c: c.depths == [2, 2, 2, 2]),
    "deit": ("DeiTForImageClassification", (), None),
    "clip": ("CLIPForImageClassification", ("vision_config.num_hidden_layers=3",),
             lambda c: c.vision_config.num_hidden_layers == 3),
    "clip_text_model": ("CLIPTextModel", (), None),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model_type", SMALL)
def test_a_small_transformers_model(model_type: str) -> None:
    name, settings, holds = SMALL[model_type]
    if settings == ("n_layers=2",):
        with pytest.raises(UsageError, match="Did you mean num_hidden_layers"):
            spec.load(f"hf:{model_type}", settings)
        return
    model, inputs = spec.load(f"hf:{model_type}", settings)
    assert type(model).__name__ == name and inputs is None and not model.training
    assert sum(p.numel() for p in model.parameters()) < 100e6
    assert holds is None or holds(model.config)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, settings, message",
    [
        ("hf:gtp2", (), "Did you mean hf:gpt2"),
        ("hf:gpt2", ("n_layer='two'",), "n_layer"),
        ("hf:gpt2", ("n_head=7",), "no small model"),
        ("timm:resnet81", (), "Did you mean timm:resnet"),
        ("timm:resnet18", ("no_such=1",), "no_such"),
    ],
)
def test_what_a_library_does_not_know(text: str, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        spec.load(text, settings)


@pytest.mark.slow
def test_a_timm_model() -> None:
    model, inputs = spec.load("timm:resnet18", ["num_classes=3"])
    assert type(model).__name__ == "ResNet" and model.fc.out_features == 3 and inputs is None and not model.training

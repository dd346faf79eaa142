"""PEFT's own tests of decoders, on converted models: what passes on the originals has to pass on the conversions.

    python -m pip download --no-deps --no-binary peft peft==0.21.2
    python tests/peft_decoders.py peft-0.21.2.tar.gz
    python tests/peft_decoders.py peft-0.21.2.tar.gz --models Llama,gpt2 --tests "lora and not prompt"

The tests are those of the source distribution, unchanged. They ask for small models by their names on the hub; here
these names stand for models of the same classes made on the spot, with random weights, once as they are and once
converted, with perturbed sites. Not a part of `make test`: it takes long. Ends with status 1 if a test passes on the
originals alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as tree
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conftest import define_torchvision_operators

FOLDER = "MHC_PEFT_MODELS"  # in the environment of the runs: where the models are that stand for those of the hub
SMALL = {"vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 1100, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
# By the names that PEFT's tests use: transformers' config class, and what makes it small.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTConfig", {**SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2Config", GPT2),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2Config", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJConfig", {**GPT2, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", LAYERS),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2Config", LAYERS),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralConfig", LAYERS),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": ("Gemma3TextConfig", {**LAYERS, "head_dim": 8}),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("sdist", type=Path, help="PEFT's source distribution, of the version that is installed")
    parser.add_argument("--models", default="Llama,GPT2", help="parts of their names, with commas; all: 'tiny'")
    parser.add_argument("--tests", default="", metavar="EXPRESSION", help="pytest's -k, besides the models")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if not options.sdist.is_file():
        parser.error(f"there is no {options.sdist}; the first line of this file's examples brings it")
    chosen = f"({' or '.join(options.models.split(','))})" + (f" and ({options.tests})" if options.tests else "")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with tarfile.open(options.sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.glob("peft-*")
        # Another tests/ is on the path, and PEFT's settings of pytest bring plugins of their own.
        (source / "tests").rename(folder / "peft_tests")
        (folder / "peft_tests" / "__init__.py").touch()
        # Imported by what all of PEFT's tests share, for tests of other models.
        for package, name in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
            if importlib.util.find_spec(package) is None:
                (folder / f"{package}.py").write_text(f"class {name}: ...\n")
        for kind in ("original", "converted"):
            make_models(folder / kind, options.models.split(","), kind == "converted")
        found = {kind: outcomes(folder, kind, chosen, options.jobs) for kind in ("original", "converted")}
    for kind, of in found.items():
        print(f"{kind}: {dict(Counter(of.values()))}")
    lost = [test for test, outcome in found["original"].items()
            if outcome == "passed" and found["converted"].get(test) != "passed"]  # fmt: skip
    print("\n".join(["pass on the originals alone:", *lost]) if lost else "What passes on the originals passes.")
    return 1 if lost or "passed" not in found["original"].values() else 0


def make_models(folder: Path, parts: list[str], convert: bool) -> None:
    """A folder for every model's name, as `save_pretrained` writes it."""
    define_torchvision_operators()
    import transformers

    import oracle
    from mhc_rewrite import mhcify

    for name, (config, sizes) in MODELS.items():
        if not any(part.lower() in name.lower() for part in parts):  # as pytest's -k
            continue
        torch.manual_seed(0)
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes))
        if convert:
            oracle.perturb(mhcify(model))
        model.save_pretrained(folder / name)


def outcomes(folder: Path, kind: str, chosen: str, jobs: int) -> dict[str, str]:
    """What became of every test, run on the models of this kind."""
    here, results = Path(__file__).parent, folder / f"{kind}.xml"
    path = os.pathsep.join([str(folder), str(here), str(here.parent)])
    environment = {**os.environ, FOLDER: str(folder / kind), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "peft_decoders", "-c", os.devnull, "--rootdir", str(folder),
        "-n", str(jobs), "-k", chosen, "--junitxml", str(results), "--tb=line", "-W", "ignore",
        str(folder / "peft_tests" / "test_decoder_models.py"),
    ]  # fmt: skip
    subprocess.run(command, env=environment, cwd=folder)
    found = {}
    for case in tree.parse(results).iter("testcase"):
        said = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[case.attrib["name"]] = said[0] if said else "passed"
    return found


def pytest_configure() -> None:
    """As a plugin of those runs: the models' names lead to the folders made here."""
    define_torchvision_operators()
    torch.set_num_threads(1)
    import transformers

    import mhc_rewrite.hf  # noqa: F401

    given = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(os.environ[FOLDER], str(name))
        return given(folder if folder.is_dir() else name, *args, **kwargs)

    transformers.AutoModelForCausalLM.from_pretrained = from_pretrained  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main())

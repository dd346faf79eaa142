"""The wheel as people get it: built from the sources, installed beside its dependencies alone, used."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "passes")

USED = """
import torch
from torch import nn
from mhc_rewrite import mhcify, report

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x):
        return x + self.linear(self.norm(x))

model = nn.Sequential(*(Block() for _ in range(3)))
x = torch.randn(2, 5, 16)
want = model(x)
mhcify(model, (x,))
assert torch.allclose(model(x), want, atol=1e-5)
model(x).sum().backward()
print(report(model))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "mhc_rewrite", tree / "mhc_rewrite", ignore=shutil.ignore_patterns("__pycache__"))
    for name in LINKS:
        (tree / name).symlink_to(f"mhc_rewrite/{name}")
    build = "from setuptools import build_meta; build_meta.build_wheel('.')"
    _run([sys.executable, "-c", build], tree)
    (made,) = tree.glob("*.whl")
    return made


def _run(command: list[str], folder: Path, path: str | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    if path is not None:
        environment["PATH"] = path
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _needed(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    """A distribution of this environment and those that it needs, without extras."""
    if name in found:
        return
    try:
        found[name] = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return  # for another system or Python
    for requirement in found[name].requires or ():
        if "extra ==" not in requirement:
            _needed(re.split(r"[ <>=!~\[;(]", requirement)[0], found)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and what it says that it needs: links to what is installed here."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = archive.read(metadata).decode()
    found: dict[str, importlib.metadata.Distribution] = {}
    for line in re.findall(r"^Requires-Dist: (.+)$", said, re.MULTILINE):
        if "extra ==" not in line:
            _needed(re.split(r"[ <>=!~\[;(]", line)[0], found)
    for distribution in found.values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(str(distribution.locate_file(top)))
    _run([str(folder / "bin" / "python"), "-m", "pip", "install", "--no-index", str(wheel)], folder)
    return folder


def test_wheel_holds_every_file_once(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        (entry_points,) = (name for name in files if name.endswith("entry_points.txt"))
        assert "mhc-rewrite = mhc_rewrite.cli.main:app" in archive.read(entry_points).decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mhc_rewrite").rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == sources
    assert len(files) == len(set(files))
    data = {"devices.json", "py.typed", *(f"kernels/cpp/{path.name}" for path in (ROOT / "kernels/cpp").iterdir())}
    data |= {f"insight/drawing/page/{name}" for name in ("page.css", "page.js")}
    assert {f"mhc_rewrite/{name}" for name in data} <= set(files)


def test_converts_beside_nothing_but_its_dependencies(bare: Path) -> None:
    seen = _run([str(bare / "bin" / "python"), "-c", USED], bare)
    assert "3 sites in 1 stream" in seen
    where = _run([str(bare / "bin" / "python"), "-c", "import mhc_rewrite; print(mhc_rewrite.__file__)"], bare)
    assert where.startswith(str(bare))


def test_command_line_beside_nothing_but_its_dependencies(bare: Path) -> None:
    command = str(bare / "bin" / "mhc-rewrite")
    path = os.pathsep.join([str(bare / "bin"), "/usr/bin", "/bin"])
    (bare / "net.py").write_text(USED.split("want =")[0].replace("from mhc_rewrite import mhcify, report\n", "")
                                 + "def load():\n    return model, (x,)\n")  # fmt: skip
    assert "3 sites in 1 stream" in _run([command, "sites", "net.py:load"], bare, path)
    assert "torch" in _run([command, "doctor"], bare, path)
    assert "27" in _run([command, "cost", "paper"], bare, path)
    missing = subprocess.run([command, "sites", "hf:gpt2"], cwd=bare, capture_output=True, text=True, timeout=600)
    assert missing.returncode != 0 and "transformers" in missing.stderr and "Traceback" not in missing.stderr

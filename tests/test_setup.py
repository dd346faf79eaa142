"""What holds the repository together: the two links, the packaging, the versions, the commands, the demo."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from setuptools import find_namespace_packages
from setuptools.config.pyprojecttoml import read_configuration

import mhc_rewrite

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "passes")


@pytest.fixture(scope="module")
def settings() -> dict[str, Any]:
    """pyproject.toml."""
    return read_configuration(ROOT / "pyproject.toml", expand=False)


def source_files() -> set[str]:
    """The package's Python files, from the root, each under its own name and not a link's."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "mhc_rewrite").rglob("*.py")}


def python(*arguments: str, folder: Path = ROOT, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, started in `folder`, with `path` behind it on sys.path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("name", LINKS)
def test_link_at_the_root(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert os.readlink(link) == f"mhc_rewrite/{name}"
    assert any(link.glob("*.py"))


@pytest.mark.parametrize("name", LINKS)
def test_linked_folder_is_no_regular_package(name: str) -> None:
    assert not (ROOT / "mhc_rewrite" / name / "__init__.py").exists()


def test_link_does_not_hide_an_installed_kernels_package(tmp_path: Path) -> None:
    """Found at the root first, a folder without `__init__.py` gives way to a package further down sys.path."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("installed = True\n")
    found = python("-c", "import sys, kernels; print(sys.path[0] == '', kernels.installed)", path=tmp_path)
    assert found.stdout.split() == ["True", "True"], found.stderr


@pytest.mark.slow
def test_transformers_imports_at_the_root() -> None:
    """With the link there and no package `kernels` installed."""
    hide = "import sys; sys.modules['torchvision'] = None"  # its wheel does not load beside every build of torch
    found = python("-c", f"{hide}; from transformers import GPT2LMHeadModel as m; print(m.__name__)")
    assert found.stdout.strip() == "GPT2LMHeadModel", found.stderr


def test_packaging_finds_every_subpackage_once(settings: dict[str, Any]) -> None:
    find = settings["tool"]["setuptools"]["packages"]["find"]
    assert find["namespaces"]
    found = find_namespace_packages(str(ROOT / find["where"][0]), include=find["include"])
    folders = {Path(file).parent.as_posix().replace("/", ".") for file in source_files()}
    assert folders <= set(found)
    assert {"mhc_rewrite.kernels", "mhc_rewrite.passes"} <= set(found)
    assert {name.split(".")[0] for name in found} == {"mhc_rewrite"}


def test_version_is_the_same_everywhere(settings: dict[str, Any]) -> None:
    version = settings["project"]["version"]
    assert mhc_rewrite.__version__ == version
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    try:
        installed = importlib.metadata.version("mhc-rewrite")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed in this environment")
    assert installed == version


def test_console_script_names_the_command() -> None:
    from mhc_rewrite.cli.main import app

    assert callable(app)


def test_every_dependency_has_a_tested_version(settings: dict[str, Any]) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9.]*( ; .+)?", line) for line in lines), lines
    pinned = {line.split("==")[0] for line in lines}
    project = settings["project"]
    wanted = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert {re.split(r"[<>=!~\[ ;]", requirement)[0] for requirement in wanted} <= pinned
    assert {"torch==2.13.0", "torchvision==0.28.0"} <= set(lines)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("demo", [" -m venv ", " -m pip install -c constraints.txt -e ", "demos/convert_gpt.py"]),
        ("test", [" -m venv ", " -m pip install ", "ruff check", "ruff format --check", "mypy", "pytest -n 2"]),
        ("test-fast", [" -m venv ", " -m pip install ", '-m "not slow and not long"']),
    ],
)
def test_make_sets_up_before_it_runs(target: str, steps: list[str], tmp_path: Path) -> None:
    """From nothing, and from a finished set-up, where nothing is installed again."""
    venv = tmp_path / "venv"
    command = ["make", "-n", target, f"VENV={venv}", "PYTEST_ARGS="]
    # This test may itself run under `make`, whose settings would be handed on.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}

    def planned() -> str:
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

    fresh = planned()
    places = [fresh.find(step) for step in steps]
    assert -1 not in places, fresh
    assert places == sorted(places), fresh
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / "installed").touch()
    again = planned()
    assert "pip install" not in again
    assert "-m venv" not in again
    assert steps[-1] in again


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


@pytest.mark.slow
def test_demo_runs(tmp_path: Path) -> None:
    """In a few steps, from another folder: it prints plan, layer, equality and result, and writes the pictures."""
    output = tmp_path / "out"
    arguments = (str(ROOT / "demos" / "convert_gpt.py"), "--steps", "6", "--threads", "1", "--output", str(output))
    ran = python(*arguments, folder=tmp_path, path=ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "\x1b" not in ran.stdout
    for text in ("GPT2LMHeadModel", "mhc_0", "largest relative error", "6/6", "loss on held-out files"):
        assert text in ran.stdout
    for name in ("loss.png", "model.png", "watched.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    assert "transformer.h.{0..3}" in (output / "model.html").read_text()
    with (output / "loss.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "original", "mHC"]
    losses = [[float(value) for value in row[1:]] for row in rows]
    assert len(losses) == 6
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-4)
    for before, after in zip(losses[0], losses[-1]):
        assert after < before
    (spread,) = re.findall(r"spread of the streams.*?(\d+\.\d+)", ran.stdout)
    assert float(spread) > 0.0

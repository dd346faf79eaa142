"""What a machine has for converted models, and where the CPU kernels go when they can't go where they should."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension
from typer.testing import CliRunner

from mhc_rewrite.cli.main import app
from mhc_rewrite.insight.machine import machine
from mhc_rewrite.kernels import cpu, gpu


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing built, temporary files in a folder of the test's, and a compiler that writes the file and no code."""
    monkeypatch.setenv("MHC_REWRITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu.tempfile, "tempdir", str(tmp_path))

    def load(name: str, sources: list[str], build_directory: str, **_: Any) -> None:
        Path(build_directory, f"{name}.so").write_text("built")

    monkeypatch.setattr(cpp_extension, "load", load)
    return tmp_path


def test_built_once_in_the_folder_that_is_named(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = cpu.built()
    assert file.parent == folders / "cache" and file.read_text() == "built"
    assert "building the CPU kernels, once (about 20 seconds)" in capsys.readouterr().err
    assert cpu.built() == file and not capsys.readouterr().err
    assert os.listdir(file.parent) == [file.name]


def test_torchs_own_variable_and_the_default(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MHC_REWRITE_CACHE")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folders / "extensions"))
    assert cpu.library().folders[0] == folders / "extensions"
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders / "home"))
    assert cpu.library().folders[0] == folders / "home" / "torch_extensions"


def test_a_folder_that_cannot_be_written_to(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "cache").write_text("a file")
    file = cpu.built()
    assert file.parent.parent == folders and file.parent.name.startswith("mhc_rewrite-")
    assert file.parent.stat().st_mode & 0o077 == 0
    said = capsys.readouterr().err
    assert f"{folders / 'cache'} can't be used" in said and f"{file.parent} instead" in said
    assert cpu.built() == file and not capsys.readouterr().err
    assert machine().cpu_kernels == f"built, {file}"


def test_a_place_that_was_named_later_gets_its_own(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image's folder, say: that there is a library among the temporary files does not help there."""
    (folders / "cache").write_text("a file")
    spare = cpu.built()
    monkeypatch.setenv("MHC_REWRITE_CACHE", str(folders / "image"))
    assert "not built yet" in machine().cpu_kernels
    assert cpu.built().parent == folders / "image" and spare.exists()


def test_a_full_disk(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    usage = shutil.disk_usage(folders)
    full = str(folders / "cache")
    monkeypatch.setattr(
        cpu.shutil, "disk_usage", lambda place: usage._replace(free=0) if str(place).startswith(full) else usage
    )
    assert cpu.built().parent != folders / "cache"
    assert "less than 32 MB are free" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="knows no owners of files")
def test_no_code_is_loaded_from_a_folder_of_another_user(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    assert cpu.library().folders == (folders / "cache",)
    (folders / "cache").write_text("a file")
    with pytest.raises(OSError):
        cpu.built()


def test_what_the_machine_has(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine()
    assert found.versions["torch"] == torch.__version__ and found.versions["sympy"] is not None
    assert found.devices[0].startswith("CPU: ")
    assert "not built yet" in found.cpu_kernels and str(folders / "cache") in found.cpu_kernels
    assert any("mhc-rewrite build" in one for one in found.missing)
    cpu.built()
    assert machine().cpu_kernels == f"built, {cpu.library().files[0]}"
    assert not any("CPU kernels" in one for one in machine().missing)


def test_what_is_missing_is_said_with_what_brings_it(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    for program, said in (("ninja", "pip install ninja"), (cpp_extension.get_cxx_compiler(), "g++ 12 or newer")):
        absent = lambda name, program=program, **more: None if name == program else which(name, **more)  # noqa: E731
        monkeypatch.setattr(shutil, "which", absent)
        found = machine()
        assert "can't be built" in found.cpu_kernels and any(said in one for one in found.missing), found
    monkeypatch.setattr(gpu, "AVAILABLE", False)
    assert machine().triton == "not installed"


def test_the_commands(folders: Path) -> None:
    shown = CliRunner().invoke(app, ["doctor"])
    assert shown.exit_code == 0 and re.search(rf"torch +{re.escape(torch.__version__)}", shown.output), shown.output
    assert "missing: the CPU kernels" in shown.output
    built = CliRunner().invoke(app, ["build"])  # what was built here is no library
    assert built.exit_code == 1 and "could not be built" in built.output


def test_another_process_was_quicker(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = cpp_extension.load

    def late(name: str, sources: list[str], build_directory: str, **_: Any) -> None:
        monkeypatch.setattr(cpp_extension, "load", quick)
        assert cpu.built().exists()  # the other one begins and ends in the meantime
        quick(name, sources, build_directory=build_directory)

    monkeypatch.setattr(cpp_extension, "load", late)
    file = cpu.built()
    assert file.read_text() == "built" and os.listdir(file.parent) == [file.name]


@pytest.mark.slow
def test_built_ahead(tmp_path: Path) -> None:
    """For an image: built in a folder that is named, and loaded from there by others."""
    environment = {**os.environ, "MHC_REWRITE_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "mhc_rewrite.cli.main", "build"]
    first, again = (subprocess.run(command, env=environment, capture_output=True, text=True) for _ in range(2))
    (file,) = tmp_path.iterdir()
    assert first.returncode == 0 and re.search(rf"built in \d+ s: {re.escape(str(file))}", first.stdout), first.stderr
    assert "building the CPU kernels, once" in first.stderr
    assert again.stdout.strip() == f"there already: {file}" and not again.stderr

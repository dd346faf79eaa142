"""torchvision's operators are defined where they are missing alone: a second definition would end the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
# What stands in torchvision/__init__.py, and whether the operators are to be defined.
PACKAGES = {
    "library loads": (f"library = torch.library.Library('torchvision', 'DEF'); library.define('{NMS}')", False),
    "library does not load": ("@torch.library.register_fake('torchvision::nms')\ndef fake(*_): ...", True),
    "not there": ("raise ModuleNotFoundError('torchvision')", False),
}


def python(code: str, *folders: Path) -> str:
    """What a process of its own prints that looks into the folders first."""
    paths = f"import sys; sys.path[:0] = {[str(folder) for folder in folders]}\n"
    ran = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("case", PACKAGES)
def test_defined_where_they_are_missing(case: str, tmp_path: Path) -> None:
    code, defined = PACKAGES[case]
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"import torch\n{code}\n")
    use = "import torchvision" if case != "not there" else ""
    printed = python(
        "import torch\n"
        "from torchvision_operators import define_torchvision_operators as define\n"
        f"define(); define()\n{use}\n"
        "print(hasattr(define, 'library'), hasattr(torch.ops.torchvision, 'nms'))",
        tmp_path, ROOT / "demos",
    )  # fmt: skip
    assert printed.split() == [str(defined), str(case != "not there")]


def test_beside_the_torchvision_that_is_here() -> None:
    """In either order; a process that aborts prints nothing."""
    pytest.importorskip("torchvision")
    define = "from torchvision_operators import define_torchvision_operators as define; define()"
    assert python(f"{define}; import torchvision; print('alive')", ROOT / "demos") == "alive\n"
    first = "import contextlib\nwith contextlib.suppress(RuntimeError): import torchvision"
    assert python(f"{first}\n{define}; import torchvision; print('alive')", ROOT / "demos") == "alive\n"

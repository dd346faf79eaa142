"""The Triton kernels by Triton's interpreter, which is switched on when a kernel is decorated: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "kernels_interpreted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests",
    [
        "test_post or test_pre", "test_boundary", "test_inner",
        "not test_post and not test_pre and not test_boundary and not test_inner",
    ],
)  # fmt: skip
def test_kernels_interpreted(tests: str) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this system")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", tests, str(FOLDER)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(command, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]

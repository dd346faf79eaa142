"""demos/gpu_check.py on the CPU: what shows without a GPU is that it runs, and that it finds what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEMOS = ROOT / "demos"


@pytest.fixture(scope="module")
def script() -> Any:
    """The script and its parts as modules."""
    sys.path.insert(0, str(DEMOS))
    try:
        import gpu_check
        import gpu_operators
        import gpu_times

        yield gpu_check, gpu_operators, gpu_times
    finally:
        sys.path.remove(str(DEMOS))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMOS / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no GPU")
def test_without_a_gpu_it_says_so_and_checks_the_cpu(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    done = run("--quick", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].startswith("No GPU is present")
    assert "26 of 26 checks" in done.stdout
    figures = json.loads(file.read_text())
    assert figures["times"] == [] and len(figures["correctness"]) == 24 + 2
    assert not any(row["wrong"] for row in figures["correctness"])


@pytest.mark.slow
def test_asking_for_a_gpu_that_is_not_there_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--device", "cuda")
    assert done.returncode == 2 and "torch finds no GPU" in done.stderr.replace("\n", " ")


def test_times(script: Any) -> None:
    """Every operator, forward and with its gradients, beside a copy; who is absent is named with a reason."""
    _, operators, times = script
    size = operators.Size(8, 4, 16)
    rows = times.measure([size], torch.float32, "cpu", 1, ["ours", "eager aten", "Liger", "TransformerEngine"])
    assert [(row["operator"], row["backward"]) for row in rows] == [
        (name, backward) for name in operators.OPERATORS for backward in (False, True)
    ]
    for row in rows:
        assert {"copy", "ours", "eager aten"} <= set(row["seconds"]) and row["seconds"]["copy"] > 0
        assert set(row["seconds"]) | set(row["absent"]) == {"copy", "ours", "eager aten", "Liger", "TransformerEngine"}
        assert row["error"]["ours"] < 1e-5 and row["error"]["eager aten"] < 1e-5
    assert times.times_table(rows, size, "float32").row_count == len(rows)


def test_bytes_are_those_of_the_table_of_operators(script: Any) -> None:
    """n = 4: 5C, 9C and 10C forward; 9C, 14C and 15C more with the gradients; coefficients where C is nothing."""
    _, operators, _ = script
    size, dtype = operators.Size(1, 4, 10**6), torch.bfloat16
    streams = {"pre": (5, 14), "post": (9, 23), "post_collapse": (6, 17), "boundary": (10, 25)}
    for name, both in streams.items():
        moved = [operators.bytes_moved(name, size, dtype, backward) for backward in (False, True)]
        assert [round(m / (2 * 10**6)) for m in moved] == list(both)
    # n + n^2 = 20 coefficients, and raw and r, 25 numbers, of 4 bytes.
    none = operators.Size(3, 4, 0)
    assert operators.bytes_moved("pre", none, dtype, False) == 3 * 4 * (20 + 25)
    assert operators.bytes_moved("boundary", none, dtype, False) == 3 * 4 * (20 + 20 + 25)


@pytest.mark.parametrize("fault", ["a wrong value", "an element left unwritten", "an exception"])
def test_a_broken_operator_is_found(script: Any, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, operators, _ = script
    post = operators.OPERATORS["post"]

    def broken(X: torch.Tensor, y: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
        if fault == "an exception":
            raise RuntimeError("out of registers")
        out = post.run(X, y, h_post, h_res)
        if fault == "a wrong value":
            return out * 1.001
        left = torch.empty_like(out)
        left[1:] = out[1:]
        return left

    monkeypatch.setitem(operators.OPERATORS, "post", post._replace(run=broken))
    row = check.check_one(check.Case(operators.Size(5, 4, 16), torch.float32), "post", "cpu")
    said = "out of registers" if fault == "an exception" else "output 0"
    assert said in row["wrong"]
    assert check.correctness_table([{"case": "c", "operator": "post", **row}]).row_count == 1


@pytest.mark.parametrize("name", ["project", "read", "read_products", "post_project_backward"])
def test_a_broken_operator_with_given_coefficients_is_found(
    script: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, _, _ = script
    for case in check.SHORT_GIVEN:
        assert not check.check_given(case, "cpu")["wrong"]
    run = getattr(check.aten, name)

    def broken(*args: Any) -> Any:
        out = run(*args)
        return out * 1.001 if isinstance(out, torch.Tensor) else (out[0] * 1.001, *out[1:])

    monkeypatch.setattr(check.aten, name, broken)
    assert check.check_given(check.SHORT_GIVEN[0], "cpu")["wrong"]

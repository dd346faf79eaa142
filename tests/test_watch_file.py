"""The file of a watched run: what is written is read, and what is none is refused in a sentence."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import watched_runs
from mhc_rewrite import watch
from mhc_rewrite.errors import RunFileError
from mhc_rewrite.insight.watching.format import FIGURES, Reader, read, short
from watched_models import X, loss_of, model


def run(file: Path, steps: int, first: int = 0, **options: Any) -> None:
    converted = model()
    with watch(converted, every=2, to=file, **options) as seen:
        seen.begin(first)
        for _ in range(steps):
            loss_of(converted(X)).backward()
            seen.step(1.0)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    run(tmp_path / "new" / "run.jsonl", 5)
    found = read(tmp_path / "new" / "run.jsonl")
    assert (found.steps, found.end) == ([0, 2, 4], "finished")
    assert dataclasses.replace(found.header, drawing="") == watch(model(), every=2).header
    assert "<svg" in found.header.drawing
    assert set(found.samples[0]["figures"]) == set(FIGURES)
    assert [len(row) for row in found.figure("spread")] == [6, 6, 6] and found.figure("none such")[0] == [None] * 6


def test_a_run_of_a_known_form_is_one_too(tmp_path: Path) -> None:
    found = read(watched_runs.write(tmp_path / "run.jsonl", 3, 4))
    assert found.steps == [0, 10, 20, 30] and set(found.samples[0]) == {
        "step", "loss", "figures", "dead", "maps", "composite",
    }  # fmt: skip


def test_no_second_run_by_mistake(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    run(file, 3)
    before = file.read_text()
    with pytest.raises(RunFileError, match=r"run.jsonl is there already.*resume=True"):
        watch(model(), to=file)
    assert file.read_text() == before


def test_a_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    run(file, 7)
    with file.open("a") as opened:
        opened.write('{"step":8,"los')  # killed
    run(file, 3, first=4, resume=True)
    found = read(file)
    assert found.steps == [0, 2, 4, 6] and found.end == "finished" and file.read_text().count('"mhc_rewrite"') == 1
    run(file, 1, first=found.steps[-1] + 2, resume=True)
    assert read(file).steps == [0, 2, 4, 6, 8]


def test_steps_are_counted_on_where_nobody_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    run(file, 3)
    converted = model()
    with watch(converted, every=2, to=file, resume=True) as seen:
        for _ in range(4):
            loss_of(converted(X)).backward()
            seen.step()
    assert read(file).steps == [0, 2, 4, 6]


def test_another_models_run(tmp_path: Path) -> None:
    file = watched_runs.write(tmp_path / "run.jsonl", 3, 2)
    with pytest.raises(RunFileError, match="is of another model, or of other sites"):
        watch(model(), to=file, resume=True)


@pytest.mark.parametrize("error, end", [(None, "finished"), (ValueError("no luck\nat all"), "ValueError: no luck")])
def test_the_end(error: Exception | None, end: str, tmp_path: Path) -> None:
    try:
        with watch(model(), to=tmp_path / "run.jsonl") as seen:
            loss_of(seen._roots[0](X)).backward()
            seen.step()
            if error is not None:
                raise error
    except ValueError:
        pass
    assert read(tmp_path / "run.jsonl").end == end


def test_nothing_comes_behind_the_end(tmp_path: Path) -> None:
    converted = model()
    with watch(converted, every=1, to=tmp_path / "run.jsonl") as seen:
        loss_of(converted(X)).backward()
        seen.step()
    seen.begin(1)
    loss_of(converted(X)).backward()
    with pytest.raises(RunFileError, match="has its end: to go on, watch anew"):
        seen.step()


def test_a_line_that_is_cut_off_is_on_its_way(tmp_path: Path) -> None:
    file = watched_runs.write(tmp_path / "run.jsonl", 3, 4, end=None)
    whole = file.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    file.write_bytes(whole[: last + 100])
    reader = Reader(file)
    assert reader.run.steps == [0, 10, 20] and reader.more() == [] and reader.run.end is None
    file.write_bytes(whole)
    assert [sample["step"] for sample in reader.more()] == [30] and reader.run.steps == [0, 10, 20, 30]
    file.write_bytes(whole[:last])
    with pytest.raises(RunFileError, match="has become shorter"):
        reader.more()


BAD = {
    "": "holds no line yet",
    "step,loss\n": "is no file of a watched run",
    '{"mhc_rewrite": "plan"}\n': "is no file of a watched run",
    '{"mhc_rewrite": "run", "format": 7}\n': "has format 7; format 1 is understood",
    '{"mhc_rewrite": "run", "format": 1, "model": "M"}\n': "is no header of format 1",
    "[1, 2]\n": "is no file of a watched run",
}


@pytest.mark.parametrize("text", BAD)
def test_files_that_are_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(RunFileError, match=BAD[text]):
        read(tmp_path / "run.jsonl")


@pytest.mark.parametrize("line", ["no JSON", "[]", '{"step": 3}', '{"step": 3, "figures": {"spread": [1]}}'])
def test_lines_that_are_none(line: str, tmp_path: Path) -> None:
    file = watched_runs.write(tmp_path / "run.jsonl", 2, 2, end=None)
    with file.open("a") as opened:
        opened.write(line + "\n")
    with pytest.raises(RunFileError, match=r"Line 4 of .*run.jsonl is no sample of its run"):
        read(file)


def test_paths_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="can't be read: No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(RunFileError, match="can't be read"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFileError, match="can't be written"):
        watch(model(), to=tmp_path / "file" / "run.jsonl")


def test_numbers_are_short() -> None:
    assert [short(value) for value in (1 / 3, 1234.1, 1e-20 / 3, float("inf"), float("nan"), None)] == [
        0.3333, 1234.0, 3.333e-21, None, None, None,
    ]  # fmt: skip
    line = json.dumps(watched_runs.sample(10, 100, 8))
    assert len(line) < 8 * 600


def test_memory_does_not_grow_with_the_run() -> None:
    converted = model(torch.float32)
    with watch(converted, every=1) as seen:
        tensors = []
        for _ in range(5):
            converted.zero_grad()
            loss_of(converted(X.float())).backward()
            seen.step()
            gc.collect()
            tensors.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert len(set(tensors[1:])) == 1 and isinstance(seen.line, dict) and seen.line["step"] == 4

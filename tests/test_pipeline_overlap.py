"""demos/pipeline_overlap.py: the simulation of schedules by hand, and a dry run in two processes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pipeline_overlap as overlap
import pytest
import torch
from pipeline_overlap import BACKWARD, FORWARD, INPUT, WEIGHT, one_forward_one_backward, simulate

from test_demos import run


def test_an_order_by_hand() -> None:
    """Two stages, two microbatches: F0 F1 . . B0 B0 . B1 B1 and . F0 B0 B0 F1 B1 B1."""
    order = one_forward_one_backward(2, 2)
    assert order[0] == [(FORWARD, 0, 0), (FORWARD, 0, 1), (BACKWARD, 0, 0), (BACKWARD, 0, 1)]
    assert order[1] == [(FORWARD, 1, 0), (BACKWARD, 1, 0), (FORWARD, 1, 1), (BACKWARD, 1, 1)]
    assert simulate(order, 0.0) == 9
    # The first one waits for a message forward and one backward, and the second microbatch is ready by then.
    assert simulate(order, 0.5) == 10


@pytest.mark.parametrize("message, ends", [(0.0, 4.0), (0.5, 4.5), (3.0, 11.0)])
def test_messages_pass_one_after_the_other(message: float, ends: float) -> None:
    """Three forwards of a rank, and the other's: the messages leave at 1, 2 and 3, or when the one before is there."""
    order = {0: [(FORWARD, 0, k) for k in range(3)], 1: [(FORWARD, 1, k) for k in range(3)]}
    assert simulate(order, message) == ends


def test_weights_wait_for_nothing() -> None:
    order = {0: [(FORWARD, 0, 0), (INPUT, 0, 0), (WEIGHT, 0, 0)], 1: [(FORWARD, 1, 0), (INPUT, 1, 0), (WEIGHT, 1, 0)]}
    assert simulate(order, 2.0) == 1 + 2 + 1 + 1 + 2 + 1 + 1


def test_stages_of_one_rank_pass_without_a_message() -> None:
    order = {0: [(FORWARD, 0, 0), (FORWARD, 1, 0), (BACKWARD, 1, 0), (BACKWARD, 0, 0)]}
    assert simulate(order, 100.0) == 6


def test_an_order_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="wait for one another"):
        simulate({0: [(BACKWARD, 0, 0), (FORWARD, 0, 0)], 1: [(FORWARD, 1, 0), (BACKWARD, 1, 0)]}, 0.0)


def test_a_link_is_taken_by_one_message_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 bytes at 10,000 a second: there after 0.1 s, and the next one after 0.2."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(overlap.dist, "isend", lambda tensor, **to: sent.append(tensor))
    link, op = overlap.Link(), SimpleNamespace(tensor=torch.zeros(250), group=None, group_peer=1)
    link.bandwidth = 10_000.0
    began = time.monotonic()
    link.send(op)
    link.send(op)
    due = [float(part) - began for part in sent if part.dim() == 0]
    assert due[0] == pytest.approx(0.1, abs=0.05) and due[1] - due[0] == pytest.approx(0.1)
    assert link.bytes == 2000


def test_who_receives_waits_until_it_is_due() -> None:
    done: list[str] = []
    work: Any = SimpleNamespace(wait=lambda: done.append("there"))
    due = torch.tensor(time.monotonic() + 0.1, dtype=torch.float64)
    overlap.Message([work, work], due, due).wait()
    assert time.monotonic() >= float(due) and done == ["there"] * 2
    overlap.Message([work], None, due + 1000).wait()  # who sends does not


@pytest.mark.long
def test_dry_run(tmp_path: Path) -> None:
    printed = run("pipeline_overlap.py", tmp_path, "--quick", "--json", "overlap.json")
    assert "4 layers, C = 32, n = 2, 4 microbatches of 1 x 32 tokens" in printed
    found = json.loads((tmp_path / "overlap.json").read_text())
    rows = {(row["model"], row["schedule"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 3 * len(overlap.SCHEDULES)
    for (model, schedule), row in rows.items():
        message = 4 * 32 * 32 * (1 if model == overlap.ORIGINAL else 2)
        times = {"1F1B": 1, "Interleaved1F1B": 3, "ZBV": 2, "DualPipeV": 2}[schedule]
        assert (row["message"], row["bytes"]) == (message, 4 * times * message)
        assert row["transfer"] == pytest.approx(row["bytes"] / found["bandwidth"])
        assert row["exposed"] == pytest.approx(row["longer"] / row["transfer"])
        assert 0 < row["on_paper"] <= 1.0001
    assert rows["converted", "DualPipeV"]["on_paper"] < rows["converted", "1F1B"]["on_paper"] == pytest.approx(1)

"""What the kernels move, counted from their loads and stores, is what the table of operators says: equal, not close.

Numbers are elements a token. Streams are everything with C elements in a row: X, y, u, X' and their gradients.
Coefficients are the rest that belongs to a token: H_post, H_res, raw, r. Parameters, and sums over tokens, belong to no
token and stand apart, as do repeated reads: they cost bandwidth only where a cache has lost them.

    TRITON_INTERPRET=1 python tests/kernels_interpreted/test_bytes.py    # the table, repeated reads included
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from rich.console import Console
from rich.table import Table
from torch import Tensor
from traffic import WHAT, Moved, Traffic, counted

from mhc_rewrite.kernels import triton_boundary, triton_post
from mhc_rewrite.kernels import triton_boundary_backward as backward
from mhc_rewrite.kernels.kinds import KINDS
from mhc_rewrite.kernels.triton_configs import using

SPLIT = 129  # elements of a row that is long enough to be cut into parts, as a power of two
TOKENS = 67  # more than a few, no multiple of a block of tokens, and no other axis is as long


@dataclass(frozen=True)
class Case:
    """`given` of the n streams are in memory: 1 where they are still equal. `rows` of them are written by `post`: 1
    together with the collapse."""

    operator: str
    n: int
    width: int
    given: int
    rows: int
    kind: str = "mhc"

    def __str__(self) -> str:
        form = {(1, self.n): ", equal streams", (self.n, 1): ", collapsed"}.get((self.given, self.rows), "")
        return f"{self.operator} {self.kind} n={self.n} C={self.width}{form if self.n > 1 else ''}"


class Moves(NamedTuple):
    """A launch, and a token's rows of C elements that it reads and writes."""

    kernel: str
    read: int
    written: int


def in_the_table(case: Case) -> list[Moves]:
    """The table of operators. Where rows are long `pre` and `boundary` are cut into parts, and read the state again."""
    n, m, rows = case.n, case.given, case.rows

    def pre(streams: int) -> list[Moves]:
        if case.width < SPLIT:
            return [Moves("_forward_kernel", streams, 1)]
        return [Moves("_project_part_kernel", streams, 0), Moves("_finish_part_kernel", streams, 1)]

    coefficients = Moves("_coefficients_kernel", 0, 0)
    return {
        "pre": pre(m),
        "boundary": [Moves("_post_forward_kernel", m + 1, n), *pre(n)],
        "post": [Moves("_post_forward_kernel", m + 1, rows)],
        "post_backward": [Moves("_post_backward_kernel", rows + m + 1, m + 1)],
        "pre_backward": [
            Moves("_dots_kernel", m + 1, 0), coefficients, Moves("_state_kernel", m + 1, m),
            Moves("_parameters_kernel", m, 0),
        ],
        "boundary_backward": [
            Moves("_dots_kernel", m + 2, 0), coefficients, Moves("_state_kernel", n + 1, n),
            Moves("_post_backward_kernel", n + m + 1, m + 1), Moves("_parameters_kernel", m + 1, 0),
        ],
    }[case.operator]  # fmt: skip


def coefficients_in_the_table(case: Case) -> dict[str, int]:
    """What a token's coefficients that leave the operator count, by the names of the kernels' arguments."""
    n, m, rows = case.n, case.given, case.rows
    norm = 1 if KINDS[case.kind].constrained else n
    return {
        "post": {},
        "post_backward": {"g_post": rows, "g_res": rows * m},
        "pre_backward": {},
        "boundary_backward": {"g_post": n, "g_res": n * m},
    }.get(case.operator, {"h_post": n, "h_res": n * n, "raw": n * n + 2 * n, "r": norm})


def cases(streams: tuple[int, ...] = (1, 2, 3, 4, 5, 8)) -> list[Case]:
    forms = [(n, n, n) for n in streams] + [(4, 1, 4)]
    widths = (131, 71)  # odd, and cut into parts and not
    table = [
        Case(operator, n, widths[k % 2], given, rows)
        for operator in ("pre", "post", "post_backward", "boundary", "pre_backward", "boundary_backward")
        for k, (n, given, rows) in enumerate([*forms, *([(4, 4, 1)] if operator.startswith("post") else [])])
    ]
    # What the other kinds keep and write differs, not what they read.
    return table + [
        Case(operator, 3, 71, 3, 3, kind) for operator in ("pre", "boundary") for kind in ("deepseek_v4", "hc")
    ]


def launches_of(case: Case) -> list[Traffic]:
    """Runs the operator on random tensors and counts."""
    T, n, m, rows, C = TOKENS, case.n, case.given, case.rows, case.width
    K = n * n + 2 * n
    options, eps = (case.kind, 20), 1e-6
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    branch = (random(T, m, C), random(T, C), random(T, rows), random(T, rows, m))
    given = m if case.operator.startswith("pre") else n  # streams that are projected
    parameters = (random(given * C, K) / 30, torch.ones(3), random(K))
    kept = (random(T, K), random(T, 1 if KINDS[case.kind].constrained else n).abs() + 1)
    gradients = (random(T, C), random(T, n), random(T, n, n))
    run: Callable[[], Any] = {
        "pre": lambda: triton_boundary.pre(branch[0], *parameters, *options, eps),
        "post": lambda: triton_post.post(*branch),
        "post_backward": lambda: triton_post.post_backward(random(T, rows, C), *branch),
        "boundary": lambda: triton_boundary.boundary(*branch, *parameters, *options, eps),
        "pre_backward": lambda: backward.pre_backward(*gradients, branch[0], *parameters, *kept, *options),
        "boundary_backward": lambda: backward.boundary_backward(
            random(T, n, C), *gradients, *branch, *parameters, *kept, *options
        ),
    }[case.operator]
    with counted() as launches:
        run()
    return launches


def per_token(launch: Traffic, case: Case, what: str) -> tuple[int, int]:
    """What every token moves of streams and of coefficients."""
    streams = coefficients = 0
    for moved in launch.moved.values():
        if is_stream(moved, case):
            streams += moved.per_token(what, TOKENS)
        elif moved.shape[0] == TOKENS:
            coefficients += moved.per_token(what, TOKENS)
    return streams, coefficients


def is_stream(moved: Moved, case: Case) -> bool:
    return moved.shape[0] == TOKENS and moved.shape[-1] == case.width


# MHC_WHOLE_GRID=1: more streams; otherwise one, a power of two and an odd number.
@pytest.mark.parametrize("case", cases() if os.environ.get("MHC_WHOLE_GRID") == "1" else cases((1, 4, 5)), ids=str)
def test_moves_what_the_table_says(case: Case) -> None:
    launches = launches_of(case)
    found = []
    for launch in launches:
        rows = [per_token(launch, case, what)[0] / case.width for what in ("fetched", "written")]
        found.append(Moves(launch.kernel, *map(int, rows)))
        assert all(count == int(count) for count in rows)
        assert per_token(launch, case, "rewritten") == (0, 0)
    assert found == in_the_table(case)
    for name, count in coefficients_in_the_table(case).items():
        written = [launch.moved[name].total("written") for launch in launches if name in launch.moved]
        assert sum(written) == count * TOKENS, name


@pytest.mark.parametrize("n,given", [(4, 4), (4, 1), (3, 3)])
def test_pre_reads_its_parameters_once_from_memory(n: int, given: int) -> None:
    (launch,) = launches_of(Case("pre", n, 71, given, n))
    of = {name: launch.moved[name].total("fetched") for name in ("phi", "alpha", "bias")}
    K = n * n + 2 * n
    assert of == {"phi": given * 71 * K, "alpha": 3, "bias": K}


def test_second_sweeps_are_counted_apart() -> None:
    """pre reads every element of X twice: nC a token each, from the cache."""
    (pre,) = launches_of(Case("pre", 4, 71, 4, 4))
    assert pre.moved["state"].per_token("repeated", TOKENS) == 4 * 71


def test_few_tokens_read_the_streams_in_both_launches() -> None:
    """Split over C, the projection ends before u begins: a state of a few tokens is fetched a second time."""
    with using("pre", "few"):
        project, finish = launches_of(Case("pre", 4, 129, 4, 4))
    for launch in (project, finish):
        assert launch.moved["state"].per_token("fetched", TOKENS) == 4 * 129
        assert not launch.moved["state"].total("repeated")


# -- the counting itself ----------------------------------------------------------------------------------------------


@triton.jit
def _moves_what_the_test_knows(a, b, total, N, LANES: tl.constexpr, BEYOND: tl.constexpr):
    k = tl.arange(0, LANES)
    x = tl.load(a + k, mask=k < N, other=0.0)  # N from memory
    x += tl.load(a + k // 2, mask=k < 4, other=0.0)  # four lanes, two elements, known
    tl.store(b + k, x, mask=k < N)
    x += tl.load(b + k, mask=k < 3, other=0.0)  # its own
    tl.store(b + k + BEYOND, x, mask=k < 2)
    tl.atomic_add(total, tl.sum(x))


def test_the_counting() -> None:
    a, b, total = torch.ones(10), torch.zeros(10), torch.zeros(1)
    with counted() as launches:
        for _ in range(2):
            _moves_what_the_test_knows[(1,)](a, b, total, 10, LANES=16, BEYOND=0)
    for launch in launches:
        counts = {
            name: {what: moved.total(what) for what in WHAT if moved.total(what)}
            for name, moved in launch.moved.items()
        }
        assert counts == {
            "a": {"fetched": 10, "repeated": 4},
            "b": {"own": 3, "written": 10, "rewritten": 2},
            "total": {"fetched": 1, "written": 1},
        }
    assert launches[0].moved["a"].per_token("fetched", 5) == 2
    with pytest.raises(AssertionError, match="0 to 2"):
        launches[0].moved["b"].per_token("rewritten", 5)


def test_a_lane_outside_every_tensor_is_an_error() -> None:
    whole = torch.zeros(12)
    with pytest.raises(Exception, match="2 lanes outside"), counted():
        _moves_what_the_test_knows[(1,)](torch.ones(10), whole[:10], torch.zeros(1), 10, LANES=16, BEYOND=10)


# -- the table --------------------------------------------------------------------------------------------------------


def table() -> Table:
    """Every launch of every case: streams in units of C a token, parameters in units of their size."""
    whats = WHAT[:4]
    result = Table(title=f"elements moved a token, {TOKENS} tokens; streams in units of C")
    result.add_column("operator")
    result.add_column("kernel")
    for group in ("streams", "coefficients"):
        for what in whats:
            result.add_column(f"{group}\n{what}", justify="right")
    result.add_column("parameters and\nsums, fetched", justify="right")
    result.add_column("repeated", justify="right")
    result.add_column("written", justify="right")
    for case in cases():
        for launch in launches_of(case):
            streams, coefficients = zip(*(per_token(launch, case, what) for what in whats))
            rest = [moved for moved in launch.moved.values() if moved.shape[0] != TOKENS]
            result.add_row(
                str(case), launch.kernel, *(f"{count / case.width:g}" for count in streams), *map(str, coefficients),
                *(str(sum(moved.total(what) for moved in rest)) for what in ("fetched", "repeated", "written")),
            )  # fmt: skip
    return result


if __name__ == "__main__":
    Console(width=200).print(table())

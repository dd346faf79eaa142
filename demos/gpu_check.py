"""Checks and times the operators on a GPU: correctness first, then the time and the fraction of copy bandwidth.

    python demos/gpu_check.py                  # NVIDIA or AMD; under five minutes
    python demos/gpu_check.py --quick --json check.json

1. Every operator, forward and backward, against the reference in fp64, with every new buffer filled with NaN first; and
   those that connections of one function run on.
2. Times, forward and forward with backward, beside aten eager and compiled, Liger's and TransformerEngine's operators.
   A fraction is the time of a `copy_` that moves as many bytes as the operator must, over the operator's own time;
   both run in the same rounds, in turn, and medians are taken.

Without a GPU the first part runs on the CPU, in short.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import torch
import typer
from gpu_operators import BRANCH, CONTENDERS, EPS, OPERATORS, Outputs, Size, distance, operands
from gpu_times import measure, times_table
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from mhc_rewrite.kernels import aten, gpu, reference, triton_configs
from mhc_rewrite.kernels.kinds import KINDS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CLOSE = {F32: 1e-5, BF16: 2e-2, F16: 2e-2}


class Case(NamedTuple):
    size: Size
    dtype: torch.dtype
    kind: str = "mhc"

    def __str__(self) -> str:
        return f"{self.size}, {name_of(self.dtype)}, {self.kind}"


SHORT = [
    Case(Size(13, 4, 100), F32), Case(Size(33, 4, 129), BF16), Case(Size(5, 3, 64), F16), Case(Size(7, 4, 36, 1), F32),
    Case(Size(9, 2, 50), F32, "deepseek_v4"), Case(Size(9, 4, 50), F32, "hc"),
]  # fmt: skip
WHOLE = [
    *SHORT,
    Case(Size(257, 4, 768), F32), Case(Size(257, 4, 768), BF16), Case(Size(257, 4, 768), F16),
    Case(Size(33, 1, 100), F32), Case(Size(33, 8, 768), BF16),
    Case(Size(13, 4, 5129), BF16), Case(Size(2048, 4, 7168), BF16), Case(Size(1, 4, 16384), F32),
    Case(Size(2048, 4, 1024), BF16, "deepseek_v4"), Case(Size(2048, 4, 1024), BF16, "hc"),
    Case(Size(2048, 4, 1024, 1), BF16), Case(Size(5, 16, 129), F32),
]  # fmt: skip


class Given(NamedTuple):
    """The operators that are given their coefficients, with any number of columns of phi."""

    size: Size
    columns: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.size}, {self.columns} columns, {name_of(self.dtype)}"


SHORT_GIVEN = [Given(Size(13, 4, 300), 14, F32), Given(Size(33, 4, 129, 1), 0, BF16)]
GIVEN = [
    *SHORT_GIVEN, Given(Size(257, 4, 768), 32, BF16), Given(Size(33, 5, 768), 130, BF16),
    Given(Size(70, 4, 512, 1), 24, F16), Given(Size(257, 8, 512), 288, F32),
]  # fmt: skip
# Training, and decoding with a few tokens.
TIMED = {
    "cuda": [Size(8192, 4, 2560), Size(4096, 4, 7168), Size(16, 4, 7168)],
    "cpu": [Size(256, 4, 256)],
}


def main(
    device: Annotated[Optional[str], typer.Option(help="cuda (NVIDIA or AMD) or cpu; the GPU if there is one.")] = None,  # noqa: UP045
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repetitions.")] = False,
    times: Annotated[Optional[bool], typer.Option(help="Measure times; on a GPU only, unless asked.")] = None,  # noqa: UP045
    contender: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help=f"Measure only these: {', '.join(CONTENDERS)}. Repeatable."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the streams that are timed: float32, bfloat16 or float16.")
    ] = "bfloat16",
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write all figures there.")] = None,  # noqa: UP045
) -> None:
    """Check the operators on this machine's GPU, then time them."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    present = torch.cuda.is_available()
    device = device or ("cuda" if present else "cpu")
    timed = {name_of(dtype): dtype for dtype in CLOSE}
    if device not in TIMED:
        raise typer.BadParameter(f"no device {device!r}: cuda or cpu")
    if device == "cuda" and not present:
        raise typer.BadParameter("torch finds no GPU")
    if dtype not in timed:
        raise typer.BadParameter(f"no dtype {dtype!r}: {', '.join(timed)}")
    if unknown := set(contender or ()) - set(CONTENDERS):
        raise typer.BadParameter(f"no contender {unknown.pop()!r}: {', '.join(CONTENDERS)}")
    if not present:
        console.print(
            "No GPU is present: correctness is checked on the CPU, in short, and nothing about a GPU is shown."
        )
    times = device == "cuda" if times is None else times
    rounds = 5 if quick else 30
    cases = SHORT if device == "cpu" or quick else WHOLE
    of_given = SHORT_GIVEN if device == "cpu" or quick else GIVEN
    sizes = TIMED[device][:1] if quick else TIMED[device]

    settings = {**about(device), "cases": len(cases)}
    if times:
        settings |= {"timed": f"{dtype}, mhc", "sizes": "; ".join(map(str, sizes)), "rounds": rounds}
    console.print(settings_table(settings))
    checked = check(cases, device)
    console.print(correctness_table(checked))
    given = [check_given(case, device) for case in of_given]
    for row in given:
        said = f"[red]{row['wrong']}[/red]" if row["wrong"] else f"{row['error']:.1e}, {row['launches']}"
        console.print(f"given coefficients, {row['case']}: {said}", highlight=False)
    checked += given
    measured = measure(sizes, timed[dtype], device, rounds, contender or list(CONTENDERS)) if times else []
    for size in sizes if times else []:
        console.print(times_table([row for row in measured if row["size"] == str(size)], size, dtype))
    if json_file:
        json_file.write_text(json.dumps({"settings": settings, "correctness": checked, "times": measured}, indent=1))
        console.print(f"figures: {json_file}", highlight=False)
    wrong = sum(bool(row["wrong"]) for row in checked)
    console.print(f"{len(checked) - wrong} of {len(checked)} checks of values and gradients passed.", highlight=False)
    raise typer.Exit(1 if wrong else 0)


def about(device: str) -> dict[str, Any]:
    try:
        import triton

        version = triton.__version__
    except ModuleNotFoundError:
        version = "none"
    versions = {"torch": torch.__version__, "Triton": version}
    if device == "cpu":
        return {"device": f"CPU, {torch.get_num_threads()} threads", **versions}
    properties = torch.cuda.get_device_properties(0)
    name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return {"device": name, **versions, "CUDA": torch.version.cuda or "none", "ROCm": torch.version.hip or "none"}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- correctness ------------------------------------------------------------------------------------------------------


def check(cases: list[Case], device: str) -> list[dict[str, Any]]:
    """A row for each case and operator: the worst relative error, what is wrong, and how many Triton kernels ran."""
    rows = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("values and gradients", total=len(cases) * len(OPERATORS))
        for case in cases:
            for name in OPERATORS:
                rows.append({"case": str(case), "operator": name, **check_one(case, name, device)})
                progress.advance(task)
    return rows


def check_one(case: Case, name: str, device: str) -> dict[str, Any]:
    operator = OPERATORS[name]
    values = operands(case.size, case.dtype, device)
    given = {operand: values[operand].requires_grad_() for operand in operator.operands}
    wide = {operand: value.detach().double().requires_grad_() for operand, value in given.items()}
    options = operator.options(case.kind)
    want = with_gradients(operator.truth, wide, options, operator.outputs)
    # alpha's gradient is three sums over tokens and columns that cancel: it is held against the size of its terms.
    terms = terms_of_alpha(name, wide, case.kind)
    try:
        with poisoned(), counted_launches() as launches:
            got = with_gradients(operator.run, given, options, operator.outputs)
    except Exception as error:
        return {"error": None, "wrong": f"{type(error).__name__}: {error}"[:300], "launches": 0}
    errors, wrong = [], []
    for part, truth in want.items():
        norm = max(float(truth.norm()), terms if part == "alpha" else 0.0)
        errors.append(distance(got[part], truth) / norm)
        if not errors[-1] <= CLOSE[case.dtype]:
            wrong.append(part)
    return {"error": max(errors), "wrong": ", ".join(wrong), "launches": len(launches)}


def check_given(case: Given, device: str) -> dict[str, Any]:
    """A row as `check_one` makes it, of all seven operators: of a state that is there, and of one that `post` makes."""
    (tokens, n, width, streams), columns, dtype = case
    values = operands(case.size, dtype, device)
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    X, y, h_post, h_res = (values[name] for name in BRANCH)
    h_res = h_res.sum(-1, keepdim=True) if streams == 1 else h_res
    g_state, g_u, g_raw = random(tokens, n, width).to(dtype), random(tokens, width).to(dtype), random(tokens, columns)
    close = CLOSE[dtype]
    run = gpu if device == "cuda" else aten
    errors: dict[str, float] = {}

    def hold(names: str, got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
        for name, mine, truth in zip(names.split(", "), got, want, strict=True):
            errors[name] = distance(mine, truth) / max(float(truth.norm()), 1e-30)

    def truth(state: Tensor, h_pre: Tensor, phi: Tensor) -> Outputs:
        r = (state.square().mean((-1, -2)).unsqueeze(-1) + EPS).sqrt()
        return reference.mix_in(state, h_pre), state.flatten(1) @ phi / r

    def wide(*tensors: Tensor) -> list[Tensor]:
        return [tensor.detach().double().requires_grad_() for tensor in tensors]

    try:
        with poisoned(), counted_launches() as launches:
            h_pre, phi = random(tokens, X.shape[1]), random(X.shape[1] * width, columns) / width**0.5
            raw, r = run.project(X, phi, EPS)
            leaves = wide(X, h_pre, phi)
            want = truth(*leaves)
            hold("u, raw", (run.read(X, h_pre), raw), want)
            g_X, g_phi = run.project_backward(g_u, h_pre, g_raw, X, phi, raw, r)
            gradients = torch.autograd.grad(want, leaves, (g_u.double(), g_raw.double()))
            hold("g_X, g_pre, g_phi", (g_X, run.read_products(g_u, X), g_phi), gradients)

            h_pre, phi = random(tokens, n), random(n * width, columns) / width**0.5
            state, raw, r = run.post_project(X, y, h_post, h_res, phi, EPS)
            leaves = wide(X, y, h_post, h_res, h_pre, phi)
            exact = reference.mix_out(*leaves[:4])
            stored = exact + (state.double() - exact).detach()  # what the projection reads
            want = truth(stored, *leaves[4:])
            hold("X', raw of X'", (state, raw), (exact, want[1]))
            made = (X, y, h_post, h_res)
            *of_mix, g_phi = run.post_project_backward(g_state, g_u, h_pre, g_raw, *made, phi, raw, r)
            weights = tuple(g.double() for g in (g_state, g_u, g_raw))
            gradients = torch.autograd.grad((stored, *want), leaves, weights)
            g_pre = run.post_read_products(g_u, *made)
            names = "g_X of X', g_y, g_post, g_res, g_pre of X', g_phi of X'"
            hold(names, (*of_mix, g_pre, g_phi), gradients)
    except Exception as error:
        return {
            "case": str(case), "operator": "given", "error": None, "launches": 0,
            "wrong": f"{type(error).__name__}: {error}"[:300],
        }  # fmt: skip
    wrong = [name for name, error in errors.items() if not error <= close]
    row = {"case": str(case), "operator": "given", "error": max(errors.values()), "launches": len(launches)}
    return {**row, "wrong": ", ".join(wrong)}


def terms_of_alpha(name: str, wide: dict[str, Tensor], kind: str) -> float:
    """The norm of what alpha's gradient sums up: the gradient of a bias of each token, times raw."""
    operator = OPERATORS[name]
    if "phi" not in wide:
        return 0.0
    bias = wide["bias"].detach().expand(len(wide["X"]), -1).clone().requires_grad_()
    gradients = with_gradients(operator.truth, {**wide, "bias": bias}, operator.options(kind), operator.outputs)
    with torch.no_grad():
        state = wide["X"] if name == "pre" else reference.post(*list(wide.values())[:4])
        raw, _ = reference.project(state, wide["phi"], kind, EPS)
    return float((gradients["bias"] * (raw if KINDS[kind].constrained else raw.tanh())).norm())


def with_gradients(
    run: Callable[..., Any], leaves: dict[str, Tensor], options: tuple[Any, ...], outputs: int
) -> dict[str, Tensor]:
    out = run(*leaves.values(), *options)
    out = (out,) if isinstance(out, Tensor) else tuple(out[:outputs])
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in out]
    gradients = torch.autograd.grad(out, list(leaves.values()), weights)
    return {f"output {k}": o.detach() for k, o in enumerate(out)} | dict(zip(leaves, gradients))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch fills every uninitialised buffer with NaN: what a kernel does not write shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The names of the Triton kernels launched inside: none where an operator ran something else."""
    launched: list[str] = []
    run = triton_configs.Launch.run

    def counting(launch: triton_configs.Launch) -> None:
        launched.append(launch.kernel.__name__)
        run(launch)

    triton_configs.Launch.run = counting
    try:
        yield launched
    finally:
        triton_configs.Launch.run = run


# -- tables -----------------------------------------------------------------------------------------------------------


def settings_table(settings: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in settings.items():
        table.add_row(f"[bold]{name}[/bold]", str(value))
    return table


def correctness_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="worst relative error of values and gradients, and Triton launches")
    table.add_column("tokens x n x C, dtype, kind")
    for name in OPERATORS:
        table.add_column(name, justify="right")
    for case in dict.fromkeys(row["case"] for row in rows):
        table.add_row(case, *(
            f"[red]{row['wrong']}[/red]" if row["wrong"] else f"{row['error']:.1e}, {row['launches']}"
            for row in rows if row["case"] == case
        ))  # fmt: skip
    table.caption = (
        "allowed: 1e-5 in fp32, 2e-2 in bf16 and fp16; no launches: the operator ran without Triton's kernels"
    )
    return table


if __name__ == "__main__":
    typer.run(main)

"""`mhc-rewrite cost`: formulas, numbers and estimates of mhc_rewrite/cost.py as tables."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any, Optional

import sympy
import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import mhc_rewrite
from mhc_rewrite import cost as costs
from mhc_rewrite.cli import spec
from mhc_rewrite.cli.cost_mesh import mesh_tables
from mhc_rewrite.cli.cost_tables import estimates, formula_text, numbers_table, prose, section
from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.cli.options import Settings, number_of_streams
from mhc_rewrite.config import MAX_STREAMS
from mhc_rewrite.cost import FUSIONS, Cost, Device, L, Mesh, T, s
from mhc_rewrite.errors import ConfigError
from mhc_rewrite.kernels.kinds import FUNCTIONS
from mhc_rewrite.printing import plain_table

PAPER = "paper"

Model = Annotated[
    str,
    typer.Argument(metavar="SPEC|paper", help=f"The model: {spec.FORMS}; or the paper's own, 27B.", show_default=False),
]
DeviceName = Annotated[str, typer.Option("--device", metavar="NAME", help="h100, a100, mi300x or cpu.")]
Streams = Annotated[
    str,
    typer.Option(
        "--n",
        "--n-streams",
        metavar="N,N,...|PATTERN=N,...",
        help=f"Numbers of streams, 1 to {MAX_STREAMS}; or one plan with n by stretches: layers.0-11=4,layers.12-23=2.",
    ),
]
Tokens = Annotated[
    int, typer.Option(min=1, help="Tokens of a step, for what grows with them; with --mesh of a rank's microbatch.")
]
Meshes = Annotated[
    Optional[list[str]],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Option(
        "--mesh",
        metavar="AXIS=N,...",
        help="What the ranks of a mesh send one another, and wait for: dp, fsdp, tp or sp, pp, as in fsdp=8,pp=8. "
        "Repeatable.",
    ),
]
Microbatches = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        min=1, help="Of a step on a mesh.", show_default="four a stage, one without stages; the paper's batch"
    ),
]
Parameters = Annotated[
    Optional[float],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Option(min=1, help="Parameters that a token uses, where these are not the model's own: of experts, say."),
]


def register(
    app: typer.Typer, show: Callable[[RenderableType], None], working: Callable[[str], AbstractContextManager[Any]]
) -> None:
    """Adds the command to an app. `show` prints; what is done within `working` fails with one message."""

    @app.command("cost")
    def print_cost(
        model: Model, device: DeviceName = "h100", n: Streams = "1,2,4,8", tokens: Tokens = 4096,
        mesh: Meshes = None, microbatches: Microbatches = None, parameters: Parameters = None, config: Settings = None,
    ) -> None:  # fmt: skip
        """Show what mHC costs: formulas, numbers, and an estimate of the step's overhead on a device, or on many."""
        with working(f"Reading {model}"):
            with _asked():
                on, meshes = costs.device(device), [Mesh.parse(text) for text in mesh or ()]
            stretches = number_of_streams(n) if "=" in n else 4
            if microbatches and (model == PAPER or not meshes):
                raise UsageError("--microbatches is for a SPEC with --mesh: the paper's follow from its batch.")
            if model == PAPER and meshes:
                if parameters:
                    raise UsageError("--parameters is not for the paper on a mesh, which needs two numbers of them.")
                with _asked():
                    shown = _paper_on(meshes, _streams(n), on)
            elif model == PAPER:
                size = parameters or costs.PAPER_PARAMETERS
                shown = _paper({k: costs.paper(k) for k in _streams(n)}, on, size)
            else:
                built, inputs = spec.load(model, config or ())
                plan = mhc_rewrite.plan(built, inputs, n_streams=stretches)
                size = parameters or sum(p.numel() for p in built.parameters())
                of: dict[Any, Cost] = {plan.config.streams_as_text(): costs.cost(plan)}
                if "=" not in n:
                    of = {k: costs.cost(costs.with_streams(plan, k)) for k in _streams(n)}
                if meshes:
                    with _asked():
                        jobs = [(k, costs.job(plan, built, k, size, tokens, microbatches)) for k in meshes]
                        rows = [(costs.on_mesh(one, k), job) for k, job in jobs for one in of.values()]
                        shown = mesh_tables(plan.model, rows, on)
                else:
                    shown = _model(plan.model, of, on, size, tokens)
        show(shown)


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    """What is refused here is what was asked for."""
    try:
        yield
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _streams(text: str) -> list[int]:
    """`1,2,4` -> `[1, 2, 4]`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= MAX_STREAMS for part in parts):
        raise UsageError(f"--n takes numbers of streams from 1 to {MAX_STREAMS}, such as 1,2,4,8, not {text!r}.")
    return list(dict.fromkeys(map(int, parts)))


# -- tables ------------------------------------------------------------------------------------------------------------


def _model(name: str, of: Mapping[Any, Cost], on: Device, parameters: float, tokens: int) -> RenderableType:
    first = next(iter(of.values()))
    sizes = "; ".join(
        f"{k.sites} sites" + (f", n = {k.n}" if k.n else "") + f", C = {k.width}, {k.itemsize} bytes an element"
        for k in first.streams
    )
    return Group(
        Text(f"{name}: {sizes}", style="bold"),
        Text("as SPEC builds it, with all its parameters; --config and --parameters change that", style="dim"),
        *_formulas(first),
        *section(f"numbers for {tokens:,} tokens", _numbers(of, tokens)),
        *estimates(_overheads(of, on, parameters), costs.assumptions(first, on, parameters)),
    )


def _paper(of: Mapping[int, Cost], on: Device, parameters: float) -> RenderableType:
    stream = costs.PAPER_STREAM
    table = _overheads(
        of, on, parameters, {"paper": costs.PAPER_OVERHEAD, "others": costs.COMMENTARY_OVERHEAD}
    )  # fmt: skip
    taken = (
        f"sizes: arXiv:2512.24880, table 5, 27B: C = {stream.width}, 30 layers with two sites each, bf16 streams; the "
        "parameters are the active ones. The device is not named there",
        "paper: section 4.3, n = 4 only, its own kernels, recomputation and pipeline; others: an unofficial text "
        "on the paper, which gives no source for n = 2 and 8",
    )
    return Group(
        Text(f"the paper's 27B on {on.title}", style="bold"),
        *estimates(table, (*taken, *costs.assumptions(next(iter(of.values())), on, parameters))),
    )


def _paper_on(meshes: Sequence[Mesh], streams: Sequence[int], on: Device) -> RenderableType:
    taken = (
        "sizes: arXiv:2512.24880, table 5, 27B: 30 layers, C = 2560, bf16; 27.0e9 parameters are gathered and reduced, "
        "4.14e9 of them computed with; a step of 1280 sequences of 4096 tokens, each a microbatch. The paper names "
        "neither its devices nor its mesh",
        "paper: section 4.3, n = 4 only, its own kernels, recomputation and pipeline",
    )
    rows = [costs.paper_on(mesh, k) for mesh in meshes for k in streams]
    return mesh_tables(f"the paper's 27B on {on.title}", rows, on, {"paper": costs.PAPER_OVERHEAD}, taken)


def _formulas(of: Cost) -> list[RenderableType]:
    traffic = plain_table("traffic", "read", "written", "fp32 coefficients", "read again for parameters")
    flops = plain_table("flops", "projection", "mixes", "Sinkhorn-Knopp")
    for k, direction in enumerate(("forward", "backward")):
        for fusion in FUSIONS:
            moved = of.traffic[fusion][k]
            row = (moved.read, moved.written, moved.coefficients, moved.again)
            traffic.add_row(f"{fusion}, {direction}", *map(formula_text, row))
        flops.add_row(direction, *map(formula_text, (of.flops[k].projection, of.flops[k].mixes, of.flops[k].sinkhorn)))
    memory = plain_table("", "formula")
    for what, formula in (
        ("parameters added", of.parameters),
        ("kept: states", of.kept.states),
        ("  outputs of blocks", of.kept.outputs),
        ("  raw and r, fp32", of.kept.coefficients),
        ("  H_post and H_res, fp32", of.kept.mixes),
        ("kept in segments: states", of.kept_in_segments.states),
        ("  outputs of blocks", of.kept_in_segments.outputs),
        ("  raw and r, fp32", of.kept_in_segments.coefficients),
        ("  transient elements", of.transient),
        ("bytes at a pipeline cut", of.cut),
    ):
        memory.add_row(Text(what, no_wrap=True), formula_text(formula))
    resized = any(stream.before > 1 for stream in of.streams)
    if resized:
        for k, direction in enumerate(("forward", "backward")):
            moved = of.resize[k]
            row = (moved.read, moved.written, moved.coefficients, moved.again)
            traffic.add_row(f"resized between stretches, {direction}", *map(formula_text, row))
    symbols = {**costs.SYMBOLS, **(costs.RESIZED if resized else {})}
    if of.config.connection in FUNCTIONS:
        symbols.update(costs.COLUMNS)
    names = ", ".join(f"{symbol} = {what}" for symbol, what in symbols.items())
    return [
        *section("a token and site, in elements of the streams and in flops", traffic, Text(), flops),
        *section("a stream, in elements and fp32 numbers", memory),
        Padding(prose(names), (0, 0, 0, 2)),
    ]


def _numbers(of: Mapping[Any, Cost], tokens: int) -> Table:
    table = numbers_table(
        "n", "parameters\nadded", "moved at boundaries\nforward", "\nbackward", "flops\nforward", "\nbackward",
        "kept", "L_r", "kept in\nsegments", "transient", "at a\npipeline cut",
    )  # fmt: skip
    for n, cost in of.items():
        if n == 1:
            table.add_row("1", "nothing is rewritten")
            continue

        def value(formula: sympy.Expr, cost: Cost = cost, **how: Any) -> int:
            return cost.evaluate(formula, tokens=tokens, **how)

        moved = (f"{number / 1e6:,.1f} MB" for number in cost.moved("boundary", tokens))
        flops = (f"{value(T * L * (k.projection + k.mixes + k.sinkhorn)) / 1e9:,.2f} G" for k in cost.flops)
        lengths = dict.fromkeys(cost.best_segment(k) for k in range(len(cost.streams)))
        table.add_row(
            str(n), f"{value(cost.parameters):,}", *moved, *flops,
            f"{value(cost.kept.bytes) / 1e6:,.1f} MB", ", ".join(map(str, lengths)),
            f"{value(cost.kept_in_segments.bytes) / 1e6:,.1f} MB",
            f"{value(s * cost.transient, over=max) / 1e6:,.1f} MB", f"{value(cost.cut, over=max) / 1e6:,.1f} MB",
        )  # fmt: skip
    return table


def _overheads(
    of: Mapping[Any, Cost], on: Device, parameters: float, beside: Mapping[str, Mapping[int, float]] | None = None
) -> Table:
    """By n; `beside` are columns of other people's figures."""
    ways = [(fusion, recompute) for fusion in FUSIONS for recompute in (False, True)]
    headers = [f"{fusion},\nrecompute" if recompute else fusion for fusion, recompute in ways]
    table = numbers_table("n", *headers, *(beside or {}))
    for n, cost in of.items():
        shares = (costs.estimate(cost, on, parameters, *way).overhead for way in ways)
        theirs = (figures.get(n) for figures in (beside or {}).values())
        table.add_row(
            str(n), *(f"{share:.1%}" for share in shares), *("-" if k is None else f"{k:.1%}" for k in theirs)
        )
    return table

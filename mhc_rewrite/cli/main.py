"""`mhc-rewrite`: a few lines over the API for each command."""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import json
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

import mhc_rewrite
from mhc_rewrite.cli import bench, cost, experiment, listing, machine, report, spec
from mhc_rewrite.cli.errors import CommandError
from mhc_rewrite.cli.options import Connected, Settings, Spec, Static, Streams, number_of_streams
from mhc_rewrite.errors import ExampleInputsError, MHCError
from mhc_rewrite.printing import as_text

_INPUTS = " On the command line: name a callable that returns the pair (model, example_inputs)."
PATIENCE = 2.0  # seconds without an answer before a spinner says what is being done

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Rewrite the residual connections of a PyTorch model into manifold-constrained hyper-connections.",
)


class Stage(str, enum.Enum):
    """Which graph is shown."""

    original = "original"
    rewritten = "rewritten"
    diff = "diff"


class GraphFormat(str, enum.Enum):
    """How graphs are printed."""

    rich = "rich"
    text = "text"
    json = "json"
    dot = "dot"


class PlanFormat(str, enum.Enum):
    """How a plan is printed."""

    rich = "rich"
    json = "json"


Include = Annotated[
    Optional[list[str]],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Option("--include", metavar="PATTERN", help="Rewrite only these sites or modules. Repeatable."),
]
Exclude = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--exclude", metavar="PATTERN", help="Leave these sites or modules alone. Repeatable."),
]


def _chosen(
    streams: int | dict[str, int], connection: str, static: bool, include: list[str] | None, exclude: list[str] | None
) -> dict[str, Any]:
    filters = {"include": tuple(include or ()), "exclude": tuple(exclude or ())}
    return {"n_streams": streams, "connection": connection, "dynamic": not static, **filters}


@app.command("print")
def print_graphs(
    model: Spec,
    stage: Annotated[Stage, typer.Option(help="The graphs before, after, or their difference.")] = Stage.rewritten,
    layer: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="Only the module of this name, or those of this pattern."),
    ] = None,
    format: Annotated[GraphFormat, typer.Option(help="How to print it.")] = GraphFormat.rich,
    n: Streams = "4",
    connection: Connected = "mhc",
    static: Static = False,
    include: Include = None,
    exclude: Exclude = None,
    config: Settings = None,
) -> None:
    """Show the model's rewritten graph, module by module; identical modules once."""
    with _working(f"Rewriting {model}"):
        streams = number_of_streams(n)
        built, inputs = spec.load(model, config or ())
        mhc_rewrite.mhcify(built, inputs, **_chosen(streams, connection, static, include, exclude))
        graphs = mhc_rewrite.graphs(built) if streams != 1 else []
        listings = listing.merge(listing.select(graphs, layer), stage.value)
    if format is GraphFormat.rich:
        _show(listing.rich(listings, stage.value))
    elif format is GraphFormat.text:
        print(listing.text(listings, stage.value))
    elif format is GraphFormat.json:
        print(listing.as_json(listings, stage.value, spec=model, model=type(built).__name__, n_streams=streams))
    else:
        print(listing.dot(listings, stage.value))


@app.command("sites")
def print_sites(
    model: Spec,
    format: Annotated[PlanFormat, typer.Option(help="How to print it.")] = PlanFormat.rich,
    n: Streams = "4",
    connection: Connected = "mhc",
    static: Static = False,
    include: Include = None,
    exclude: Exclude = None,
    config: Settings = None,
) -> None:
    """Show what would be rewritten: streams, sites, and what is left alone and why."""
    with _working(f"Reading {model}"):
        streams = number_of_streams(n)
        built, inputs = spec.load(model, config or ())
        plan = mhc_rewrite.plan(built, inputs, **_chosen(streams, connection, static, include, exclude))
    if format is PlanFormat.rich:
        _show(plan)
    else:
        print(json.dumps(plan.to_dict(), indent=2))


@app.command("draw")
def draw_model(
    model: Spec,
    to: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="model.svg, .html, .png, .dot; .json for Model Explorer.",
            show_default=False,
        ),
    ],
    unfolded: Annotated[bool, typer.Option("--unfolded", help="Draw every layer, also those that are alike.")] = False,
    n: Streams = "4",
    connection: Connected = "mhc",
    static: Static = False,
    include: Include = None,
    exclude: Exclude = None,
    config: Settings = None,
) -> None:
    """Draw the model before and after: its trunks, and the streams that they would become."""
    with _working(f"Drawing {model}"):
        from mhc_rewrite.insight.drawing import check_path

        check_path(to)
        streams = number_of_streams(n)
        built, inputs = spec.load(model, config or ())
        chosen = _chosen(streams, connection, static, include, exclude)
        drawn = mhc_rewrite.draw(built, inputs, folded=not unfolded, **chosen)
        drawn.save(to)
    print(to)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mhc-rewrite {importlib.metadata.version('mhc-rewrite')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Only what stands before a command."""


def _show(renderable: RenderableType | Any) -> None:
    """To a terminal in colour and in its width, else as plain text in the width that it needs."""
    console = Console()
    if console.is_terminal:
        console.print(renderable)
    else:
        print(as_text(renderable))


def _tell(message: Text) -> None:
    Console(stderr=True).print(message, soft_wrap=True)


@contextlib.contextmanager
def _working(what: str) -> Iterator[Callable[[str], None]]:
    """While a model is at work: its prints go to stderr, warnings and errors become one message each.

    Gives a function that is told what is being done.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), _spinner(what) as tell:
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            yield tell
    except (CommandError, MHCError) as error:
        here = _INPUTS if isinstance(error, ExampleInputsError) else ""
        _tell(Text.assemble(("error: ", "bold red"), str(error) + here))
        raise typer.Exit(error.exit_code if isinstance(error, CommandError) else 1) from error


def _show_warning(message: Warning | str, *place: Any) -> None:
    _tell(Text.assemble(("warning: ", "bold yellow"), str(message)))


@contextlib.contextmanager
def _spinner(what: str) -> Iterator[Callable[[str], None]]:
    """On a terminal, and only after a while, says on stderr what is being done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda doing: None
        return
    # Live would put its own objects in place of sys.stdout and sys.stderr, from the timer's thread: not here.
    spinner = Spinner("dots", what)
    live = Live(spinner, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)
    timer = threading.Timer(PATIENCE, live.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda doing: spinner.update(text=f"{what}: {doing}")
    finally:
        timer.cancel()
        timer.join()
        live.stop()


cost.register(app, _show, _working)
bench.register(app, _show, _working)
experiment.register(app, _show, _working)
machine.register(app, _show, _working)
report.register(app, _show, _working)

if __name__ == "__main__":
    app()

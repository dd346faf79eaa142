"""`mhc-rewrite bench`: what mhc_rewrite/insight/bench.py measures, as a table, JSON, CSV and a plot."""

from __future__ import annotations

import csv
import dataclasses
import enum
import functools
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Group, RenderableType
from rich.text import Text
from torch import Tensor, nn

from mhc_rewrite.capture.examples import example_call
from mhc_rewrite.cli import spec
from mhc_rewrite.cli.errors import CommandError, UsageError
from mhc_rewrite.cli.options import Settings, Spec, Streams, number_of_streams
from mhc_rewrite.cli.tables import bench_table
from mhc_rewrite.config import MHCConfig
from mhc_rewrite.insight import bench as benchmark
from mhc_rewrite.insight.bench import Inputs, Measured, Workload
from mhc_rewrite.insight.peers import PEERS
from mhc_rewrite.kernels import cpu

TOKENS = 128  # of a sequence, where the example inputs are not the user's


class Device(str, enum.Enum):
    """Where it runs."""

    cpu = "cpu"
    cuda = "cuda"


class Autocast(str, enum.Enum):
    """The dtype of torch.autocast."""

    bf16 = "bf16"
    fp16 = "fp16"


AUTOCAST = {Autocast.bf16: torch.bfloat16, Autocast.fp16: torch.float16}

Batch = Annotated[
    Optional[int],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Option(min=1, help="Rows of the example inputs, repeated or cut.", show_default="as they are"),
]
Length = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Tokens of a sequence, repeated or cut.", show_default=f"{TOKENS}, or the SPEC's own"),
]
Training = Annotated[bool, typer.Option("--training/--forward", help="A training step, or a forward pass alone.")]
Cast = Annotated[
    Optional[Autocast],  # noqa: UP045
    typer.Option(help="Run the forward under torch.autocast.", show_default="off"),
]
On = Annotated[
    Optional[Device],  # noqa: UP045
    typer.Option("--device", help="Where it runs.", show_default="cuda where there is one"),
]
Recompute = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="L_r|auto",
        show_default="off",
        help="Keep the stream state only at the first of this many consecutive sites; auto: of as many as keep least.",
    ),
]
Compiled = Annotated[bool, typer.Option(help="With torch.compile too.")]
Peers = Annotated[bool, typer.Option("--peers", help=f"With the sites of other packages: {', '.join(PEERS)}.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds; in each everything runs once.")]
Threads = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="Threads on the CPU.", show_default="torch's"),
]
Fresh = Annotated[bool, typer.Option(help="Compilation and memory too, in a process for each way to run.")]
Json = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--json", dir_okay=False, help="Write settings and figures to this file.", show_default=False),
]
Csv = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--csv", dir_okay=False, help="Write the figures to this file.", show_default=False),
]
Plot = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(dir_okay=False, help="Draw the times and the memory, as .png, .svg or .pdf.", show_default=False),
]


def register(
    app: typer.Typer,
    show: Callable[[RenderableType], None],
    working: Callable[[str], AbstractContextManager[Callable[[str], None]]],
) -> None:
    """Adds the command to an app. `show` prints; what is done within `working` fails with one message."""

    @app.command("bench")
    def print_bench(
        model: Spec, n: Streams = "4", batch: Batch = None, length: Length = None, training: Training = True,
        autocast: Cast = None, recompute: Recompute = None, device: On = None, compiled: Compiled = True,
        peers: Peers = False, rounds: Rounds = 15, threads: Threads = None, fresh: Fresh = True,
        json_file: Json = None, csv_file: Csv = None, plot: Plot = None, config: Settings = None,
    ) -> None:  # fmt: skip
        """Time a model beside its conversion: eager, compiled, and with other packages' sites."""
        with working(f"Measuring {model}") as tell:
            for path in (json_file, csv_file, plot):
                _check_folder(path)
            plotted = pyplot("--plot") if plot else None
            on = _device(device)
            if threads:
                torch.set_num_threads(threads)
            load_it = functools.partial(load, model, tuple(config or ()), batch, length)
            options = MHCConfig(n_streams=number_of_streams(n, 2), recompute=_recompute(recompute))
            workload = Workload(load_it, options, training, AUTOCAST[autocast] if autocast else None, on)
            settings = _settings(workload, model, rounds)
            backends = [benchmark.EAGER, benchmark.MHC] if compiled else [benchmark.EAGER]
            ready, missing = _ready(on) if peers else ([], {})
            measured = benchmark.bench(
                workload, backends=backends, peers=ready, rounds=rounds, fresh=fresh, progress=tell
            )
            if json_file:
                json_file.write_text(_as_json(settings, measured), encoding="utf-8")
            if csv_file:
                _write_csv(csv_file, measured)
            if plot:
                draw(plotted, plot, f"{model}: {settings['inputs']}", measured)
        notes = [Text(f"left out: {peer}: {why}", style="yellow") for peer, why in missing.items()]
        facts = [Text(f"{name}: {value}", style="dim") for name, value in settings.items()]
        show(Group(*facts, Text(), bench_table(measured), *notes))


def load(model: str, settings: Sequence[str], batch: int | None, length: int | None) -> tuple[nn.Module, Inputs]:
    """The model of a SPEC with inputs of this size: rows and, of token ids, columns are repeated or cut."""
    torch.manual_seed(0)
    built, given = spec.load(model, settings)
    args, kwargs = example_call(built, given)
    length = length or (TOKENS if given is None else None)

    def sized(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() > 0:
            value = _cycled(value, 0, batch)
            if value.dim() == 2 and not value.is_floating_point():
                value = _cycled(value, 1, length)
        return value

    kwargs = {name: sized(value) for name, value in kwargs.items()}
    return built, kwargs or tuple(sized(value) for value in args)


def _cycled(value: Tensor, dim: int, size: int | None) -> Tensor:
    if size is None:
        return value
    return value.index_select(dim, torch.arange(size, device=value.device) % value.shape[dim])


def _device(asked: Device | None) -> str:
    there = torch.cuda.is_available()
    if asked is Device.cuda and not there:
        raise UsageError("--device cuda: torch sees no GPU here.")
    return asked.value if asked else "cuda" if there else "cpu"


def _recompute(text: str | None) -> Any:
    return int(text) if text and text.isdigit() else text


def _ready(device: str) -> tuple[list[str], dict[str, str]]:
    """The peers that can run here, and why the others can't."""
    missing = {name: why for name, peer in PEERS.items() if (why := peer.missing(device))}
    return [name for name in PEERS if name not in missing], missing


def _check_folder(path: Path | None) -> None:
    if path is not None and not path.resolve().parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}.")


def _settings(workload: Workload, model: str, rounds: int) -> dict[str, str]:
    built, inputs = workload.load()
    args, kwargs = example_call(built, inputs)
    named = kwargs or {str(k): value for k, value in enumerate(args)}
    shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in named.items() if isinstance(v, Tensor))
    parameters, streams = sum(p.numel() for p in built.parameters()), workload.config.streams_as_text()
    where = f"{torch.get_num_threads()} threads, C++ kernels: {'yes' if cpu.available() else 'no'}"
    return {
        "model": f"{model}, {parameters:,} parameters, n = {streams}",
        "inputs": shapes,
        "step": ("forward and backward" if workload.training else "forward")
        + (f", autocast {workload.autocast}" if workload.autocast else "")
        + (f", recompute {workload.config.recompute}" if workload.config.recompute else ""),
        "on": f"torch {torch.__version__}, "
        + (torch.cuda.get_device_name() if workload.device == "cuda" else where),
        "figures": f"medians of {rounds} interleaved rounds; ratios over the original, eager or compiled",
    }  # fmt: skip


def _as_json(settings: dict[str, str], measured: Sequence[Measured]) -> str:
    return json.dumps({"settings": settings, "measured": [dataclasses.asdict(one) for one in measured]}, indent=2)


def _write_csv(path: Path, measured: Sequence[Measured]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Measured)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(one) for one in measured)


def pyplot(what: str) -> Any:
    """matplotlib's, which writes files.

    Raises:
        CommandError: `what` needs it, and it is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise CommandError(f'{what} needs matplotlib. Install it with: pip install "mhc-rewrite[demo]"') from error
    matplotlib.use("agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def draw(pyplot: Any, path: Path, title: str, measured: Sequence[Measured]) -> None:
    """Bars of the time of a step and, where it was measured, of the memory that it needs."""
    labels = [f"{one.model}, {one.backend}" for one in measured]
    panels = {"time of a step over the original's": [one.ratio for one in measured]}
    if all(one.peak is not None for one in measured):
        panels["peak memory of a step, MB"] = [(one.peak or 0) / 1e6 for one in measured]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 1 + 0.4 * len(labels)), sharey=True)
    for axis, (what, values) in zip([axes] if len(panels) == 1 else axes, panels.items()):
        colours = ["lightgrey" if one.model == benchmark.ORIGINAL else "tab:blue" for one in measured]
        axis.bar_label(axis.barh(labels, values, color=colours), fmt="%.3g", padding=2)
        axis.set_xlabel(what)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise UsageError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)

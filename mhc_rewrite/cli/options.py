"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from mhc_rewrite.cli import spec
from mhc_rewrite.cli.errors import UsageError
from mhc_rewrite.config import MAX_STREAMS

Spec = Annotated[str, typer.Argument(metavar="SPEC", help=f"The model: {spec.FORMS}.", show_default=False)]
Streams = Annotated[
    str,
    typer.Option(
        "--n",
        "--n-streams",
        metavar="N|PATTERN=N,...",
        help=f"Number of streams, up to {MAX_STREAMS}; or by stretches of the model: layers.0-11=4,layers.12-23=2,*=3.",
    ),
]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Option("--config", metavar="KEY=VALUE", help="An option of the model's config or callable. Repeatable."),
]


def number_of_streams(text: str, least: int = 1) -> int | dict[str, int]:
    """`4` -> 4; `layers.0-11=4,*=2` -> `{"layers.0-11": 4, "*": 2}`.

    Raises:
        UsageError: it is neither.
    """
    if "=" not in text and text.strip().isdecimal() and least <= int(text) <= MAX_STREAMS:
        return int(text)
    pairs = [tuple(end.strip() for end in part.rpartition("=")[::2]) for part in text.split(",")]
    streams = {pattern: int(n) for pattern, n in pairs if pattern and n.isdecimal()}
    if len(streams) < len(pairs):
        raise UsageError(
            f"--n takes a number of streams from {least} to {MAX_STREAMS}, or such numbers by pattern, as in "
            f"layers.0-11=4,layers.12-23=2, each pattern once, not {text!r}."
        )
    return streams

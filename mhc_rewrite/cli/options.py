"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from mhc_rewrite.cli import spec

Spec = Annotated[str, typer.Argument(metavar="SPEC", help=f"The model: {spec.FORMS}.", show_default=False)]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045 (read at run time by every supported Typer)
    typer.Option("--config", metavar="KEY=VALUE", help="An option of the model's config or callable. Repeatable."),
]

"""What the tables of `mhc-rewrite cost` have in common."""

from __future__ import annotations

import sympy
from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mhc_rewrite.printing import plain_table

PROSE_WIDTH = 116


def section(title: str, *parts: RenderableType) -> list[RenderableType]:
    """Parts under a heading."""
    return [Text(), Text(title, style="bold cyan"), *(Padding(part, (0, 0, 0, 2)) for part in parts)]


def formula_text(expression: sympy.Expr) -> str:
    """`2*n**2` -> `2 n^2`."""
    return str(expression).replace("**", "^").replace("*", " ")


def numbers_table(*headers: str) -> Table:
    """A table of numbers, by what its first column names."""
    table = plain_table(*headers)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def estimates(table: Table, assumed: tuple[str, ...]) -> list[RenderableType]:
    """A table that is marked as an estimate, with what it takes for granted."""
    return [
        *section("ESTIMATE, not measured: what a training step takes longer", table),
        *section("assumed", *(prose(f"- {text}.") for text in assumed)),
    ]


def prose(text: str) -> Table:
    """Wrapped, also where the console has no end."""
    table = Table.grid()
    table.add_column(max_width=PROSE_WIDTH)
    table.add_row(text)
    return table

"""Lines and tables of reports on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console


def widen(console: Console, columns: int) -> None:
    """Print at least `columns` columns, even where the terminal is narrower: a table must not lose cells."""
    console.width = max(console.width, columns)


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print `text` without markup; the terminal, not the console, breaks a line that is too long."""
    console.print(Text(text, style=style), soft_wrap=True)


def figure_table(*columns: str, left: int = 0) -> Table:
    """An empty table with a line below its head; all columns but the first `left` are right-aligned."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        side: Literal["left", "right"] = "left" if number < left else "right"
        table.add_column(name, justify=side, no_wrap=True)
    return table


def percent(share: float) -> str:
    """A share with three digits at most: 0.125 is "12.5 %"."""
    return f"{share * 100:.3g} %"

"""Lines and tables of reports on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 110
"""Columns that most reports' tables take."""


def widen(console: Console, columns: int = TABLE_WIDTH) -> None:
    """Print at least `columns` columns, even if the terminal is narrower, so that no cell is cut off."""
    console.width = max(console.width, columns)


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a paragraph without markup; the terminal wraps it."""
    console.print(Text(text, style=style), soft_wrap=True)


def table_of(*columns: str, texts: tuple[int, ...] = (0,)) -> Table:
    """A table whose number columns are aligned right and never cut; the columns in `texts` wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        words = number in texts
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def percent(share: float) -> str:
    """A share with three digits at most: 0.125 is "12.5 %"."""
    return f"{share * 100:.3g} %"

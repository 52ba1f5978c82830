"""Paragraphs and tables of a report on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box as boxes
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 110
"""The width of tables in a narrower terminal, or without one: a cell that is cut off says nothing."""


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print a paragraph without markup; the terminal wraps it."""
    console.print(Text(text, style=style), soft_wrap=True)


def table_of(*columns: str, texts: tuple[int, ...] = (0,)) -> Table:
    """A table whose number columns are aligned right and never cut; the columns in `texts` wrap."""
    table = Table(box=boxes.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        words = number in texts
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table

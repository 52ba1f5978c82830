"""A page of HTML in one file, without script or network access, in the reader's light or dark colours.

A `Page` holds the content; the template `page.html` and the styles `page.css` give the form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from moebox.cost.page.charts import Columns, Lines, Tick
from moebox.cost.words import Sentence
from moebox.errors import RequestError

FOLDER = Path(__file__).parent
OPTION = re.compile(r"(?<!\S)(--[a-z][a-z-]+)")
Tone = Literal["", "good", "bad"]


@dataclass(frozen=True)
class Tile:
    """A key figure."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Row:
    """A row of a table; `tones` holds the colours of cells by their column."""

    cells: Sequence[str]
    total: bool = False
    tones: Mapping[int, Tone] = field(default_factory=dict)

    def tone(self, column: int) -> Tone:
        """The colour of the cell in `column`; empty: none."""
        return self.tones.get(column, "")


@dataclass(frozen=True)
class Table:
    """A table; its columns are aligned right, those in `texts` left."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Row]
    texts: Sequence[int] = ()


@dataclass(frozen=True)
class BarPart:
    """A part of a bar: its colour, its width in any unit that all bars share, and its tooltip."""

    kind: str
    width: float
    title: str


@dataclass(frozen=True)
class Bar:
    """A bar between its name (with a note) and its value (with a detail)."""

    name: str
    parts: Sequence[BarPart]
    value: str
    note: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Block:
    """A heading, a paragraph, and a chart, bars or a table.

    Attributes:
        kind: decides which of `chart`, `bars` and `table` is shown.
        id: of the chart, unique on the page.
        keys: the legend: (kind, label) of each colour.
        bars: with widths in percent, from `scaled`.
        table: what the kind `table` shows; with another kind, the chart's figures, folded.
        foot: a paragraph below the rest.
    """

    kind: Literal["columns", "curves", "bars", "table"]
    title: str
    text: str = ""
    id: str = ""
    keys: Sequence[tuple[str, str]] = ()
    chart: Columns | Lines | None = None
    x_title: str = ""
    bars: Sequence[Bar] = ()
    table: Table | None = None
    foot: str = ""


@dataclass(frozen=True)
class Section:
    """Columns of blocks, side by side where there is room."""

    columns: Sequence[Sequence[Block]]

    @property
    def blocks(self) -> list[Block]:
        """The blocks, column by column."""
        return [block for column in self.columns for block in column]


@dataclass(frozen=True)
class Page:
    """The content of the page.

    Attributes:
        over: texts above the headline: the command, the range, and what the range is limited to.
        lead: the paragraph below the headline.
    """

    title: str
    over: Sequence[str]
    headline: Sentence
    lead: str
    tiles: Sequence[Tile] = ()
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()
    footer: Sequence[str] = ()


def render_page(page: Page) -> str:
    """`page` as HTML; every text is escaped."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["num"] = _number
    environment.filters["pct"] = lambda value: f"{_number(value)}%"
    environment.filters["widest"] = _widest
    environment.filters["prose"] = _prose
    template = environment.from_string((FOLDER / "page.html").read_text(encoding="utf-8"))
    css = (FOLDER / "page.css").read_text(encoding="utf-8").strip()
    return template.render(page=page, css=Markup(css))


def write_page(page: Page, path: Path) -> None:
    """Write `page` to `path`.

    Raises:
        RequestError: the file cannot be written.
    """
    try:
        path.write_text(render_page(page), encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be written: {error.strerror or error}",
            "Name a file in a folder that is writable.",
        ) from None


def scaled(bars: Sequence[Bar]) -> list[Bar]:
    """The bars with widths in percent of the longest bar; parts without a width are left out."""
    longest = max((sum(part.width for part in bar.parts) for bar in bars), default=0.0) or 1.0
    return [
        replace(
            bar,
            parts=[replace(part, width=100 * part.width / longest) for part in bar.parts if part.width > 0],
        )
        for bar in bars
    ]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _prose(text: str) -> Markup:
    """`text`, escaped, with markup that keeps lines from breaking at the hyphens of `--options`."""
    return Markup(OPTION.sub(r'<span class="option">\1</span>', str(escape(text))))


def _widest(ticks: Sequence[Tick]) -> str:
    """The longest label, which decides the width of the axis."""
    return max((tick.label for tick in ticks), key=len, default="")

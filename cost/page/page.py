"""One page of HTML that needs nothing else: no script, no network, light and dark as its reader likes.

`page.html` and `page.css` are its form; what stands on it is a `Page`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from moebox.cost.page.charts import Columns, Lines, Tick
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
    """A row of a table; `tones` colours cells by their column."""

    cells: Sequence[str]
    total: bool = False
    tones: Mapping[int, Tone] = field(default_factory=dict)

    def tone(self, column: int) -> Tone:
        """How the cell of `column` is coloured."""
        return self.tones.get(column, "")


@dataclass(frozen=True)
class Table:
    """A table; numbers stand right, and the columns in `texts` left."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Row]
    texts: Sequence[int] = ()


@dataclass(frozen=True)
class BarPart:
    """A part of a bar, its width in percent of the widest bar."""

    kind: str
    width: float
    title: str


@dataclass(frozen=True)
class Bar:
    """A bar with its name before and its value behind it."""

    name: str
    parts: Sequence[BarPart]
    value: str
    note: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Block:
    """A heading, what it says, and a chart, bars or a table.

    Attributes:
        id: of the chart, unique on the page.
        keys: (kind, label) of the colours.
        table: the block itself for the kind `table`, else the chart's figures behind a fold.
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
        """All of them, column by column."""
        return [block for column in self.columns for block in column]


@dataclass(frozen=True)
class Page:
    """What stands on the page.

    Attributes:
        over: above the headline: what this is, the range, what it is limited to.
        headline: pieces of one sentence, each with whether it stands out.
    """

    title: str
    over: Sequence[str]
    headline: Sequence[tuple[str, bool]]
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
        RequestError: it cannot be written.
    """
    try:
        path.write_text(render_page(page), encoding="utf-8")
    except OSError as error:
        raise RequestError(
            f"{path}: cannot be written: {error.strerror or error}",
            "Name a file in a folder that is writable.",
        ) from None


def bars_of(rows: Sequence[tuple[Bar, Sequence[tuple[str, float, str]]]]) -> list[Bar]:
    """Bars with their parts (kind, value, title) scaled so that the longest fills its line."""
    longest = max((sum(value for _, value, _ in parts) for _, parts in rows), default=0.0) or 1.0
    return [
        Bar(
            bar.name,
            [BarPart(kind, 100 * value / longest, title) for kind, value, title in parts if value > 0],
            bar.value,
            bar.note,
            bar.detail,
        )
        for bar, parts in rows
    ]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _prose(text: str) -> Markup:
    """`text`, escaped, whose options are not broken at their hyphens."""
    return Markup(OPTION.sub(r'<span class="option">\1</span>', str(escape(text))))


def _widest(ticks: Sequence[Tick]) -> str:
    """The longest label, which keeps the axis as wide as its labels are."""
    return max((tick.label for tick in ticks), key=len, default="")

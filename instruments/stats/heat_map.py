"""Maps with a cell for each layer and expert: their values, folding to a width, drawing in text or colour.

Shapes: L MoE layers, E n_routed_experts, W columns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.style import Style
from rich.text import Text

from moebox.console import percent
from moebox.instruments.stats.report import SavedPlacement, StatsReport
from moebox.offload.routing.replay import slots_of

Grid = npt.NDArray[np.float64]
Levels = npt.NDArray[np.intp]
Colour = tuple[int, int, int]

WIDEST_CELL = 4
"""Columns of one expert, at most."""


@dataclass(frozen=True)
class Scale:
    """The levels of a map: their names, their colours, and their characters in Unicode and in ASCII."""

    names: tuple[str, ...]
    colours: tuple[Colour, ...]
    shades: str
    ascii_shades: str


USE_BOUNDS = (0.0, 0.5, 0.8, 1.25, 2.0, 4.0)
"""Upper bounds of all levels of use but the last, in multiples of the layer's mean."""
USE = Scale(
    ("never", *(f"up to {bound:g}" for bound in USE_BOUNDS[1:]), "more"),
    # From matplotlib's magma (CC0), whose lightness grows evenly.
    (
        (24, 24, 27),
        (40, 17, 89),
        (114, 31, 129),
        (182, 54, 121),
        (241, 96, 93),
        (254, 175, 119),
        (252, 253, 191),
    ),
    " ·:░▒▓█",
    " .:-+#@",
)
PLACE_COLOURS: tuple[Colour, ...] = ((42, 47, 58), (38, 110, 142), (53, 183, 121), (253, 231, 37))
"""Colours from the slowest place to the fastest, taken from viridis (CC0)."""


def place_scale(names: Sequence[str]) -> Scale:
    """The scale of up to four places, the slowest first."""
    chosen = {1: (0,), 2: (0, 3), 3: (0, 2, 3)}.get(len(names), range(len(names)))
    return Scale(
        tuple(names),
        tuple(PLACE_COLOURS[index] for index in chosen),
        "".join("·▒▓█"[index] for index in chosen),
        "".join(".+#@"[index] for index in chosen),
    )


@dataclass(frozen=True)
class Map:
    """A map of all experts.

    Attributes:
        title: what is shown.
        values: [L, E], uses in multiples of the layer's mean, or the index of a place.
        scale: the levels.
        of_use: whether `values` are uses.
    """

    title: str
    values: Grid
    scale: Scale
    of_use: bool

    def levels(self, width: int | None = None) -> Levels:
        """[L, W], indices of the scale's levels; without a `width` W is E."""
        if not self.of_use:
            places: Levels = self.values.astype(np.intp)
            return places if width is None else fold_places(places, width, len(self.scale.names))
        values = self.values if width is None else fold(self.values, width)
        return np.searchsorted(USE_BOUNDS, values, side="left")


def maps_of(report: StatsReport) -> list[Map]:
    """A map of use, and a map of places: the saved ones, or, without, those that use alone would give."""
    use = Map("use, in uses of a layer's mean expert", np.array(report.use), USE, True)
    if report.places is not None:
        title = f"where each expert lies, {_saved_by(report.places)}"
        places = Map(title, np.array(report.places.tiers), place_scale(report.places.names), False)
        return [use, places]
    budgets = sorted(float(part) for part in report.shares)[: len(PLACE_COLOURS) - 1]
    names = ("more", *map(percent, reversed(budgets)))
    title = "by use alone an expert is held where this share of all experts fits"
    return [use, Map(title, _held_from(report, budgets), place_scale(names), False)]


def _saved_by(places: SavedPlacement) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(places.at_s))
    state = "is running" if places.running else "has ended"
    return f"as process {places.process}, which {state}, said at {when}"


def _held_from(report: StatsReport, budgets: Sequence[float]) -> Grid:
    """[L, E], the number of `budgets` with which an expert fits, the most used experts first."""
    rank = np.array(report.rank)
    held: Grid = np.sum([rank < slots_of(budget, rank.size) for budget in budgets], axis=0, dtype=float)
    return held


def fold(values: Grid, width: int) -> Grid:
    """[L, E] -> [L, W], W at most `width`: a column is the mean of neighbouring experts."""
    experts = values.shape[1]
    if experts <= width:
        return np.repeat(values, min(WIDEST_CELL, width // experts), axis=1)
    edges = np.arange(width + 1) * experts // width
    folded: Grid = np.add.reduceat(values, edges[:-1], axis=1) / np.diff(edges)
    return folded


def fold_places(places: npt.NDArray[np.integer], width: int, kinds: int) -> Levels:
    """[L, E] -> [L, W]: a column is the most frequent place of neighbouring experts, of equals the faster."""
    shares = [fold((places == kind).astype(np.float64), width) for kind in reversed(range(kinds))]
    most: Levels = kinds - 1 - np.argmax(shares, axis=0)
    return most


def draw(levels: Levels, labels: Sequence[str], scale: Scale) -> list[Text]:
    """Lines of a map [L, W] in colour, each after its label; a line shows two layers, one above the other."""
    return [_halves(labels[row], levels[row : row + 2], scale) for row in range(0, len(levels), 2)]


def draw_plain(levels: Levels, labels: Sequence[str], shades: str) -> list[Text]:
    """Lines of a map [L, W] without colours, one layer a line."""
    return [
        Text(f"{label} {''.join(shades[level] for level in row)}")
        for label, row in zip(labels, levels, strict=True)
    ]


def legend(scale: Scale) -> Text:
    """The names of the levels beside their colours."""
    text = Text()
    for name, colour in zip(scale.names, scale.colours, strict=True):
        text.append("  ", Style(bgcolor=Color.from_rgb(*colour)))
        text.append(f" {name}   ")
    return text


def legend_plain(scale: Scale, shades: str) -> Text:
    """The names of the levels beside their characters."""
    return Text("   ".join(f"[{shade}] {name}" for name, shade in zip(scale.names, shades, strict=True)))


def _halves(label: str, rows: Levels, scale: Scale) -> Text:
    text = Text(f"{label} ")
    for levels in rows.T:
        upper, *lower = (Color.from_rgb(*scale.colours[level]) for level in levels)
        text.append("▀", Style(color=upper, bgcolor=lower[0] if lower else None))
    return text

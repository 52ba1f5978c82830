"""The positions of the marks of the page's charts, in percent of the plot.

The browser stretches an SVG of these marks to the width of the page. Labels are text of the page beside the
SVG, so that they stay readable on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

LABEL_GAP = 9.0
"""Percent of a plot's height that the label of a line takes."""
CURVE_POINTS = 64
MAX_LABELS = 7
"""Names of columns that are shown at most."""
MAX_COLUMN_WIDTH = 12.0
"""Percent of a plot's width. Without the limit, the column of a report of one day would fill the plot."""


@dataclass(frozen=True)
class Tick:
    """A label at a position along an axis, in percent."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A rectangle: left, top, width and height in percent, its colour, and its tooltip."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    title: str


@dataclass(frozen=True)
class Columns:
    """Stacked columns over time."""

    marks: list[Mark]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True)
class Series:
    """A line through points [(x, y)] of the data; `label` is written above its left or right end."""

    kind: str
    label: str
    points: Sequence[tuple[float, float]]
    side: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Spot:
    """A point with a label."""

    x: float
    y: float
    label: str
    kind: str = "spot"


@dataclass(frozen=True)
class Placed:
    """A line or a spot in percent of the plot. `x` and `y` are the spot, or the labelled end of the line.

    Attributes:
        path: the line as data of an SVG path; empty for a spot.
        side: "left": the label begins at x; "right": it ends there.
        label_y: the label's height, which may differ from `y` to keep labels apart.
    """

    kind: str
    label: str
    x: float
    y: float
    path: str = ""
    side: Literal["left", "right"] = "left"
    label_y: float = 0.0


@dataclass(frozen=True)
class Lines:
    """Curves on two axes."""

    lines: list[Placed]
    spots: list[Placed]
    x_ticks: list[Tick]
    y_ticks: list[Tick]


@dataclass(frozen=True)
class Axis:
    """Maps data to percent, linearly or logarithmically."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """100 x (value - low) / (high - low), or the same of logarithms, limited to 0 ... 100."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, part))

    def ticks(self, text: Callable[[float], str]) -> list[Tick]:
        """Round values within the axis."""
        values = _log_steps(self.low, self.high) if self.log else steps(self.high)
        return [Tick(self(value), text(value)) for value in values]


def columns(
    names: Sequence[str],
    stacks: Sequence[Sequence[tuple[str, float, str]]],
    text: Callable[[float], str],
) -> Columns:
    """One column per name.

    Args:
        names: labels of the columns.
        stacks: for each column its parts (kind, value, title), from the bottom up.
        text: writes the values of the axis.
    """
    values = steps(max((sum(value for _, value, _ in stack) for stack in stacks), default=0.0))
    axis = Axis(0.0, values[-1])
    pitch = 100 / max(1, len(names))
    width = min(pitch - min(0.28 * pitch, 1.2), MAX_COLUMN_WIDTH)
    marks = []
    for number, stack in enumerate(stacks):
        top = 100.0
        for kind, value, title in stack:
            height = axis(value)
            top -= height
            left = (number + 0.5) * pitch - width / 2
            marks.append(Mark(left, top, width, height, kind, title))
    every = math.ceil(len(names) / MAX_LABELS)
    x_ticks = [Tick((at + 0.5) * pitch, names[at]) for at in range(0, len(names), max(1, every))]
    return Columns(marks, x_ticks, axis.ticks(text))


@dataclass(frozen=True)
class Chart:
    """Series and spots on two axes, and functions that write the values of the axes."""

    x: Axis
    y: Axis
    x_text: Callable[[float], str]
    y_text: Callable[[float], str]
    series: Sequence[Series] = field(default_factory=tuple)
    spots: Sequence[Spot] = field(default_factory=tuple)

    def place(self) -> Lines:
        """All positions in percent of the plot, with the labels of neighbouring lines moved apart."""
        lines = [self._line(series) for series in self.series]
        spots = [self._spot(spot) for spot in self.spots]
        return Lines(_apart(lines), spots, self.x.ticks(self.x_text), self.y.ticks(self.y_text))

    def _line(self, series: Series) -> Placed:
        points = [(self.x(x), 100 - self.y(y)) for x, y in series.points]
        path = "M" + " L".join(f"{x:.2f} {y:.2f}" for x, y in points)
        x, y = points[0 if series.side == "left" else -1]
        return Placed(series.kind, series.label, x, y, path, series.side, y)

    def _spot(self, spot: Spot) -> Placed:
        x, y = self.x(spot.x), 100 - self.y(spot.y)
        return Placed(spot.kind, spot.label, x, y, side="right" if x > 60 else "left", label_y=y)


def sampled(function: Callable[[float], float], low: float, high: float) -> list[tuple[float, float]]:
    """Points of `function` from `low` to `high`, evenly spaced on a logarithmic axis."""
    ratio = high / low
    xs = (low * ratio ** (step / (CURVE_POINTS - 1)) for step in range(CURVE_POINTS))
    return [(x, function(x)) for x in xs]


def steps(highest: float) -> list[float]:
    """Values from 0 in three to five round steps to at least `highest`, or to 1 where that is 0."""
    rough = (highest or 1.0) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil((highest or 1.0) / step - 1e-9) + 1)]


def _log_steps(low: float, high: float) -> list[float]:
    """Powers of ten within the range; fewer than four are filled up with 3, or with 2 and 5, times each."""
    for factors in ((1,), (1, 3), (1, 2, 5)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in values if low * 0.999 <= value <= high * 1.001]
        if len(found) >= 4:
            break
    return found


def _apart(lines: list[Placed]) -> list[Placed]:
    """The lines with labels moved up, from the lowest line to the highest, so that none covers another."""
    placed, ceiling = dict[int, float](), math.inf
    for index in sorted(range(len(lines)), key=lambda index: -lines[index].y):
        placed[index] = min(lines[index].y, ceiling)
        ceiling = placed[index] - LABEL_GAP
    return [
        Placed(line.kind, line.label, line.x, line.y, line.path, line.side, placed[index])
        for index, line in enumerate(lines)
    ]

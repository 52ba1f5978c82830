"""Positions of marks and labels, and the formats of figures."""

import pytest
from pytest import approx

from moebox.cost import figures
from moebox.cost.page.charts import LABEL_GAP, Axis, Chart, Series, Spot, columns, sampled, steps
from moebox.cost.page.page import Bar, BarPart, scaled


@pytest.mark.parametrize(
    ("highest", "last", "number"),
    [
        (0.0, 1.0, 5),
        (1.0, 1.0, 5),
        (7.3, 8.0, 5),
        (1_180_000, 1_500_000, 4),
        (0.031, 0.04, 5),
        (9.99, 10.0, 5),
    ],
)
def test_steps_of_an_axis_are_round_and_reach_the_top(highest, last, number):
    found = steps(highest)
    assert (found[0], found[-1], len(found)) == (0.0, approx(last), number)


def test_columns_stack_from_the_bottom_and_touch():
    chart = columns(["a", "b"], [[("x", 1.0, "one"), ("y", 3.0, "three")], [("x", 2.0, "two")]], str)
    low, high, other = chart.marks
    assert (low.y + low.height, low.height) == (approx(100), approx(25))
    assert high.y + high.height == approx(low.y)
    assert high.y == approx(0)
    assert other.height == approx(2 * low.height)
    assert low.x == high.x < other.x
    assert all(mark.x + mark.width <= 100 for mark in chart.marks)
    assert [tick.label for tick in chart.x_ticks] == ["a", "b"]


def test_columns_of_nothing():
    chart = columns(["a"], [[]], str)
    assert chart.marks == []
    assert [tick.at for tick in chart.y_ticks] == [0, 25, 50, 75, 100]


def test_a_single_column_has_a_limited_width():
    (mark,) = columns(["a"], [[("x", 1.0, "one")]], str).marks
    assert mark.width < 20
    assert mark.x + mark.width / 2 == approx(50)


def test_a_logarithmic_axis():
    axis = Axis(1.0, 100.0, log=True)
    assert [axis(value) for value in (0.5, 1, 10, 100, 500)] == [0, 0, approx(50), approx(100), 100]
    assert [tick.label for tick in axis.ticks(lambda value: f"{value:g}")] == ["1", "3", "10", "30", "100"]


def test_labels_of_near_lines_are_moved_apart_in_their_order():
    near = [Series("api", str(value), [(1, value), (10, value)]) for value in (10.0, 10.1, 50.0)]
    placed = Chart(Axis(1, 10, log=True), Axis(1, 100, log=True), str, str, near).place().lines
    low, middle, high = (line.label_y for line in placed)
    assert low - middle == approx(LABEL_GAP)
    assert middle - high >= LABEL_GAP
    assert placed[0].y == approx(low)


def test_lines_and_spots_share_their_axes():
    curve = Series("own", "", sampled(lambda x: 100 / x, 1, 100))
    drawn = Chart(
        Axis(1, 100, log=True), Axis(1, 100, log=True), str, str, [curve], [Spot(10, 10, "here")]
    ).place()
    (line,), (spot,) = drawn.lines, drawn.spots
    assert line.path.startswith("M0.00 0.00 L")
    assert line.path.endswith("L100.00 100.00")
    assert (spot.x, spot.y) == (approx(50), approx(50))


def test_bars_are_scaled_to_the_longest():
    one, two = scaled(
        [
            Bar("a", [BarPart("x", 1.0, ""), BarPart("y", 3.0, "")], "4"),
            Bar("b", [BarPart("x", 2.0, ""), BarPart("y", 0.0, "")], "2"),
        ]
    )
    assert [part.width for part in one.parts] == [25, 75]
    assert [part.width for part in two.parts] == [50]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (25_000, "$25,000"),
        (1234.5, "$1,234"),
        (200, "$200"),
        (199.996, "$200.00"),
        (12.3, "$12.30"),
        (0.93, "$0.93"),
        (0.0342, "$0.0342"),
        (0.004, "$0.004"),
        (0.00004, "<$0.0001"),
        (0, "$0.00"),
        (-3.5, "-$3.50"),
    ],
)
def test_money(value, text):
    assert figures.money(value) == text


def test_other_currencies():
    assert figures.money(3, "EUR") == "€3.00"
    assert figures.money(3, "CHF") == "CHF 3.00"
    assert figures.axis_money(60) == "$60"
    assert figures.axis_money(0.5) == "$0.50"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (9999, "9,999"),
        (9999.7, "10.0k"),
        (12_400, "12.4k"),
        (999_999, "1.00M"),
        (3.06e6, "3.06M"),
        (2e12, "2.00T"),
    ],
)
def test_counts(value, text):
    assert figures.count(value) == text


def test_other_figures():
    assert [figures.rate(value) for value in (1204.4, 24.12, 0.834)] == ["1,204", "24.1", "0.83"]
    assert [figures.share(value) for value in (1, 0.1234, 0.0421, 0.0003, 0)] == [
        "100 %",
        "12 %",
        "4.2 %",
        "0.03 %",
        "0 %",
    ]
    assert [figures.span(value) for value in (3.21, 42, 150, 7200, 21 * 86_400)] == [
        "3.2 s",
        "42 s",
        "2.5 minutes",
        "2 hours",
        "21 days",
    ]
    assert [figures.energy(value) for value in (840, 43_200, 3.6e6 * 3.4)] == ["840 J", "12.0 Wh", "3.4 kWh"]
    assert [figures.months(value) for value in (1, 36, 35.2, 90, 5000)] == [
        "1 month",
        "36 months",
        "35.2 months",
        "7.5 years",
        "more than 100 years",
    ]
    assert [figures.times(value) for value in (3.21, 24.4)] == ["3.2 times", "24 times"]
    assert [figures.size(value) for value in (11.9e9, 4.2e8, 900)] == ["11.9 GB", "420 MB", "1 kB"]

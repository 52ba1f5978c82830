"""Names and phrases that the report and the scenario share, on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from moebox.cost import figures
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Method, Source

PART_NAMES = {"electricity": "electricity", "hardware": "hardware", "other": "other costs"}
"""Readable names of `PARTS`."""
SOURCE_NAMES: dict[Source, str] = {"gpu": "GPU", "cpu": "CPU", "dram": "memory"}
METHOD_NAMES: dict[Method, str] = {
    "counter": "energy counter",
    "power": "power by time",
    "estimated": "estimated",
}

Sentence = Sequence[tuple[str, bool]]
"""Pieces of a sentence, each with whether the page emphasises it."""


class Priced(Protocol):
    """A report whose money is in one currency."""

    @property
    def currency(self) -> str: ...


def money(priced: Priced, value: float) -> str:
    """`value` in the report's currency."""
    return figures.money(value, priced.currency)


def axis_money(priced: Priced) -> Callable[[float], str]:
    """Writes the values of an axis in the report's currency."""
    return lambda value: figures.axis_money(value, priced.currency)


def kwh_price(prices: Prices) -> str:
    """`$0.176 a kWh`: all digits of the price, which `figures.money` would round."""
    symbol = figures.money(0, prices.currency).removesuffix("0.00")
    return f"{symbol}{prices.electricity_per_kwh:g} a kWh"


def plain(sentence: Sentence) -> str:
    """The sentence without emphasis."""
    return "".join(text for text, _ in sentence)


def value_or(missing: str, value: float | None, text: Callable[[float], str]) -> str:
    """`text(value)`, or `missing` where the value is None."""
    return missing if value is None else text(value)


def payback(months: float | None) -> str:
    """Months until the hardware is paid off, in words; None: never."""
    return value_or("never", months, figures.months)


def names_by_price(models: Iterable[tuple[str, float]]) -> dict[float, str]:
    """Prices with the names of the models that have them: models of one price share a label of a chart."""
    found: dict[float, str] = {}
    for name, price in models:
        found[price] = f"{found[price]}, {name}" if price in found else name
    return found

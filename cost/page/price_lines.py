"""Horizontal lines of a chart at the prices of hosted models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from moebox.cost.page.charts import Series
from moebox.cost.words import Priced, money, names_by_price


def price_lines(
    priced: Priced,
    models: Iterable[tuple[str, float]],
    low: float,
    high: float,
    side: Literal["left", "right"] = "left",
) -> list[Series]:
    """One line from x = `low` to `high` for each price; models (name, price) of one price share it."""
    return [
        Series("api", f"{names} {money(priced, price)}", [(low, price), (high, price)], side)
        for price, names in names_by_price(models).items()
    ]

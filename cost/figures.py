"""Formats of the figures in cost reports, on the terminal and on the page."""

from __future__ import annotations

import math

SYMBOLS = {"USD": "$", "EUR": "€", "GBP": "£", "JPY": "¥"}
MIN_MONEY = 0.0001
"""Smaller amounts are written as `<$0.0001`."""


def money(value: float, currency: str = "USD") -> str:
    """`$25,000`, `$12.30`, `$0.0042`: without cents from 1,000 on, with three digits below 0.1."""
    symbol = SYMBOLS.get(currency, f"{currency} ")
    size = abs(value)
    if 0 < size < MIN_MONEY:
        return f"<{symbol}{MIN_MONEY}"
    if size >= 1000 or (size >= 100 and size == round(size)):
        text = f"{size:,.0f}"
    elif size >= 1 or size == 0:
        text = f"{size:,.2f}"
    else:
        text = f"{size:.{2 - math.floor(math.log10(size))}f}"
        text = text.rstrip("0") if size < 0.1 else f"{size:.2f}"
    return f"{'-' if value < 0 else ''}{symbol}{text}"


def axis_money(value: float, currency: str = "USD") -> str:
    """As `money`, but whole amounts without cents."""
    return money(value, currency).removesuffix(".00")


def count(value: float) -> str:
    """`842`, `12.4k`, `3.06M`, `1.20B`: three digits from ten thousand on."""
    if abs(value) < 9_999.5:
        return f"{value:,.0f}"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{_three_digits(value / size)}{unit}"
    raise AssertionError(value)


def rate(value: float) -> str:
    """Three digits of a speed or of joules: `1,204`, `24.1`, `0.83`."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def share(value: float) -> str:
    """`12 %`, `4.2 %`, `0.03 %`."""
    percent = value * 100
    if percent >= 9.95 or percent == 0:
        return f"{percent:.0f} %"
    return f"{percent:.1f} %" if percent >= 0.1 else f"{percent:.2g} %"


def span(seconds: float) -> str:
    """`42 s`, `12 minutes`, `7.5 hours`, `21 days`."""
    for size, unit in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def energy(joules: float) -> str:
    """`840 J`, `12 Wh`, `3.4 kWh`."""
    if joules < 3_600:
        return f"{rate(joules)} J"
    watt_hours = joules / 3_600
    return f"{watt_hours:.1f} Wh" if watt_hours < 1000 else f"{watt_hours / 1000:,.1f} kWh"


def size(nbytes: float) -> str:
    """`420 MB`, `11.9 GB`, `3.1 TB`."""
    for unit_bytes, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if nbytes >= unit_bytes:
            return f"{_three_digits(nbytes / unit_bytes)} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def times(value: float) -> str:
    """`3.2 times`, `24 times`."""
    return f"{value:.1f} times" if value < 9.95 else f"{value:,.0f} times"


def months(value: float) -> str:
    """`36 months`, `7.5 years`."""
    if value > 48:
        return f"{value / 12:,.1f} years" if value < 1200 else "more than 100 years"
    return f"{value:.1f}".removesuffix(".0") + (" month" if value == 1 else " months")


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:,.0f}"

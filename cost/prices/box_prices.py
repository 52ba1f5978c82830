"""Prices of a box and its electricity. Options override the user's TOML file, which overrides the defaults.

The file is `$XDG_CONFIG_HOME/moebox/prices.toml`; its keys are the fields of `Prices`:

    electricity_per_kwh = 0.31
    hardware_price = 25_000
    life_months = 36
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from moebox.cost.energy.power_model import DEFAULT_POWER
from moebox.errors import PricesError
from moebox.folders import config_folder

HOURS_PER_MONTH = 730
"""8,760 hours of a year / 12."""
MONTH_S = HOURS_PER_MONTH * 3600
JOULES_PER_KWH = 3.6e6
MIN_UTILISATION = 0.001
"""A minute and a half a day."""


@dataclass(frozen=True)
class Prices:
    """The price of a box and of its operation. All money is in `currency`.

    Attributes:
        electricity_per_kwh: price of a kilowatt-hour; the default is that of the scenario `kimi-k2-h100`.
        hardware_price: price of the whole box; None: not known, and not part of the costs.
        life_months: months over which the hardware's price less `residual` is spread evenly.
        residual: value of the hardware after them.
        other_per_month: money a month for anything else: rent, cooling, staff.
        utilisation: part of the time in which the box works, from 0.001 to 1; None: as measured.
        idle_watts, watts_per_core, dram_watts: as in `PowerModel`, where no counter can be read.
        currency: code of the currency of all prices. List prices of APIs, which are in US dollars, are
            converted by `per_usd`.
        per_usd: price of one US dollar in `currency`.
    """

    electricity_per_kwh: float = 0.176
    hardware_price: float | None = None
    life_months: float = 36.0
    residual: float = 0.0
    other_per_month: float = 0.0
    utilisation: float | None = None
    idle_watts: float = DEFAULT_POWER.idle_watts
    watts_per_core: float = DEFAULT_POWER.watts_per_core
    dram_watts: float = DEFAULT_POWER.dram_watts
    currency: str = "USD"
    per_usd: float = 1.0

    def __post_init__(self) -> None:
        _check(asdict(self), "prices")
        if self.residual > (self.hardware_price or 0.0):
            raise PricesError(
                f"residual is {self.residual:g}, above hardware_price, which is "
                f"{'not given' if self.hardware_price is None else format(self.hardware_price, 'g')}",
                "the residual value is part of the hardware's price: give a price that is at least as high",
            )
        if self.currency != "USD" and self.per_usd == 1.0:
            raise PricesError(
                f"prices in {self.currency} without a rate: hosted models are priced in US dollars",
                f"give per_usd, what one US dollar costs in {self.currency}",
            )

    @property
    def hardware_per_month(self) -> float:
        """(price - residual) / months of life; 0 where the price is not known."""
        return (
            0.0 if self.hardware_price is None else (self.hardware_price - self.residual) / self.life_months
        )


def prices_path() -> Path:
    """Path of the user's file of prices, which need not exist."""
    return config_folder() / "prices.toml"


def load_prices(path: Path | None = None, **overrides: object) -> Prices:
    """Prices from a TOML file, overridden by the `overrides` that are not None.

    Args:
        path: a file that must exist; None: `prices_path()`, or the defaults where there is no such file.

    Raises:
        PricesError: a file that cannot be read, an unknown key or a bad value, with file, key and value.
    """
    given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    _check(given, "options")
    where = prices_path() if path is None else path
    from_file = read_toml(where, missing_ok=path is None)
    _check(from_file, str(where))
    try:
        return Prices(**{**from_file, **given})
    except PricesError as error:
        raise PricesError(f"{where}: {error.what}" if from_file else error.what, error.fix) from None


def read_toml(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """The content of a file of prices; empty where the file is missing and `missing_ok`.

    Raises:
        PricesError: the file cannot be read, or is not TOML in UTF-8.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if missing_ok and isinstance(error, FileNotFoundError):
            return {}
        raise PricesError(
            f"{path}: cannot be read: {error.strerror}", "name a file of prices in TOML"
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PricesError(f"{path}: not TOML: {error}", "write one `key = value` a line") from error


def near(name: str, known: list[str]) -> str:
    """The fix for an unknown name: the known names that look like it, or all of them where none does."""
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"did you mean {', '.join(close)}?" if close else f"known are {', '.join(known)}"


def number(value: object) -> float | None:
    """`value` as a finite number; None where it is no number, true and false included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None
    return found if math.isfinite(found) else None


def _check(values: Mapping[str, object], where: str) -> None:
    known = [item.name for item in fields(Prices)]
    for key, value in values.items():
        if key not in known:
            raise PricesError(f"{where}: unknown key {key!r} = {value!r}", near(key, known))
        fits, wanted = RULES.get(key, NOT_NEGATIVE)
        if not fits(value):
            raise PricesError(f"{where}: {key} = {value!r}", f"{key} must be {wanted}")


Rule = tuple[Callable[[object], bool], str]


def _positive(value: object) -> bool:
    return (number(value) or 0.0) > 0


def _not_negative(value: object) -> bool:
    return (-1.0 if (found := number(value)) is None else found) >= 0


def _code(value: object) -> bool:
    return isinstance(value, str) and len(value) == 3 and value.isascii() and value.isupper()


NOT_NEGATIVE: Rule = (_not_negative, "a number of 0 or more")
RULES: dict[str, Rule] = {
    "hardware_price": (lambda value: value is None or _not_negative(value), "a number of 0 or more"),
    "life_months": (lambda value: (number(value) or 0.0) >= 1, "a number of 1 or more"),
    "utilisation": (
        lambda value: value is None or MIN_UTILISATION <= (number(value) or 0.0) <= 1,
        f"from {MIN_UTILISATION} to 1, such as 0.25 for six hours a day",
    ),
    "currency": (_code, "a code of three letters such as USD or EUR"),
    "per_usd": (_positive, "a number above 0"),
}

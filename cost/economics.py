"""The arithmetic of costs: what tokens cost on a box, the same work at an API's prices, when owning pays off.

Pure functions. Money is in the currency of `Prices`; a month has 730 hours, a day 24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from moebox.cost.prices.api_prices import ApiPrice
from moebox.cost.prices.box_prices import JOULES_PER_KWH, MONTH_S, Prices
from moebox.cost.usage import Usage

DAY_S = 86_400
MILLION = 1e6


@dataclass(frozen=True)
class Parts:
    """Money for some work, or for a million of its tokens, by what it pays for."""

    electricity: float
    hardware: float
    other: float

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return self.electricity + self.hardware + self.other

    def by_name(self) -> dict[str, float]:
        """The parts alone, by the names in `PARTS`."""
        return {name: getattr(self, name) for name in PARTS}

    def scaled(self, factor: float) -> Parts:
        """Each part times `factor`."""
        return Parts(**{name: value * factor for name, value in self.by_name().items()})

    def to_dict(self) -> dict[str, Any]:
        """The parts and their total, for JSON."""
        return self.by_name() | {"total": self.total}


PARTS = tuple(part.name for part in fields(Parts))
"""What the money pays for, in the order of tables and charts."""


@dataclass(frozen=True)
class TokenCost(Parts):
    """Money per million tokens at the utilisation of the box, and at full utilisation.

    Attributes:
        utilisation: the part of the time in which the box worked, as the sums use it: above 0, at most 1.
        at_full_utilisation: the same work on a box that never waits: no second of waiting is paid.
    """

    utilisation: float
    at_full_utilisation: Parts

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        full = self.at_full_utilisation.to_dict()
        return super().to_dict() | {"utilisation": self.utilisation, "at_full_utilisation": full}


@dataclass(frozen=True)
class Work:
    """Work that is to be priced.

    Attributes:
        tokens: computed tokens: of prompts those that were not cached, and of answers.
        joules: energy measured during the work.
        busy_s: seconds of the box that the work took. Requests at the same time share them: each counts with
            its part, so that the parts of all sum to the seconds in which the box was busy.
        utilisation: as measured, above 0, at most 1: busy seconds of all work / seconds of the range.
        idle_joules: this work's share of the energy of waiting; 0 where that energy is not shared out.
    """

    tokens: float
    joules: float
    busy_s: float
    utilisation: float = 1.0
    idle_joules: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.utilisation <= 1:
            raise ValueError(f"utilisation is {self.utilisation!r}, not above 0 and at most 1")

    @property
    def idle_s(self) -> float:
        """The work's share of the seconds of waiting: busy_s x (1 / utilisation - 1)."""
        return self.busy_s * (1 / self.utilisation - 1)

    @property
    def idle_watts(self) -> float:
        """idle_joules / idle_s; 0 where the box never waited."""
        return self.idle_joules / self.idle_s if self.idle_s else 0.0

    def at(self, utilisation: float | None) -> Work:
        """The same work at another utilisation, with the same watts of waiting; None: as measured."""
        if utilisation is None:
            return self
        moved = replace(self, utilisation=utilisation)
        return replace(moved, idle_joules=self.idle_watts * moved.idle_s)


def work_of(usage: Usage) -> Work:
    """The work of a request that had the box for itself; nothing of waiting is part of it."""
    return Work(usage.computed_tokens, usage.joules, usage.work_s)


def electricity_of(joules: float, prices: Prices) -> float:
    """Money for energy: joules / 3,600,000 x price of a kWh."""
    return joules / JOULES_PER_KWH * prices.electricity_per_kwh


def money_of(work: Work, prices: Prices) -> Parts:
    """Money for some work at `prices.utilisation`, or at the measured one where that is None.

    The box is paid for every second, also those in which it waits, so each second of work is charged with
    1 / utilisation seconds of the box.

        electricity = (joules + idle joules) / 3,600,000 x price of a kWh
        hardware = (price - residual) / months of life x busy_s / utilisation / 2,628,000
        other = other costs a month x busy_s / utilisation / 2,628,000
    """
    work = work.at(prices.utilisation)
    paid_months = work.busy_s / work.utilisation / MONTH_S
    return Parts(
        electricity_of(work.joules + work.idle_joules, prices),
        prices.hardware_per_month * paid_months,
        prices.other_per_month * paid_months,
    )


def cost_of(work: Work, prices: Prices) -> TokenCost | None:
    """Money per million tokens, as the box was used and at full utilisation; None without computed tokens.

    Each part is that of `money_of` / tokens x 1,000,000. At full utilisation no joule of waiting is paid.
    """
    if not work.tokens:
        return None
    scale = MILLION / work.tokens
    paid = money_of(work, prices).scaled(scale)
    full = money_of(work, replace(prices, utilisation=1.0)).scaled(scale)
    return TokenCost(
        **paid.by_name(), utilisation=prices.utilisation or work.utilisation, at_full_utilisation=full
    )


def api_cost(prompt_tokens: float, cached_tokens: float, completion_tokens: float, price: ApiPrice) -> float:
    """Money for the same work at an API; `cached_tokens` are part of `prompt_tokens`.

    ((prompt - cached) x input price + cached x cached price + completion x output price) / 1,000,000
    """
    computed = (prompt_tokens - cached_tokens) * price.input_per_million
    cached = cached_tokens * price.cached_per_million
    return (computed + cached + completion_tokens * price.output_per_million) / MILLION


@dataclass(frozen=True)
class BreakEven:
    """When owning pays off against an API; None stands for never.

    Attributes:
        months: time until the money saved each month has paid for the hardware.
        tokens_per_day: computed tokens a day, in the same mix, from which owning is cheaper over the
            hardware's life.
        capacity_per_day: tokens that the box computes in a day without a pause, at its measured speed.
        within_life: whether `months` end before the hardware's life does.
        reachable: whether the box can compute `tokens_per_day`.
    """

    months: float | None
    tokens_per_day: float | None
    capacity_per_day: float
    within_life: bool
    reachable: bool


def break_even(work: Work, api_money: float, prices: Prices) -> BreakEven | None:
    """When owning pays off against an API; None without the hardware's price, or where nothing was computed.

    In a month the box does MONTH_S x utilisation / busy_s times this work.

        months = (price - residual) / (the API's money - electricity - other costs, each a month)
        tokens a day = money that a day costs at any use / money that each token saves
        capacity = tokens / busy_s x 86,400

    A day costs (hardware + other, each a month) / MONTH_S x 86,400 and, where waiting is shared out, the
    watts of waiting all day. A token saves the API's money less the price of its joules above those of
    waiting.

    Args:
        api_money: price of this work at an API, from `api_cost`.
    """
    if prices.hardware_price is None or not work.tokens or not work.busy_s:
        return None
    work = work.at(prices.utilisation)
    months = payback_months(api_money * _times_a_month(work) - running_per_month(work, prices), prices)
    tokens_per_day = _tokens_per_day(work, api_money, prices)
    capacity = work.tokens / work.busy_s * DAY_S
    return BreakEven(
        months,
        tokens_per_day,
        capacity,
        within_life=months is not None and months <= prices.life_months,
        reachable=tokens_per_day is not None and tokens_per_day <= capacity,
    )


def running_per_month(work: Work, prices: Prices) -> float:
    """Money a month for all but the hardware: electricity at the pace of `work`, and other costs.

    (joules + idle joules) x (MONTH_S x utilisation / busy_s) / 3,600,000 x price of a kWh + other costs;
    busy_s must be above 0.
    """
    work = work.at(prices.utilisation)
    electricity = electricity_of(work.joules + work.idle_joules, prices) * _times_a_month(work)
    return electricity + prices.other_per_month


def owning_per_month(work: Work, prices: Prices) -> float:
    """Money a month for hardware, electricity at the pace of `work`, and other costs."""
    return prices.hardware_per_month + running_per_month(work, prices)


def payback_months(saved_per_month: float, prices: Prices) -> float | None:
    """(price - residual) / saved a month; None: never, since nothing is saved.

    Args:
        saved_per_month: the price of the alternative less `running_per_month`.
    """
    if saved_per_month <= 0:
        return None
    return ((prices.hardware_price or 0.0) - prices.residual) / saved_per_month


def developers_to_win(owning: float, subscription: float) -> int:
    """The smallest number of developers whose subscriptions cost more than owning, both a month.

    floor(owning / subscription) + 1. Whether the box is fast enough for them is not part of it.
    """
    return math.floor(owning / subscription) + 1


def _times_a_month(work: Work) -> float:
    return MONTH_S * work.utilisation / work.busy_s


def _tokens_per_day(work: Work, api_money: float, prices: Prices) -> float | None:
    waiting_per_s = electricity_of(work.idle_watts, prices)
    fixed = (prices.hardware_per_month + prices.other_per_month) / MONTH_S * DAY_S + waiting_per_s * DAY_S
    drawn = electricity_of(work.joules, prices) - waiting_per_s * work.busy_s
    saved_per_token = (api_money - drawn) / work.tokens
    return fixed / saved_per_token if saved_per_token > 0 else None

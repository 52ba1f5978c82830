"""The sums: what tokens cost on one's own box, the same work at an API's prices, and when owning pays.

Pure functions. Money is in the currency of `Prices`; a month has 730 hours, a day 24.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moebox.cost.prices.api_prices import ApiPrice
from moebox.cost.prices.box_prices import JOULES_PER_KWH, MONTH_S, Prices
from moebox.cost.usage import Usage

DAY_S = 86_400
MILLION = 1e6


@dataclass(frozen=True)
class Parts:
    """Money by what it is paid for: for some work, or for a million of its tokens."""

    electricity: float
    hardware: float
    other: float

    @property
    def total(self) -> float:
        """All three."""
        return self.electricity + self.hardware + self.other


@dataclass(frozen=True)
class TokenCost(Parts):
    """Money per million tokens as the box was used, and its twin for a box that never waits.

    Attributes:
        utilisation: the part of the time in which the box worked, as used in the sums: above 0 up to 1.
        at_full_utilisation: the same work on a box that always has some: no second of waiting is paid.
    """

    utilisation: float
    at_full_utilisation: Parts


@dataclass(frozen=True)
class Work:
    """What is priced.

    Attributes:
        tokens: that were computed: prompts without what was cached, and answers.
        joules: measured meanwhile.
        busy_s: seconds of the box that the work took. Requests at the same time share them: each counts with
            its part, so that the parts of all sum to the seconds in which the box was busy.
        utilisation: as measured, above 0 up to 1: busy seconds of all work / seconds of the range.
        idle_joules: of waiting, where it is to be shared out; this work's share of them.
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
        """Seconds of waiting that this work answers for: busy_s x (1 / utilisation - 1)."""
        return self.busy_s * (1 / self.utilisation - 1)

    @property
    def idle_watts(self) -> float:
        """Joules of waiting / seconds of waiting; 0 where the box never waited."""
        return self.idle_joules / self.idle_s if self.idle_s else 0.0

    def at(self, utilisation: float | None) -> Work:
        """The same work at another utilisation, waiting at the same watts; None: as measured."""
        if utilisation is None:
            return self
        moved = replace(self, utilisation=utilisation)
        return replace(moved, idle_joules=self.idle_watts * moved.idle_s)


def work_of(usage: Usage) -> Work:
    """One request that had the box to itself, which had nothing to wait for."""
    return Work(usage.computed_tokens, usage.joules, usage.prefill_s + usage.decode_s)


def electricity_of(joules: float, prices: Prices) -> float:
    """Money: joules / 3,600,000 x price of a kWh."""
    return joules / JOULES_PER_KWH * prices.electricity_per_kwh


def money_of(work: Work, prices: Prices) -> Parts:
    """What some work cost at `prices.utilisation`, or as measured.

    The box is paid for every second, also those in which it waits: a second of work is charged with
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
    """Money per million tokens, as it was and on a box that never waits; None where no token was computed.

    Each part is that of `money_of` / tokens x 1,000,000. At full utilisation no joule of waiting counts.
    """
    if not work.tokens:
        return None
    scale = MILLION / work.tokens
    paid = money_of(work, prices)
    full = money_of(work, replace(prices, utilisation=1.0))
    return TokenCost(
        paid.electricity * scale,
        paid.hardware * scale,
        paid.other * scale,
        prices.utilisation or work.utilisation,
        Parts(full.electricity * scale, full.hardware * scale, full.other * scale),
    )


def api_cost(prompt_tokens: float, cached_tokens: float, completion_tokens: float, price: ApiPrice) -> float:
    """Money for the same work at an API; `cached_tokens` are part of `prompt_tokens`.

    ((prompt - cached) x input price + cached x cached price + completion x output price) / 1,000,000
    """
    fresh = (prompt_tokens - cached_tokens) * price.input_per_million
    cached = cached_tokens * price.cached_per_million
    return (fresh + cached + completion_tokens * price.output_per_million) / MILLION


@dataclass(frozen=True)
class BreakEven:
    """When owning pays; None stands for never.

    Attributes:
        months: until what is saved each month has paid for the hardware.
        tokens_per_day: computed tokens from which owning is cheaper over the hardware's life, same mix.
        capacity_per_day: tokens that the box computes in a day without a pause, at the speed it had.
        within_life: `months` end before the hardware's life does.
        reachable: the box can compute `tokens_per_day`.
    """

    months: float | None
    tokens_per_day: float | None
    capacity_per_day: float
    within_life: bool
    reachable: bool


def break_even(work: Work, api_money: float, prices: Prices) -> BreakEven | None:
    """When owning pays against an API; None where no hardware's price is known or nothing was computed.

    In a month the box does MONTH_S x utilisation / busy_s times this work.

        months = (price - residual) / (API's money - electricity - other, each a month)
        tokens a day = money that a day costs whatever is done / money that each token saves
        capacity = tokens / busy_s x 86,400

    A day costs (hardware + other, each a month) / MONTH_S x 86,400, and the watts of waiting all day where
    they are shared out; a token saves the API's money less its joules above those of waiting.

    Args:
        api_money: what an API takes for this work, of `api_cost`.
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
    """What owning costs a month beside the hardware: electricity at the pace of `work`, and other costs.

    joules of `work` x (MONTH_S x utilisation / busy_s) / 3,600,000 x price of a kWh + other costs; busy_s is
    above 0.
    """
    work = work.at(prices.utilisation)
    electricity = electricity_of(work.joules + work.idle_joules, prices) * _times_a_month(work)
    return electricity + prices.other_per_month


def owning_per_month(work: Work, prices: Prices) -> float:
    """Hardware, electricity at the pace of `work`, and other costs."""
    return prices.hardware_per_month + running_per_month(work, prices)


def payback_months(saved_per_month: float, prices: Prices) -> float | None:
    """(price - residual) / saved a month; None: never, since nothing is saved.

    Args:
        saved_per_month: what the others would cost less what owning costs beside the hardware.
    """
    if saved_per_month <= 0:
        return None
    return ((prices.hardware_price or 0.0) - prices.residual) / saved_per_month


def developers_to_win(owning: float, subscription: float) -> int:
    """The smallest number of developers whose subscriptions cost more than owning, both a month.

    floor(owning / subscription) + 1. Whether the box is fast enough for them is another question.
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

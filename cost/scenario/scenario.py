"""The cost of a box on paper, without a ledger: at chosen speeds, beside hosted models and subscriptions.

tokens a month = tok/s x 2,628,000 x utilisation
electricity a month = watts / 1000 x 730 h x price of a kWh, since the box stays on
owning a month = (price - residual) / months of life + electricity + other costs
price of 1M tokens = owning a month / tokens a month x 1,000,000
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from moebox.cost.economics import (
    MILLION,
    TokenCost,
    Work,
    api_cost,
    cost_of,
    developers_to_win,
    owning_per_month,
    payback_months,
    running_per_month,
)
from moebox.cost.prices.api_prices import ApiPrice
from moebox.cost.prices.box_prices import MONTH_S, Prices, near
from moebox.errors import PricesError


@dataclass(frozen=True)
class Scenario:
    """A box on paper.

    Attributes:
        name: as the command takes it.
        title: for readers.
        prices: of electricity and the box; the table by speed uses their utilisation.
        watts: power of the whole box, at work or waiting.
        subscription: price a month for one developer.
        hosted: list prices to compare with; the first one is of the model that the box runs.
        speeds: tokens of answers per second, of all streams together: a row of the table each.
        developers: numbers of developers who share the box: a row of the table each.
        prompt_per_answer: tokens of prompts for each token of an answer, where both are priced.
        office_hours: hours a month in which the box works, where it works in office hours only.
    """

    name: str
    title: str
    prices: Prices
    watts: float
    subscription: float
    hosted: tuple[ApiPrice, ...]
    speeds: tuple[float, ...]
    developers: tuple[int, ...]
    prompt_per_answer: float
    office_hours: float


def _listed(name: str, provider: str, input_per_million: float, output_per_million: float) -> ApiPrice:
    # No token of the scenario is cached, so any price of cached tokens will do.
    return ApiPrice(
        name,
        provider,
        input_per_million,
        output_per_million,
        cached_per_million=input_per_million,
        dated="2026-11-10",
        origin="scenario kimi-k2-h100",
    )


KIMI_K2_H100 = Scenario(
    name="kimi-k2-h100",
    title="Kimi K2 on a box with one H100",
    prices=Prices(electricity_per_kwh=0.176, hardware_price=25_000.0, life_months=36.0, utilisation=1.0),
    watts=700.0,
    subscription=200.0,
    hosted=(
        _listed("Kimi K2 Thinking", "Moonshot AI", 0.60, 2.50),
        _listed("GPT-5", "OpenAI", 1.25, 10.0),
        _listed("Claude Sonnet 4.5", "Anthropic", 3.0, 15.0),
        _listed("Grok 4", "xAI", 3.0, 15.0),
    ),
    speeds=(10, 15, 20, 25, 50, 100, 1000),
    developers=tuple(range(1, 11)),
    prompt_per_answer=3.0,
    office_hours=176.0,
)
SCENARIOS = {scenario.name: scenario for scenario in (KIMI_K2_H100,)}


@dataclass(frozen=True)
class SpeedRow:
    """The cost of tokens at one speed.

    Attributes:
        tokens_per_s: of all streams together.
        tokens_per_month: at the scenario's utilisation.
        cost: money per million tokens.
        in_office_hours: the same where the box works in office hours only and stays on all day.
        cheaper_than: hosted models whose tokens of answers cost more than `cost`.
        running_cheaper_than: the same without the hardware in `cost`.
    """

    tokens_per_s: float
    tokens_per_month: float
    cost: TokenCost
    in_office_hours: TokenCost
    cheaper_than: tuple[str, ...]
    running_cheaper_than: tuple[str, ...]


@dataclass(frozen=True)
class HostedRow:
    """A hosted model compared with the box.

    Attributes:
        price: list prices.
        blended_per_million: price of a million tokens, with `prompt_per_answer` of prompts for one of an
            answer.
        times_as_dear: `blended_per_million` / that of the first hosted model.
        wins_from: tok/s from which owning is cheaper, where only tokens of answers are priced.
        wins_from_with_prompts: the same where the API is paid for the prompts too, while they take no time
            of the box: the best case for owning.
        wins_from_once_paid: as `wins_from`, without the price of the hardware.
    """

    price: ApiPrice
    blended_per_million: float
    times_as_dear: float
    wins_from: float
    wins_from_with_prompts: float
    wins_from_once_paid: float


@dataclass(frozen=True)
class DevelopersRow:
    """A number of developers on one box compared with their subscriptions; money a month.

    Attributes:
        developers: their number.
        subscriptions: price of all subscriptions.
        owning: money for hardware, electricity and other costs.
        saved: `subscriptions` less the money for electricity and other costs.
        payback_months: months until `saved` has paid for the hardware; None: never.
        wins: whether that is within the hardware's life.
    """

    developers: int
    subscriptions: float
    owning: float
    saved: float
    payback_months: float | None
    wins: bool


@dataclass(frozen=True)
class ScenarioReport:
    """A scenario and its results; money a month where nothing else is said.

    Attributes:
        scenario: with the prices that were used.
        electricity, hardware, owning: money for the box; `owning` is the total, with other costs.
        electricity_per_year, subscription_per_year: money for twelve months; one developer's subscription.
        by_speed, hosted, by_developers: rows of the tables.
        developers_to_win: the smallest number whose subscriptions cost more than owning.
    """

    scenario: Scenario
    electricity: float
    hardware: float
    owning: float
    electricity_per_year: float
    subscription_per_year: float
    by_speed: tuple[SpeedRow, ...]
    hosted: tuple[HostedRow, ...]
    by_developers: tuple[DevelopersRow, ...]
    developers_to_win: int

    @property
    def currency(self) -> str:
        """The code of the currency of all money."""
        return self.scenario.prices.currency

    def to_dict(self) -> dict[str, Any]:
        """All fields, and the totals of the costs, for JSON."""
        costs = [
            {"cost": row.cost.to_dict(), "in_office_hours": row.in_office_hours.to_dict()}
            for row in self.by_speed
        ]
        found = asdict(self)
        found["by_speed"] = [row | cost for row, cost in zip(found["by_speed"], costs, strict=True)]
        return found


def find_scenario(name: str, subscription: float | None = None, **overrides: object) -> Scenario:
    """The scenario of that name, with the prices in `overrides` that are not None.

    Args:
        subscription: price a month for one developer; None: the scenario's.

    Raises:
        PricesError: there is no scenario of that name, or a price is bad.
    """
    if name not in SCENARIOS:
        raise PricesError(f"no scenario named {name!r}", near(name, list(SCENARIOS)))
    scenario = SCENARIOS[name]
    given: dict[str, Any] = {key: value for key, value in overrides.items() if value is not None}
    if subscription is not None and subscription <= 0:
        raise PricesError(f"subscription = {subscription:g}", "give what a developer pays a month, above 0")
    return replace(
        scenario,
        prices=replace(scenario.prices, **given),
        subscription=scenario.subscription if subscription is None else subscription,
    )


def run_scenario(scenario: Scenario) -> ScenarioReport:
    """Compute all tables of `scenario`."""
    month, prices = _month(scenario, 1.0), scenario.prices
    electricity = running_per_month(month, prices) - prices.other_per_month
    owning = owning_per_month(month, prices)
    return ScenarioReport(
        scenario,
        electricity,
        prices.hardware_per_month,
        owning,
        12 * electricity,
        12 * scenario.subscription,
        tuple(_speed_row(scenario, speed) for speed in scenario.speeds),
        tuple(_hosted_row(scenario, price, owning) for price in scenario.hosted),
        tuple(_developers_row(scenario, number, owning) for number in scenario.developers),
        developers_to_win(owning, scenario.subscription),
    )


def _month(scenario: Scenario, tokens_per_s: float) -> Work:
    """A month's work of a box that draws the same watts at work and while it waits."""
    utilisation = scenario.prices.utilisation or 1.0
    busy_s = MONTH_S * utilisation
    waiting = scenario.watts * (MONTH_S - busy_s)
    return Work(tokens_per_s * busy_s, scenario.watts * busy_s, busy_s, utilisation, waiting)


def _office(scenario: Scenario) -> Scenario:
    utilisation = scenario.office_hours * 3600 / MONTH_S
    return replace(scenario, prices=replace(scenario.prices, utilisation=utilisation))


def _speed_row(scenario: Scenario, tokens_per_s: float) -> SpeedRow:
    work = _month(scenario, tokens_per_s)
    cost = _cost(scenario, tokens_per_s)
    return SpeedRow(
        tokens_per_s,
        work.tokens,
        cost,
        _cost(_office(scenario), tokens_per_s),
        _dearer(scenario.hosted, cost.total),
        _dearer(scenario.hosted, cost.electricity + cost.other),
    )


def _cost(scenario: Scenario, tokens_per_s: float) -> TokenCost:
    cost = cost_of(_month(scenario, tokens_per_s), scenario.prices)
    if cost is None:
        raise ValueError(f"a speed of {tokens_per_s} tok/s")
    return cost


def _dearer(hosted: Sequence[ApiPrice], per_million: float) -> tuple[str, ...]:
    return tuple(price.name for price in hosted if price.output_per_million > per_million)


def _hosted_row(scenario: Scenario, price: ApiPrice, owning: float) -> HostedRow:
    prompt, running = scenario.prompt_per_answer, owning - scenario.prices.hardware_per_month
    blended = _blended(price, prompt)
    with_prompts = api_cost(prompt * MILLION, 0, MILLION, price)
    return HostedRow(
        price,
        blended,
        blended / _blended(scenario.hosted[0], prompt),
        _wins_from(scenario, owning, price.output_per_million),
        _wins_from(scenario, owning, with_prompts),
        _wins_from(scenario, running, price.output_per_million),
    )


def _blended(price: ApiPrice, prompt_per_answer: float) -> float:
    answers = MILLION / (prompt_per_answer + 1)
    return api_cost(answers * prompt_per_answer, 0, answers, price)


def _wins_from(scenario: Scenario, per_month: float, per_million: float) -> float:
    """tok/s at which a month's tokens cost `per_month` at the API.

    per_month / per_million x 1,000,000 / busy seconds of a month
    """
    busy_s = MONTH_S * (scenario.prices.utilisation or 1.0)
    return per_month / per_million * MILLION / busy_s


def _developers_row(scenario: Scenario, developers: int, owning: float) -> DevelopersRow:
    subscriptions = developers * scenario.subscription
    saved = subscriptions - (owning - scenario.prices.hardware_per_month)
    months = payback_months(saved, scenario.prices)
    wins = months is not None and months <= scenario.prices.life_months
    return DevelopersRow(developers, subscriptions, owning, saved, months, wins)

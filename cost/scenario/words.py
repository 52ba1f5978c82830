"""What a scenario says in words and in tables, on the terminal and on the page."""

from __future__ import annotations

from typing import NamedTuple

from moebox.cost import figures
from moebox.cost.scenario.scenario import DevelopersRow, HostedRow, ScenarioReport, SpeedRow
from moebox.cost.words import Sentence, kwh_price, money, payback

STREAM_TOKENS_PER_S = 25
"""The speed that one stream reaches on such a box at most."""

SPEED_HEADS = (
    *("tok/s", "tokens a month", "hardware", "electricity", "1M tokens", "in office hours"),
    "cheaper than",
)
"""Headings of `speed_cells`."""


class Fact(NamedTuple):
    """A figure of the scenario, with a note on its origin."""

    name: str
    figure: str
    note: str


def scenario_headline(report: ScenarioReport) -> Sentence:
    """The cost of a million tokens at the lowest and the highest speed of a stream, and the hosted price."""
    slow = report.by_speed[0]
    quick = max(
        (row for row in report.by_speed if row.tokens_per_s <= STREAM_TOKENS_PER_S),
        key=lambda row: row.tokens_per_s,
    )
    same = report.hosted[0].price
    return [
        (f"At {slow.tokens_per_s:g} tok/s a million tokens cost ", False),
        (money(report, slow.cost.total), True),
        (f", at {quick.tokens_per_s:g} tok/s ", False),
        (money(report, quick.cost.total), True),
        (f"; {same.name} is sold at {money(report, same.output_per_million)}.", False),
    ]


def scenario_verdict(report: ScenarioReport) -> str:
    """The speeds, and the number of developers, from which owning is cheaper."""
    by_speed: dict[str, list[str]] = {}
    for row in sorted(report.hosted, key=lambda row: row.wins_from):
        by_speed.setdefault(tokens_per_s(row.wins_from), []).append(row.price.name)
    speeds = ", ".join(f"{' and '.join(names)} from {speed}" for speed, names in by_speed.items())
    return (
        f"With answers all day and night, owning is cheaper than {speeds} on, all streams together. "
        f"Subscriptions of {money(report, report.scenario.subscription)} a month cost more than the box from "
        f"{report.developers_to_win} developers on, if it is fast enough for them."
    )


def scenario_facts(report: ScenarioReport) -> list[Fact]:
    """The costs of a month and a year."""
    scenario, prices = report.scenario, report.scenario.prices
    life = f"{money(report, prices.hardware_price or 0.0)} over {figures.months(prices.life_months)}"
    power = f"{scenario.watts / 1000:g} kW at {kwh_price(prices)}"
    together = "both, and other costs" if prices.other_per_month else "both"
    yearly = f"a developer; electricity {money(report, report.electricity_per_year)}"
    return [
        Fact("Hardware a month", money(report, report.hardware), life),
        Fact("Electricity a month", money(report, report.electricity), power),
        Fact("Owning a month", money(report, report.owning), together),
        Fact("Subscription a year", money(report, report.subscription_per_year), yearly),
    ]


def scenario_notes(report: ScenarioReport) -> list[str]:
    """What the sums leave out, and which of them favour owning."""
    scenario = report.scenario
    office = figures.rate(scenario.office_hours)
    once = ", ".join(f"{row.price.name} {tokens_per_s(row.wins_from_once_paid)}" for row in report.hosted)
    return [
        "Prompts are left out: they take the box time, and hosted models ask less for them; "
        f"“with prompts” counts {scenario.prompt_per_answer:g} tokens of prompt for one of an answer as free "
        "of time: the best case for owning.",
        f"Busy in {office} office hours a month only, tokens cost what that column says.",
        f"Once the hardware is paid for, owning wins from: {once}.",
    ]


def tokens_per_s(value: float) -> str:
    """`119 tok/s`."""
    return f"{figures.rate(value)} tok/s"


def speed_cells(report: ScenarioReport, row: SpeedRow) -> list[str]:
    """A row of the table by speed: counts, money per million tokens, and the models that cost more."""
    amounts = (row.cost.hardware, row.cost.electricity, row.cost.total, row.in_office_hours.total)
    return [
        figures.count(row.tokens_per_s),
        figures.count(row.tokens_per_month),
        *(money(report, value) for value in amounts),
        ", ".join(row.cheaper_than) or "none",
    ]


def hosted_cells(report: ScenarioReport, row: HostedRow) -> list[str]:
    """A row of the table of hosted models: name, list prices, ratio, and speeds from which owning wins."""
    amounts = (row.price.input_per_million, row.price.output_per_million, row.blended_per_million)
    speeds = (row.wins_from, row.wins_from_with_prompts, row.wins_from_once_paid)
    return [
        row.price.name,
        *(money(report, value) for value in amounts),
        figures.times(row.times_as_dear),
        *(tokens_per_s(value) for value in speeds),
    ]


def developers_cells(report: ScenarioReport, row: DevelopersRow) -> list[str]:
    """A row of the table of developers: their number, money a month, and when the hardware is paid off."""
    amounts = (row.subscriptions, row.owning, row.saved)
    return [str(row.developers), *(money(report, value) for value in amounts), payback(row.payback_months)]

"""What a scenario says in words, on the terminal and on the page."""

from __future__ import annotations

from moebox.cost import figures
from moebox.cost.scenario.scenario import DevelopersRow, ScenarioReport, SpeedRow


def money(report: ScenarioReport, value: float) -> str:
    """`value` in the scenario's currency."""
    return figures.money(value, report.scenario.prices.currency)


def scenario_headline(report: ScenarioReport) -> list[tuple[str, bool]]:
    """What a million tokens cost at the slowest and at the quickest speed of one stream, and elsewhere."""
    slow, quick = report.by_speed[0], _within_one_stream(report)
    same = report.hosted[0].price
    return [
        (f"At {slow.tokens_per_s:g} tok/s a million tokens cost ", False),
        (money(report, slow.cost.total), True),
        (f", at {quick.tokens_per_s:g} tok/s ", False),
        (money(report, quick.cost.total), True),
        (f"; {same.name} is sold at {money(report, same.output_per_million)}.", False),
    ]


def scenario_verdict(report: ScenarioReport) -> str:
    """From which speed, and for how many developers, owning wins."""
    by_speed: dict[str, list[str]] = {}
    for row in sorted(report.hosted, key=lambda row: row.wins_from):
        by_speed.setdefault(tokens_per_s(row.wins_from), []).append(row.price.name)
    speeds = ", ".join(f"{' and '.join(names)} from {speed}" for speed, names in by_speed.items())
    return (
        f"With answers all day and night, owning is cheaper than {speeds} on, all streams together. "
        f"Subscriptions of {money(report, report.scenario.subscription)} a month cost more than the box from "
        f"{report.developers_to_win} developers on, if it is fast enough for them."
    )


def scenario_facts(report: ScenarioReport) -> list[tuple[str, str, str]]:
    """What a month and a year cost: name, figure, how it comes about."""
    scenario, prices = report.scenario, report.scenario.prices
    life = f"{money(report, prices.hardware_price or 0.0)} over {figures.months(prices.life_months)}"
    symbol = figures.money(0, prices.currency).removesuffix("0.00")
    power = f"{scenario.watts / 1000:g} kW at {symbol}{prices.electricity_per_kwh:g} a kWh"
    together = "both, and other costs" if prices.other_per_month else "both"
    yearly = f"a developer; electricity {money(report, report.electricity_per_year)}"
    return [
        ("Hardware a month", money(report, report.hardware), life),
        ("Electricity a month", money(report, report.electricity), power),
        ("Owning a month", money(report, report.owning), together),
        ("Subscription a year", money(report, report.subscription_per_year), yearly),
    ]


def tokens_per_s(value: float) -> str:
    """`119 tok/s`."""
    return f"{figures.rate(value)} tok/s"


def beaten(row: SpeedRow) -> str:
    """Whom the box beats at this speed."""
    return ", ".join(row.cheaper_than) or "none"


def payback(row: DevelopersRow) -> str:
    """When so many developers have paid for the box."""
    return "never" if row.payback_months is None else figures.months(row.payback_months)


def scenario_notes(report: ScenarioReport) -> list[str]:
    """What the sums leave out, and where they flatter."""
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


def _within_one_stream(report: ScenarioReport) -> SpeedRow:
    """The fastest speed that one stream reaches on such a box: 25 tok/s."""
    return max((row for row in report.by_speed if row.tokens_per_s <= 25), key=lambda row: row.tokens_per_s)

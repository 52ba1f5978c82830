"""A scenario as a page: tokens by speed, hosted models, developers, and the figures."""

from __future__ import annotations

from moebox.cost import figures
from moebox.cost.page.charts import Axis, Chart, Series, Spot, sampled
from moebox.cost.page.page import Bar, Block, Page, Row, Section, Table, Tile, bars_of
from moebox.cost.scenario.scenario import ScenarioReport
from moebox.cost.scenario.words import (
    beaten,
    money,
    payback,
    scenario_facts,
    scenario_headline,
    scenario_notes,
    scenario_verdict,
    tokens_per_s,
)
from moebox.version import __version__


def scenario_page(report: ScenarioReport) -> Page:
    """What stands on the page of a scenario."""
    scenario = report.scenario
    return Page(
        f"moebox cost: {scenario.title}",
        ["moebox cost", scenario.title, "on paper: no ledger was read"],
        scenario_headline(report),
        scenario_verdict(report),
        [
            *(Tile(*fact) for fact in scenario_facts(report)),
            Tile(
                "Developers to win",
                str(report.developers_to_win),
                f"at {money(report, scenario.subscription)} a month each",
            ),
        ],
        scenario_notes(report),
        [
            Section([[_curves(report)]]),
            Section([[_speeds(report)]]),
            Section([[_hosted(report)]]),
            Section([[_developers(report)]]),
        ],
        [
            f"Made by moebox {__version__}: moebox cost --scenario {scenario.name}",
            "This page has no script and loads nothing.",
        ],
    )


def _curves(report: ScenarioReport) -> Block:
    rows = report.by_speed
    speeds = [row.tokens_per_s for row in rows]
    # A month costs the same at any speed.
    scale = rows[0].cost.total * speeds[0]
    office = rows[0].in_office_hours.total * speeds[0]
    low, high = speeds[0], speeds[-1]
    listed = [row.price.output_per_million for row in report.hosted]
    chart = Chart(
        Axis(low, high, log=True),
        Axis(min(scale / high, *listed) / 1.5, office / low * 1.1, log=True),
        lambda value: f"{value:,.0f}",
        lambda value: figures.axis_money(value, report.scenario.prices.currency),
        [
            *(
                Series("api", f"{names} {money(report, price)}", [(low, price), (high, price)], "right")
                for price, names in _by_price(report).items()
            ),
            Series("office", "", sampled(lambda speed: office / speed, low, high)),
            Series("own", "", sampled(lambda speed: scale / speed, low, high)),
        ],
        [
            Spot(row.tokens_per_s, row.cost.total, money(report, row.cost.total), "now")
            for row in rows
            if row.tokens_per_s in (10, 25, 100)
        ],
    )
    keys = [
        ("own", "this box, busy all the time"),
        ("office", "busy in office hours only"),
        ("api", "tokens of answers, list price"),
    ]
    text = "What a million tokens of answers cost by the tokens a second of all streams together."
    return Block(
        "curves",
        "Speed decides",
        text,
        "by-speed",
        keys,
        chart.place(),
        "tokens a second, all streams together",
    )


def _by_price(report: ScenarioReport) -> dict[float, str]:
    """Models of one price share a line."""
    found: dict[float, str] = {}
    for row in report.hosted:
        price = row.price.output_per_million
        found[price] = f"{found[price]}, {row.price.name}" if price in found else row.price.name
    return found


def _speeds(report: ScenarioReport) -> Block:
    heads = [
        "tok/s",
        "tokens a month",
        "hardware",
        "electricity",
        "1M tokens",
        "in office hours",
        "cheaper than",
    ]
    rows = [
        Row(
            [
                figures.count(row.tokens_per_s),
                figures.count(row.tokens_per_month),
                *(
                    money(report, value)
                    for value in (row.cost.hardware, row.cost.electricity, row.cost.total)
                ),
                money(report, row.in_office_hours.total),
                beaten(row),
            ],
            tones={6: "good" if row.cheaper_than else "bad"},
        )
        for row in report.by_speed
    ]
    text = "Money per million tokens of answers; all streams together make the tokens a second."
    return Block("table", "By speed", text, table=Table("By speed", heads, rows, texts=(6,)))


def _hosted(report: ScenarioReport) -> Block:
    heads = [
        "Hosted model",
        "1M in",
        "1M out",
        "1M mixed",
        "as dear as the first",
        "owning wins from",
        "with prompts",
        "once paid for",
    ]
    rows = [
        Row(
            [
                row.price.name,
                money(report, row.price.input_per_million),
                money(report, row.price.output_per_million),
                money(report, row.blended_per_million),
                figures.times(row.times_as_dear),
                *(
                    tokens_per_s(value)
                    for value in (row.wins_from, row.wins_from_with_prompts, row.wins_from_once_paid)
                ),
            ]
        )
        for row in report.hosted
    ]
    mix = f"{report.scenario.prompt_per_answer:g} tokens of prompts for one of an answer"
    text = f"List prices per million tokens; mixed are {mix}."
    return Block("table", "Hosted models", text, table=Table("Hosted models", heads, rows))


def _developers(report: ScenarioReport) -> Block:
    """Subscriptions by the number of developers, with the box between them."""
    bars = [
        (_count(row.developers), "", row.subscriptions, "api", f"paid off after {payback(row)}")
        for row in report.by_developers
    ]
    bars.append(("This box", "hardware and electricity", report.owning, "own", ""))
    bars.sort(key=lambda bar: bar[2])
    drawn = [
        (
            Bar(name, (), money(report, value), note, detail),
            [(kind, value, f"{name}: {money(report, value)} a month")],
        )
        for name, note, value, kind, detail in bars
    ]
    keys = [("own", "owning"), ("api", "subscriptions")]
    return Block(
        "bars",
        "Developers on subscriptions",
        f"Money a month, and when what is saved has paid for a box that lasts {_life(report)}.",
        "developers",
        keys,
        bars=bars_of(drawn),
        table=_developers_table(report),
    )


def _life(report: ScenarioReport) -> str:
    return figures.months(report.scenario.prices.life_months)


def _count(developers: int) -> str:
    return "1 developer" if developers == 1 else f"{developers} developers"


def _developers_table(report: ScenarioReport) -> Table:
    rows = [
        Row(
            [
                str(row.developers),
                money(report, row.subscriptions),
                money(report, row.owning),
                money(report, row.saved),
                payback(row),
            ],
            tones={4: "good" if row.wins else "bad"},
        )
        for row in report.by_developers
    ]
    heads = ["Developers", "subscriptions", "owning", "saved beside the hardware", "paid off after"]
    return Table("Developers on subscriptions", heads, rows)

"""A scenario as a page: tokens by speed, hosted models, developers, and the figures."""

from __future__ import annotations

from moebox.cost import figures
from moebox.cost.page.charts import Axis, Chart, Series, Spot, sampled
from moebox.cost.page.page import Bar, BarPart, Block, Page, Row, Section, Table, Tile, scaled
from moebox.cost.page.price_lines import price_lines
from moebox.cost.scenario.scenario import ScenarioReport
from moebox.cost.scenario.words import (
    SPEED_HEADS,
    developers_cells,
    hosted_cells,
    scenario_facts,
    scenario_headline,
    scenario_notes,
    scenario_verdict,
    speed_cells,
)
from moebox.cost.words import axis_money, money, payback
from moebox.version import __version__

MARKED_SPEEDS = (10, 25, 100)
"""Tokens a second whose cost is written beside the curve."""


def scenario_page(report: ScenarioReport) -> Page:
    """The content of a scenario's page."""
    scenario = report.scenario
    each = f"at {money(report, scenario.subscription)} a month each"
    return Page(
        f"moebox cost: {scenario.title}",
        ["moebox cost", scenario.title, "on paper: no ledger was read"],
        scenario_headline(report),
        scenario_verdict(report),
        [
            *(Tile(*fact) for fact in scenario_facts(report)),
            Tile("Developers to win", str(report.developers_to_win), each),
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
        _chart(report).place(),
        "tokens a second, all streams together",
    )


def _chart(report: ScenarioReport) -> Chart:
    """The cost of a million tokens is the money of a month / tokens a second, times a constant."""
    rows = report.by_speed
    low, high = rows[0].tokens_per_s, rows[-1].tokens_per_s
    own, office = rows[0].cost.total * low, rows[0].in_office_hours.total * low
    models = [(row.price.name, row.price.output_per_million) for row in report.hosted]
    lowest = min(own / high, *(price for _, price in models))
    return Chart(
        Axis(low, high, log=True),
        Axis(lowest / 1.5, office / low * 1.1, log=True),
        lambda value: f"{value:,.0f}",
        axis_money(report),
        [
            *price_lines(report, models, low, high, "right"),
            Series("office", "", sampled(lambda speed: office / speed, low, high)),
            Series("own", "", sampled(lambda speed: own / speed, low, high)),
        ],
        [
            Spot(row.tokens_per_s, row.cost.total, money(report, row.cost.total), "now")
            for row in rows
            if row.tokens_per_s in MARKED_SPEEDS
        ],
    )


def _speeds(report: ScenarioReport) -> Block:
    rows = [
        Row(speed_cells(report, row), tones={6: "good" if row.cheaper_than else "bad"})
        for row in report.by_speed
    ]
    text = "Money per million tokens of answers; all streams together make the tokens a second."
    return Block("table", "By speed", text, table=Table("By speed", SPEED_HEADS, rows, texts=(6,)))


def _hosted(report: ScenarioReport) -> Block:
    heads = [
        *("Hosted model", "1M in", "1M out", "1M mixed", "as dear as the first", "owning wins from"),
        *("with prompts", "once paid for"),
    ]
    rows = [Row(hosted_cells(report, row)) for row in report.hosted]
    mix = f"{report.scenario.prompt_per_answer:g} tokens of prompts for one of an answer"
    text = f"List prices per million tokens; mixed are {mix}."
    return Block("table", "Hosted models", text, table=Table("Hosted models", heads, rows))


def _developers(report: ScenarioReport) -> Block:
    """Subscriptions by the number of developers, and the box, the cheapest first."""
    rows = [
        (
            _count(row.developers),
            "",
            row.subscriptions,
            "api",
            f"paid off after {payback(row.payback_months)}",
        )
        for row in report.by_developers
    ]
    rows.append(("This box", "hardware and electricity", report.owning, "own", ""))
    rows.sort(key=lambda row: row[2])
    bars = [
        Bar(
            name,
            [BarPart(kind, value, f"{name}: {money(report, value)} a month")],
            money(report, value),
            note,
            detail,
        )
        for name, note, value, kind, detail in rows
    ]
    life = figures.months(report.scenario.prices.life_months)
    return Block(
        "bars",
        "Developers on subscriptions",
        f"Money a month, and when what is saved has paid for a box that lasts {life}.",
        "developers",
        [("own", "owning"), ("api", "subscriptions")],
        bars=scaled(bars),
        table=_developers_table(report),
    )


def _count(developers: int) -> str:
    return "1 developer" if developers == 1 else f"{developers} developers"


def _developers_table(report: ScenarioReport) -> Table:
    rows = [
        Row(developers_cells(report, row), tones={4: "good" if row.wins else "bad"})
        for row in report.by_developers
    ]
    heads = ["Developers", "subscriptions", "owning", "saved beside the hardware", "paid off after"]
    return Table("Developers on subscriptions", heads, rows)

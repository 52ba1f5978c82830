"""A scenario for the terminal, and as rows for a spreadsheet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from moebox.cost import figures
from moebox.cost.report.text import TABLE_WIDTH, line, table_of
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

if TYPE_CHECKING:
    from rich.console import Console


def render_scenario(report: ScenarioReport, console: Console) -> None:
    """Print all of `report`."""
    console.width = max(console.width, TABLE_WIDTH)
    line(console, f"{report.scenario.title}, on paper", "dim")
    line(console, "".join(text for text, _ in scenario_headline(report)), "bold")
    line(console, scenario_verdict(report))
    for name, figure, note in scenario_facts(report):
        line(console, f"  {name}: {figure} ({note})", "dim")
    line(console, "a million tokens of answers by speed, all streams together", "bold")
    console.print(_speeds(report))
    line(console, "hosted models, list prices per million tokens", "bold")
    console.print(_hosted(report))
    line(console, f"subscriptions of {money(report, report.scenario.subscription)} a month", "bold")
    console.print(_developers(report))
    for note in scenario_notes(report):
        line(console, note, "dim")


def scenario_rows(report: ScenarioReport) -> list[list[object]]:
    """By speed: a heading and a row for each, money per million tokens."""
    names = ["tokens_per_s", "tokens_per_month"]
    parts = ["electricity", "hardware", "other", "total"]
    heading: list[object] = [*names, *(f"{part}_per_million" for part in parts)]
    heading += ["total_per_million_in_office_hours", "cheaper_than"]
    rows: list[list[object]] = [
        [
            *(getattr(row, name) for name in names),
            *(getattr(row.cost, part) for part in parts),
            row.in_office_hours.total,
            "; ".join(row.cheaper_than),
        ]
        for row in report.by_speed
    ]
    return [heading, *rows]


def _speeds(report: ScenarioReport) -> Table:
    names = (
        "tok/s",
        "tokens a month",
        "hardware",
        "electricity",
        "1M tokens",
        "in office hours",
        "cheaper than",
    )
    table = table_of(*names, texts=(6,))
    for row in report.by_speed:
        amounts = (row.cost.hardware, row.cost.electricity, row.cost.total, row.in_office_hours.total)
        counts = (figures.count(row.tokens_per_s), figures.count(row.tokens_per_month))
        table.add_row(*counts, *(money(report, value) for value in amounts), beaten(row))
    return table


def _hosted(report: ScenarioReport) -> Table:
    names = ("in", "out", "mixed", "as dear", "owning wins from", "with prompts", "once paid for")
    table = table_of("", *names)
    for row in report.hosted:
        price = row.price
        amounts = (price.input_per_million, price.output_per_million, row.blended_per_million)
        speeds = (row.wins_from, row.wins_from_with_prompts, row.wins_from_once_paid)
        table.add_row(
            price.name,
            *(money(report, value) for value in amounts),
            figures.times(row.times_as_dear),
            *(tokens_per_s(value) for value in speeds),
        )
    return table


def _developers(report: ScenarioReport) -> Table:
    table = table_of(
        "developers", "a month", "owning", "saved beside the hardware", "paid off after", texts=()
    )
    for row in report.by_developers:
        amounts = (row.subscriptions, row.owning, row.saved)
        table.add_row(str(row.developers), *(money(report, value) for value in amounts), payback(row))
    return table

"""A scenario for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

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
from moebox.cost.terminal import TABLE_WIDTH, print_line, table_of
from moebox.cost.words import money, plain

if TYPE_CHECKING:
    from rich.console import Console


def render_scenario(report: ScenarioReport, console: Console) -> None:
    """Print all of `report`."""
    console.width = max(console.width, TABLE_WIDTH)
    print_line(console, f"{report.scenario.title}, on paper", "dim")
    print_line(console, plain(scenario_headline(report)), "bold")
    print_line(console, scenario_verdict(report))
    for name, figure, note in scenario_facts(report):
        print_line(console, f"  {name}: {figure} ({note})", "dim")
    print_line(console, "a million tokens of answers by speed, all streams together", "bold")
    console.print(_speeds(report))
    print_line(console, "hosted models, list prices per million tokens", "bold")
    console.print(_hosted(report))
    print_line(console, f"subscriptions of {money(report, report.scenario.subscription)} a month", "bold")
    console.print(_developers(report))
    for note in scenario_notes(report):
        print_line(console, note, "dim")


def _speeds(report: ScenarioReport) -> Table:
    table = table_of(*SPEED_HEADS, texts=(6,))
    for row in report.by_speed:
        table.add_row(*speed_cells(report, row))
    return table


def _hosted(report: ScenarioReport) -> Table:
    names = ("in", "out", "mixed", "as dear", "owning wins from", "with prompts", "once paid for")
    table = table_of("", *names)
    for row in report.hosted:
        table.add_row(*hosted_cells(report, row))
    return table


def _developers(report: ScenarioReport) -> Table:
    table = table_of(
        "developers", "a month", "owning", "saved beside the hardware", "paid off after", texts=()
    )
    for row in report.by_developers:
        table.add_row(*developers_cells(report, row))
    return table

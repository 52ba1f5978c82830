"""The report for the terminal: the answer first, then parts, energy, hosted models and break-even."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box as boxes
from rich.table import Table
from rich.text import Text

from moebox.cost import figures
from moebox.cost.economics import Parts
from moebox.cost.report.report import Hosted, Line, Report
from moebox.cost.report.words import (
    EMPTY,
    METHOD_NAMES,
    PART_NAMES,
    SOURCE_NAMES,
    dates,
    developers,
    headline,
    how_to_fill,
    list_prices,
    money,
    notes,
    paid_kinds,
    verdict,
    verdict_of,
)

if TYPE_CHECKING:
    from rich.console import Console

TABLE_WIDTH = 110
"""Columns printed even where the terminal is narrower, or none: cells that are cut off say nothing."""


def render_report(report: Report, console: Console) -> None:
    """Print all of `report`."""
    if report.empty:
        line(console, f"{EMPTY} ({report.ledger})", "bold")
        line(console, how_to_fill(report))
        return
    console.width = max(console.width, TABLE_WIDTH)
    line(console, dates(report), "dim")
    line(console, "".join(text for text, _ in headline(report)), "bold")
    line(console, verdict(report))
    for note in notes(report):
        line(console, f"  {note}", "dim")
    console.print(_lines(report))
    line(console, "a million tokens", "bold")
    console.print(_parts(report))
    line(console, f"energy: {_joules(report.total)} a token", "bold")
    console.print(_energy(report))
    if report.hosted:
        line(console, "the same work at list prices", "bold")
        console.print(_hosted(report))
        line(console, list_prices(report), "dim")
    if developers(report):
        line(console, developers(report))


def line(console: Console, text: str, style: str = "") -> None:
    """Print a paragraph as it is, wrapped by the terminal."""
    console.print(Text(text, style=style), soft_wrap=True)


def table_of(*columns: str, texts: tuple[int, ...] = (0,)) -> Table:
    """A table whose columns of numbers stand right and are never cut; those in `texts` wrap."""
    table = Table(box=boxes.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(columns):
        words = number in texts
        table.add_column(name, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return table


def _lines(report: Report) -> Table:
    names = ("requests", "prompt", "cached", "answers", "tok/s", "J/token", "1M tokens", "at full", "paid")
    table = table_of(report.asked.by, *names)
    for found in report.lines:
        table.add_row(*_cells(report, found, found.key))
    table.add_row(*_cells(report, report.total, "together"), style="bold")
    return table


def _cells(report: Report, found: Line, name: str) -> list[Text | str]:
    totals, cost = found.totals, found.cost
    counts = (totals.requests, totals.prompt_tokens, totals.cached_tokens, totals.completion_tokens)
    speed = found.decode_tokens_per_s
    return [
        Text(name),  # never markup
        *(figures.count(value) for value in counts),
        "-" if speed is None else figures.rate(speed),
        _joules(found),
        "-" if cost is None else money(report, cost.total),
        "-" if cost is None else money(report, cost.at_full_utilisation.total),
        money(report, found.money),
    ]


def _joules(found: Line) -> str:
    if found.joules_per_token is None:
        return "-"
    return f"{figures.rate(found.joules_per_token)} J{' est.' if found.estimated else ''}"


def _parts(report: Report) -> Table:
    kinds, cost = paid_kinds(report), report.total.cost
    table = table_of("", *(PART_NAMES[kind] for kind in kinds), "together")
    if cost is not None:
        used = f"as it was used, busy {figures.share(cost.utilisation)}"
        rows: tuple[tuple[str, Parts], ...] = (
            (used, cost),
            ("at full utilisation", cost.at_full_utilisation),
        )
        for name, parts in rows:
            values = [getattr(parts, kind) for kind in kinds]
            table.add_row(name, *(money(report, value) for value in (*values, parts.total)))
    return table


def _energy(report: Report) -> Table:
    table = table_of("", "energy", "J/token", "", texts=(0, 3))
    totals = report.total.totals
    for part in totals.energy:
        per_token = figures.rate(part.joules / totals.computed_tokens) if totals.computed_tokens else "-"
        drawn = figures.energy(part.joules)
        table.add_row(SOURCE_NAMES[part.source], drawn, per_token, METHOD_NAMES[part.method])
    idle = report.idle
    shared = "shared out" if report.asked.share_idle else "apart"
    note = f"{figures.span(idle.seconds)} with a model loaded, {shared}: {money(report, report.idle_money)}"
    table.add_row("waiting", figures.energy(idle.joules), "", note)
    return table


def _hosted(report: Report) -> Table:
    """Without a hardware's price there is nothing that could be paid off."""
    even = ("tokens a day", "paid off after", "") if any(found.even for found in report.hosted) else ()
    table = table_of("", "1M tokens", "in all", *even, texts=(0, 5))
    for found in report.hosted:
        amounts = (money(report, found.per_million), money(report, found.money))
        table.add_row(Text(found.price.name), *amounts, *_even(found))
    return table


def _even(found: Hosted) -> tuple[str, ...]:
    if found.even is None:
        return ()
    need, months = found.even.tokens_per_day, found.even.months
    return (
        "never" if need is None else figures.count(need),
        "never" if months is None else figures.months(months),
        verdict_of(found.even),
    )

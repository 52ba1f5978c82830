"""The report for the terminal: the answer first, then parts, energy, hosted models and break-even."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from moebox.cost import figures
from moebox.cost.report.report import Hosted, Line, Report
from moebox.cost.report.words import (
    EMPTY,
    counts,
    dates,
    developers,
    headline,
    how_to_fill,
    list_prices,
    notes,
    paid_parts,
    tokens_to_win,
    verdict,
    verdict_of,
)
from moebox.cost.terminal import TABLE_WIDTH, print_line, table_of
from moebox.cost.words import METHOD_NAMES, PART_NAMES, SOURCE_NAMES, money, payback, plain, value_or

if TYPE_CHECKING:
    from rich.console import Console

MISSING = "-"


def render_report(report: Report, console: Console) -> None:
    """Print all of `report`."""
    if report.empty:
        print_line(console, f"{EMPTY} ({report.ledger})", "bold")
        print_line(console, how_to_fill(report))
        return
    console.width = max(console.width, TABLE_WIDTH)
    print_line(console, dates(report), "dim")
    print_line(console, plain(headline(report)), "bold")
    print_line(console, verdict(report))
    for note in notes(report):
        print_line(console, f"  {note}", "dim")
    console.print(_lines(report))
    print_line(console, "a million tokens", "bold")
    console.print(_parts(report))
    print_line(console, f"energy: {_joules(report.total)} a token", "bold")
    console.print(_energy(report))
    if report.hosted:
        print_line(console, "the same work at list prices", "bold")
        console.print(_hosted(report))
        print_line(console, list_prices(report), "dim")
    if developers(report):
        print_line(console, developers(report))


def _lines(report: Report) -> Table:
    names = ("requests", "prompt", "cached", "answers", "tok/s", "J/token", "1M tokens", "at full", "paid")
    table = table_of(report.options.by, *names)
    for line in report.lines:
        table.add_row(*_cells(report, line, line.key))
    table.add_row(*_cells(report, report.total, "together"), style="bold")
    return table


def _cells(report: Report, line: Line, name: str) -> list[Text | str]:
    cost = line.cost
    return [
        Text(name),  # a name of a model or a user may look like markup
        *counts(line),
        value_or(MISSING, line.decode_tokens_per_s, figures.rate),
        _joules(line),
        MISSING if cost is None else money(report, cost.total),
        MISSING if cost is None else money(report, cost.at_full_utilisation.total),
        money(report, line.money),
    ]


def _joules(line: Line) -> str:
    if line.joules_per_token is None:
        return MISSING
    return f"{figures.rate(line.joules_per_token)} J{' est.' if line.estimated else ''}"


def _parts(report: Report) -> Table:
    paid, cost = paid_parts(report), report.total.cost
    table = table_of("", *(PART_NAMES[part] for part in paid), "together")
    if cost is not None:
        used = f"as it was used, busy {figures.share(cost.utilisation)}"
        for name, parts in ((used, cost), ("at full utilisation", cost.at_full_utilisation)):
            values = [*(parts.by_name()[part] for part in paid), parts.total]
            table.add_row(name, *(money(report, value) for value in values))
    return table


def _energy(report: Report) -> Table:
    table = table_of("", "energy", "J/token", "", texts=(0, 3))
    usage = report.total.totals.usage
    for part in usage.energy:
        per_token = figures.rate(part.joules / usage.computed_tokens) if usage.computed_tokens else MISSING
        drawn = figures.energy(part.joules)
        table.add_row(SOURCE_NAMES[part.source], drawn, per_token, METHOD_NAMES[part.method])
    idle = report.idle
    shared = "shared out" if report.options.share_idle else "apart"
    note = f"{figures.span(idle.seconds)} with a model loaded, {shared}: {money(report, report.idle_money)}"
    table.add_row("waiting", figures.energy(idle.joules), "", note)
    return table


def _hosted(report: Report) -> Table:
    """Without the hardware's price the columns of break-even are left out."""
    even = ("tokens a day", "paid off after", "") if any(hosted.even for hosted in report.hosted) else ()
    table = table_of("", "1M tokens", "in all", *even, texts=(0, 5))
    for hosted in report.hosted:
        amounts = (money(report, hosted.per_million), money(report, hosted.money))
        table.add_row(Text(hosted.price.name), *amounts, *_even(hosted))
    return table


def _even(hosted: Hosted) -> tuple[str, ...]:
    if hosted.even is None:
        return ()
    return tokens_to_win(hosted.even), payback(hosted.even.months), verdict_of(hosted.even)

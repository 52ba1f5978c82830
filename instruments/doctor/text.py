"""The report of `moebox doctor` for the terminal: for each check what was seen, what it costs, what to do."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebox.console import widen
from moebox.instruments.doctor.checks.base import Check
from moebox.instruments.doctor.doctor import DoctorReport

MARKS = {
    "pass": ("ok", "green"),
    "warn": ("warn", "yellow"),
    "fail": ("FAIL", "bold red"),
    "skip": ("skip", "dim"),
}
LEAST_WIDTH = 80


def render_doctor(report: DoctorReport, console: Console) -> None:
    """Print all of `report`."""
    widen(console, LEAST_WIDTH)
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in report.checks:
        mark, style = MARKS[check.status]
        table.add_row(Text(mark, style), check.id, _findings(check))
    console.print(table)
    console.print(_summary(report))


def _findings(check: Check) -> Text:
    text = Text(f"{check.subject}: {check.seen}" if check.subject else check.seen)
    if check.status == "skip":
        text.stylize("dim")
    for name, lines in (("costs", check.costs), ("do", check.fix)):
        if lines:
            text.append(f"\n{name}: ", "bold")
            text.append(lines)
    return text


def _summary(report: DoctorReport) -> Text:
    counts = Counter(check.status for check in report.checks)
    parts = [f"{counts['pass']} passed", f"{counts['warn']} with a warning", f"{counts['fail']} failed"]
    parts.append(f"{counts['skip']} skipped")
    return Text(f"\n{', '.join(parts)}", "bold red" if report.failed else "")

"""The lines of the report as rows for a spreadsheet."""

from __future__ import annotations

from dataclasses import asdict

from moebox.cost.economics import PARTS
from moebox.cost.report.report import Line, Report
from moebox.cost.usage import SOURCES


def csv_rows(report: Report) -> list[list[object]]:
    """A heading, a row per line, and a row of the total."""
    lines = [*report.lines, report.total]
    rows = [_row(line) for line in lines]
    heading: list[object] = [report.options.by, *rows[0]]
    return [heading, *([_cell(line.key), *row.values()] for line, row in zip(lines, rows, strict=True))]


def _row(line: Line) -> dict[str, object]:
    """The numbers of `Line.to_dict`, then what it holds in groups: energy, traffic, and parts of the cost."""
    usage, cost = line.totals.usage, line.cost
    numbers = {name: value for name, value in line.to_dict().items() if name not in ("key", "per_million")}
    energy = {part.source: part for part in usage.energy}
    row = {name: value for name, value in numbers.items() if not isinstance(value, (dict, tuple))}
    for source in SOURCES:
        part = energy.get(source)
        row[f"{source}_joules"] = part.joules if part else None
        row[f"{source}_method"] = part.method if part else None
    row |= asdict(usage.traffic)
    for name in (*PARTS, "total"):
        row[f"{name}_per_million"] = None if cost is None else getattr(cost, name)
    row["total_per_million_at_full_utilisation"] = cost.at_full_utilisation.total if cost else None
    return row


def _cell(key: str) -> str:
    """`key` as text also where a spreadsheet would read it as a formula."""
    return f"'{key}" if key.startswith(("=", "+", "-", "@", "\t", "\r")) else key

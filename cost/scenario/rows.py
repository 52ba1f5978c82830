"""A scenario as rows for a spreadsheet."""

from __future__ import annotations

from moebox.cost.economics import PARTS
from moebox.cost.scenario.scenario import ScenarioReport


def scenario_rows(report: ScenarioReport) -> list[list[object]]:
    """A heading, and a row per speed, with money per million tokens."""
    names, costs = ("tokens_per_s", "tokens_per_month"), (*PARTS, "total")
    heading: list[object] = [*names, *(f"{cost}_per_million" for cost in costs)]
    heading += ["total_per_million_in_office_hours", "cheaper_than"]
    rows: list[list[object]] = [
        [
            *(getattr(row, name) for name in names),
            *(getattr(row.cost, cost) for cost in costs),
            row.in_office_hours.total,
            "; ".join(row.cheaper_than),
        ]
        for row in report.by_speed
    ]
    return [heading, *rows]

"""Blocks of the report's page over time: tokens and money by day, or by week."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from typing import NamedTuple

from moebox.cost import figures
from moebox.cost.economics import MILLION
from moebox.cost.page.charts import columns
from moebox.cost.page.page import Block
from moebox.cost.report.report import Line, Report
from moebox.cost.report.words import day_text, paid_parts, short_day
from moebox.cost.words import PART_NAMES, axis_money, money

TOKEN_NAMES = {"answers": "answers", "prompt": "prompts", "cached": "prompts, cached: not computed again"}
MAX_DAYS = 92
"""A range with more days than these is shown by week."""


class _Bucket(NamedTuple):
    """A day or a week, which the chart shows as one column."""

    label: str
    title: str
    lines: list[Line]


Values = Callable[[list[Line]], dict[str, float]]
"""The heights of a column's parts, by their kind, from the lines of its days."""


def tokens_by_day(report: Report) -> Block:
    """Tokens of answers, computed tokens of prompts, and cached ones."""

    def values(lines: list[Line]) -> dict[str, float]:
        usages = [line.totals.usage for line in lines]
        return {
            "answers": sum(usage.completion_tokens for usage in usages),
            "prompt": sum(usage.computed_prompt_tokens for usage in usages),
            "cached": sum(usage.cached_tokens for usage in usages),
        }

    def title(kind: str, tokens: float) -> str:
        return f"{tokens:,} tokens, {TOKEN_NAMES[kind]}"

    return _block(report, "Tokens", "tokens-by-day", TOKEN_NAMES, values, title, figures.count)


def money_by_day(report: Report) -> Block:
    """What the tokens cost, by part."""
    names = {part: PART_NAMES[part] for part in paid_parts(report)}

    def values(lines: list[Line]) -> dict[str, float]:
        return {part: sum(_money(line, part) for line in lines) for part in names}

    def title(part: str, value: float) -> str:
        return f"{money(report, value)} {names[part]}"

    return _block(report, "What they cost", "money-by-day", names, values, title, axis_money(report))


def _money(line: Line, part: str) -> float:
    per_million = 0.0 if line.cost is None else line.cost.by_name()[part]
    return per_million * line.totals.usage.computed_tokens / MILLION


def _block(
    report: Report,
    heading: str,
    id: str,
    names: dict[str, str],
    values: Values,
    title: Callable[[str, float], str],
    axis_text: Callable[[float], str],
) -> Block:
    """A chart with a column for each bucket, whose parts are the kinds in `names`, from the bottom up."""
    buckets = _buckets(report)
    stacks = [
        [
            (kind, float(value), f"{bucket.title}: {title(kind, value)}")
            for kind, value in values(bucket.lines).items()
            if value
        ]
        for bucket in buckets
    ]
    chart = columns([bucket.label for bucket in buckets], stacks, axis_text)
    per = "by week" if buckets[0].title.startswith("week") else "by day"
    return Block("columns", f"{heading} {per}", "", id, list(names.items()), chart)


def _buckets(report: Report) -> list[_Bucket]:
    """Every day or week from the first to the last day with requests, or from the first day asked for."""
    by_day = {date.fromisoformat(line.key): line for line in report.days}
    first, last = min(by_day), max(by_day)
    if report.options.since_s is not None:
        first = min(first, date.fromtimestamp(report.since_s))
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    if len(days) <= MAX_DAYS:
        return [_Bucket(short_day(day), f"{day:%a} {day_text(day)}", _within(by_day, day, 1)) for day in days]
    first -= timedelta(days=first.weekday())
    mondays = [first + timedelta(weeks=number) for number in range((last - first).days // 7 + 1)]
    return [
        _Bucket(short_day(monday), f"week of {day_text(monday)}", _within(by_day, monday, 7))
        for monday in mondays
    ]


def _within(by_day: dict[date, Line], first: date, n_days: int) -> list[Line]:
    return [line for day, line in by_day.items() if 0 <= (day - first).days < n_days]

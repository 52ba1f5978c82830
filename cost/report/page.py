"""The report as a page: the answer, then days, parts, hosted models, when owning pays off, the figures."""

from __future__ import annotations

from datetime import datetime

from moebox.cost import figures
from moebox.cost.economics import TokenCost
from moebox.cost.page.page import Block, Page, Section, Tile
from moebox.cost.report.breakdown import (
    MISSING,
    assumptions_block,
    energy_block,
    lines_block,
    parts_block,
    tiers_block,
)
from moebox.cost.report.comparison import break_even_blocks, hosted_bars
from moebox.cost.report.days import money_by_day, tokens_by_day
from moebox.cost.report.report import Line, Report
from moebox.cost.report.words import (
    EMPTY,
    NOTHING,
    dates,
    day_text,
    headline,
    how_to_fill,
    notes,
    verdict,
)
from moebox.cost.words import money, value_or
from moebox.version import __version__


def report_page(report: Report) -> Page:
    """The content of the page of `report`."""
    cost = report.total.cost
    if cost is None:
        return _empty_page(report)
    sections = [
        Section([[tokens_by_day(report)], [money_by_day(report)]]),
        _beside([parts_block(report, cost), energy_block(report)], hosted_bars(report, cost)),
        *(Section([[block]]) for block in break_even_blocks(report, cost)),
        Section([[lines_block(report)]]),
        _beside([assumptions_block(report)], tiers_block(report)),
    ]
    return Page(
        f"moebox cost: {dates(report)}",
        _over(report),
        headline(report),
        verdict(report),
        _tiles(report, cost),
        notes(report),
        sections,
        _footer(report),
    )


def _beside(left: list[Block], right: list[Block]) -> Section:
    return Section([left, right] if right else [left])


def _tiles(report: Report, cost: TokenCost) -> list[Tile]:
    total, usage = report.total, report.total.totals.usage
    full = money(report, cost.at_full_utilisation.total)
    answers, prompts = figures.count(usage.completion_tokens), figures.count(usage.computed_prompt_tokens)
    joules = value_or(MISSING, total.joules_per_token, lambda value: f"{figures.rate(value)} J")
    reading = total.prefill_tokens_per_s
    return [
        Tile("A million tokens", money(report, cost.total), f"{money(report, total.money)} in all"),
        Tile("At full utilisation", full, f"it was busy {figures.share(report.utilisation)}"),
        Tile("Tokens", figures.count(usage.computed_tokens), f"{answers} in answers, {prompts} in prompts"),
        Tile(
            "Requests",
            figures.count(total.totals.requests),
            f"{figures.count(usage.cached_tokens)} tokens from the cache",
        ),
        Tile("Energy per token", joules, _how_measured(total)),
        Tile(
            "Tokens a second",
            value_or(MISSING, total.decode_tokens_per_s, figures.rate),
            "in an answer" if reading is None else f"in an answer; {figures.rate(reading)} of a prompt",
        ),
    ]


def _how_measured(total: Line) -> str:
    methods = {part.method for part in total.totals.usage.energy}
    if "estimated" not in methods:
        return "as measured" if methods else "not recorded"
    return "estimated" if len(methods) == 1 else "in part estimated"


def _over(report: Report) -> list[str]:
    model, user = report.options.model, report.options.user
    chosen = [f"model {model}" if model else "", f"user {user}" if user else ""]
    return ["moebox cost", dates(report), *(text for text in chosen if text)]


def _footer(report: Report) -> list[str]:
    return [
        f"Made by moebox {__version__} on {day_text(datetime.now())} from {report.ledger}, which holds no "
        "prompts and no answers.",
        "Tokens are those that the box computed: of prompts what was not cached, and of answers. This "
        "page has no script and loads nothing.",
    ]


def _empty_page(report: Report) -> Page:
    return Page(
        "moebox cost",
        _over(report),
        [(EMPTY if report.empty else NOTHING, False)],
        how_to_fill(report),
        footer=_footer(report),
    )

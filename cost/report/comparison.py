"""Blocks of the report's page that compare the box with hosted models: prices, and when owning pays off."""

from __future__ import annotations

from dataclasses import replace

from moebox.cost import figures
from moebox.cost.economics import DAY_S, MILLION, BreakEven, TokenCost, cost_of
from moebox.cost.page.charts import Axis, Chart, Series, Spot, sampled
from moebox.cost.page.page import Bar, BarPart, Block, Row, Table, Tone, scaled
from moebox.cost.page.price_lines import price_lines
from moebox.cost.report.report import Hosted, Report
from moebox.cost.report.words import developers, list_prices, owned, tokens_to_win, verdict_of
from moebox.cost.words import axis_money, money, payback, value_or

HIGH_UTILISATION = 0.6
"""Above this utilisation the two marked points of the curve would cover each other."""


def hosted_bars(report: Report, cost: TokenCost) -> list[Block]:
    """The same work on the box and at list prices, the cheapest first; empty without hosted models."""
    if not report.hosted:
        return []
    full = cost.at_full_utilisation.total
    only = "" if owned(report) else ", without its hardware"
    rows = [
        (cost.total, "own", "This box", f"as it was used{only}", report.total.money),
        (full, "full", "This box", f"at full utilisation{only}", full * report.total.work.tokens / MILLION),
        *(
            (line.per_million, "api", line.price.name, _rates(report, line), line.money)
            for line in report.hosted
        ),
    ]
    bars = [
        Bar(
            name,
            [BarPart(kind, value, f"{name}, {note}: {money(report, value)}")],
            money(report, value),
            note,
            f"{money(report, whole)} in all",
        )
        for value, kind, name, note, whole in sorted(rows, key=lambda row: row[0])
    ]
    keys = [("own", "owning"), ("full", "owning, busy all the time"), ("api", "hosted")]
    text = (
        "The same prompts and answers, per million tokens that the box computed; how good their answers are "
        "is not part of it."
    )
    foot = list_prices(report)
    return [Block("bars", "Owning beside hosted models", text, "hosted", keys, bars=scaled(bars), foot=foot)]


def _rates(report: Report, hosted: Hosted) -> str:
    price = hosted.price
    rates = (price.input_per_million, price.cached_per_million, price.output_per_million)
    computed, cached, answer = (money(report, rate) for rate in rates)
    return f"{price.provider}: {computed} in, {cached} cached, {answer} out"


def break_even_blocks(report: Report, cost: TokenCost) -> list[Block]:
    """Curves and a table; empty without the hardware's price, or without hosted models."""
    if not any(line.even for line in report.hosted):
        return []
    text = (
        "The more tokens a day share the box, the less each costs. Owning wins where the solid line is below "
        "a dashed one."
    )
    keys = [("own", "a million tokens on this box"), ("api", "at a hosted model's list price")]
    lines = _curves(report, cost).place()
    curves = Block("curves", "When owning pays", text, "break-even", keys, lines, "computed tokens a day")
    return [curves, _table(report)]


def _curves(report: Report, cost: TokenCost) -> Chart:
    """The cost of a million tokens over the number computed a day; both axes are logarithmic."""
    work, prices = report.total.work, replace(report.options.prices, utilisation=None)
    capacity = work.tokens / work.busy_s * DAY_S
    listed = [line.per_million for line in report.hosted]

    def own(tokens_per_day: float) -> float:
        at = cost_of(work.at(min(1.0, tokens_per_day / capacity)), prices)
        return at.total if at else 0.0

    low, high = min(capacity * cost.utilisation / 3, capacity / 30), capacity * 1.15
    while own(low) < 2 * max(listed) and low > capacity / 1e5:
        low /= 2
    lowest = min(value for value in (own(capacity), *listed) if value > 0)
    # A logarithmic axis has no place for models that cost nothing.
    models = [(line.price.name, line.per_million) for line in report.hosted if line.per_million > 0]
    return Chart(
        Axis(low, high, log=True),
        Axis(lowest / 1.7, own(low), log=True),
        figures.count,
        axis_money(report),
        [*price_lines(report, models, low, high), Series("own", "", sampled(own, low, capacity))],
        _spots(report, cost, capacity),
    )


def _spots(report: Report, cost: TokenCost, capacity: float) -> list[Spot]:
    full = cost.at_full_utilisation.total
    used = Spot(capacity * cost.utilisation, cost.total, f"as used {money(report, cost.total)}", "now")
    if cost.utilisation > HIGH_UTILISATION:
        return [used]
    return [used, Spot(capacity, full, f"without a pause {money(report, full)}", "full")]


def _table(report: Report) -> Block:
    rows = [_row(report, line, line.even) for line in report.hosted if line.even]
    heads = [
        "Instead of",
        "1M tokens",
        "tokens a day",
        "of what the box can do",
        "hardware paid off after",
        "",
    ]
    life = figures.months(report.options.prices.life_months)
    text = (
        "Tokens a day from which owning is the cheaper one, and how long it takes to pay the hardware off at "
        f"the pace of this range; it lasts {life}."
    )
    table = Table("Break-even", heads, rows, texts=(5,))
    return Block("table", "Break-even", text, table=table, foot=developers(report))


def _row(report: Report, hosted: Hosted, even: BreakEven) -> Row:
    part = value_or("", even.tokens_per_day, lambda need: figures.share(need / even.capacity_per_day))
    cells = [
        hosted.price.name,
        money(report, hosted.per_million),
        tokens_to_win(even),
        part,
        payback(even.months),
        verdict_of(even),
    ]
    reachable: Tone = "good" if even.reachable else "bad"
    return Row(cells, tones={2: reachable, 3: reachable, 4: "good" if even.within_life else "bad"})

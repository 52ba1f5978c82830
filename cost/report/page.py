"""The report as a page: the answer, then days, parts, hosted models, when owning pays, the figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timedelta
from typing import NamedTuple

from moebox.cost import figures
from moebox.cost.economics import DAY_S, MILLION, BreakEven, Parts, TokenCost, cost_of
from moebox.cost.page.charts import Axis, Chart, Series, Spot, columns, sampled
from moebox.cost.page.page import Bar, Block, Page, Row, Section, Table, Tile, Tone, bars_of
from moebox.cost.prices.box_prices import MONTH_S
from moebox.cost.report.report import Hosted, Line, Report
from moebox.cost.report.words import (
    EMPTY,
    METHOD_NAMES,
    NOTHING,
    PART_NAMES,
    SOURCE_NAMES,
    dates,
    day_text,
    developers,
    headline,
    how_to_fill,
    list_prices,
    money,
    notes,
    owned,
    paid_kinds,
    short_day,
    verdict,
    verdict_of,
)
from moebox.version import __version__

TOKEN_NAMES = {"answers": "answers", "prompt": "prompts", "cached": "prompts, cached: not computed again"}
MOST_DAYS = 92
"""More days than these are shown as weeks."""
ALMOST_FULL = 0.6
"""Above this utilisation the two marked points of the curve would cover each other."""


def report_page(report: Report) -> Page:
    """What stands on the page of `report`."""
    cost = report.total.cost
    if cost is None:
        return _empty_page(report)
    sections = [
        Section([[_tokens_by_day(report)], [_money_by_day(report)]]),
        _beside([_parts(report, cost), _energy(report)], _hosted_bars(report, cost)),
        *(Section([[block]]) for block in _break_even(report, cost)),
        Section([[_lines(report)]]),
        _beside([_assumptions(report)], _places(report)),
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


class _Bucket(NamedTuple):
    """One column over time: a day, or a week."""

    label: str
    title: str
    lines: list[Line]


def _buckets(report: Report) -> list[_Bucket]:
    """Every day from the first to the last one with requests, or of the range that was asked for."""
    by_day = {date.fromisoformat(line.key): line for line in report.days}
    first, last = min(by_day), max(by_day)
    if report.asked.since_s is not None:
        first = min(first, date.fromtimestamp(report.since_s))
    days = [first + timedelta(days=number) for number in range((last - first).days + 1)]
    if len(days) <= MOST_DAYS:
        return [_Bucket(short_day(day), f"{day:%a} {day_text(day)}", _some(by_day, day)) for day in days]
    first -= timedelta(days=first.weekday())
    mondays = [first + timedelta(weeks=number) for number in range((last - first).days // 7 + 1)]
    weeks = [[line for day, line in by_day.items() if 0 <= (day - monday).days < 7] for monday in mondays]
    return [
        _Bucket(short_day(monday), f"week of {day_text(monday)}", lines)
        for monday, lines in zip(mondays, weeks, strict=True)
    ]


def _some(by_day: dict[date, Line], day: date) -> list[Line]:
    return [by_day[day]] if day in by_day else []


def _tokens_by_day(report: Report) -> Block:
    buckets = _buckets(report)
    stacks = []
    for bucket in buckets:
        values = {
            "answers": sum(line.totals.completion_tokens for line in bucket.lines),
            "prompt": sum(line.totals.prompt_tokens - line.totals.cached_tokens for line in bucket.lines),
            "cached": sum(line.totals.cached_tokens for line in bucket.lines),
        }
        stacks.append(
            [
                (kind, float(tokens), f"{bucket.title}: {tokens:,} tokens, {TOKEN_NAMES[kind]}")
                for kind, tokens in values.items()
                if tokens
            ]
        )
    chart = columns([bucket.label for bucket in buckets], stacks, figures.count)
    return Block("columns", f"Tokens {_per(buckets)}", "", "tokens-by-day", list(TOKEN_NAMES.items()), chart)


def _money_by_day(report: Report) -> Block:
    buckets = _buckets(report)
    kinds = paid_kinds(report)
    stacks = []
    for bucket in buckets:
        values = {
            kind: sum(_part(line, kind) * line.totals.computed_tokens / MILLION for line in bucket.lines)
            for kind in kinds
        }
        stacks.append(
            [
                (kind, value, f"{bucket.title}: {money(report, value)} {PART_NAMES[kind]}")
                for kind, value in values.items()
                if value
            ]
        )
    chart = columns([bucket.label for bucket in buckets], stacks, _axis_text(report))
    keys = [(kind, PART_NAMES[kind]) for kind in kinds]
    return Block("columns", f"What they cost {_per(buckets)}", "", "money-by-day", keys, chart)


def _axis_text(report: Report) -> Callable[[float], str]:
    return lambda value: figures.axis_money(value, report.asked.prices.currency)


def _per(buckets: list[_Bucket]) -> str:
    return "by week" if buckets[0].title.startswith("week") else "by day"


def _kinds(report: Report) -> list[str]:
    prices = report.asked.prices
    there = {"electricity": True, "hardware": owned(report), "other": prices.other_per_month > 0}
    return [kind for kind, shown in there.items() if shown]


def _part(line: Line, kind: str) -> float:
    return 0.0 if line.cost is None else float(getattr(line.cost, kind))


def _parts(report: Report, cost: TokenCost) -> Block:
    """A million tokens by part, as it was and without a pause."""
    kinds = paid_kinds(report)
    busy = f"busy {figures.share(cost.utilisation)} of the time"
    rows = [
        _parts_bar(report, "As it was used", busy, cost, kinds),
        _parts_bar(report, "At full utilisation", "busy all the time", cost.at_full_utilisation, kinds),
    ]
    keys = [(kind, PART_NAMES[kind]) for kind in kinds]
    text = "The box is paid for whether it works or waits, so the busier it is the less a token costs."
    return Block(
        "bars", "What a million tokens cost", text, "parts", keys, bars=bars_of(rows), foot=_a_month(report)
    )


def _a_month(report: Report) -> str:
    if not owned(report):
        return ""
    fixed = report.asked.prices.hardware_per_month + report.asked.prices.other_per_month
    a_day = money(report, fixed / MONTH_S * DAY_S)
    return f"Used or not, the box costs {money(report, fixed)} a month, {a_day} a day, and its electricity."


def _parts_bar(
    report: Report, name: str, note: str, parts: Parts, kinds: list[str]
) -> tuple[Bar, list[tuple[str, float, str]]]:
    values = {kind: float(getattr(parts, kind)) for kind in kinds}
    detail = " + ".join(money(report, value) for value in values.values()) if len(kinds) > 1 else ""
    titles = [(kind, value, f"{PART_NAMES[kind]}: {money(report, value)}") for kind, value in values.items()]
    return Bar(name, (), money(report, parts.total), note, detail), titles


def _hosted_bars(report: Report, cost: TokenCost) -> list[Block]:
    """The same work at list prices, with the box between them, the cheapest first."""
    if not report.hosted:
        return []
    full = cost.at_full_utilisation.total
    only = "" if owned(report) else ", without its hardware"
    rows = [
        (cost.total, "own", "This box", f"as it was used{only}", report.total.money),
        (full, "full", "This box", f"at full utilisation{only}", full * report.total.work.tokens / MILLION),
        *(
            (line.per_million, "api", line.price.name, _list_price(report, line), line.money)
            for line in report.hosted
        ),
    ]
    bars = [
        (
            Bar(name, (), money(report, value), note, f"{money(report, whole)} in all"),
            [(kind, value, f"{name}, {note}: {money(report, value)}")],
        )
        for value, kind, name, note, whole in sorted(rows, key=lambda row: row[0])
    ]
    keys = [("own", "owning"), ("full", "owning, busy all the time"), ("api", "hosted")]
    text = (
        "The same prompts and answers, per million tokens that the box computed; how good their answers are "
        "is not part of it."
    )
    foot = list_prices(report)
    return [Block("bars", "Owning beside hosted models", text, "hosted", keys, bars=bars_of(bars), foot=foot)]


def _list_price(report: Report, line: Hosted) -> str:
    price = line.price
    rates = (price.input_per_million, price.cached_per_million, price.output_per_million)
    fresh, cached, answer = (money(report, rate) for rate in rates)
    return f"{price.provider}: {fresh} in, {cached} cached, {answer} out"


def _break_even(report: Report, cost: TokenCost) -> list[Block]:
    """Nothing where no hardware's price is known, or nothing to compare with."""
    if not any(line.even for line in report.hosted):
        return []
    text = (
        "The more tokens a day share the box, the less each costs. Owning wins where the solid line is below "
        "a dashed one."
    )
    keys = [("own", "a million tokens on this box"), ("api", "at a hosted model's list price")]
    lines = _curves(report, cost).place()
    curves = Block("curves", "When owning pays", text, "break-even", keys, lines, "computed tokens a day")
    return [curves, _even_table(report)]


def _curves(report: Report, cost: TokenCost) -> Chart:
    """What a million tokens cost by how many are computed a day, both by the logarithm."""
    work, prices = report.total.work, replace(report.asked.prices, utilisation=None)
    capacity = work.tokens / work.busy_s * DAY_S
    listed = [line.per_million for line in report.hosted]

    def own(tokens_per_day: float) -> float:
        at = cost_of(work.at(min(1.0, tokens_per_day / capacity)), prices)
        return at.total if at else 0.0

    low, high = min(capacity * cost.utilisation / 3, capacity / 30), capacity * 1.15
    while own(low) < 2 * max(listed) and low > capacity / 1e5:
        low /= 2
    least = min(value for value in (own(capacity), *listed) if value > 0)
    series = [
        Series("api", f"{names} {money(report, value)}", [(low, value), (high, value)])
        for value, names in _by_price(report).items()
    ]
    return Chart(
        Axis(low, high, log=True),
        Axis(least / 1.7, own(low), log=True),
        figures.count,
        _axis_text(report),
        [*series, Series("own", "", sampled(own, low, capacity))],
        _spots(report, cost, capacity),
    )


def _by_price(report: Report) -> dict[float, str]:
    """Names of hosted models, one entry for those of one price; free ones have no place on such an axis."""
    found: dict[float, str] = {}
    for line in report.hosted:
        value = line.per_million
        if value > 0:
            found[value] = f"{found[value]}, {line.price.name}" if value in found else line.price.name
    return found


def _spots(report: Report, cost: TokenCost, capacity: float) -> list[Spot]:
    full = cost.at_full_utilisation.total
    used = Spot(capacity * cost.utilisation, cost.total, f"as used {money(report, cost.total)}", "now")
    if cost.utilisation > ALMOST_FULL:
        return [used]
    return [used, Spot(capacity, full, f"without a pause {money(report, full)}", "full")]


def _even_table(report: Report) -> Block:
    rows = [_even_row(report, line, line.even) for line in report.hosted if line.even]
    heads = [
        "Instead of",
        "1M tokens",
        "tokens a day",
        "of what the box can do",
        "hardware paid off after",
        "",
    ]
    life = figures.months(report.asked.prices.life_months)
    text = (
        "Tokens a day from which owning is the cheaper one, and how long it takes to pay the hardware off at "
        f"the pace of this range; it lasts {life}."
    )
    table = Table("Break-even", heads, rows, texts=(5,))
    return Block("table", "Break-even", text, table=table, foot=developers(report))


def _even_row(report: Report, line: Hosted, even: BreakEven) -> Row:
    need = even.tokens_per_day
    tokens = "never" if need is None else figures.count(need)
    part = "" if need is None else figures.share(need / even.capacity_per_day)
    months = "never" if even.months is None else figures.months(even.months)
    cells = [line.price.name, money(report, line.per_million), tokens, part, months, verdict_of(even)]
    enough: Tone = "good" if even.reachable else "bad"
    return Row(cells, tones={2: enough, 3: enough, 4: "good" if even.within_life else "bad"})


def _tiles(report: Report, cost: TokenCost) -> list[Tile]:
    total, sums = report.total, report.total.totals
    full = money(report, cost.at_full_utilisation.total)
    fresh = sums.prompt_tokens - sums.cached_tokens
    answers = f"{figures.count(sums.completion_tokens)} in answers, {figures.count(fresh)} in prompts"
    joules = "—" if total.joules_per_token is None else f"{figures.rate(total.joules_per_token)} J"
    speed = total.decode_tokens_per_s
    reading = total.prefill_tokens_per_s
    return [
        Tile("A million tokens", money(report, cost.total), f"{money(report, total.money)} in all"),
        Tile("At full utilisation", full, f"it was busy {figures.share(report.utilisation)}"),
        Tile("Tokens", figures.count(sums.computed_tokens), answers),
        Tile(
            "Requests",
            figures.count(sums.requests),
            f"{figures.count(sums.cached_tokens)} tokens from the cache",
        ),
        Tile("Energy per token", joules, _how_measured(total)),
        Tile(
            "Tokens a second",
            "—" if speed is None else figures.rate(speed),
            "in an answer" if reading is None else f"in an answer; {figures.rate(reading)} of a prompt",
        ),
    ]


def _how_measured(total: Line) -> str:
    methods = {part.method for part in total.totals.energy}
    if "estimated" not in methods:
        return "as measured" if methods else "not recorded"
    return "estimated" if len(methods) == 1 else "in part estimated"


def _lines(report: Report) -> Block:
    kinds = paid_kinds(report)
    heads = [
        {"model": "Model", "user": "User", "day": "Day"}[report.asked.by],
        *("requests", "prompt", "cached", "answers", "tok/s", "J/token"),
        *(f"{PART_NAMES[kind]}*" for kind in kinds),
        *(["1M tokens"] if len(kinds) > 1 else []),
        *("1M at full", "paid"),
    ]
    rows = [Row(_cells(report, line, line.key, kinds)) for line in report.lines]
    total = Row(_cells(report, report.total, "Together", kinds), total=True)
    by = {"model": "By model", "user": "By user", "day": "By day"}[report.asked.by]
    text = "The box is shared out by the seconds that requests took; the lines add up to the whole."
    foot = "* per million computed tokens: prompts without what was cached, and answers. tok/s: of an answer."
    return Block("table", by, text, table=Table(by, heads, [*rows, total]), foot=foot)


def _cells(report: Report, line: Line, name: str, kinds: list[str]) -> list[str]:
    totals, cost = line.totals, line.cost
    joules = "—" if line.joules_per_token is None else figures.rate(line.joules_per_token)
    speed = "—" if line.decode_tokens_per_s is None else figures.rate(line.decode_tokens_per_s)
    parts = ["—" if cost is None else money(report, getattr(cost, kind)) for kind in kinds]
    together = "—" if cost is None else money(report, cost.total)
    full = "—" if cost is None else money(report, cost.at_full_utilisation.total)
    counts = (totals.requests, totals.prompt_tokens, totals.cached_tokens, totals.completion_tokens)
    return [
        name,
        *(figures.count(value) for value in counts),
        speed,
        f"{joules}{' est.' if line.estimated else ''}",
        *parts,
        *([together] if len(kinds) > 1 else []),
        full,
        money(report, line.money),
    ]


def _energy(report: Report) -> Block:
    """Joules by source, with how each was obtained; what waiting took stands below."""
    totals, rows = report.total.totals, []
    for part in totals.energy:
        name, drawn = SOURCE_NAMES[part.source], figures.energy(part.joules)
        per_token = f"{figures.rate(part.joules / totals.computed_tokens)} J a token"
        bar = Bar(name, (), drawn, METHOD_NAMES[part.method], per_token)
        rows.append((bar, [("electricity", part.joules, f"{name}: {drawn}")]))
    if report.idle.joules:
        rows.append(_waiting(report))
    text = "What requests drew, by source, and how it was obtained." if rows else "No energy was recorded."
    return Block("bars", "Energy", text, "energy", bars=bars_of(rows))


def _waiting(report: Report) -> tuple[Bar, list[tuple[str, float, str]]]:
    idle = report.idle
    shared = "shared out over all tokens" if report.asked.share_idle else "no token is charged with it"
    note = f"{figures.span(idle.seconds)} with a model loaded; {shared}"
    drawn = figures.energy(idle.joules)
    bar = Bar("Waiting", (), drawn, note, money(report, report.idle_money))
    return bar, [("idle", idle.joules, f"waiting: {drawn}")]


def _places(report: Report) -> list[Block]:
    """Where the router's picks were found; nothing where that was not recorded."""
    traffic, tokens = report.total.totals.traffic, report.total.totals.computed_tokens
    hits = {"gpu": traffic.gpu_hits, "ram": traffic.ram_hits, "disk": traffic.disk_hits}
    moved = {
        "gpu": f"{figures.size(traffic.pcie_bytes / tokens)} a token uploaded over PCIe",
        "ram": f"{figures.size(traffic.cpu_bytes / tokens)} a token computed by the CPU",
        "disk": f"{figures.size(traffic.disk_bytes / tokens)} a token read from drives",
    }
    names = {"gpu": "On the GPU", "ram": "In memory", "disk": "On a drive"}
    found = sum(hits.values())
    rows = [
        (
            Bar(names[kind], (), figures.share(hits[kind] / found), moved[kind], figures.count(hits[kind])),
            [(kind, float(hits[kind]), f"{names[kind]}: {hits[kind]:,} picks")],
        )
        for kind in hits
        if hits[kind]
    ]
    text = "The router's picks by where they lay, and the weights that moved for a token."
    return [Block("bars", "Where experts were found", text, "places", bars=bars_of(rows))] if rows else []


def _assumptions(report: Report) -> Block:
    prices = report.asked.prices
    symbol = money(report, 0).removesuffix("0.00")
    rows = [("Electricity", f"{symbol}{prices.electricity_per_kwh:g} a kWh", "--electricity")]
    hardware = "not known: not part of the costs"
    if prices.hardware_price is not None:
        life = f"over {prices.life_months:g} months, then worth {money(report, prices.residual)}"
        hardware = f"{money(report, prices.hardware_price)} {life}"
    used = f"{figures.share(report.utilisation)} of {figures.span(report.range_s)}, as measured"
    if prices.utilisation is not None:
        used = f"{figures.share(prices.utilisation)}, as stated"
    rows += [
        ("Hardware", hardware, "--hardware-price, --life-months, --residual"),
        ("Other costs", f"{money(report, prices.other_per_month)} a month", "--other"),
        ("Utilisation", used, "--utilisation"),
    ]
    if prices.currency != "USD":
        rows.append(("A US dollar", f"{prices.per_usd:g} {prices.currency}", "per_usd in the file of prices"))
    table = Table("What the sums go by", ["", "", "set by"], [Row(row) for row in rows], texts=(1, 2))
    return Block("table", "What the sums go by", table=table)


def _over(report: Report) -> list[str]:
    asked = report.asked
    chosen = [f"model {asked.model}" if asked.model else "", f"user {asked.user}" if asked.user else ""]
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

"""Blocks of the report's page that divide its figures by part, source, tier and line, and prices."""

from __future__ import annotations

from moebox.cost import figures
from moebox.cost.economics import DAY_S, Parts, TokenCost
from moebox.cost.page.page import Bar, BarPart, Block, Row, Table, scaled
from moebox.cost.prices.box_prices import MONTH_S
from moebox.cost.report.report import Line, Report
from moebox.cost.report.words import counts, owned, paid_parts
from moebox.cost.words import METHOD_NAMES, PART_NAMES, SOURCE_NAMES, kwh_price, money, value_or

MISSING = "—"


def parts_block(report: Report, cost: TokenCost) -> Block:
    """A million tokens by part, as the box was used and at full utilisation."""
    paid = paid_parts(report)
    busy = f"busy {figures.share(cost.utilisation)} of the time"
    bars = [
        _parts_bar(report, "As it was used", busy, cost, paid),
        _parts_bar(report, "At full utilisation", "busy all the time", cost.at_full_utilisation, paid),
    ]
    keys = [(part, PART_NAMES[part]) for part in paid]
    text = "The box is paid for whether it works or waits, so the busier it is the less a token costs."
    foot = _fixed_costs(report)
    return Block("bars", "What a million tokens cost", text, "parts", keys, bars=scaled(bars), foot=foot)


def _fixed_costs(report: Report) -> str:
    if not owned(report):
        return ""
    fixed = report.options.prices.hardware_per_month + report.options.prices.other_per_month
    a_day = money(report, fixed / MONTH_S * DAY_S)
    return f"Used or not, the box costs {money(report, fixed)} a month, {a_day} a day, and its electricity."


def _parts_bar(report: Report, name: str, note: str, parts: Parts, paid: list[str]) -> Bar:
    values = {part: parts.by_name()[part] for part in paid}
    detail = " + ".join(money(report, value) for value in values.values()) if len(paid) > 1 else ""
    drawn = [
        BarPart(part, value, f"{PART_NAMES[part]}: {money(report, value)}") for part, value in values.items()
    ]
    return Bar(name, drawn, money(report, parts.total), note, detail)


def energy_block(report: Report) -> Block:
    """Joules of the requests by source, with how each was obtained, and below them the joules of waiting."""
    usage, bars = report.total.totals.usage, []
    for part in usage.energy:
        name, drawn = SOURCE_NAMES[part.source], figures.energy(part.joules)
        per_token = f"{figures.rate(part.joules / usage.computed_tokens)} J a token"
        parts = [BarPart("electricity", part.joules, f"{name}: {drawn}")]
        bars.append(Bar(name, parts, drawn, METHOD_NAMES[part.method], per_token))
    if report.idle.joules:
        bars.append(_waiting_bar(report))
    text = "What requests drew, by source, and how it was obtained." if bars else "No energy was recorded."
    return Block("bars", "Energy", text, "energy", bars=scaled(bars))


def _waiting_bar(report: Report) -> Bar:
    idle = report.idle
    shared = "shared out over all tokens" if report.options.share_idle else "no token is charged with it"
    note = f"{figures.span(idle.seconds)} with a model loaded; {shared}"
    drawn = figures.energy(idle.joules)
    parts = [BarPart("idle", idle.joules, f"waiting: {drawn}")]
    return Bar("Waiting", parts, drawn, note, money(report, report.idle_money))


def tiers_block(report: Report) -> list[Block]:
    """The tiers in which the router's picks were found; empty where that was not recorded."""
    traffic, tokens = report.total.totals.usage.traffic, report.total.totals.usage.computed_tokens
    tiers = [
        ("gpu", "On the GPU", traffic.gpu_hits, traffic.pcie_bytes, "uploaded over PCIe"),
        ("ram", "In memory", traffic.ram_hits, traffic.cpu_bytes, "computed by the CPU"),
        ("disk", "On a drive", traffic.disk_hits, traffic.disk_bytes, "read from drives"),
    ]
    bars = [
        Bar(
            name,
            [BarPart(kind, float(hits), f"{name}: {hits:,} picks")],
            figures.share(hits / traffic.hits),
            f"{figures.size(nbytes / tokens)} a token {moved}",
            figures.count(hits),
        )
        for kind, name, hits, nbytes, moved in tiers
        if hits
    ]
    text = "The router's picks by where they lay, and the weights that moved for a token."
    return [Block("bars", "Where experts were found", text, "places", bars=scaled(bars))] if bars else []


def lines_block(report: Report) -> Block:
    """A table of all lines and their total."""
    paid = paid_parts(report)
    heads = [
        {"model": "Model", "user": "User", "day": "Day"}[report.options.by],
        *("requests", "prompt", "cached", "answers", "tok/s", "J/token"),
        *(f"{PART_NAMES[part]}*" for part in paid),
        *(["1M tokens"] if len(paid) > 1 else []),
        *("1M at full", "paid"),
    ]
    rows = [Row(_cells(report, line, line.key, paid)) for line in report.lines]
    total = Row(_cells(report, report.total, "Together", paid), total=True)
    by = {"model": "By model", "user": "By user", "day": "By day"}[report.options.by]
    text = "The box is shared out by the seconds that requests took; the lines add up to the whole."
    foot = "* per million computed tokens: prompts without what was cached, and answers. tok/s: of an answer."
    return Block("table", by, text, table=Table(by, heads, [*rows, total]), foot=foot)


def _cells(report: Report, line: Line, name: str, paid: list[str]) -> list[str]:
    joules = value_or(MISSING, line.joules_per_token, figures.rate)
    return [
        name,
        *counts(line),
        value_or(MISSING, line.decode_tokens_per_s, figures.rate),
        f"{joules}{' est.' if line.estimated else ''}",
        *_cost_cells(report, line.cost, paid),
        money(report, line.money),
    ]


def _cost_cells(report: Report, cost: TokenCost | None, paid: list[str]) -> list[str]:
    """The parts, their total where there are several, and the total at full utilisation."""
    n_cells = len(paid) + (len(paid) > 1) + 1
    if cost is None:
        return [MISSING] * n_cells
    parts = [cost.by_name()[part] for part in paid]
    total = [cost.total] if len(paid) > 1 else []
    return [money(report, value) for value in (*parts, *total, cost.at_full_utilisation.total)]


def assumptions_block(report: Report) -> Block:
    """The prices that the sums use, with the options that set them."""
    prices = report.options.prices
    hardware = "not known: not part of the costs"
    if prices.hardware_price is not None:
        life = f"over {prices.life_months:g} months, then worth {money(report, prices.residual)}"
        hardware = f"{money(report, prices.hardware_price)} {life}"
    used = f"{figures.share(report.utilisation)} of {figures.span(report.range_s)}, as measured"
    if prices.utilisation is not None:
        used = f"{figures.share(prices.utilisation)}, as stated"
    rows = [
        ("Electricity", kwh_price(prices), "--electricity"),
        ("Hardware", hardware, "--hardware-price, --life-months, --residual"),
        ("Other costs", f"{money(report, prices.other_per_month)} a month", "--other"),
        ("Utilisation", used, "--utilisation"),
    ]
    if prices.currency != "USD":
        rows.append(("A US dollar", f"{prices.per_usd:g} {prices.currency}", "per_usd in the file of prices"))
    table = Table("What the sums go by", ["", "", "set by"], [Row(row) for row in rows], texts=(1, 2))
    return Block("table", "What the sums go by", table=table)

"""What the report says in words, on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime

from moebox.cost import figures
from moebox.cost.economics import DAY_S, BreakEven
from moebox.cost.report.report import Hosted, Report

PART_NAMES = {"electricity": "electricity", "hardware": "hardware", "other": "other costs"}
SOURCE_NAMES = {"gpu": "GPU", "cpu": "CPU", "dram": "memory"}
METHOD_NAMES = {"counter": "energy counter", "power": "power by time", "estimated": "estimated"}


def money(report: Report, value: float) -> str:
    """`value` in the report's currency."""
    return figures.money(value, report.asked.prices.currency)


def dates(report: Report) -> str:
    """The range in words: `1-22 November 2026`."""
    first, last = (datetime.fromtimestamp(at_s) for at_s in (report.since_s, report.until_s - 1e-3))
    if first.date() == last.date():
        return f"{day_text(first)}, {first:%H:%M} to {last:%H:%M}"
    if (first.year, first.month) == (last.year, last.month):
        return f"{first.day} to {day_text(last)}"
    return (
        f"{first.day} {first:%B} to {day_text(last)}"
        if first.year == last.year
        else f"{day_text(first)} to {day_text(last)}"
    )


def headline(report: Report) -> list[tuple[str, bool]]:
    """What a token costs, and what it costs elsewhere: pieces of a sentence, each with whether it matters."""
    cost, hosted = report.total.cost, report.hosted
    if cost is None:
        return [(NOTHING, False)]
    begin = "A million tokens cost " if owned(report) else f"{_paid(report)} for a million tokens cost "
    text = [(begin, False), (money(report, cost.total), True), (" on this box", False)]
    if not hosted or not owned(report):
        return [*text, (".", False)]
    ends = (hosted[0],) if hosted[0] is hosted[-1] else (hosted[0], hosted[-1])
    named = " to ".join(f"{money(report, line.per_million)} ({line.price.name})" for line in ends)
    return [*text, (f"; the same work at list prices {named}.", False)]


def _paid(report: Report) -> str:
    """What there is to pay where no hardware's price is known."""
    return "The electricity and other costs" if report.asked.prices.other_per_month else "The electricity"


def verdict(report: Report) -> str:
    """Whether owning wins, as the box was used and without a pause."""
    cost = report.total.cost
    if cost is None:
        return ""
    busy = f"The box was busy {figures.share(report.utilisation)} of the time."
    if not owned(report):
        return f"{busy} What the hardware costs is not part of this: name its price with --hardware-price."
    full = cost.at_full_utilisation.total
    if not report.hosted:
        return f"{busy} Without a pause a million tokens would cost {money(report, full)}."
    used = _against(report.hosted, cost.total)
    return f"As it was used, owning {used}. {busy} Without a pause it {_against(report.hosted, full)}."


def _against(hosted: Sequence[Hosted], own: float) -> str:
    """Owning at `own` a million beside all hosted models."""
    beaten = sum(own < line.per_million for line in hosted)
    if beaten == len(hosted):
        return "is cheaper than all of them" if len(hosted) > 1 else "is cheaper"
    if not hosted[0].per_million:
        return "is dearer than the cheapest, which is free"
    ratio = figures.times(own / hosted[0].per_million)
    beats = f", and is cheaper than {beaten} of the {len(hosted)}" if beaten else ""
    return f"costs {ratio} what the cheapest takes{beats}"


def notes(report: Report) -> list[str]:
    """What the reader has to know to read the figures right."""
    prices = report.asked.prices
    found = [_estimates(report)] if report.total.estimated else []
    if prices.utilisation is not None:
        stated, measured = figures.share(prices.utilisation), figures.share(report.utilisation)
        found.append(f"The costs go by a stated utilisation of {stated}; measured were {measured}.")
    if report.idle.joules and not report.asked.share_idle:
        drawn = f"{figures.energy(report.idle.joules)}, {money(report, report.idle_money)} of electricity"
        found.append(
            f"Waiting with a model loaded took another {drawn}: no token is charged with it unless "
            "--share-idle is given."
        )
    if report.range_s < DAY_S:
        found.append(f"The range is {figures.span(report.range_s)} long; a whole day is rarely like it.")
    return found


def _estimates(report: Report) -> str:
    prices, energy = report.asked.prices, report.total.totals.energy
    names = " and ".join(SOURCE_NAMES[part.source] for part in energy if part.method == "estimated")
    return (
        f"Joules of {names} are estimated, not measured: by stated watts, now {prices.idle_watts:g} W idle, "
        f"{prices.watts_per_core:g} W for a busy core and {prices.dram_watts:g} W of memory."
    )


def owned(report: Report) -> bool:
    """Whether the costs hold the hardware."""
    return report.asked.prices.hardware_price is not None


def paid_kinds(report: Report) -> list[str]:
    """The parts of a token's cost that there are."""
    there = {"electricity": True, "hardware": owned(report), "other": report.asked.prices.other_per_month > 0}
    return [kind for kind, shown in there.items() if shown]


def verdict_of(even: BreakEven) -> str:
    """What a break-even means, in a few words."""
    if even.tokens_per_day is None:
        return "never: electricity alone is dearer"
    if not even.reachable:
        return "too slow for so many"
    if even.within_life:
        return "pays off at this pace"
    return "pays off with more use"


def developers(report: Report) -> str:
    """Owning beside subscriptions; empty where none was named."""
    against = report.subscription
    if against is None:
        return ""
    one = "developer" if against.developers == 1 else "developers"
    return (
        f"Owning costs {money(report, against.owning)} a month at this pace: less than subscriptions of "
        f"{money(report, against.per_month)} from {against.developers:,} {one} on, if the box is fast enough "
        "for them."
    )


def list_prices(report: Report) -> str:
    """Where the list prices are from, and of when."""
    origins = dict.fromkeys(f"{line.price.origin}, as of {line.price.dated}" for line in report.hosted)
    return f"List prices: {'; '.join(origins)}. Nothing was looked up on the network."


def day_text(day: date) -> str:
    """`22 November 2026`."""
    return f"{day.day} {day:%B %Y}"


def short_day(day: date) -> str:
    """`22 Nov`."""
    return f"{day.day} {day:%b}"


NOTHING = "Nothing was computed in this range."
EMPTY = "The ledger holds no requests of this range."


def how_to_fill(report: Report) -> str:
    """What to do about a report without requests."""
    asked = report.asked
    if asked.model or asked.user or asked.since_s is not None or asked.until_s is not None:
        return f"Ask for a longer time or for everybody: {report.ledger} holds none that fit."
    return (
        "Every answer of `moebox run` and `moebox chat` adds a row, unless --no-ledger is given. "
        "`moebox cost --scenario kimi-k2-h100` shows the sums without any."
    )

"""What the report says in words, on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime

from moebox.cost import figures
from moebox.cost.economics import DAY_S, PARTS, BreakEven
from moebox.cost.report.report import Hosted, Line, Report
from moebox.cost.words import SOURCE_NAMES, Sentence, money, value_or

NOTHING = "Nothing was computed in this range."
EMPTY = "The ledger holds no requests of this range."


def dates(report: Report) -> str:
    """The range in words: `1 to 22 November 2026`, or the hours of a single day."""
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


def headline(report: Report) -> Sentence:
    """The cost of a million tokens on the box, and the list prices of the cheapest and the dearest model."""
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
    """The subject of the headline where the hardware's price is not known."""
    return "The electricity and other costs" if report.options.prices.other_per_month else "The electricity"


def verdict(report: Report) -> str:
    """Whether owning is cheaper than hosted models, as the box was used and at full utilisation."""
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
    """A million tokens at `own` compared with the prices of all hosted models, the cheapest first."""
    beaten = sum(own < line.per_million for line in hosted)
    if beaten == len(hosted):
        return "is cheaper than all of them" if len(hosted) > 1 else "is cheaper"
    if not hosted[0].per_million:
        return "is dearer than the cheapest, which is free"
    ratio = figures.times(own / hosted[0].per_million)
    beats = f", and is cheaper than {beaten} of the {len(hosted)}" if beaten else ""
    return f"costs {ratio} what the cheapest takes{beats}"


def notes(report: Report) -> list[str]:
    """Notes without which the figures would mislead."""
    prices = report.options.prices
    found = [_estimates(report)] if report.total.estimated else []
    if prices.utilisation is not None:
        stated, measured = figures.share(prices.utilisation), figures.share(report.utilisation)
        found.append(f"The costs go by a stated utilisation of {stated}; measured were {measured}.")
    if report.idle.joules and not report.options.share_idle:
        drawn = f"{figures.energy(report.idle.joules)}, {money(report, report.idle_money)} of electricity"
        found.append(
            f"Waiting with a model loaded took another {drawn}: no token is charged with it unless "
            "--share-idle is given."
        )
    if report.range_s < DAY_S:
        found.append(f"The range is {figures.span(report.range_s)} long; a whole day is rarely like it.")
    return found


def _estimates(report: Report) -> str:
    prices, energy = report.options.prices, report.total.totals.usage.energy
    names = " and ".join(SOURCE_NAMES[part.source] for part in energy if part.method == "estimated")
    return (
        f"Joules of {names} are estimated, not measured: by stated watts, now {prices.idle_watts:g} W idle, "
        f"{prices.watts_per_core:g} W for a busy core and {prices.dram_watts:g} W of memory."
    )


def owned(report: Report) -> bool:
    """Whether the hardware's price is known, and so part of the costs."""
    return report.options.prices.hardware_price is not None


def paid_parts(report: Report) -> list[str]:
    """The `PARTS` that the prices name."""
    unpaid = {"hardware": not owned(report), "other": report.options.prices.other_per_month <= 0}
    return [part for part in PARTS if not unpaid.get(part)]


def verdict_of(even: BreakEven) -> str:
    """A break-even in a few words."""
    if even.tokens_per_day is None:
        return "never: electricity alone is dearer"
    if not even.reachable:
        return "too slow for so many"
    if even.within_life:
        return "pays off at this pace"
    return "pays off with more use"


def developers(report: Report) -> str:
    """Owning compared with subscriptions; empty where no subscription was named."""
    against = report.subscription
    if against is None:
        return ""
    one = "developer" if against.developers == 1 else "developers"
    return (
        f"Owning costs {money(report, against.owning)} a month at this pace: less than subscriptions of "
        f"{money(report, against.per_month)} from {against.developers:,} {one} on, if the box is fast enough "
        "for them."
    )


def counts(line: Line) -> list[str]:
    """Requests, and tokens of prompts, of the cache and of answers: the first figures of a line's row."""
    usage = line.totals.usage
    values = (line.totals.requests, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    return [figures.count(value) for value in values]


def tokens_to_win(even: BreakEven) -> str:
    """Tokens a day from which owning is cheaper."""
    return value_or("never", even.tokens_per_day, figures.count)


def list_prices(report: Report) -> str:
    """The origin and the date of the list prices."""
    origins = dict.fromkeys(f"{line.price.origin}, as of {line.price.dated}" for line in report.hosted)
    return f"List prices: {'; '.join(origins)}. Nothing was looked up on the network."


def day_text(day: date) -> str:
    """`22 November 2026`."""
    return f"{day.day} {day:%B %Y}"


def short_day(day: date) -> str:
    """`22 Nov`."""
    return f"{day.day} {day:%b}"


def how_to_fill(report: Report) -> str:
    """How to get a report with requests, where this one has none."""
    options = report.options
    if options.model or options.user or options.since_s is not None or options.until_s is not None:
        return f"Ask for a longer time or for everybody: {report.ledger} holds none that fit."
    return (
        "Every answer of `moebox run` and `moebox chat` adds a row, unless --no-ledger is given. "
        "`moebox cost --scenario kimi-k2-h100` shows the sums without any."
    )

"""`moebox cost`: the ledger's requests of a time, their energy, and what they cost beside hosted models."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebox.cost.economics import (
    MILLION,
    BreakEven,
    TokenCost,
    Work,
    api_cost,
    break_even,
    cost_of,
    developers_to_win,
    electricity_of,
    owning_per_month,
)
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.ledger.totals import Key, Totals
from moebox.cost.prices.api_prices import ApiPrice
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import SOURCES, IdleSpell, Joules, add_energy

TOTAL = "total"
LEAST_RANGE_S = 1.0


@dataclass(frozen=True)
class ReportOptions:
    """What the command was asked for.

    Attributes:
        prices: of electricity and the box.
        since_s, until_s: Unix times; None: from the first request on, and until now.
        model, user: whose requests; None: all.
        by: what the lines are.
        api: hosted models to compare with.
        subscription: money a month and developer, to compare with.
        share_idle: whether the energy of waiting is part of what tokens cost.
    """

    prices: Prices
    since_s: float | None = None
    until_s: float | None = None
    model: str | None = None
    user: str | None = None
    by: Key = "model"
    api: tuple[ApiPrice, ...] = ()
    subscription: float | None = None
    share_idle: bool = False


@dataclass(frozen=True)
class Line:
    """One model, user or day, or all of them.

    Attributes:
        key: which.
        totals: of its requests.
        work: the same as it is priced: its part of the busy seconds and of the energy of waiting, where that
            is shared out; the parts of all lines sum to the whole.
        cost: money per million computed tokens; None where none was computed.
    """

    key: str
    totals: Totals
    work: Work
    cost: TokenCost | None

    @property
    def money(self) -> float:
        """What it cost in all."""
        return 0.0 if self.cost is None else self.cost.total * self.totals.computed_tokens / MILLION

    @property
    def joules_per_token(self) -> float | None:
        """Measured while requests were in work, per computed token."""
        tokens = self.totals.computed_tokens
        return self.totals.joules / tokens if tokens else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Prompt tokens that were not cached, over the seconds spent on them."""
        fresh = self.totals.prompt_tokens - self.totals.cached_tokens
        return fresh / self.totals.prefill_s if self.totals.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens of answers over the seconds spent on them: the speed that one person sees."""
        return self.totals.completion_tokens / self.totals.decode_s if self.totals.decode_s else None

    @property
    def tokens_per_busy_s(self) -> float | None:
        """All computed tokens over the seconds in which the box was busy: the speed of the box."""
        return self.totals.computed_tokens / self.work.busy_s if self.work.busy_s else None

    @property
    def estimated(self) -> bool:
        """Whether some of its joules come from the stated model."""
        return any(part.method == "estimated" for part in self.totals.energy)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        totals = asdict(self.totals)
        for name in ("key", "busy_s"):
            del totals[name]
        rates = ("prefill_tokens_per_s", "decode_tokens_per_s", "tokens_per_busy_s", "joules_per_token")
        return {
            "key": self.key,
            **totals,
            "computed_tokens": self.totals.computed_tokens,
            "joules": self.totals.joules,
            "busy_s": self.work.busy_s,
            "idle_joules": self.work.idle_joules,
            **{name: getattr(self, name) for name in rates},
            "money": self.money,
            "per_million": None if self.cost is None else cost_dict(self.cost),
        }


def cost_dict(cost: TokenCost) -> dict[str, Any]:
    """Money per million tokens by part, as it was and at full utilisation."""
    full = cost.at_full_utilisation
    found = asdict(cost) | {"total": cost.total}
    return found | {"at_full_utilisation": asdict(full) | {"total": full.total}}


@dataclass(frozen=True)
class Hosted:
    """The same work at a hosted model's list prices.

    Attributes:
        price: the model's.
        money: for all of the work.
        per_million: per million of the tokens that the box computed, so that it compares with the box's.
        even: when owning is the cheaper one; None where no hardware's price is known.
    """

    price: ApiPrice
    money: float
    per_million: float
    even: BreakEven | None


@dataclass(frozen=True)
class Subscription:
    """Owning beside a subscription for every developer, both a month at the range's pace.

    Attributes:
        per_month: of one developer.
        owning: hardware, electricity and other costs.
        developers: the smallest number whose subscriptions cost more than owning.
    """

    per_month: float
    owning: float
    developers: int


@dataclass(frozen=True)
class Report:
    """What a time's requests cost. Money is in the currency of the prices.

    Attributes:
        asked: the command's options.
        ledger: the file.
        since_s, until_s: Unix times of the range.
        utilisation: part of the range in which at least one request was in work, anybody's.
        total: all chosen requests.
        lines: the same by model, user or day, the largest first, or in order of days.
        days: the same by day.
        idle: waiting in the range with a model loaded.
        idle_money: its price; part of the lines' where it is shared out.
        hosted: beside hosted models, the cheapest first.
        subscription: None where none was named, or no hardware's price is known.
    """

    asked: ReportOptions
    ledger: str
    since_s: float
    until_s: float
    utilisation: float
    total: Line
    lines: list[Line]
    days: list[Line]
    idle: IdleSpell
    idle_money: float
    hosted: list[Hosted]
    subscription: Subscription | None

    @property
    def range_s(self) -> float:
        """Seconds of the range."""
        return self.until_s - self.since_s

    @property
    def empty(self) -> bool:
        """Whether there was no request."""
        return self.total.totals.requests == 0

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        asked = self.asked
        idle = asdict(self.idle) | {"joules": self.idle.joules, "money": self.idle_money}
        return {
            "ledger": self.ledger,
            "since_s": self.since_s,
            "until_s": self.until_s,
            "model": asked.model,
            "user": asked.user,
            "by": asked.by,
            "prices": asdict(asked.prices),
            "utilisation": self.utilisation,
            "total": self.total.to_dict(),
            "lines": [line.to_dict() for line in self.lines],
            "days": [line.to_dict() for line in self.days],
            "idle": idle | {"shared_out": asked.share_idle},
            "hosted": [asdict(line) for line in self.hosted],
            "subscription": None if self.subscription is None else asdict(self.subscription),
        }


def make_report(ledger: Ledger, asked: ReportOptions, now_s: float | None = None) -> Report:
    """Read `ledger`, all figures at one moment, and do the sums."""
    since_s, until_s = asked.since_s, asked.until_s
    with ledger.snapshot():
        (everyone,) = ledger.totals(since_s, until_s)
        chosen = everyone
        if asked.model is not None or asked.user is not None:
            (chosen,) = ledger.totals(since_s, until_s, asked.model, asked.user)
        days = ledger.totals(since_s, until_s, asked.model, asked.user, by="day")
        groups = days
        if asked.by != "day":
            groups = ledger.totals(since_s, until_s, asked.model, asked.user, by=asked.by)
            groups.sort(key=lambda totals: -totals.computed_tokens)
        idle = sum_idle(ledger.idle(since_s, until_s))
    begin_s, end_s = _range(asked, everyone, time.time() if now_s is None else now_s)
    pricing = _Pricing(everyone, idle, asked, end_s - begin_s)
    total = pricing.line(TOTAL, chosen)
    return Report(
        asked,
        str(ledger.path),
        begin_s,
        end_s,
        pricing.utilisation,
        total,
        [pricing.line(str(totals.key), totals) for totals in groups],
        [pricing.line(str(totals.key), totals) for totals in days],
        idle,
        electricity_of(idle.joules, asked.prices),
        pricing.hosted(total),
        pricing.subscription(),
    )


def empty_report(asked: ReportOptions, path: Path) -> Report:
    """The report of a ledger that nothing has made yet."""
    begin_s, end_s = _range(asked, Totals(), time.time())
    idle = sum_idle(())
    total = _Pricing(Totals(), idle, asked, end_s - begin_s).line(TOTAL, Totals())
    return Report(asked, str(path), begin_s, end_s, 0.0, total, [], [], idle, 0.0, [], None)


def sum_idle(spells: Iterable[IdleSpell]) -> IdleSpell:
    """One spell of them all; a source's method is that of its least certain part."""
    begun_s, seconds, energy = 0.0, 0.0, tuple[Joules, ...]()
    for spell in spells:
        begun_s = begun_s or spell.begun_s
        seconds += spell.seconds
        energy = add_energy(energy, spell.energy)
    return IdleSpell(begun_s, seconds, energy)


def _range(asked: ReportOptions, everyone: Totals, now_s: float) -> tuple[float, float]:
    """The range as it counts for utilisation: no further than now, and to the end of what ran in it."""
    until_s = now_s if asked.until_s is None else min(asked.until_s, now_s)
    since_s = asked.since_s
    if since_s is None:
        since_s = until_s if everyone.first_s is None else everyone.first_s
    return since_s, max(until_s, everyone.last_s or until_s, since_s + LEAST_RANGE_S)


@dataclass(frozen=True)
class _Pricing:
    """Shares the box out over the requests of its range."""

    everyone: Totals
    idle: IdleSpell
    asked: ReportOptions
    range_s: float

    @property
    def utilisation(self) -> float:
        return min(1.0, self.everyone.busy_s / self.range_s)

    def work(self, totals: Totals) -> Work:
        """Its part of the busy seconds by the seconds of its requests, of waiting by its tokens."""
        worked_s = _worked_s(self.everyone)
        busy_s = self.everyone.busy_s * _worked_s(totals) / worked_s if worked_s else 0.0
        tokens, all_tokens = totals.computed_tokens, self.everyone.computed_tokens
        idle_joules = self.idle.joules * tokens / all_tokens if self.asked.share_idle and all_tokens else 0.0
        return Work(tokens, totals.joules, busy_s, self.utilisation or 1.0, idle_joules)

    def line(self, key: str, totals: Totals) -> Line:
        work = self.work(totals)
        return Line(key, totals, work, cost_of(work, self.asked.prices))

    def hosted(self, total: Line) -> list[Hosted]:
        """Nothing where nothing was computed."""
        found = [self._hosted(total, price) for price in self.asked.api if total.cost is not None]
        return sorted(found, key=lambda line: line.money)

    def _hosted(self, total: Line, price: ApiPrice) -> Hosted:
        sums = total.totals
        money = api_cost(sums.prompt_tokens, sums.cached_tokens, sums.completion_tokens, price)
        even = break_even(total.work, money, self.asked.prices)
        return Hosted(price, money, money / sums.computed_tokens * MILLION, even)

    def subscription(self) -> Subscription | None:
        """Everybody's work, since subscriptions are for all who use the box."""
        per_month, prices = self.asked.subscription, self.asked.prices
        if not per_month or prices.hardware_price is None or not self.everyone.busy_s:
            return None
        owning = owning_per_month(self.work(self.everyone), prices)
        return Subscription(per_month, owning, developers_to_win(owning, per_month))


def _worked_s(totals: Totals) -> float:
    return totals.prefill_s + totals.decode_s


def csv_rows(report: Report) -> list[list[object]]:
    """A heading, a row per line, and the total."""
    lines = [*report.lines, report.total]
    rows = [_csv_row(line) for line in lines]
    heading: list[object] = [report.asked.by, *rows[0]]
    return [heading, *([_cell(line.key), *row.values()] for line, row in zip(lines, rows, strict=True))]


def _csv_row(line: Line) -> dict[str, object]:
    found = line.to_dict()
    energy = {part.source: part for part in line.totals.energy}
    row: dict[str, object] = {
        name: value for name, value in found.items() if not isinstance(value, (str, dict, list, tuple))
    }
    row.pop("per_million", None)
    for source in SOURCES:
        part = energy.get(source)
        row[f"{source}_joules"] = part.joules if part else None
        row[f"{source}_method"] = part.method if part else None
    row |= found["traffic"]
    for name in ("electricity", "hardware", "other", "total"):
        row[f"{name}_per_million"] = getattr(line.cost, name, None)
    full = line.cost.at_full_utilisation.total if line.cost else None
    return row | {"total_per_million_at_full_utilisation": full}


def _cell(key: str) -> str:
    """A name that a spreadsheet would take for a formula is marked as text."""
    return f"'{key}" if key.startswith(("=", "+", "-", "@", "\t", "\r")) else key

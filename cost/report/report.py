"""`moebox cost`: the requests of a range of time, their energy and cost, beside hosted models."""

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
from moebox.cost.usage import IdleSpell, Joules, add_energy

TOTAL = "total"
"""The key of the line that holds all requests."""
MIN_RANGE_S = 1.0


@dataclass(frozen=True)
class ReportOptions:
    """The options of the command.

    Attributes:
        prices: of electricity and the box.
        since_s, until_s: the range, in Unix time; None: from the first request on, and until now.
        model, user: only requests of this model and user; None: of all.
        by: the report has a line for each model, user or day.
        api: hosted models to compare with.
        subscription: its price a month for one developer, to compare with.
        share_idle: whether the energy of waiting is part of the cost of tokens.
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
    """The requests of one model, user or day, or all of them.

    Attributes:
        key: the model, the user, the day, or `TOTAL`.
        totals: sums over the requests.
        work: the same as priced: with the line's part of the busy seconds and, where that is shared out, of
            the energy of waiting. The parts of all lines sum to the whole.
        cost: money per million computed tokens; None where no token was computed.
    """

    key: str
    totals: Totals
    work: Work
    cost: TokenCost | None

    @property
    def money(self) -> float:
        """Money for all requests of the line."""
        return 0.0 if self.cost is None else self.cost.total * self.totals.usage.computed_tokens / MILLION

    @property
    def joules_per_token(self) -> float | None:
        """Joules measured while the box worked on the requests, per computed token."""
        usage = self.totals.usage
        return usage.joules / usage.computed_tokens if usage.computed_tokens else None

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """Computed tokens of prompts / seconds spent on prompts."""
        usage = self.totals.usage
        return usage.computed_prompt_tokens / usage.prefill_s if usage.prefill_s else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens of answers / seconds spent on answers: the speed that one user sees."""
        usage = self.totals.usage
        return usage.completion_tokens / usage.decode_s if usage.decode_s else None

    @property
    def tokens_per_busy_s(self) -> float | None:
        """All computed tokens / seconds in which the box was busy: the speed of the box."""
        return self.totals.usage.computed_tokens / self.work.busy_s if self.work.busy_s else None

    @property
    def estimated(self) -> bool:
        """Whether some of the joules come from the stated model of watts."""
        return any(part.method == "estimated" for part in self.totals.usage.energy)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        totals, usage = self.totals, self.totals.usage
        rates = ("prefill_tokens_per_s", "decode_tokens_per_s", "tokens_per_busy_s", "joules_per_token")
        return {
            "key": self.key,
            "requests": totals.requests,
            **asdict(usage),
            "first_s": totals.first_s,
            "last_s": totals.last_s,
            "computed_tokens": usage.computed_tokens,
            "joules": usage.joules,
            "busy_s": self.work.busy_s,
            "idle_joules": self.work.idle_joules,
            **{name: getattr(self, name) for name in rates},
            "money": self.money,
            "per_million": None if self.cost is None else self.cost.to_dict(),
        }


@dataclass(frozen=True)
class Hosted:
    """The same work at a hosted model's list prices.

    Attributes:
        price: the model's list prices.
        money: the price of all requests.
        per_million: the same per million tokens that the box computed, as for the cost of the box.
        even: when owning breaks even; None where the hardware's price is not known.
    """

    price: ApiPrice
    money: float
    per_million: float
    even: BreakEven | None


@dataclass(frozen=True)
class Subscription:
    """Owning compared with a subscription for every developer, both a month at the pace of the range.

    Attributes:
        per_month: price of one developer's subscription.
        owning: money for hardware, electricity and other costs.
        developers: the smallest number whose subscriptions cost more than owning.
    """

    per_month: float
    owning: float
    developers: int


@dataclass(frozen=True)
class Report:
    """The cost of the requests in a range of time. Money is in the currency of the prices.

    Attributes:
        options: of the command.
        ledger: path of the file.
        since_s, until_s: the range, in Unix time.
        utilisation: part of the range in which the box worked on at least one request of any user.
        total: all requests that the options select.
        lines: the same by model or user, the most tokens first, or by day, in order.
        days: the same by day.
        idle: the time in which a model was loaded and no request was open.
        idle_money: the price of its energy, which the lines contain where it is shared out.
        hosted: the same work on hosted models, the cheapest first.
        subscription: None where none was named, or where the hardware's price is not known.
    """

    options: ReportOptions
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
    def currency(self) -> str:
        """The code of the currency of all money."""
        return self.options.prices.currency

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
        options = self.options
        idle = asdict(self.idle) | {"joules": self.idle.joules, "money": self.idle_money}
        return {
            "ledger": self.ledger,
            "since_s": self.since_s,
            "until_s": self.until_s,
            "model": options.model,
            "user": options.user,
            "by": options.by,
            "prices": asdict(options.prices),
            "utilisation": self.utilisation,
            "total": self.total.to_dict(),
            "lines": [line.to_dict() for line in self.lines],
            "days": [line.to_dict() for line in self.days],
            "idle": idle | {"shared_out": options.share_idle},
            "hosted": [asdict(line) for line in self.hosted],
            "subscription": None if self.subscription is None else asdict(self.subscription),
        }


def make_report(ledger: Ledger, options: ReportOptions, now_s: float | None = None) -> Report:
    """Read all figures of one moment from `ledger`, and price them.

    Args:
        now_s: Unix time at which the range ends at the latest; None: the clock's.
    """
    since_s, until_s = options.since_s, options.until_s
    with ledger.snapshot():
        (all_totals,) = ledger.totals(since_s, until_s)
        chosen = all_totals
        if options.model is not None or options.user is not None:
            (chosen,) = ledger.totals(since_s, until_s, options.model, options.user)
        days = ledger.totals(since_s, until_s, options.model, options.user, by="day")
        groups = days
        if options.by != "day":
            groups = ledger.totals(since_s, until_s, options.model, options.user, by=options.by)
            groups.sort(key=lambda totals: -totals.usage.computed_tokens)
        idle = sum_idle(ledger.idle(since_s, until_s))
    begin_s, end_s = _range(options, all_totals, time.time() if now_s is None else now_s)
    pricing = _Pricing(all_totals, idle, options, end_s - begin_s)
    total = pricing.line(TOTAL, chosen)
    return Report(
        options,
        str(ledger.path),
        begin_s,
        end_s,
        pricing.utilisation,
        total,
        [pricing.line(str(totals.key), totals) for totals in groups],
        [pricing.line(str(totals.key), totals) for totals in days],
        idle,
        electricity_of(idle.joules, options.prices),
        pricing.hosted(total),
        pricing.subscription(),
    )


def empty_report(options: ReportOptions, path: Path) -> Report:
    """The report where no file exists at `path` yet."""
    begin_s, end_s = _range(options, Totals(), time.time())
    idle = sum_idle(())
    total = _Pricing(Totals(), idle, options, end_s - begin_s).line(TOTAL, Totals())
    return Report(options, str(path), begin_s, end_s, 0.0, total, [], [], idle, 0.0, [], None)


def sum_idle(spells: Iterable[IdleSpell]) -> IdleSpell:
    """The spells as one; a source's method is that of its least certain part."""
    begun_s, seconds, energy = 0.0, 0.0, tuple[Joules, ...]()
    for spell in spells:
        begun_s = begun_s or spell.begun_s
        seconds += spell.seconds
        energy = add_energy(energy, spell.energy)
    return IdleSpell(begun_s, seconds, energy)


def _range(options: ReportOptions, all_totals: Totals, now_s: float) -> tuple[float, float]:
    """The range that utilisation refers to: it ends now at the latest, but not before its last request."""
    until_s = now_s if options.until_s is None else min(options.until_s, now_s)
    since_s = options.since_s
    if since_s is None:
        since_s = until_s if all_totals.first_s is None else all_totals.first_s
    return since_s, max(until_s, all_totals.last_s or until_s, since_s + MIN_RANGE_S)


@dataclass(frozen=True)
class _Pricing:
    """Shares the box out over the requests of the range, and prices the shares.

    Attributes:
        all_totals: sums over the requests of all users and models.
        idle: the time of waiting in the range.
        range_s: seconds of the range.
    """

    all_totals: Totals
    idle: IdleSpell
    options: ReportOptions
    range_s: float

    @property
    def utilisation(self) -> float:
        return min(1.0, self.all_totals.busy_s / self.range_s)

    def work(self, totals: Totals) -> Work:
        """Shares busy seconds out by the seconds of requests, and the energy of waiting by tokens.

        busy_s = busy seconds of all x work_s / work_s of all
        idle_joules = joules of waiting x computed tokens / computed tokens of all
        """
        usage, all_usage = totals.usage, self.all_totals.usage
        busy_s = self.all_totals.busy_s * usage.work_s / all_usage.work_s if all_usage.work_s else 0.0
        tokens, all_tokens = usage.computed_tokens, all_usage.computed_tokens
        shared = self.options.share_idle and all_tokens
        idle_joules = self.idle.joules * tokens / all_tokens if shared else 0.0
        return Work(tokens, usage.joules, busy_s, self.utilisation or 1.0, idle_joules)

    def line(self, key: str, totals: Totals) -> Line:
        work = self.work(totals)
        return Line(key, totals, work, cost_of(work, self.options.prices))

    def hosted(self, total: Line) -> list[Hosted]:
        """Empty where no token was computed."""
        found = [self._hosted(total, price) for price in self.options.api if total.cost is not None]
        return sorted(found, key=lambda line: line.money)

    def _hosted(self, total: Line, price: ApiPrice) -> Hosted:
        usage = total.totals.usage
        money = api_cost(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, price)
        even = break_even(total.work, money, self.options.prices)
        return Hosted(price, money, money / usage.computed_tokens * MILLION, even)

    def subscription(self) -> Subscription | None:
        """Compares with the work of all users, since each of them would need a subscription."""
        per_month, prices = self.options.subscription, self.options.prices
        if not per_month or prices.hardware_price is None or not self.all_totals.busy_s:
            return None
        owning = owning_per_month(self.work(self.all_totals), prices)
        return Subscription(per_month, owning, developers_to_win(owning, per_month))

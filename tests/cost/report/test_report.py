"""The report's figures compared with sums of the ledger, and with sums done by hand."""

import tempfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from helpers.ledger import changed, make_record
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.prices.api_prices import ApiPrice
from moebox.cost.prices.box_prices import MONTH_S, Prices
from moebox.cost.report.report import ReportOptions, empty_report, make_report
from moebox.cost.report.rows import csv_rows
from moebox.cost.report.words import headline, how_to_fill, notes, verdict
from moebox.cost.usage import SECONDS, TOKENS, IdleSpell, Joules, Traffic, Usage

NOON_S = datetime(2026, 11, 9, 12).timestamp()
DAY_S = 86_400.0
BOX = Prices(electricity_per_kwh=0.36, hardware_price=36_500.0, life_months=36.5)  # 1,000 a month
K2 = ApiPrice("K2", "Moonshot", 0.6, 2.5, 0.15, "2026-11-10", "test")
DEAR = ApiPrice("Dear", "Elsewhere", 3.0, 15.0, 3.0, "2026-11-10", "test")


def record(number=0, **given):
    plain = make_record(
        id=f"request-{number}",
        begun_s=NOON_S,
        model="k2",
        user="ana",
        prompt_tokens=1000,
        cached_tokens=400,
        completion_tokens=400,
        queue_s=0.0,
        prefill_s=4.0,
        decode_s=16.0,
        finish_reason="stop",
        energy=(Joules("gpu", 9_000.0, "counter"), Joules("cpu", 1_000.0, "estimated")),
        traffic=Traffic(60, 30, 10, 5_000, 3_000, 1_000),
    )
    return changed(plain, **given)


def report_of(path, records, spells=(), now_s=None, **asked):
    with Ledger.open(path) as ledger:
        ledger.add(*records)
        for spell in spells:
            ledger.add_idle(spell)
        return make_report(ledger, ReportOptions(asked.pop("prices", BOX), **asked), now_s)


def test_what_one_request_costs(tmp_path):
    # One request of 20 s in a range of 200 s, 1,000 computed tokens, 10,000 J.
    report = report_of(
        tmp_path / "l", [record()], now_s=NOON_S + 200, since_s=NOON_S, api=(DEAR, K2), subscription=200.0
    )
    total = report.total
    assert total.totals.usage.computed_tokens == 1000
    assert report.utilisation == approx(0.1)
    # 10,000 J = 1 / 360 kWh, x 0.36 = 0.001; a million tokens: x 1,000 = 1.
    assert total.cost.electricity == approx(1.0)
    # 200 s of 1,000 a month, for 1,000 tokens.
    assert total.cost.hardware == approx(1000 * 200 / MONTH_S * 1000)
    assert total.cost.at_full_utilisation.hardware == approx(1000 * 20 / MONTH_S * 1000)
    assert total.money == approx(total.cost.total / 1000)
    assert total.joules_per_token == approx(10.0)
    assert total.estimated
    assert (total.prefill_tokens_per_s, total.decode_tokens_per_s) == (approx(150.0), approx(25.0))
    assert total.tokens_per_busy_s == approx(50.0)
    # (600 x 0.6 + 400 x 0.15 + 400 x 2.5) / 1e6 = 0.00142, and (600 x 3 + 400 x 3 + 400 x 15) / 1e6 = 0.009.
    assert [(line.price.name, line.money) for line in report.hosted] == [
        ("K2", approx(0.00142)),
        ("Dear", approx(0.009)),
    ]
    assert report.hosted[0].per_million == approx(1.42)
    # 1,000 of hardware and the electricity of a tenth of the seconds of a month at 500 W.
    owning = 1000 + 500 * 0.1 * MONTH_S / 3.6e6 * 0.36
    assert report.subscription.owning == approx(owning)
    assert report.subscription.developers == 6


def test_the_energy_of_waiting_is_apart_unless_it_is_shared_out(tmp_path):
    spell = IdleSpell(NOON_S + 20, 180.0, (Joules("gpu", 18_000.0, "counter"),))
    apart = report_of(tmp_path / "l", [record()], [spell], NOON_S + 200, since_s=NOON_S)
    assert apart.idle.joules == 18_000
    assert apart.idle_money == approx(18_000 / 3.6e6 * 0.36)
    assert apart.total.cost.electricity == approx(1.0)
    assert any("Waiting with a model loaded" in note for note in notes(apart))
    shared = report_of(tmp_path / "l", [], now_s=NOON_S + 200, since_s=NOON_S, share_idle=True)
    assert shared.total.cost.electricity == approx(1.0 + 1.8)
    assert shared.total.cost.at_full_utilisation.electricity == approx(1.0)
    assert not any("Waiting" in note for note in notes(shared))


def test_the_method_of_idle_energy_is_that_of_its_least_certain_part(tmp_path):
    spells = [
        IdleSpell(NOON_S, 10.0, (Joules("gpu", 5.0, "counter"), Joules("cpu", 1.0, "counter"))),
        IdleSpell(NOON_S + 10, 20.0, (Joules("gpu", 7.0, "power"),)),
    ]
    report = report_of(tmp_path / "l", [record()], spells, NOON_S + 200)
    assert report.idle.energy == (Joules("gpu", 12.0, "power"), Joules("cpu", 1.0, "counter"))
    assert report.idle.seconds == 30


def test_a_users_part_is_charged_at_the_utilisation_by_all_users(tmp_path):
    bens = [record(1, begun_s=NOON_S + 10, user="ben"), record(2, begun_s=NOON_S + 100, user="ben")]
    records = [record(0), *bens]
    whole = report_of(tmp_path / "l", records, now_s=NOON_S + 200, by="user")
    # 30 + 20 s of 200 were busy; each request of 20 s has a third of them.
    assert whole.utilisation == approx(50 / 200)
    assert [(line.key, line.work.busy_s) for line in whole.lines] == [
        ("ben", approx(100 / 3)),
        ("ana", approx(50 / 3)),
    ]
    ana = report_of(tmp_path / "l", [], now_s=NOON_S + 200, user="ana")
    assert ana.utilisation == whole.utilisation
    assert ana.total.money == approx(whole.lines[1].money)


def test_the_range_ends_now_but_not_before_its_last_request(tmp_path):
    assert report_of(tmp_path / "l", [record()], now_s=NOON_S + 200).range_s == approx(200)
    late = report_of(tmp_path / "l", [], now_s=NOON_S + 200, until_s=NOON_S + 5000)
    assert late.until_s == NOON_S + 200
    early = report_of(tmp_path / "l", [], now_s=NOON_S + 200, until_s=NOON_S + 5)
    assert early.until_s == NOON_S + 20
    assert early.utilisation == 1


def test_a_stated_utilisation_is_used_and_noted(tmp_path):
    report = report_of(
        tmp_path / "l", [record()], now_s=NOON_S + 200, prices=replace(BOX, utilisation=0.5), since_s=NOON_S
    )
    assert report.total.cost.hardware == approx(1000 * 40 / MONTH_S * 1000)
    assert any("stated utilisation of 50 %; measured were 10 %" in note for note in notes(report))


def test_days_are_in_order_and_add_up(tmp_path):
    records = [record(number, begun_s=NOON_S + number % 3 * DAY_S) for number in range(7)]
    report = report_of(tmp_path / "l", records, now_s=NOON_S + 4 * DAY_S, by="day")
    assert [line.key for line in report.lines] == ["2026-11-09", "2026-11-10", "2026-11-11"]
    assert report.lines == report.days
    assert sum(line.totals.requests for line in report.lines) == 7


def test_headline_and_verdict_say_which_is_cheaper(tmp_path):
    asked = {"now_s": NOON_S + 200, "since_s": NOON_S, "api": (K2, DEAR)}
    report = report_of(tmp_path / "l", [record()], **asked)
    assert report.total.cost.total > 70
    assert "".join(text for text, _ in headline(report)) == (
        "A million tokens cost $77.10 on this box; the same work at list prices $1.42 (K2) to $9.00 (Dear)."
    )
    assert verdict(report) == (
        "As it was used, owning costs 54 times what the cheapest takes. The box was busy 10 % of the time. "
        "Without a pause it costs 6.1 times what the cheapest takes, and is cheaper than 1 of the 2."
    )
    free = report_of(tmp_path / "l", [], **asked, prices=replace(BOX, hardware_price=1.0, residual=1.0))
    assert verdict(free).startswith("As it was used, owning is cheaper than all of them.")
    unknown = report_of(tmp_path / "l", [], **asked, prices=replace(BOX, hardware_price=None))
    assert "The electricity for a million tokens cost $1.00" in "".join(text for text, _ in headline(unknown))
    assert "--hardware-price" in verdict(unknown)
    assert unknown.hosted[0].even is None and unknown.subscription is None


def test_rows_for_a_spreadsheet(tmp_path):
    records = [record(0), record(1, begun_s=NOON_S + 50, user='=HYPERLINK("http://x")')]
    report = report_of(tmp_path / "l", records, now_s=NOON_S + 200, by="user")
    heading, *rows = csv_rows(report)
    assert all(len(row) == len(heading) for row in rows)
    table = [dict(zip(heading, row, strict=True)) for row in rows]
    assert [row["user"] for row in table] == ['\'=HYPERLINK("http://x")', "ana", "total"]
    total = table[-1]
    assert (total["requests"], total["computed_tokens"], total["gpu_joules"]) == (2, 2000, 18_000)
    assert (total["cpu_method"], total["dram_joules"]) == ("estimated", None)
    assert total["total_per_million"] == approx(report.total.cost.total)
    assert total["pcie_bytes"] == 10_000


def test_nothing_is_charged_where_nothing_was_computed(tmp_path):
    asked = ReportOptions(BOX, api=(K2,))
    for report in (empty_report(asked, tmp_path / "none"), report_of(tmp_path / "l", [])):
        assert report.empty and report.total.cost is None and report.hosted == []
        assert report.to_dict()["total"]["requests"] == 0
        assert "moebox run" in how_to_fill(report)
    cached = record(prompt_tokens=10, cached_tokens=10, completion_tokens=0, prefill_s=0.0, decode_s=0.0)
    report = report_of(tmp_path / "l", [cached], api=(K2,), subscription=200.0)
    assert not report.empty and report.total.cost is None
    assert report.total.money == 0 and report.total.joules_per_token is None


def test_all_figures_are_of_one_moment(tmp_path):
    class Busy(Ledger):
        """A ledger to which another connection adds a request before every sum."""

        def totals(self, *arguments, **named):
            with Ledger.open(self.path) as other:
                other.add(record(next(numbers)))
            return super().totals(*arguments, **named)

    numbers = iter(range(100))
    Ledger.open(tmp_path / "l").close()
    with Busy.open(tmp_path / "l", read_only=True) as ledger:
        report = make_report(ledger, ReportOptions(BOX))
    counts = {report.total.totals.requests, *(line.totals.requests for line in (*report.lines, *report.days))}
    assert len(counts) == 1


def _joules(draw_joules):
    methods = st.sampled_from(["counter", "power", "estimated"])
    one = [
        st.one_of(st.none(), st.builds(Joules, st.just(source), draw_joules, methods))
        for source in ("gpu", "cpu", "dram")
    ]
    return st.tuples(*one).map(lambda parts: tuple(part for part in parts if part))


TIMES = st.floats(0, 5_000, allow_nan=False)
RECORDS = st.builds(
    lambda cached, fresh, **rest: make_record(
        id="", prompt_tokens=cached + fresh, cached_tokens=cached, finish_reason="stop", **rest
    ),
    cached=st.integers(0, 10_000),
    fresh=st.integers(0, 10_000),
    completion_tokens=st.integers(0, 10_000),
    begun_s=st.floats(NOON_S, NOON_S + 9 * DAY_S),
    model=st.sampled_from(["k2", "k2.5", "tiny"]),
    user=st.sampled_from(["ana", "ben", "ci"]),
    queue_s=TIMES,
    prefill_s=TIMES,
    decode_s=TIMES,
    energy=_joules(st.floats(0, 1e7)),
    traffic=st.builds(Traffic, *[st.integers(0, 10**12)] * 6),
)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(RECORDS, max_size=25),
    st.sampled_from(["model", "user", "day"]),
    st.booleans(),
    st.floats(0, 9 * DAY_S),
)
def test_totals_of_the_report_equal_those_of_the_ledger(records, by, share_idle, since_s):
    records = [replace(each, id=str(number)) for number, each in enumerate(records)]
    spell = IdleSpell(NOON_S, 9 * DAY_S, (Joules("gpu", 5e6, "power"),))
    with tempfile.TemporaryDirectory() as folder:
        report = report_of(
            Path(folder) / "l",
            records,
            [spell],
            NOON_S + 10 * DAY_S,
            since_s=NOON_S + since_s,
            by=by,
            share_idle=share_idle,
            api=(K2,),
        )
        with Ledger.open(Path(folder) / "l", read_only=True) as ledger:
            rows = list(ledger.requests(since_s=NOON_S + since_s))
            (of_ledger,) = ledger.totals(since_s=NOON_S + since_s)
    assert report.total.totals == of_ledger
    assert report.total.totals.requests == len(rows)
    assert report.total.totals.usage.joules == approx(sum(row.usage.joules for row in rows))
    for lines in (report.lines, report.days):
        assert sum(line.totals.requests for line in lines) == of_ledger.requests
        used = sum((line.totals.usage for line in lines), Usage())
        for name in (*TOKENS, *SECONDS, "joules"):
            assert getattr(used, name) == approx(getattr(of_ledger.usage, name))
        assert used.traffic == of_ledger.usage.traffic
        assert sum(line.work.busy_s for line in lines) == approx(of_ledger.busy_s)
        if of_ledger.usage.computed_tokens:
            assert sum(line.work.idle_joules for line in lines) == approx(report.total.work.idle_joules)
        assert_money_adds_up(lines, report.total)


def assert_money_adds_up(lines, total):
    """Lines without computed tokens have no cost, so their seconds are missing from the sum of the lines."""
    if all(line.cost is not None or not line.work.busy_s for line in lines):
        assert sum(line.money for line in lines) == approx(total.money, abs=1e-12)


def test_a_filter_and_its_complement_sum_to_the_whole(tmp_path):
    records = [
        record(number, begun_s=NOON_S + 9 * number, model="k2" if number % 3 else "tiny")
        for number in range(9)
    ]
    whole = report_of(tmp_path / "l", records, now_s=NOON_S + 900)
    parts = [report_of(tmp_path / "l", [], now_s=NOON_S + 900, model=name) for name in ("k2", "tiny")]
    assert sum(part.total.money for part in parts) == approx(whole.total.money)

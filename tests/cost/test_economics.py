from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx

from moebox.cost.economics import (
    Parts,
    Work,
    api_cost,
    break_even,
    cost_of,
    developers_to_win,
    electricity_of,
    money_of,
    owning_per_month,
    payback_months,
    running_per_month,
    work_of,
)
from moebox.cost.prices.api_prices import ApiPrice
from moebox.cost.prices.box_prices import Prices
from moebox.cost.usage import Joules, Usage

# Figures that divide without a remainder: a month has 2,628,000 s, so that the hardware costs 0.001 a second
# (2,628 a month) and the rest 0.0001.
PRICES = Prices(
    electricity_per_kwh=0.36,
    hardware_price=95_608.0,
    residual=1000.0,
    life_months=36.0,
    other_per_month=262.8,
)
GPT = ApiPrice("GPT", "them", 1.25, 10.0, 0.125, "2026-11-01", "file")

# An hour of a range in which the box worked for a quarter, at 800 W; waiting it drew 100 W.
WORK = Work(tokens=90_000, joules=720_000, busy_s=900, utilisation=0.25, idle_joules=270_000)


def test_electricity_is_kilowatt_hours_times_their_price():
    # 720,000 J / 3,600,000 J per kWh = 0.2 kWh; x 0.36 = 0.072
    assert electricity_of(720_000, PRICES) == approx(0.072)


def test_the_hardware_is_spread_over_its_life():
    # (95,608 - 1,000) / 36 = 2,628 a month
    assert PRICES.hardware_per_month == approx(2628)


def test_money_is_charged_for_the_works_share_of_waiting_too():
    money = money_of(WORK, PRICES)
    # (720,000 + 270,000) / 3,600,000 x 0.36 = 0.099
    assert money.electricity == approx(0.099)
    # 900 s / 0.25 = 3,600 s x 0.001 = 3.60
    assert money.hardware == approx(3.60)
    # 3,600 s x 0.0001 = 0.36
    assert money.other == approx(0.36)
    # 0.099 + 3.60 + 0.36
    assert money.total == approx(4.059)


def test_money_per_million_tokens_as_measured_and_at_full_utilisation():
    cost = cost_of(WORK, PRICES)
    # x 1,000,000 / 90,000 = x 11.111: 1.10, 40.00, 4.00
    assert (cost.electricity, cost.hardware, cost.other) == approx((1.1, 40.0, 4.0))
    assert cost.total == approx(45.1)
    assert cost.utilisation == 0.25
    # At full: 0.072, 900 s x 0.001 = 0.90, 900 s x 0.0001 = 0.09; x 11.111
    full = cost.at_full_utilisation
    assert (full.electricity, full.hardware, full.other) == approx((0.8, 10.0, 1.0))
    assert full.total == approx(11.8)


def test_a_stated_utilisation_replaces_the_measured_one():
    cost = cost_of(WORK, replace(PRICES, utilisation=0.5))
    # 900 s / 0.5 = 1,800 s: 1.80 and 0.18; 900 s of waiting at 270,000 J / 2,700 s = 100 W: 90,000 J;
    # (720,000 + 90,000) / 3,600,000 x 0.36 = 0.081. x 11.111
    assert (cost.electricity, cost.hardware, cost.other) == approx((0.9, 20.0, 2.0))
    assert cost.utilisation == 0.5
    assert cost.at_full_utilisation == cost_of(WORK, PRICES).at_full_utilisation


def test_without_a_price_of_the_hardware_tokens_cost_electricity():
    cost = cost_of(replace(WORK, idle_joules=0), Prices(electricity_per_kwh=0.36))
    assert (cost.electricity, cost.hardware, cost.other) == approx((0.8, 0, 0))


def test_no_token_has_no_price():
    assert cost_of(replace(WORK, tokens=0), PRICES) is None
    assert break_even(replace(WORK, tokens=0), 1.0, PRICES) is None


@pytest.mark.parametrize("utilisation", [0.0, -0.1, 1.01, float("nan")])
def test_an_impossible_utilisation_is_refused(utilisation):
    with pytest.raises(ValueError, match="utilisation"):
        Work(1, 1, 1, utilisation)


def test_the_work_of_one_request():
    joules = (Joules("gpu", 500.0, "counter"), Joules("cpu", 220.0, "estimated"))
    usage = Usage(1000, 400, 300, 5.0, 2.0, 7.0, energy=joules)
    assert work_of(usage) == Work(tokens=900, joules=720.0, busy_s=9.0)
    cost = cost_of(work_of(usage), PRICES)
    # 720 J -> 0.000072; 9 s -> 0.009 and 0.0009; x 1,000,000 / 900
    assert (cost.electricity, cost.hardware, cost.other) == approx((0.08, 10.0, 1.0))
    assert cost.total == approx(cost.at_full_utilisation.total)


def test_the_same_work_at_an_api():
    # 600,000 fresh x 1.25 = 0.75; 400,000 cached x 0.125 = 0.05; 300,000 x 10 = 3.00
    assert api_cost(1_000_000, 400_000, 300_000, GPT) == approx(3.80)


def test_break_even_against_an_api():
    even = break_even(replace(WORK, idle_joules=0), 9.072, PRICES)
    # A month does this work 2,628,000 x 0.25 / 900 = 730 times: the API takes 6,622.56, electricity
    # 730 x 0.072 = 52.56, the rest 262.80: saved 6,307.20. (95,608 - 1,000) / 6,307.20 = 15 months.
    assert even.months == approx(15)
    assert even.within_life
    # A day costs 86,400 s x 0.0011 = 95.04; a token saves (9.072 - 0.072) / 90,000 = 0.0001: 950,400 tokens.
    assert even.tokens_per_day == approx(950_400)
    # 90,000 tokens / 900 s = 100 tok/s x 86,400 s
    assert even.capacity_per_day == approx(8_640_000)
    assert even.reachable


def test_break_even_with_the_energy_of_waiting():
    even = break_even(WORK, 9.072, PRICES)
    # Electricity a month: 730 x 0.099 = 72.27 instead of 52.56: saved 6,287.49
    assert even.months == approx(94_608 / 6287.49)
    # A day of waiting at 100 W: 2.4 kWh x 0.36 = 0.864, so that it costs 95.904. A token draws 720,000 J less
    # the 90,000 J that waiting would have taken: 630,000 / 3,600,000 x 0.36 = 0.063; (9.072 - 0.063) / 90,000
    assert even.tokens_per_day == approx(95.904 / (9.009 / 90_000))
    # At so many tokens a day both cost the same: 95.904 + tokens x 0.063 / 90,000 = tokens x 9.072 / 90,000
    tokens = even.tokens_per_day
    assert 95.904 + tokens * 0.063 / 90_000 == approx(tokens * 9.072 / 90_000)


def test_owning_never_pays_where_electricity_alone_costs_more():
    even = break_even(WORK, 0.05, PRICES)
    assert even.months is None and even.tokens_per_day is None
    assert not even.within_life and not even.reachable


def test_owning_may_pay_after_its_life_and_beyond_what_the_box_can_do():
    # 730 x 1.0 - 52.56 - 262.80 = 414.64 a month: 94,608 / 414.64 = 228 months, longer than 36.
    # 95.04 / ((1.0 - 0.072) / 90,000) = 9.2 million tokens a day, above 8.64 million.
    even = break_even(replace(WORK, idle_joules=0), 1.0, PRICES)
    assert even.months == approx(228.2, rel=1e-3) and not even.within_life
    assert even.tokens_per_day == approx(9_217_241, rel=1e-6) and not even.reachable


def test_without_a_price_of_the_hardware_there_is_nothing_to_pay_back():
    assert break_even(WORK, 1.0, Prices()) is None


def test_a_month_of_owning():
    # 730 times (720,000 + 270,000) J = 200.75 kWh x 0.36 = 72.27, and 262.80
    assert running_per_month(WORK, PRICES) == approx(335.07)
    # and 2,628 of the hardware
    assert owning_per_month(WORK, PRICES) == approx(2963.07)
    # At twice the pace: 1,460 times (720,000 + 90,000) J = 328.5 kWh x 0.36 = 118.26, and 262.80
    assert running_per_month(WORK, replace(PRICES, utilisation=0.5)) == approx(381.06)


@pytest.mark.parametrize(("saved", "months"), [(9460.8, 10), (94_608, 1), (0, None), (-1, None)])
def test_payback(saved, months):
    assert payback_months(saved, PRICES) == (months if months is None else approx(months))


@pytest.mark.parametrize(
    ("owning", "subscription", "developers"),
    [(784.38, 200, 4), (800, 200, 5), (799.99, 200, 4), (90, 200, 1), (0, 200, 1)],
)
def test_the_number_of_subscriptions_that_cost_more_than_owning(owning, subscription, developers):
    assert developers_to_win(owning, subscription) == developers
    assert developers * subscription > owning >= (developers - 1) * subscription


POSITIVE = st.floats(1e-3, 1e9)


@given(st.lists(st.tuples(POSITIVE, POSITIVE, POSITIVE), min_size=1, max_size=6), st.floats(0.01, 1))
def test_costs_of_parts_of_the_work_sum_to_the_cost_of_the_whole(parts, utilisation):
    works = [Work(1, joules, busy_s, utilisation, idle) for joules, busy_s, idle in parts]
    whole = Work(1, *(sum(column) for column in list(zip(*parts, strict=True))[:2]), utilisation)
    whole = replace(whole, idle_joules=sum(part[2] for part in parts))
    money = [money_of(work, PRICES) for work in works]
    for name in ("electricity", "hardware", "other", "total"):
        assert sum(getattr(part, name) for part in money) == approx(getattr(money_of(whole, PRICES), name))


@given(POSITIVE, POSITIVE, POSITIVE, st.floats(0.01, 1), st.floats(0.01, 1))
def test_waiting_never_makes_tokens_cheaper(tokens, joules, busy_s, utilisation, stated):
    work = Work(tokens, joules, busy_s, utilisation, idle_joules=joules * (1 - utilisation))
    for prices in (PRICES, replace(PRICES, utilisation=stated)):
        cost = cost_of(work, prices)
        for name in ("electricity", "hardware", "other"):
            assert getattr(cost, name) >= getattr(cost.at_full_utilisation, name) * (1 - 1e-9)


@given(POSITIVE, POSITIVE, POSITIVE, st.floats(0.01, 1), POSITIVE)
def test_owning_and_api_cost_the_same_at_the_break_even(tokens, joules, busy_s, utilisation, api):
    work = Work(tokens, joules, busy_s, utilisation)
    even = break_even(work, api, PRICES)
    if even.tokens_per_day is None:
        assert api <= electricity_of(joules, PRICES)
        return
    times = even.tokens_per_day / tokens
    fixed = (PRICES.hardware_per_month + PRICES.other_per_month) / 2_628_000 * 86_400
    assert fixed + times * electricity_of(joules, PRICES) == approx(times * api)


def test_parts_sum():
    assert Parts(1.0, 2.0, 4.0).total == 7.0

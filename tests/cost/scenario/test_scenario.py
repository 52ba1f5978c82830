"""The scenario's figures compared with a calculation by hand, whose results are rounded."""

import json

import pytest
from pytest import approx

from moebox.cost.scenario.scenario import SCENARIOS, find_scenario, run_scenario
from moebox.errors import PricesError

REPORT = run_scenario(find_scenario("kimi-k2-h100"))
PENNY = 0.005
"""Half of the last digit of amounts that are written in dollars and cents."""


def test_a_month_of_the_box():
    # Electricity: 0.7 kW x 730 h = 511 kWh; x $0.176 = $89.936, rounded $90 a month.
    assert REPORT.electricity == approx(89.936)
    assert round(REPORT.electricity) == 90
    # A year: 12 x $89.936 = $1,079.23; with the rounded $90 a month, $1,080.
    assert REPORT.electricity_per_year == approx(1079.232)
    assert round(REPORT.electricity_per_year, -1) == 1080 == 12 * 90
    # Hardware: $25,000 / 36 months = $694.44.
    assert REPORT.hardware == approx(694.44, abs=PENNY)
    # Owning: $694.44 + $89.94 = $784.38.
    assert REPORT.owning == approx(784.38, abs=PENNY)


def test_a_developers_subscription_for_a_year():
    # 12 x $200 = $2,400, against $1,079 of electricity: $1,321 less, without the hardware.
    assert REPORT.subscription_per_year == 2400
    assert 2400 - REPORT.electricity_per_year == approx(1320.77, abs=PENNY)


def test_list_prices():
    listed = {
        row.price.name: (row.price.input_per_million, row.price.output_per_million) for row in REPORT.hosted
    }
    assert listed == {
        "Kimi K2 Thinking": (0.60, 2.50),
        "GPT-5": (1.25, 10.0),
        "Claude Sonnet 4.5": (3.0, 15.0),
        "Grok 4": (3.0, 15.0),
    }


def test_prices_of_hosted_models_relative_to_the_open_one():
    blended = {row.price.name: row.blended_per_million for row in REPORT.hosted}
    # Three tokens of prompts for one of an answer:
    # K2: (3 x 0.60 + 2.50) / 4 = 4.30 / 4
    assert blended["Kimi K2 Thinking"] == approx(1.075)
    # GPT-5: (3 x 1.25 + 10) / 4 = 13.75 / 4
    assert blended["GPT-5"] == approx(3.4375)
    # Claude Sonnet 4.5 and Grok 4: (3 x 3 + 15) / 4 = 24 / 4
    assert blended["Claude Sonnet 4.5"] == blended["Grok 4"] == approx(6.0)
    times = {row.price.name: row.times_as_dear for row in REPORT.hosted}
    # 3.4375 / 1.075 = 3.198: about 3 times; 6 / 1.075 = 5.581: about 6 times.
    assert times["Kimi K2 Thinking"] == 1
    assert times["GPT-5"] == approx(3.198, abs=0.0005) and round(times["GPT-5"]) == 3
    assert times["Claude Sonnet 4.5"] == times["Grok 4"] == approx(5.581, abs=0.0005)
    assert round(times["Grok 4"]) == 6


# tok/s, tokens a month in millions (x 2,628,000 s), electricity $89.936 over them, hardware $694.444, both
# $784.380; the last in office hours: x 730 h / 176 h = 4.14773.
SPEEDS = [
    (10, 26.28, 3.4222, 26.4248, 29.8470, 123.797),
    (15, 39.42, 2.2815, 17.6165, 19.8980, 82.532),
    (20, 52.56, 1.7111, 13.2124, 14.9235, 61.899),
    (25, 65.70, 1.3689, 10.5699, 11.9388, 49.519),
    (50, 131.40, 0.6844, 5.2850, 5.9694, 24.759),
    (100, 262.80, 0.3422, 2.6425, 2.9847, 12.380),
    (1000, 2628.0, 0.0342, 0.2642, 0.2985, 1.238),
]


@pytest.mark.parametrize("line", SPEEDS, ids=[f"{line[0]} tok/s" for line in SPEEDS])
def test_a_million_tokens_at_a_speed(line):
    speed, millions, electricity, hardware, total, in_office_hours = line
    row = next(row for row in REPORT.by_speed if row.tokens_per_s == speed)
    assert row.tokens_per_month == approx(millions * 1e6)
    assert row.cost.electricity == approx(electricity, abs=0.00006)
    assert row.cost.hardware == approx(hardware, abs=0.00006)
    assert row.cost.other == 0
    assert row.cost.total == approx(total, abs=0.00006)
    assert row.cost.at_full_utilisation.total == approx(total, abs=0.00006)
    assert row.in_office_hours.total == approx(in_office_hours, abs=0.0006)
    assert row.in_office_hours.at_full_utilisation.total == approx(total, abs=0.00006)


def test_the_speeds_are_those_of_the_table():
    assert [row.tokens_per_s for row in REPORT.by_speed] == [line[0] for line in SPEEDS]


def test_one_stream_costs_twelve_to_thirty_dollars():
    costs = {row.tokens_per_s: row.cost.total for row in REPORT.by_speed}
    assert round(costs[25]) == 12 and round(costs[10]) == 30
    # Several times the hosted open model's $2.50: 4.8 and 11.9 times.
    assert costs[25] / 2.5 == approx(4.8, abs=0.05)
    assert costs[10] / 2.5 == approx(11.9, abs=0.05)


def test_hosted_models_that_owning_beats_at_a_speed():
    wins = {row.tokens_per_s: row.cheaper_than for row in REPORT.by_speed}
    # $29.85 and $19.90 are above all of $2.50, $10, $15, $15; $14.92 and $11.94 are below 15; $5.97 and $2.98
    # are below 10 too; only $0.30 is below 2.50.
    assert wins[10] == wins[15] == ()
    assert wins[20] == wins[25] == ("Claude Sonnet 4.5", "Grok 4")
    assert wins[50] == wins[100] == ("GPT-5", "Claude Sonnet 4.5", "Grok 4")
    assert wins[1000] == ("Kimi K2 Thinking", "GPT-5", "Claude Sonnet 4.5", "Grok 4")
    # Electricity alone: $3.42 is above 2.50, $2.28 is below.
    paid = {row.tokens_per_s: row.running_cheaper_than for row in REPORT.by_speed}
    assert paid[10] == ("GPT-5", "Claude Sonnet 4.5", "Grok 4")
    assert all(paid[speed] == wins[1000] for speed in (15, 20, 25, 50, 100, 1000))


# $784.380 / price / 2.628 million s; the same for answers with three times their prompts; $89.936 / price.
WINS = [
    ("Kimi K2 Thinking", 119.388, 69.412, 13.689),  # prices 2.50; 3 x 0.60 + 2.50 = 4.30
    ("GPT-5", 29.847, 21.707, 3.422),  # prices 10; 3 x 1.25 + 10 = 13.75
    ("Claude Sonnet 4.5", 19.898, 12.436, 2.281),  # prices 15; 3 x 3 + 15 = 24
    ("Grok 4", 19.898, 12.436, 2.281),
]


def test_the_speed_from_which_owning_wins():
    rows = [
        (row.price.name, row.wins_from, row.wins_from_with_prompts, row.wins_from_once_paid)
        for row in REPORT.hosted
    ]
    for row, line in zip(rows, WINS, strict=True):
        assert row[0] == line[0]
        assert row[1:] == approx(line[1:], abs=0.0006)


# developers, x $200, less electricity of $89.936, months to $25,000, within 36 months
DEVELOPERS = [
    (1, 200, 110.064, 227.14, False),
    (2, 400, 310.064, 80.63, False),
    (3, 600, 510.064, 49.01, False),
    (4, 800, 710.064, 35.21, True),
    (5, 1000, 910.064, 27.47, True),
    (6, 1200, 1110.064, 22.52, True),
    (7, 1400, 1310.064, 19.08, True),
    (8, 1600, 1510.064, 16.56, True),
    (9, 1800, 1710.064, 14.62, True),
    (10, 2000, 1910.064, 13.09, True),
]


def test_the_number_of_developers_from_which_owning_wins():
    assert len(REPORT.by_developers) == len(DEVELOPERS)
    for row, line in zip(REPORT.by_developers, DEVELOPERS, strict=True):
        found = (row.developers, row.subscriptions, row.saved, row.payback_months)
        assert found == approx(line[:4], abs=PENNY)
        assert row.wins is line[4]
        assert row.owning == approx(784.38, abs=PENNY)
        assert row.wins == (row.subscriptions > row.owning)
    # $784.38 / $200 = 3.92: the fourth.
    assert REPORT.developers_to_win == 4


def test_payback_for_one_developer_is_longer_than_the_hardwares_life():
    # 227.14 months are 18.9 years.
    assert REPORT.by_developers[0].payback_months / 12 == approx(18.9, abs=0.05)


def test_other_prices_replace_those_of_the_scenario():
    scenario = find_scenario(
        "kimi-k2-h100", subscription=100, hardware_price=12_500, electricity_per_kwh=None, utilisation=0.5
    )
    report = run_scenario(scenario)
    # $347.22 + $89.94 = $437.16: the fifth developer at $100; half the tokens a month.
    assert report.owning == approx(437.16, abs=PENNY)
    assert report.developers_to_win == 5
    assert report.by_speed[0].tokens_per_month == approx(13.14e6)
    # $437.16 / 13.14 million; the box stays on, so that waiting takes half of the electricity.
    assert report.by_speed[0].cost.total == approx(33.269, abs=0.0006)
    assert report.by_speed[0].cost.electricity == approx(89.936 / 13.14)
    assert report.by_speed[0].cost.at_full_utilisation.electricity == approx(89.936 / 26.28)
    assert report.hosted[0].wins_from == approx(437.158 / 2.5 / 1.314, rel=1e-5)


def test_a_wrong_name_or_price_is_refused():
    with pytest.raises(PricesError, match="no scenario named 'kimi-k2'") as caught:
        find_scenario("kimi-k2")
    assert "kimi-k2-h100" in caught.value.fix
    with pytest.raises(PricesError, match="subscription = 0"):
        find_scenario("kimi-k2-h100", subscription=0)
    with pytest.raises(PricesError, match="life_months = -1"):
        find_scenario("kimi-k2-h100", life_months=-1)


def test_json_has_rows_with_totals():
    found = json.loads(json.dumps(REPORT.to_dict()))
    assert found["by_speed"][0]["cost"]["total"] == REPORT.by_speed[0].cost.total
    assert found["by_speed"][0]["cost"]["at_full_utilisation"]["total"] == approx(29.847, abs=0.0005)
    assert found["scenario"]["name"] in SCENARIOS
    assert found["hosted"][1]["price"]["provider"] == "OpenAI"

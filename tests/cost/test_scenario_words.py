import re

from moebox.cost.scenario import find_scenario, run_scenario
from moebox.cost.scenario_words import conclusions, sums

REPORT = run_scenario(find_scenario("kimi-k2-h100"))


def test_the_missions_sums_are_shown_as_sums():
    assert sums(REPORT) == (
        "Electricity: 0.7 kW x 730 h x $0.176 = $89.94 a month, $1,079 a year",
        "Hardware: $25,000 / 36 months = $694.44 a month",
        "Owning: $784.38 a month",
        "Subscription: $200 a month and developer, $2,400 a year",
        "List prices per 1M tokens in/out: Kimi K2 Thinking 0.60/2.50, GPT-5 1.25/10.00, "
        "Claude Sonnet 4.5 3.00/15.00, Grok 4 3.00/15.00",
        "3 tokens in to 1 out: Kimi K2 Thinking $1.075, GPT-5 $3.438 (about 3 times: 3.20), "
        "Claude Sonnet 4.5 $6.000 (about 6 times: 5.58), Grok 4 $6.000 (about 6 times: 5.58)",
    )


def test_residual_and_other_costs_are_shown_where_there_are_some():
    report = run_scenario(find_scenario("kimi-k2-h100", residual=5000, other_per_month=100))
    assert "Hardware: ($25,000 - $5,000) / 36 months = $555.56 a month" in sums(report)
    assert "Other costs: $100.00 a month" in sums(report)


def test_it_says_from_which_speed_and_for_how_many_developers_owning_wins():
    said = "\n".join(conclusions(REPORT))
    assert (
        "owning wins from 119.4 tok/s on against Kimi K2 Thinking, 29.8 against GPT-5, 19.9 against" in said
    )
    assert "owning wins from 4 developers on: $784.38 / $200 = 3.92." in said


def test_it_says_where_owning_loses():
    said = "\n".join(conclusions(REPORT))
    assert "$11.94 to $29.85 per 1M tokens, 4.8 to 11.9 times the $2.50 of hosted Kimi K2 Thinking" in said
    assert "by one developer in 227 months (18.9 years), it is paid back by 4 developers in 35 months" in said
    assert "4.1 times as dear" in said


def test_a_subscription_below_the_electricity_never_pays():
    report = run_scenario(find_scenario("kimi-k2-h100", subscription=50, utilisation=0.25))
    said = "\n".join(conclusions(report))
    assert "never paid back by one developer" in said
    assert "cheaper than none of these models at 25 tok/s" in said
    assert "25% of the time" in said and "730 hours" not in said
    assert not re.search(r"\b(nan|inf|None)\b", said)

"""A/B trials with made-up times: what they decide, and what they cost."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from moebox.offload.prefetch.ab_trial import LAST_TOKENS, LEAST_ON, REST_TOKENS, SHARE, WORST, Trial, budget_s

TOKEN_S = 0.1


@dataclass
class Run:
    """Tokens whose time grows with what they read; what the trial decided, and what it really cost."""

    trial: Trial = field(default_factory=Trial)
    modes: list[bool] = field(default_factory=list)
    decided: list[int] = field(default_factory=list)
    time_s: float = 0.0
    cost_s: float = 0.0
    over_s: float = -math.inf

    def go(self, tokens, change, noise=0.1, seed=0, drift=0.0, slow=0.0):
        """`slow`: share of the tokens, with and without the feature, that take three times as long."""
        rng = np.random.default_rng(seed)
        for token in range(tokens):
            on, to_read = self.trial.on, int(rng.integers(0, 16))
            usual_s = TOKEN_S * (0.6 + 0.05 * to_read) * (1 + drift * token)
            usual_s *= math.exp(rng.normal(0, noise)) * (3 if rng.random() < slow else 1)
            self.modes.append(on)
            self.time_s += usual_s * (1 + change * on)
            self.cost_s += usual_s * change * on
            self.over_s = max(self.over_s, self.cost_s - budget_s(self.time_s))
            if self.trial.observe(usual_s * (1 + change * on), to_read):
                self.decided.append(len(self.modes))
        return self

    def share_on(self, last):
        """Share of the last tokens that had the feature."""
        return sum(self.modes[-last:]) / last


@pytest.mark.parametrize("change", [1.0, 0.5, 0.2, 0.1, 0.05, 0.02])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_never_costs_more_than_the_budget(change, seed):
    run = Run().go(1500, change, noise=0.05, seed=seed)
    assert run.over_s < 2 * TOKEN_S  # at any moment; the fit has an error
    assert run.cost_s < SHARE * run.time_s
    assert run.share_on(400) < 0.3


@pytest.mark.parametrize("change", [0.5, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_costs_no_more_than_the_budget_where_times_are_noisy(change, seed):
    run = Run().go(1500, change, noise=0.2, seed=seed, slow=0.03)
    assert run.cost_s < 0.02 * run.time_s


@pytest.mark.parametrize(("change", "noise"), [(-0.3, 0.2), (-0.2, 0.1), (-0.1, 0.05), (-0.05, 0.02)])
@pytest.mark.parametrize("seed", range(3))
def test_a_gain_is_found_within_a_trial_and_kept(change, noise, seed):
    run = Run().go(600, change, noise, seed)
    assert run.decided
    assert run.decided[0] <= LAST_TOKENS
    assert run.share_on(300) > 0.8
    assert run.cost_s < 0.6 * change * run.time_s


def test_begins_without_the_feature_and_assumes_the_worst_of_the_first_token():
    run = Run().go(200, -0.2, noise=0.0)
    first = run.modes.index(True)
    assert budget_s(first * TOKEN_S) >= 0.9 * WORST * TOKEN_S
    assert first < 60


def test_a_large_loss_ends_with_the_least_tokens():
    run = Run().go(LAST_TOKENS + 100, 0.5, noise=0.02)
    assert sum(run.modes) == LEAST_ON
    assert not run.trial.trying
    assert run.trial.change == pytest.approx(0.5, abs=0.05)
    assert run.trial.cost_s == pytest.approx(run.cost_s, rel=0.2)


@pytest.mark.parametrize("seed", range(3))
def test_a_feature_that_changes_nothing_ends_the_trial_too(seed):
    run = Run().go(LAST_TOKENS, 0.0, noise=0.1, seed=seed)
    assert run.decided
    assert abs(run.trial.change) < 0.1


@pytest.mark.parametrize("drift", [0.01, -0.002])
@pytest.mark.parametrize("change", [-0.2, 0.2])
def test_a_steady_drift_does_not_count_for_either_side(drift, change):
    run = Run().go(LAST_TOKENS, change, noise=0.01, drift=drift)
    assert len(run.decided) == 1
    assert run.trial.change == pytest.approx(change, abs=0.05)


def test_a_few_slow_tokens_do_not_decide():
    trial, rng, token = Trial(), np.random.default_rng(0), 0
    while trial.trying:
        slow = trial.on and token % 16 == 7
        seconds = 0.01 * (0.9 if trial.on else 1.0) * float(np.exp(rng.normal(0, 0.02)))
        trial.observe(0.03 if slow else seconds, 5)
        token += 1
    assert trial.on
    assert trial.change == pytest.approx(-0.1, abs=0.05)


def test_rests_grow_while_it_loses():
    run = Run().go(3000, 0.2, noise=0.02)
    rests = np.diff(run.decided)
    assert len(run.decided) == 4
    assert list(rests // REST_TOKENS) == [1, 2, 4]


def test_a_gain_that_turns_into_a_loss_is_noticed():
    run = Run().go(600, -0.2, noise=0.05)
    assert run.share_on(100) > 0.8
    before_s = run.cost_s
    run.go(600, 0.2, noise=0.05, seed=1)
    assert run.share_on(200) < 0.1
    assert run.cost_s - before_s < 20 * TOKEN_S  # the loss is noticed within the time of a fit


def test_a_loss_that_turns_into_a_gain_is_found_after_the_rest():
    run = Run().go(250, 0.3, noise=0.05)
    assert not any(run.modes[-100:])
    run.go(1200, -0.3, noise=0.05, seed=1)
    assert run.share_on(300) > 0.8


def test_controls_go_on_while_it_pays_and_keep_the_budget():
    run = Run().go(1000, -0.4, noise=0.02)
    assert not all(run.modes[-500:])
    assert (1 - run.share_on(500)) * 0.4 <= SHARE * 1.5


def test_says_what_it_found():
    trial = Run().go(LAST_TOKENS + 100, 0.5, noise=0.02).trial
    assert f"{trial.change:+.1%} with it (standard error {trial.error:.1%})" in trial.why_off


def test_the_budget_is_two_per_cent_at_first_and_one_after_a_minute():
    assert budget_s(10) == pytest.approx(0.2)
    assert max(budget_s(t) / t for t in range(1, 60)) <= 0.02
    assert budget_s(60) == pytest.approx(0.6)
    assert budget_s(3600) == pytest.approx(36)

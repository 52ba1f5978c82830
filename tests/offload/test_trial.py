"""The decision whether something pays, from times that are made up."""

import numpy as np
import pytest

from moebox.offload.trial import FIRST_TOKENS, LAST_TOKENS, SETTLED_TOKENS, Trial


def run(trial, tokens, change, noise=0.1, seed=0, drift=0.0):
    """Tokens whose time grows with what they read; returns which of them had the trial's consent."""
    rng = np.random.default_rng(seed)
    modes = []
    for token in range(tokens):
        modes.append(trial.on)
        to_read = int(rng.integers(0, 40))
        seconds = (0.01 + 0.0005 * to_read) * (1 + change * trial.on) * (1 + drift * token)
        trial.observe(seconds * float(np.exp(rng.normal(0, noise))), to_read)
    return modes


@pytest.mark.parametrize(("change", "on"), [(0.1, False), (-0.1, True)])
@pytest.mark.parametrize("seed", range(5))
def test_a_clear_change_is_found_before_the_last_token(change, on, seed):
    trial = Trial()
    run(trial, LAST_TOKENS, change, noise=0.05, seed=seed)
    assert not trial.trying
    assert trial.on is on
    assert trial.change == pytest.approx(change, abs=0.05)
    assert trial.error < 0.05


def test_a_large_loss_ends_at_the_first_decision():
    trial = Trial()
    modes = run(trial, 200, 0.5)
    assert sum(modes) == FIRST_TOKENS // 2


def test_what_changes_nothing_is_decided_in_the_end():
    trial = Trial()
    run(trial, LAST_TOKENS, 0.0, noise=0.3)
    assert not trial.trying
    assert abs(trial.change) < 0.2


@pytest.mark.parametrize("drift", [0.01, -0.003])
def test_what_grows_steadily_is_not_blamed_on_one_side(drift):
    trial = Trial()
    run(trial, FIRST_TOKENS, -0.2, noise=0.01, drift=drift)
    assert trial.change == pytest.approx(-0.2, abs=0.05)


def test_a_few_slow_tokens_do_not_decide():
    trial = Trial()
    rng = np.random.default_rng(0)
    token = 0
    while trial.trying:
        slow = trial.on and token % 16 == 0
        seconds = 0.01 * (0.9 if trial.on else 1.0) * float(np.exp(rng.normal(0, 0.02)))
        trial.observe(1.0 if slow else seconds, 5)
        token += 1
    assert trial.on


def test_is_tried_again_when_circumstances_have_changed():
    trial = Trial()
    run(trial, FIRST_TOKENS, 0.5)
    assert not trial.on
    modes = run(trial, SETTLED_TOKENS - 1, -0.3)
    assert not any(modes)
    assert not trial.trying
    run(trial, LAST_TOKENS, -0.3)
    assert trial.on


def test_says_when_it_has_decided():
    trial = Trial()
    ended = [trial.observe(0.02 if trial.on else 0.01, 3) for _ in range(FIRST_TOKENS + 5)]
    assert ended.index(True) == FIRST_TOKENS - 1
    assert sum(ended) == 1

"""The slot table and its scores against a plain model of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebox.offload.residency import Residency

KEYS = 12


class Model:
    """`Residency` in a few lines of Python: scores as of their last change."""

    def __init__(self, n_slots: int, reserve: int, half_life: float, n_experts: int) -> None:
        self.slots = [-1] * n_slots
        self.n_experts, self.layer = n_experts or KEYS, 0
        self.reserve, self.half_life, self.tick = reserve, half_life, 0
        self.last = [(0.0, 0)] * KEYS

    def score(self, key: int) -> float:
        score, tick = self.last[key]
        return score * 0.5 ** ((self.tick - tick) / self.half_life)

    def use(self, key: int, count: float) -> None:
        self.last[key] = (self.score(key) + count, self.tick)
        self.layer = key // self.n_experts

    def worth(self, key: int) -> float:
        """Score per layer until the key's layer comes again."""
        layers = KEYS // self.n_experts
        return self.score(key) / ((key // self.n_experts - self.layer - 1) % layers + 1)

    def place(self, key: int) -> int:
        if -1 not in self.slots:
            return -1
        slot = self.slots.index(-1)
        self.slots[slot] = key
        return slot

    def release(self, key: int) -> None:
        self.slots[self.slots.index(key)] = -1

    def weakest(self) -> list[int]:
        return sorted((key for key in self.slots if key >= 0), key=lambda key: (self.worth(key), -key))

    def trim(self) -> list[int]:
        keys = self.weakest()[: max(0, self.reserve - self.slots.count(-1))]
        for key in keys:
            self.release(key)
        return keys


KEY = st.integers(0, KEYS - 1)
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("use"), st.lists(st.tuples(KEY, st.sampled_from([0.0, 0.3, 1.0, 5.7])), max_size=5)
        ),
        st.tuples(st.just("tick"), st.integers(1, 40)),
        st.tuples(st.just("seed"), st.tuples(KEY, st.sampled_from([0.0, 0.25, 2.9]))),
        st.tuples(st.sampled_from(["toggle", "toggle", "trim"]), KEY),
    ),
    max_size=60,
)


def take_step(residency: Residency, model: Model, step: str, argument: object) -> None:
    """Make the same call on both, and compare the results."""
    if step == "use":
        keys = np.array([key for key, _ in argument], np.int32)
        residency.use(keys, np.array([count for _, count in argument], np.float32))
        for key, count in argument:
            model.use(key, float(np.float32(count)))
    elif step == "tick":
        residency.tick += argument
        model.tick += argument
    elif step == "seed":
        key, score = argument
        residency.seed(np.array([key], np.int32), np.array([score], np.float32))
        model.last[key] = (float(np.float32(score)), model.tick)
    elif step == "trim":
        assert residency.trim() == model.trim()
    elif argument in model.slots:
        residency.release(argument)
        model.release(argument)
    else:
        assert residency.place(argument) == model.place(argument)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 6), st.integers(0, 5), st.sampled_from([0.5, 16.0]), st.sampled_from([0, 3, 4]), STEPS)
def test_matches_the_model(n_slots: int, reserve: int, half_life: float, n_experts: int, steps: list) -> None:
    """Any series of calls, with ties and scores that fade to nothing."""
    reserve = min(reserve, max(n_slots - 1, 0))
    residency = Residency(KEYS, n_slots, reserve, half_life, n_experts)
    model = Model(n_slots, reserve, half_life, n_experts)
    for step, argument in steps:
        take_step(residency, model, step, argument)
        assert residency.slots().tolist() == model.slots
        assert residency.table().tolist() == [
            model.slots.index(key) if key in model.slots else -1 for key in range(KEYS)
        ]
        assert (residency.n_free, residency.n_resident) == (
            model.slots.count(-1),
            n_slots - model.slots.count(-1),
        )
        assert residency.weakest(n_slots) == model.weakest()
    for key in range(KEYS):
        assert math.isclose(residency.score(key), model.score(key), rel_tol=1e-9, abs_tol=1e-300)
    np.testing.assert_allclose(
        residency.scores(), [model.score(key) for key in range(KEYS)], rtol=1e-6, atol=1e-37
    )


def test_scores_halve_and_their_order_stays() -> None:
    """Also after far more ticks than a float could count down."""
    residency = Residency(3, 2, 1, half_life=8.0)
    residency.use(np.array([0, 1, 1], np.int32))
    residency.tick = 8
    assert residency.score(1) == pytest.approx(1.0)
    assert residency.score(0) == pytest.approx(0.5)
    assert residency.score(2) == 0.0
    for key in (0, 1):
        residency.place(key)
    residency.tick = 10_000_000
    assert residency.score(1) == 0.0
    assert residency.weakest(5) == [0, 1]
    assert residency.trim() == [0]


def cycle(residency: Residency, tokens: int) -> None:
    """Two layers of 6; both pick 0 and 1, then 2 and 3, then 4 and 5, and again."""
    for _ in range(tokens):
        residency.tick += 1
        first = 2 * (residency.tick % 3)
        for layer in range(2):
            picks = np.array([first, first + 1], np.int32) + 6 * layer
            residency.use(picks)
            residency.update_values(picks)


def test_update_values_learns_which_experts_come_next() -> None:
    """The score alone would keep the experts that were picked last."""
    residency = Residency(KEYS, 11, 1, n_experts=6)
    for key in range(6):
        residency.place(key)
    cycle(residency, 1)
    assert residency.weakest(6)[:4] == [5, 4, 1, 0]
    cycle(residency, 300)
    now = 2 * (residency.tick % 3)
    assert sorted(residency.weakest(2)) == sorted({now, now + 1})
    residency.release(now)
    residency.place(now)
    assert residency.weakest(1) != [now]  # its score counts again


def test_update_values_needs_consecutive_tokens() -> None:
    """After a prompt in between, an estimate has no next token to be compared with, so nothing is learned."""
    residency = Residency(KEYS, 11, 1, n_experts=6)
    for key in range(6):
        residency.place(key)
    for _ in range(300):
        residency.tick += 1
        cycle(residency, 1)
    now = 2 * (residency.tick % 3)
    assert not {now, now + 1} & set(residency.weakest(4))


@pytest.mark.parametrize(("n_slots", "n_experts"), [(4, 0), (0, 6), (12, 6)])
def test_update_values_does_nothing_where_no_value_matters(n_slots: int, n_experts: int) -> None:
    """One layer, no slots, or a slot for every key."""
    residency = Residency(KEYS, n_slots, 0, n_experts=n_experts)
    for key in range(n_slots):
        residency.place(key)
    cycle(residency, 100)
    score = {key: residency.score(key) / (2 if n_experts and key >= 6 else 1) for key in range(n_slots)}
    assert residency.weakest(12) == sorted(score, key=lambda key: (score[key], -key))


WRONG = {
    "key: 5 given": lambda r: r.slot(5),
    "key: -1 given": lambda r: r.place(-1),
    "key: 2 is resident already": lambda r: r.place(2),
    "key: 3 is not resident": lambda r: r.release(3),
    r"key: 9 given, 0 to n_keys=5 - 1": lambda r: r.use(np.array([0, 9], np.int32)),
    r"counts: shape \[1\] given, \[n=2\]": lambda r: r.use(np.zeros(2, np.int32), np.ones(1, np.float32)),
    r"counts\[1\]: -1.* given": lambda r: r.use(np.zeros(2, np.int32), np.array([0, -1], np.float32)),
    r"scores\[0\]: nan": lambda r: r.seed(np.zeros(1, np.int32), np.full(1, np.nan, np.float32)),
    "reserve: 4 given, fewer than n_slots=4": lambda _: Residency(5, 4, 4),
    "half_life: 0": lambda _: Residency(5, 4, 1, 0.0),
    "n_experts: 2 given, a divisor of n_keys=5": lambda _: Residency(5, 4, 1, n_experts=2),
    "key: 5 given, 0 to": lambda r: r.update_values(np.array([0, 5], np.int32)),
    "keys: 1 and 3 given, keys of one layer": lambda _: Residency(6, 4, 1, n_experts=3).update_values(
        np.array([1, 3], np.int32)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_call_is_named(message: str) -> None:
    """And changes nothing."""
    residency = Residency(5, 4, 1)
    residency.place(2)
    with pytest.raises(ValueError, match=message):
        WRONG[message](residency)
    assert residency.slots().tolist() == [2, -1, -1, -1]
    assert not residency.scores().any()

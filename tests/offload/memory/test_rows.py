"""Rows of RAM against a plain model of them: which key has which row, and which keys make room."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.offload.tiers import small_config
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.memory.rows import RamRows

ROWS = 6
KEY = st.integers(0, 11)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("place"), KEY),
        st.tuples(st.just("arrived"), KEY),
        st.tuples(st.just("drop"), KEY),
        st.tuples(st.just("hand_over"), KEY, KEY),
        st.tuples(st.just("make_room"), st.integers(0, ROWS), st.lists(KEY, max_size=4)),
        st.tuples(st.just("use"), KEY),
    ),
    max_size=40,
)


def filled(*keys):
    """A slab that holds these keys in its first rows."""
    ram = RamSlab(small_config(), ROWS)
    ram.rows[list(keys)] = np.arange(len(keys))
    return ram


class Model:
    """The same in plain Python; of equal scores the higher key is the weaker."""

    def __init__(self):
        self.rows, self.complete, self.scores = {}, set(), {}

    def place(self, key):
        free = sorted(set(range(ROWS)) - set(self.rows.values()))
        if free:
            self.rows[key] = free[0]
        return free[0] if free else -1

    def drop(self, key):
        del self.rows[key]
        self.complete.discard(key)

    def hand_over(self, old, new):
        row = self.rows[old]
        self.drop(old)
        self.rows[new] = row

    def make_room(self, n_free, busy):
        weakest = sorted(set(self.rows) - set(busy), key=lambda key: (self.scores.get(key, 0), -key))
        for key in weakest[: max(0, n_free - (ROWS - len(self.rows)))]:
            self.drop(key)


def step(rows, model, name, *arguments):
    """One step on both; skipped where it is not allowed."""
    if name == "use":
        rows.residency.use(np.array(arguments, np.int32))
        model.scores[arguments[0]] = model.scores.get(arguments[0], 0) + 1
    elif name == "make_room":
        rows.make_room(*arguments)
        model.make_room(*arguments)
    elif (name == "place") == (arguments[0] in model.rows) or (arguments[1:] and arguments[1] in model.rows):
        with pytest.raises(ValueError, match="key: "):
            getattr(rows, name)(*arguments)
    elif name == "arrived":
        rows.arrived(*arguments)
        model.complete.add(*arguments)
    else:
        assert getattr(rows, name)(*arguments) == getattr(model, name)(*arguments)


@given(STEPS)
@settings(max_examples=150, deadline=None)
def test_as_the_model_says(steps):
    ram = filled()
    rows, model = RamRows(ram), Model()
    for one in steps:
        step(rows, model, *one)
        assert {key: rows.row(key) for key in range(12) if rows.row(key) >= 0} == model.rows
        assert {int(key): int(ram.rows[key]) for key in np.flatnonzero(ram.rows >= 0)} == {
            key: model.rows[key] for key in model.complete
        }
        assert rows.n_free == ROWS - len(model.rows)


def test_takes_over_what_a_slab_holds():
    ram = filled(40, 3, 7)
    rows = RamRows(ram, reserve=2)
    assert [rows.row(key) for key in (40, 3, 7)] == [0, 1, 2]
    assert (rows.n_free, rows.capacity) == (3, 4)
    rows.residency.use(np.array([3], np.int32))
    ram.rows[[40, 3, 7]] = [-1, 0, -1]
    rows.take_over()
    assert (rows.row(40), rows.row(3), rows.n_free) == (-1, 0, 5)
    assert rows.residency.score(3) == 1


@pytest.mark.parametrize(("row", "message"), [(2, "row 1 is free"), (0, "row 0 given"), (6, "row 6 given")])
def test_refuses_a_table_that_cannot_be(row, message):
    ram = filled(4)
    ram.rows[5] = row
    with pytest.raises(ValueError, match=message):
        RamRows(ram)


def test_busy_keys_stay_and_may_have_no_row():
    rows = RamRows(filled(1, 2, 3, 4, 5, 6))
    assert rows.weakest(2, [6, 4, 60]) == [5, 3]
    rows.make_room(2, [6, 4, 60])
    assert [key for key in range(1, 7) if rows.row(key) >= 0] == [1, 2, 4, 6]
    assert rows.weakest(9) == [6, 4, 2, 1]

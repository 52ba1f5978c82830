"""The ledger, on real SQLite files."""

import os
import sqlite3
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import fields
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.ledger import NOON_S, changed, record
from moebox.cost.ledger.ledger import Ledger, ledger_path
from moebox.cost.usage import (
    METHODS,
    SOURCES,
    TRAFFIC_FIELDS,
    IdleSpell,
    Joules,
    RequestRecord,
    Traffic,
    Usage,
)
from moebox.errors import LedgerError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "ledger.sqlite3"


@pytest.fixture
def ledger(path):
    with Ledger.open(path) as opened:
        yield opened


@contextmanager
def unprivileged(folder):
    """Act as a user who may read `folder` but not write it, also where the tests run as root."""
    folder.chmod(0o555)
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared_folder():
    """A folder that every user can enter."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)
        Path(name).chmod(0o755)


def test_a_request_comes_back_as_it_was(ledger, path):
    written = record("1", begun_s=NOON_S + 1 / 3, user="Zoë 🦊 'drop table", model="a/b \udcff")
    unmeasured = record("2", begun_s=NOON_S + 1, energy=(), traffic=Traffic())
    ledger.add(written, unmeasured)
    with Ledger.open(path, read_only=True) as other:
        assert list(other.requests()) == [changed(written, model=r"a/b \udcff"), unmeasured]
        assert len(list(other.requests(model="a/b \udcff"))) == 1


def test_the_columns_are_the_figures_and_hold_no_text_of_a_conversation(ledger, path):
    with closing(sqlite3.connect(path)) as connection:
        columns = {row[1] for row in connection.execute("PRAGMA table_info(requests)")}
    measured = {f"{source}_{part}" for source in SOURCES for part in ("joules", "method")}
    used = {field.name for field in fields(Usage)} - {"energy", "traffic"}
    plain = {field.name for field in fields(RequestRecord)} - {"usage"}
    assert columns == plain | used | set(TRAFFIC_FIELDS) | measured


def test_requests_are_found_by_time_model_and_user(ledger):
    ledger.add(*(record(str(i), NOON_S + i, user="ab"[i % 2], model="mn"[i // 3]) for i in (4, 2, 0, 1, 3)))

    def ids(**chosen):
        return "".join(found.id for found in ledger.requests(**chosen))

    assert ids() == "01234"
    assert ids(since_s=NOON_S + 1, until_s=NOON_S + 3) == "12"
    assert ids(user="a") == "024"
    assert ids(user="a", model="n") == "4"
    assert ids(user="c") == ""


def test_a_request_written_twice_counts_once(ledger):
    ledger.add(record("1"), record("1"))
    ledger.add(record("1", prompt_tokens=999), record("2"))
    assert [found.usage.prompt_tokens for found in ledger.requests()] == [100, 100]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("decode_s", float("nan"), "nan is not finite"),
        ("prompt_tokens", 2**63, "does not fit into 63 bits"),
        ("prompt_tokens", 1.5, "'float' object cannot be interpreted as an integer"),
        ("user", None, "encode"),
        ("energy", (Joules("gpu", 1, "counter"), Joules("gpu", 2, "power")), "sources ['gpu', 'gpu']"),
        ("energy", (Joules("cpu", float("inf"), "counter"),), "inf is not finite"),
    ],
)
def test_a_bad_value_is_named_and_nothing_is_written(ledger, field, value, said):
    with pytest.raises(LedgerError, match="'odd'") as caught:
        ledger.add(record("1"), record("odd", **{field: value}))
    assert said in str(caught.value)
    assert list(ledger.requests()) == []


def test_numbers_of_numpy_are_stored_as_numbers(ledger):
    ledger.add(record("1", prompt_tokens=np.int64(7), decode_s=np.float32(0.5)))
    (total,) = ledger.totals()
    assert (total.usage.prompt_tokens, total.usage.decode_s) == (7, 0.5)


def test_the_part_of_an_idle_spell_within_the_range_counts(ledger):
    night = IdleSpell(NOON_S, 100.0, (Joules("gpu", 1000.0, "counter"), Joules("cpu", 10.0, "estimated")))
    instant = IdleSpell(NOON_S + 200, 0.0, (Joules("gpu", 0.5, "power"),))
    ledger.add_idle(night, instant)
    assert list(ledger.idle()) == [night, instant]
    (part,) = ledger.idle(NOON_S + 25, NOON_S + 75)
    assert (part.begun_s, part.seconds, part.joules) == (NOON_S + 25, 50.0, 505.0)
    assert list(ledger.idle(NOON_S + 100, NOON_S + 200)) == []
    assert list(ledger.idle(NOON_S + 200)) == [instant]


amounts = st.integers(0, 10**12)
seconds = st.floats(0, 1e5).map(lambda value: round(value * 64) / 64)
measured = st.lists(st.sampled_from(SOURCES), unique=True).flatmap(
    lambda sources: st.tuples(
        *(
            st.builds(
                Joules, st.just(s), st.floats(0, 1e9), st.sampled_from(["counter", "power", "estimated"])
            )
            for s in sources
        )
    )
)
requests = st.builds(
    record,
    st.uuids().map(str),
    seconds.map(lambda value: NOON_S + value),
    user=st.sampled_from("abc"),
    model=st.sampled_from("mn"),
    prompt_tokens=amounts,
    cached_tokens=amounts,
    completion_tokens=amounts,
    queue_s=seconds,
    prefill_s=seconds,
    decode_s=seconds,
    energy=measured,
    traffic=st.builds(Traffic, *[amounts] * len(TRAFFIC_FIELDS)),
)


def union_s(spans):
    """Length of the union of the spans, from their sorted edges."""
    edges = sorted({edge for span in spans for edge in span})
    return sum(b - a for a, b in pairwise(edges) if any(begin <= a and b <= end for begin, end in spans))


def check_total(total, rows):
    assert total.requests == len(rows)
    check_usage(total.usage, [row.usage for row in rows])
    begun = [row.begun_s + row.usage.queue_s for row in rows]
    worked = [(from_s, from_s + row.usage.work_s) for from_s, row in zip(begun, rows, strict=True)]
    assert total.busy_s == pytest.approx(union_s(worked), abs=1e-3)
    assert total.first_s == min((row.begun_s for row in rows), default=None)
    assert total.last_s == max((end for _, end in worked), default=None)


def check_usage(total, rows):
    for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "computed_tokens"):
        assert getattr(total, name) == sum(getattr(row, name) for row in rows)
    for name in ("queue_s", "prefill_s", "decode_s", "joules"):
        assert getattr(total, name) == pytest.approx(sum(getattr(row, name) for row in rows))
    assert total.traffic == sum((row.traffic for row in rows), Traffic())
    for source in SOURCES:
        parts = [part for row in rows for part in row.energy if part.source == source]
        found = [part for part in total.energy if part.source == source]
        assert len(found) == bool(parts)
        for part in found:
            assert part.joules == pytest.approx(sum(other.joules for other in parts))
            assert part.method == max((other.method for other in parts), key=METHODS.index)


@pytest.fixture(scope="module")
def reused(tmp_path_factory):
    with Ledger.open(tmp_path_factory.mktemp("reused") / "ledger") as ledger:
        yield ledger


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.lists(requests, max_size=12, unique_by=lambda row: row.id))
def test_totals_are_the_sums_over_the_rows(reused, rows):
    reused._connection.execute("DELETE FROM requests")
    reused.add(*rows)
    (total,) = reused.totals()
    check_total(total, rows)
    (total,) = reused.totals(NOON_S + 1e3, NOON_S + 5e4, model="m", user="a")
    check_total(total, list(reused.requests(NOON_S + 1e3, NOON_S + 5e4, "m", "a")))
    by_user = reused.totals(by="user")
    assert [total.key for total in by_user] == sorted({row.user for row in rows})
    for total in by_user:
        check_total(total, [row for row in rows if row.user == total.key])


def test_overlapping_requests_are_busy_once_and_waiting_is_not(ledger):
    spans = [(0, 10), (2, 3), (2, 12), (20, 21), (21, 22)]
    rows = [
        record(str(i), NOON_S + a - 5, queue_s=5, prefill_s=1, decode_s=b - a - 1)
        for i, (a, b) in enumerate(spans)
    ]
    ledger.add(*rows)
    assert ledger.totals()[0].busy_s == pytest.approx(14)


def test_days_are_those_of_local_time(ledger):
    late, early = datetime(2026, 11, 21, 23, 59), datetime(2026, 11, 22, 0, 1)
    ledger.add(record("1", late.timestamp()), record("2", early.timestamp()), record("3", early.timestamp()))
    days = ledger.totals(by="day")
    assert [(day.key, day.requests) for day in days] == [("2026-11-21", 1), ("2026-11-22", 2)]


def test_totals_of_an_empty_ledger(ledger):
    (total,) = ledger.totals()
    assert (total.requests, total.usage.joules, total.first_s) == (0, 0, None)
    assert ledger.totals(by="model") == []


def test_the_environment_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBOX_LEDGER", str(tmp_path / "mine.sqlite3"))
    with Ledger.open() as ledger:
        assert ledger.path == tmp_path / "mine.sqlite3"
    monkeypatch.setenv("MOEBOX_LEDGER", "~/mine")
    assert ledger_path() == Path.home() / "mine"
    monkeypatch.setenv("MOEBOX_LEDGER", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert ledger_path() == tmp_path / "moebox" / "ledger.sqlite3"


def test_a_path_may_hold_any_character(tmp_path):
    with Ledger.open(tmp_path / "what? 100% #1") as ledger:
        ledger.add(record("1"))
    assert (tmp_path / "what? 100% #1").stat().st_size


def test_many_may_open_a_new_file_at_once(path):
    def write(number):
        with Ledger.open(path) as ledger:
            ledger.add(record(str(number)))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    with Ledger.open(path, read_only=True) as ledger:
        assert len(list(ledger.requests())) == 8


def test_a_reader_sees_what_is_written_meanwhile(ledger, path):
    with Ledger.open(path, read_only=True) as reader:
        ledger.add(record("1"))
        assert len(list(reader.requests())) == 1
        with pytest.raises(LedgerError, match="cannot be written"):
            reader.add(record("2"))


def test_in_a_snapshot_nothing_changes(ledger, path):
    ledger.add(record("1"))
    with Ledger.open(path, read_only=True) as reader:
        with reader.snapshot():
            assert reader.totals()[0].requests == 1
            ledger.add(record("2"))
            assert reader.totals()[0].requests == len(list(reader.requests())) == 1
        assert reader.totals()[0].requests == 2


def fails(path, *said, read_only=True):
    with pytest.raises(LedgerError) as caught:
        Ledger.open(path, read_only=read_only)
    assert str(path) in caught.value.what
    assert caught.value.fix
    for words in said:
        assert words in str(caught.value)


def test_no_file(path):
    fails(path, "there is no ledger here", "moebox run")
    assert not path.parent.exists()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_text_file(tmp_path, read_only):
    (tmp_path / "notes.txt").write_text("not a database, and longer than the header of one. " * 10)
    fails(tmp_path / "notes.txt", "is not a ledger", "MOEBOX_LEDGER", read_only=read_only)


@pytest.mark.parametrize("read_only", [True, False])
def test_the_database_of_another_program_is_left_alone(tmp_path, read_only):
    other = tmp_path / "bookmarks.sqlite"
    with closing(sqlite3.connect(other)) as connection:
        connection.execute("CREATE TABLE bookmarks (url)")
    before = other.read_bytes()
    fails(other, "another program's database", read_only=read_only)
    assert other.read_bytes() == before


@pytest.mark.parametrize("read_only", [True, False])
def test_a_damaged_file(tmp_path, path, read_only):
    with Ledger.open(path) as ledger:
        ledger.add(*(record(str(i)) for i in range(200)))
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with (
        pytest.raises(LedgerError, match="is damaged") as caught,
        Ledger.open(path, read_only=read_only) as ledger,
    ):
        list(ledger.requests())
    assert "recover" in caught.value.fix


def test_a_full_disk(ledger):
    ledger.add(record("1"))
    ledger._connection.execute("PRAGMA max_page_count = 1")
    with pytest.raises(LedgerError, match="the disk is full") as caught:
        ledger.add(*(record(f"more {i}") for i in range(1000)))
    assert "Free some space" in caught.value.fix
    assert [row.id for row in ledger.requests()] == ["1"]


def test_a_folder_that_may_not_be_written(shared_folder):
    with unprivileged(shared_folder):
        fails(shared_folder / "ledger", "Permission denied", "writable", read_only=False)


def test_a_ledger_in_a_folder_that_may_not_be_written_is_readable(shared_folder):
    path = shared_folder / "ledger"
    with Ledger.open(path) as writer:
        writer.add(record("1"))
    with unprivileged(shared_folder):
        with Ledger.open(path, read_only=True) as ledger:
            assert [row.id for row in ledger.requests()] == ["1"]
        with pytest.raises(LedgerError, match="writable"), Ledger.open(path) as ledger:
            ledger.add(record("2"))


def test_a_ledger_that_another_user_is_writing_is_readable(shared_folder):
    path = shared_folder / "ledger"
    with Ledger.open(path) as writer:
        writer.add(record("1"))
        with unprivileged(shared_folder), Ledger.open(path, read_only=True) as ledger:
            assert [row.id for row in ledger.requests()] == ["1"]


def test_a_closed_ledger_says_so(path):
    with Ledger.open(path) as ledger:
        pass
    with pytest.raises(LedgerError, match="closed"):
        ledger.add(record("1"))

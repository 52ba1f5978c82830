"""The thread that writes the ledger."""

import logging
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from contextlib import closing

import pytest

from helpers.ledger import NOON_S, record
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.ledger.writer import LedgerWriter
from moebox.cost.usage import IdleSpell, Joules

IDLE = IdleSpell(NOON_S, 60.0, (Joules("gpu", 4800.0, "counter"),))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "ledger.sqlite3"


@pytest.fixture
def writer(path):
    opened = LedgerWriter(path)
    yield opened
    opened.close()


def ids(path):
    with Ledger.open(path, read_only=True) as ledger:
        return [row.id for row in ledger.requests()]


def test_rows_are_in_the_ledger_after_a_flush(writer, path):
    writer.put(record("1"))
    writer.put(IDLE)
    assert writer.flush()
    with Ledger.open(path, read_only=True) as ledger:
        assert list(ledger.requests()) == [record("1")]
        assert list(ledger.idle()) == [IDLE]


def test_rows_are_written_soon_without_a_flush(writer, path):
    writer.put(record("1"))
    end_s = time.monotonic() + 10
    while not (path.exists() and path.stat().st_size and ids(path)):
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_no_file_is_made_before_the_first_row(writer, path):
    assert writer.flush()
    assert not path.parent.exists()


def test_put_takes_less_than_a_millisecond(writer, path):
    taken_s = []
    for number in range(500):
        row = record(str(number))
        begun_s = time.perf_counter()
        writer.put(row)
        taken_s.append(time.perf_counter() - begun_s)
    assert statistics.median(taken_s) < 1e-3
    assert writer.flush()
    assert len(ids(path)) == 500


def test_put_does_not_wait_for_another_process_that_writes(writer, path):
    writer.put(record("first"))
    assert writer.flush()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        begun_s = time.monotonic()
        for number in range(100):
            writer.put(record(str(number)))
        waited_s = time.monotonic() - begun_s
        assert ids(path) == ["first"]
        other.execute("COMMIT")
    assert waited_s < 1
    assert writer.flush()
    assert len(ids(path)) == 101


def test_rows_are_kept_while_the_file_cannot_be_written(writer, path, caplog):
    path.parent.write_text("a file where the folder should be")
    for number in range(3):
        writer.put(record(str(number)))
        assert not writer.flush()
    path.parent.unlink()
    assert writer.flush()
    assert ids(path) == ["0", "1", "2"]
    (logged,) = caplog.records
    assert logged.levelno == logging.ERROR
    assert str(path) in logged.message


def test_closing_logs_the_number_of_lost_rows(path, caplog):
    path.parent.write_text("a file where the folder should be")
    writer = LedgerWriter(path)
    writer.put(record("1"))
    writer.put(IDLE)
    writer.close()
    writer.close()
    assert [logged.message for logged in caplog.records][1:] == [
        f"{path}: 2 requests or idle spells could not be recorded"
    ]


def test_closing_writes_what_is_left(path):
    writer = LedgerWriter(path)
    for number in range(50):
        writer.put(record(str(number)))
    writer.close()
    assert len(ids(path)) == 50
    assert {file.name for file in path.parent.iterdir()} == {"ledger.sqlite3", ".ledger.sqlite3.lock"}


def test_a_row_after_closing_is_logged_and_raises_nothing(path, caplog):
    writer = LedgerWriter(path)
    writer.close()
    writer.put(record("1"))
    writer.put(record("2"))
    (logged,) = caplog.records
    assert "closed" in logged.message


def test_the_number_of_waiting_rows_is_limited(path, caplog, monkeypatch):
    monkeypatch.setattr("moebox.cost.ledger.writer.MAX_WAITING_ROWS", 2)
    path.parent.write_text("a file where the folder should be")
    writer = LedgerWriter(path)
    for number in range(5):
        writer.put(record(str(number)))
    path.parent.unlink()
    writer.close()
    assert ids(path) == ["0", "1"]
    assert "3 requests or idle spells could not be recorded" in caplog.text


def test_a_bad_row_does_not_delay_the_others(writer, path, caplog):
    writer.put(record("1"))
    writer.put(record("odd", decode_s=float("nan")))
    writer.put(record("2"))
    assert writer.flush()
    assert ids(path) == ["1", "2"]
    assert "'odd' cannot be recorded: nan is not finite" in caplog.text


def test_a_deleted_file_is_created_again(writer, path):
    writer.put(record("1"))
    assert writer.flush()
    path.unlink()
    writer.put(record("2"))
    assert writer.flush()
    assert ids(path) == ["2"]


def test_many_threads_may_put(writer, path):
    def put(name):
        for number in range(50):
            writer.put(record(f"{name} {number}"))

    threads = [threading.Thread(target=put, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert writer.flush()
    assert len(ids(path)) == 400


def test_the_end_of_the_program_writes_what_is_left(path):
    program = (
        "import sys; from pathlib import Path; from moebox.cost.ledger.writer import LedgerWriter\n"
        "from helpers.ledger import record\n"
        "writer = LedgerWriter(Path(sys.argv[1]))\n"
        "for number in range(100): writer.put(record(str(number)))\n"
        "raise SystemExit('with an error')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, path], check=False, env={"PYTHONPATH": "tests"})
    assert done.returncode == 1
    assert len(ids(path)) == 100

"""Ledgers of other versions, created by the SQL of those versions."""

import sqlite3
from contextlib import closing

import pytest

from helpers.ledger import record
from moebox.cost.ledger.ledger import Ledger
from moebox.cost.ledger.schema import MIGRATIONS, upgrade
from moebox.cost.usage import IdleSpell, Joules
from moebox.errors import LedgerError

VERSION_1 = """
PRAGMA journal_mode = WAL;
CREATE TABLE requests (
    id TEXT PRIMARY KEY NOT NULL, begun_s REAL NOT NULL, model TEXT NOT NULL, user TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL, cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    queue_s REAL NOT NULL, prefill_s REAL NOT NULL, decode_s REAL NOT NULL, finish_reason TEXT NOT NULL,
    gpu_hits INTEGER NOT NULL, ram_hits INTEGER NOT NULL, disk_hits INTEGER NOT NULL,
    pcie_bytes INTEGER NOT NULL, cpu_bytes INTEGER NOT NULL, disk_bytes INTEGER NOT NULL,
    gpu_joules REAL, gpu_method TEXT, cpu_joules REAL, cpu_method TEXT, dram_joules REAL, dram_method TEXT
);
CREATE INDEX requests_by_time ON requests (begun_s);
CREATE TABLE idle (
    id TEXT PRIMARY KEY NOT NULL, begun_s REAL NOT NULL, seconds REAL NOT NULL,
    gpu_joules REAL, gpu_method TEXT, cpu_joules REAL, cpu_method TEXT, dram_joules REAL, dram_method TEXT
);
CREATE INDEX idle_by_time ON idle (begun_s);
INSERT INTO requests VALUES ('1', 1795348800.0, 'kimi-k2', 'ada', 100, 40, 25, 0.125, 1.5, 2.75, 'stop',
    1, 2, 3, 1000000000000, 5, 6, 812.5, 'counter', NULL, NULL, 3.25, 'estimated');
INSERT INTO idle VALUES ('a', 1795348900.0, 60.0, 4800.0, 'counter', NULL, NULL, NULL, NULL);
PRAGMA application_id = 1836016994;
PRAGMA user_version = 1;
"""
ADDED = ("ALTER TABLE requests ADD COLUMN energy_region TEXT NOT NULL DEFAULT 'unknown'",)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def first_version(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(VERSION_1)
    return path


def tables_of(path):
    with closing(sqlite3.connect(path)) as connection:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE sql NOT NULL")]
        columns = [[row[1:4] for row in connection.execute(f"PRAGMA table_info({name})")] for name in names]
    return version, names, columns


def test_version_1_is_what_it_was(first_version, tmp_path):
    with closing(sqlite3.connect(tmp_path / "new", isolation_level=None)) as connection:
        upgrade(connection, tmp_path / "new", MIGRATIONS[:1])
    assert tables_of(tmp_path / "new") == tables_of(first_version)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_of_version_1_is_read(first_version, read_only):
    with Ledger.open(first_version, read_only=read_only) as ledger:
        assert list(ledger.requests()) == [record("1")]
        assert list(ledger.idle()) == [IdleSpell(1795348900.0, 60.0, (Joules("gpu", 4800.0, "counter"),))]
    assert tables_of(first_version)[0] == len(MIGRATIONS)


def test_a_migration_keeps_the_rows_and_an_older_moebox_can_go_on_writing(first_version):
    with Ledger.open(first_version) as older:
        with closing(sqlite3.connect(first_version, isolation_level=None)) as connection:
            upgrade(connection, first_version, (*MIGRATIONS, ADDED))
            upgrade(connection, first_version, (*MIGRATIONS, ADDED))
            older.add(record("2"))
            assert connection.execute("SELECT id, energy_region FROM requests").fetchall() == [
                ("1", "unknown"),
                ("2", "unknown"),
            ]
        assert [row.id for row in older.requests()] == ["1", "2"]
    assert tables_of(first_version)[0] == len(MIGRATIONS) + 1


def test_a_migration_that_fails_leaves_the_file_as_it_was(first_version):
    before = tables_of(first_version)
    with closing(sqlite3.connect(first_version, isolation_level=None)) as connection:
        with pytest.raises(sqlite3.OperationalError):
            upgrade(connection, first_version, (*MIGRATIONS, ADDED, ("CREATE TABLE requests (id)",)))
        assert not connection.in_transaction
    assert tables_of(first_version) == before


@pytest.mark.parametrize("read_only", [True, False])
def test_an_empty_file_becomes_a_ledger(path, read_only):
    path.touch()
    with Ledger.open(path, read_only=read_only) as ledger:
        assert list(ledger.requests()) == []
    assert tables_of(path)[0] == len(MIGRATIONS)


@pytest.mark.parametrize("read_only", [True, False])
def test_a_newer_version_is_refused_and_left_alone(first_version, read_only):
    with closing(sqlite3.connect(first_version)) as connection:
        connection.execute("PRAGMA user_version = 99")
    before = tables_of(first_version)
    with pytest.raises(LedgerError, match=r"ledger of version 99.*versions up to \d+") as caught:
        Ledger.open(first_version, read_only=read_only)
    assert str(first_version) in caught.value.what
    assert "Update moebox" in caught.value.fix
    assert tables_of(first_version) == before

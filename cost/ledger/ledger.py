"""The ledger: the usage of every request, in one SQLite file in the user's data folder.

It holds neither prompts nor answers. Several processes may write and read it at the same time. A row that
`add` has written survives a crash of the process, and a loss of power if the drive honours flushes.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from moebox.cost.ledger.rows import (
    IDLE_COLUMNS,
    REQUEST_COLUMNS,
    Row,
    idle_row,
    record_of,
    request_row,
    spell_of,
    text_value,
)
from moebox.cost.ledger.schema import MIGRATIONS, upgrade, version_of
from moebox.cost.ledger.totals import CHOSEN, Key, Totals, totals_by
from moebox.cost.usage import IdleSpell, RequestRecord
from moebox.errors import LedgerError
from moebox.files import locked
from moebox.folders import data_folder

log = logging.getLogger("moebox")

LEDGER_FILE = "ledger.sqlite3"
BUSY_S = 10.0
"""Seconds to wait for another process that is writing."""
READ_CACHE_KIB = 65_536
"""Holds about 250,000 requests. With SQLite's default of 2 MB, sums over 100,000 take 1.5 times as long."""


def ledger_path() -> Path:
    """The path in the environment variable `MOEBOX_LEDGER`, else `ledger.sqlite3` in the data folder."""
    given = os.environ.get("MOEBOX_LEDGER")
    return Path(given).expanduser() if given else data_folder() / LEDGER_FILE


class Ledger:
    """One connection to the ledger, to be used by the thread that opened it. A context manager closes it.

    Every method raises `LedgerError` where the file cannot be read or written.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._file = _identity(path)

    @classmethod
    def open(cls, path: Path | None = None, *, read_only: bool = False) -> Ledger:
        """Open the ledger at `path`, by default `ledger_path()`; create a missing file, upgrade an older one.

        Args:
            read_only: the file must exist; a file of an older version is upgraded all the same.

        Raises:
            LedgerError: the file is missing, no ledger, damaged or of a newer version, or the file or its
                folder cannot be read or written.
        """
        path = path or ledger_path()
        with _errors_named(path):
            if read_only:
                _check_exists(path)
            if not _is_newest(path):
                _make(path)
            return cls(path, _connect_to_read(path) if read_only else _connect_to_write(path))

    def add(self, *records: RequestRecord) -> None:
        """Write all requests, or none after an error; one whose id is in the file is left out."""
        self.write([request_row(record) for record in records], [])

    def add_idle(self, *spells: IdleSpell) -> None:
        """Write all idle spells, or none after an error."""
        self.write([], [idle_row(spell) for spell in spells])

    def write(self, requests: Sequence[Row], spells: Sequence[Row]) -> None:
        """Write all rows of `rows.py`, or none after an error; a row whose id is in the file is left out."""
        with _errors_named(self.path), _transaction(self._connection):
            self._connection.executemany(_insert("requests", REQUEST_COLUMNS), requests)
            self._connection.executemany(_insert("idle", IDLE_COLUMNS), spells)

    def requests(
        self,
        since_s: float | None = None,
        until_s: float | None = None,
        model: str | None = None,
        user: str | None = None,
    ) -> Iterator[RequestRecord]:
        """Requests that began at `since_s` or later and before `until_s` (Unix time), in order of time."""
        columns = ", ".join(REQUEST_COLUMNS)
        statement = f"SELECT {columns} FROM requests WHERE {CHOSEN} ORDER BY begun_s, id"
        with _errors_named(self.path):
            for row in self._connection.execute(statement, _chosen(since_s, until_s, model, user)):
                yield record_of(row)

    def idle(self, since_s: float | None = None, until_s: float | None = None) -> Iterator[IdleSpell]:
        """Idle spells in order of time. A spell across an end of the range counts with its part within the
        range, and with the same part of its joules.
        """
        begin_s, end_s = _range(since_s, until_s)
        columns = ", ".join(IDLE_COLUMNS)
        statement = f"""
            SELECT {columns} FROM idle
            WHERE begun_s < :end_s AND (begun_s >= :begin_s OR begun_s + seconds > :begin_s)
            ORDER BY begun_s, id
        """
        with _errors_named(self.path):
            for row in self._connection.execute(statement, {"begin_s": begin_s, "end_s": end_s}):
                yield _within(spell_of(row), begin_s, end_s)

    def totals(
        self,
        since_s: float | None = None,
        until_s: float | None = None,
        model: str | None = None,
        user: str | None = None,
        *,
        by: Key | None = None,
    ) -> list[Totals]:
        """Sums over the requests of `requests`, one entry for each model, user or day, in their order.

        With `by` None there is exactly one entry, also where there are no requests.
        """
        with _errors_named(self.path):
            return totals_by(self._connection, by, _chosen(since_s, until_s, model, user))

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """A context in which all reads see the file at one moment, whatever is written meanwhile."""
        with _errors_named(self.path):
            self._connection.execute("BEGIN")
        try:
            yield
        finally:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")

    def is_current(self) -> bool:
        """Whether the open file is still the one at `path`; it may have been deleted or replaced."""
        return self._file is not None and self._file == _identity(self.path)

    def close(self) -> None:
        """Close the connection."""
        with _errors_named(self.path):
            self._connection.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise LedgerError(
            f"{path}: there is no ledger here",
            "The first answer of `moebox run` or `moebox chat` makes one; "
            "MOEBOX_LEDGER=PATH names another file.",
        )


def _is_newest(path: Path) -> bool:
    if not path.exists():
        return False
    with closing(_connect_to_read(path)) as connection:
        return version_of(connection, path) == len(MIGRATIONS)


def _make(path: Path) -> None:
    # The lock admits one process at a time, since SQLite does not wait while another one turns WAL on.
    with locked(path), closing(_connect(path, "rwc")) as connection:
        (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            log.warning("%s: no write-ahead log here (%s); readers wait for writers", path, mode)
        upgrade(connection, path)


def _connect_to_write(path: Path) -> sqlite3.Connection:
    connection = _connect(path, "rw")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _connect_to_read(path: Path) -> sqlite3.Connection:
    # Connections with mode=ro would leave the files of the write-ahead log behind. With mode=rw, SQLite
    # itself opens a file read-only that may not be written.
    connection = _connect(path, "rw")
    try:
        connection.execute("PRAGMA query_only = ON")
        connection.execute(f"PRAGMA cache_size = -{READ_CACHE_KIB}")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        connection.close()
        shut = _code(error) in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
        if not shut or Path(f"{path}-wal").exists():
            raise
        # No process has the file open, and SQLite cannot create the files that it shares with other processes
        # in a folder that may not be written.
        return _connect(path, "ro&immutable=1")
    return connection


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _insert(table: str, columns: Sequence[str]) -> str:
    # OR IGNORE would also ignore a missing value.
    values = ", ".join("?" * len(columns))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values}) ON CONFLICT (id) DO NOTHING"


def _chosen(
    since_s: float | None, until_s: float | None, model: str | None, user: str | None
) -> dict[str, Any]:
    begin_s, end_s = _range(since_s, until_s)
    model, user = (name and text_value(name) for name in (model, user))
    return {"since_s": begin_s, "until_s": end_s, "model": model, "user": user}


def _range(since_s: float | None, until_s: float | None) -> tuple[float, float]:
    return -math.inf if since_s is None else since_s, math.inf if until_s is None else until_s


def _within(spell: IdleSpell, begin_s: float, end_s: float) -> IdleSpell:
    until_s = spell.begun_s + spell.seconds
    if begin_s <= spell.begun_s and until_s <= end_s:
        return spell
    first_s = max(begin_s, spell.begun_s)
    seconds = min(end_s, until_s) - first_s
    energy = tuple(replace(part, joules=part.joules * seconds / spell.seconds) for part in spell.energy)
    return IdleSpell(first_s, seconds, energy)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


_ELSEWHERE = "or name another file with MOEBOX_LEDGER=PATH."
_CAUSES = {
    sqlite3.SQLITE_CANTOPEN: ("cannot be opened", f"Make its folder writable, {_ELSEWHERE}"),
    sqlite3.SQLITE_READONLY: ("cannot be written", f"Make it and its folder writable, {_ELSEWHERE}"),
    sqlite3.SQLITE_PERM: ("cannot be read", f"Make it readable, {_ELSEWHERE}"),
    sqlite3.SQLITE_NOTADB: ("is not a ledger", f"Move it away, {_ELSEWHERE}"),
    sqlite3.SQLITE_CORRUPT: (
        "is damaged",
        "Save what can be read with `sqlite3 FILE .recover`, and move it away.",
    ),
    sqlite3.SQLITE_FULL: ("the disk is full", f"Free some space there, {_ELSEWHERE}"),
    sqlite3.SQLITE_BUSY: (
        f"another process has been writing for {BUSY_S:g} seconds",
        "End the one that hangs: `fuser FILE` names it.",
    ),
}


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Turn errors of SQLite and of the system into a `LedgerError` that names the file and the fix."""
    try:
        yield
    except sqlite3.Error as error:
        what, fix = _CAUSES.get(_code(error), ("failed", f"Look at the drive, {_ELSEWHERE}"))
        raise LedgerError(f"{path}: {what} ({error})", fix) from error
    except OSError as error:
        fix = f"Make its folder writable, {_ELSEWHERE}"
        raise LedgerError(f"{path}: {error.strerror or error}", fix) from error


def _code(error: sqlite3.Error) -> int:
    # Errors of the Python module itself, such as a closed connection, have no code of SQLite.
    return int(getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)) & 0xFF

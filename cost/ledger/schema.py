"""The ledger's tables, and the migrations that upgrade a file of an older version.

A released version never changes; a new version is a new entry of `MIGRATIONS`. A migration only adds tables,
indexes, and columns with a default, so that an older moebox that is running meanwhile can go on writing. For
a new field of `Usage`:

    ("ALTER TABLE requests ADD COLUMN name INTEGER NOT NULL DEFAULT 0",)
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from moebox.errors import LedgerError

APPLICATION_ID = 0x6D6F6562
"""`moeb` in ASCII, in the file's header: distinguishes a ledger from SQLite files of other programs."""

Migration = tuple[str, ...]

_FIRST: Migration = (
    """
    CREATE TABLE requests (
        id TEXT PRIMARY KEY NOT NULL,
        begun_s REAL NOT NULL,
        model TEXT NOT NULL,
        user TEXT NOT NULL,
        prompt_tokens INTEGER NOT NULL,
        cached_tokens INTEGER NOT NULL,
        completion_tokens INTEGER NOT NULL,
        queue_s REAL NOT NULL,
        prefill_s REAL NOT NULL,
        decode_s REAL NOT NULL,
        finish_reason TEXT NOT NULL,
        gpu_hits INTEGER NOT NULL,
        ram_hits INTEGER NOT NULL,
        disk_hits INTEGER NOT NULL,
        pcie_bytes INTEGER NOT NULL,
        cpu_bytes INTEGER NOT NULL,
        disk_bytes INTEGER NOT NULL,
        gpu_joules REAL,
        gpu_method TEXT,
        cpu_joules REAL,
        cpu_method TEXT,
        dram_joules REAL,
        dram_method TEXT
    )
    """,
    "CREATE INDEX requests_by_time ON requests (begun_s)",
    """
    CREATE TABLE idle (
        id TEXT PRIMARY KEY NOT NULL,
        begun_s REAL NOT NULL,
        seconds REAL NOT NULL,
        gpu_joules REAL,
        gpu_method TEXT,
        cpu_joules REAL,
        cpu_method TEXT,
        dram_joules REAL,
        dram_method TEXT
    )
    """,
    "CREATE INDEX idle_by_time ON idle (begun_s)",
)

MIGRATIONS: tuple[Migration, ...] = (_FIRST,)
"""Entry n holds the statements that upgrade a file from version n to n + 1. Version 0 is an empty file."""


def version_of(connection: sqlite3.Connection, path: Path, newest: int = len(MIGRATIONS)) -> int:
    """The version of the ledger at `path`; 0: the file is empty.

    Raises:
        LedgerError: the file belongs to another program, or its version is above `newest`.
    """
    (owner,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if owner != APPLICATION_ID and (owner or version or objects):
        raise LedgerError(
            f"{path}: is another program's database, not a ledger of moebox",
            "Name another file with MOEBOX_LEDGER=PATH, or move this one away.",
        )
    if version > newest:
        raise LedgerError(
            f"{path}: is a ledger of version {version}; this moebox knows versions up to {newest}",
            "Update moebox, or name another file with MOEBOX_LEDGER=PATH.",
        )
    return int(version)


def upgrade(connection: sqlite3.Connection, path: Path, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Upgrade the file to the newest version, in one transaction; an error leaves the file unchanged.

    Raises:
        LedgerError: as `version_of`.
        sqlite3.Error: a statement failed.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        # The version is read again, since another process may have upgraded the file meanwhile.
        for statements in migrations[version_of(connection, path, len(migrations)) :]:
            for statement in statements:
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")

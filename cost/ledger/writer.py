"""Writes the ledger in a thread, so that no answer waits for a drive."""

from __future__ import annotations

import atexit
import logging
import threading
from pathlib import Path

from moebox.cost.ledger.ledger import Ledger, ledger_path
from moebox.cost.ledger.rows import Row, idle_row, request_row
from moebox.cost.usage import IdleSpell, RequestRecord
from moebox.errors import LedgerError

log = logging.getLogger("moebox")

RETRY_S = 10.0
MAX_WAITING_ROWS = 100_000
"""Rows that are kept while they cannot be written (about 100 MB). Further rows are lost, and counted."""


class LedgerWriter:
    """Takes rows from any thread, and writes them soon after.

    No error of the ledger stops the program: each kind of error is logged once, and rows that could not be
    written are kept and tried again every `RETRY_S` seconds, and on `close`. The file is opened with the
    first row. The end of the program calls `close`; a kill may lose the rows of the last moment.

    Args:
        path: the ledger, by default `ledger_path()`.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or ledger_path()
        self._changed = threading.Condition()
        # `_changed` guards these.
        self._waiting: list[RequestRecord | IdleSpell] = []
        self._taken = self._done = self._lost = 0
        self._tries = self._failed_try = 0
        self._hurry = self._closed = False
        # Only the writing thread uses these.
        self._ledger: Ledger | None = None
        self._requests: list[Row] = []
        self._spells: list[Row] = []
        self._said: set[str] = set()
        self._said_lost = 0
        self._thread = threading.Thread(target=self._run, name="moebox-ledger", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, item: RequestRecord | IdleSpell) -> None:
        """Hand over a row; takes some microseconds, whatever the drive does."""
        with self._changed:
            kept = self._taken + len(self._waiting) - self._done
            if self._closed or kept >= MAX_WAITING_ROWS:
                self._lost += 1
                self._say(f"{self.path}: {'closed' if self._closed else 'full'}; requests are not recorded")
                return
            self._waiting.append(item)
            self._changed.notify_all()

    def flush(self) -> bool:
        """Wait until all rows are on the drive (True), or a new attempt to write them has failed (False)."""
        with self._changed:
            due = self._taken + len(self._waiting)
            tries = self._tries
            self._hurry = True
            self._changed.notify_all()
            while self._done < due and self._failed_try <= tries and self._thread.is_alive():
                self._changed.wait(1.0)
            return self._done >= due

    def close(self) -> None:
        """Write the rows that are left, and end the thread; logs the number of lost rows, if any."""
        atexit.unregister(self.close)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        lost = self._lost + self._taken + len(self._waiting) - self._done
        if lost > self._said_lost:
            self._said_lost = lost
            log.error("%s: %d requests or idle spells could not be recorded", self.path, lost)

    def _run(self) -> None:
        closed = False
        while not closed:
            closed = self._pause()
            self._write()
        if self._ledger:
            self._ledger.close()

    def _pause(self) -> bool:
        """Wait for rows, for the next attempt, or for `close`; whether it is `close`."""
        with self._changed:
            if self._requests or self._spells:
                self._changed.wait_for(lambda: self._closed or self._hurry, RETRY_S)
            else:
                self._changed.wait_for(lambda: self._closed or self._waiting)
            return self._closed

    def _write(self) -> None:
        with self._changed:
            items, self._waiting = self._waiting, []
            self._taken += len(items)
            self._tries += 1
            self._hurry = False
        for item in items:
            self._convert(item)
        failed = not self._write_rows()
        with self._changed:
            if failed:
                self._failed_try = self._tries
            else:
                self._done = self._taken
            self._changed.notify_all()

    def _convert(self, item: RequestRecord | IdleSpell) -> None:
        try:
            if isinstance(item, RequestRecord):
                self._requests.append(request_row(item))
            else:
                self._spells.append(idle_row(item))
        except LedgerError as error:
            with self._changed:
                self._lost += 1
            self._say(str(error))

    def _write_rows(self) -> bool:
        if not (self._requests or self._spells):
            return True
        try:
            self._open().write(self._requests, self._spells)
        except LedgerError as error:
            self._say(f"{error}\nThe requests are kept meanwhile, and tried again.")
            return False
        self._requests, self._spells = [], []
        return True

    def _open(self) -> Ledger:
        # A user may delete the file to begin a new one.
        if self._ledger and not self._ledger.is_current():
            self._ledger.close()
            self._ledger = None
        if self._ledger is None:
            self._ledger = Ledger.open(self.path)
        return self._ledger

    def _say(self, problem: str) -> None:
        if problem not in self._said:
            self._said.add(problem)
            log.error("%s", problem)

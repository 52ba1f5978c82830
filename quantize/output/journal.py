"""What makes `quantize` resumable: a lock on the destination and a journal of finished shards.

Both are in `DST/.moebox/` until the output is complete. The journal has one JSON object a line. The first
line says what is being made (source, method, size of shards); each further line is one finished shard. It is
appended and synced after the shard itself was synced and renamed. So every shard that the journal names is
whole, and everything else may be deleted.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from moebox.errors import BusyError, CheckpointError
from moebox.files import FileLock, sync_folder, writing

WORK_FOLDER = ".moebox"
_JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = "lock"


class DestinationLock:
    """Only one process at a time writes to a destination; the lock ends with its process.

    The lock file holds its owner's process id. `release_and_remove` removes it while it is still locked.
    """

    def __init__(self, dst: Path) -> None:
        self._dst = dst
        self._lock = FileLock(dst / WORK_FOLDER / LOCK_FILE)

    def acquire(self) -> None:
        """Take the lock, creating `DST/.moebox` where it is missing.

        Raises:
            BusyError: another process holds it; the message gives its process id.
            OSError: `DST/.moebox` cannot be created.
        """
        if not self._lock.acquire(wait=False):
            raise BusyError(
                f"{self._dst}: process {self._owner() or 'unknown'} is writing it",
                "Wait until it has finished, or stop it and run the same command again.",
            )
        self._lock.path.write_text(f"{os.getpid()}\n")

    def _owner(self) -> str:
        with suppress(FileNotFoundError):  # it has just finished
            return self._lock.path.read_text(errors="replace").strip()
        return ""

    def release(self) -> None:
        """Release the lock; `DST/.moebox` stays, so that a later run can resume."""
        self._lock.release()

    def release_and_remove(self) -> None:
        """Remove `DST/.moebox` and release the lock. Does nothing without the lock."""
        if not self._lock.held:
            return
        folder = self._lock.path.parent
        for child in folder.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child != self._lock.path:
                child.unlink()
        self._lock.path.unlink(missing_ok=True)
        with suppress(OSError):  # another process may have created its lock file there already
            folder.rmdir()
        self._lock.release()


class Journal:
    """The finished shards of one destination.

    Attributes:
        header: the first line, None before `start`.
        shards: file name -> what `add_shard` was given.
    """

    def __init__(self, dst: Path) -> None:
        self.path = dst / WORK_FOLDER / _JOURNAL_FILE
        self.header: dict[str, Any] | None = None
        self.shards: dict[str, dict[str, Any]] = {}
        self._good_bytes = 0

    def load(self) -> None:
        """Read the journal, if there is one; a last line that a kill or a power cut has torn is ignored.

        Raises:
            CheckpointError: a line before the last one is damaged.
        """
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            entry = _parse(line)
            if entry is None and number == len(lines):
                return
            if entry is None or (self.header is not None and "shard" not in entry):
                raise CheckpointError(
                    f"{self.path}: line {number} is damaged", "Start over with --no-resume."
                )
            self._good_bytes += len(line)
            if self.header is None:
                self.header = entry
            else:
                self.shards[entry["shard"]] = entry

    def start(self, header: dict[str, Any]) -> None:
        """Begin a new journal with the line `header`."""
        self.shards, self._good_bytes = {}, 0
        self._append(header)
        self.header = header
        sync_folder(self.path.parent)

    def add_shard(self, entry: dict[str, Any]) -> None:
        """Append a shard that is synced and has its final name; `entry["shard"]` is that name."""
        self._append(entry)
        self.shards[entry["shard"]] = entry

    def _append(self, entry: dict[str, Any]) -> None:
        line = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        with writing(self.path), self.path.open("ab") as file:
            os.ftruncate(file.fileno(), self._good_bytes)  # drops a torn line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._good_bytes += len(line)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None

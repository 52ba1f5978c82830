"""What makes `quantize` resumable: a lock on the destination and a journal of finished shards.

Both live in `DST/.moebox/` until the output is complete. The journal is one JSON object per line. The
first line says what is being made (source, method, plan); each further line is one finished shard,
appended and synced only after the shard itself was synced and renamed. So whatever the journal names
is whole, and everything else may be thrown away.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from moebox.errors import BusyError, CheckpointError
from moebox.quantize.files import sync_folder, writing

WORK_FOLDER = ".moebox"
_JOURNAL_FILE = "journal.jsonl"
_LOCK_FILE = "lock"


class DestinationLock:
    """Only one process at a time works on a destination; the lock dies with its process."""

    def __init__(self, dst: Path) -> None:
        self.path = dst / WORK_FOLDER / _LOCK_FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, making `DST/.moebox` where it is missing.

        Raises:
            BusyError: another process holds it; names its pid.
        """
        while self._descriptor is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:  # a finishing process has just removed the folder
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                os.close(descriptor)
                raise BusyError(
                    f"{self.path.parent.parent}: process {pid or 'unknown'} is writing it",
                    "Wait until it has finished, or stop it and run the same command again.",
                ) from None
            if self._is_current(descriptor):
                self._descriptor = descriptor
            else:  # locked a file that its former owner had removed meanwhile
                os.close(descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go; the folder stays for a later run to resume from."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def release_and_remove(self) -> None:
        """Let go and remove `DST/.moebox`; the lock file goes last, while it is still held."""
        if self._descriptor is None:
            return
        folder = self.path.parent
        for child in folder.iterdir():
            if child.is_dir():
                shutil.rmtree(child)
            elif child != self.path:
                child.unlink()
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # another process may be waiting in it already
            folder.rmdir()
        self.release()


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
        """Read what is there. A torn last line, from a kill or a power cut while appending, is ignored.

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
        """Begin an empty journal with `header`."""
        self.shards, self._good_bytes = {}, 0
        self._append(header)
        self.header = header
        sync_folder(self.path.parent)

    def add_shard(self, entry: dict[str, Any]) -> None:
        """Record a shard that is safely on disk; `entry["shard"]` is its file name."""
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

"""Files that must survive a crash, a full disk or a second process: locks, durable writes, readable errors.

A durable write goes to a temporary name, is synced and renamed, and then the folder is synced. A reader sees
the old file or the new one, never a part of it, and so does the next start after a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moebox.errors import CheckpointError, MoeboxError, PlanError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FileLock:
    """An exclusive lock (`flock`) on a file, which is created where it is missing.

    The lock ends with `release` or with its process. The owner may remove the file while it holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._descriptor is not None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; with `wait` False, return False where another holder has it.

        Raises:
            OSError: the file or its folder cannot be created.
        """
        operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
        while not self.held:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:  # the former owner has just removed the folder
                continue
            try:
                fcntl.flock(descriptor, operation)
                if self._is_current(descriptor):  # else the former owner has removed this file meanwhile
                    self._descriptor = descriptor
            except BlockingIOError:
                return False
            finally:
                if self._descriptor != descriptor:
                    os.close(descriptor)
        return True

    def _is_current(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the lock up, if this object has it; the file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait until no other process is in a `locked` block of the same `path`; its folder is created.

    The lock is on `.NAME.lock` beside `path`, so that `path` itself may be replaced.

    Raises:
        OSError: the folder or the lock file cannot be created.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` durably. The caller sees to it that no other process writes `path` meanwhile.

    Raises:
        OSError: the file at `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            publish(file.fileno(), partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def publish(descriptor: int, partial: Path, path: Path) -> None:
    """Sync the file `partial`, open as `descriptor`, rename it to `path`, and sync the folder of `path`."""
    os.fsync(descriptor)
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing_folder(folder: Path) -> Path:
    """`folder`, or its nearest parent that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written at `folder`, or at its nearest parent that exists."""
    return shutil.disk_usage(existing_folder(folder)).free


def write_error(error: OSError, path: Path) -> MoeboxError:
    """What to raise for an `OSError` of writing `path`: `PlanError` for a full disk, or `CheckpointError`."""
    if error.errno in _DISK_FULL:
        return PlanError(
            f"{path}: disk full or file size limit reached ({error.strerror}); "
            f"{free_bytes(path.parent) / 1e9:.2f} GB are free",
            "Free some space and run the same command again: finished files are kept.",
        )
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror or error}",
        "Choose a destination that this user may write to.",
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `write_error` for an `OSError` of the block; it names the file of the error, or else `path`."""
    try:
        yield
    except OSError as error:
        raise write_error(error, Path(error.filename) if isinstance(error.filename, str) else path) from error

"""Small things that writing must get right: durable files, page-cache hints, readable disk errors."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moebox.errors import CheckpointError, MoeboxError, PlanError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data` at once: a reader or a crash sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written at `folder`, or at the nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_error(error: OSError, path: Path) -> MoeboxError:
    """An OSError met while writing `path`, as a message with its fix."""
    if error.errno in _DISK_FULL:
        return PlanError(
            f"{path}: disk full or file size limit reached ({error.strerror}); "
            f"{free_bytes(path.parent) / 1e9:.2f} GB are free",
            "Free some space and run the same command again: finished shards are kept.",
        )
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror or error}",
        "Choose a destination that this user may write to.",
    )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into the message of `write_error`."""
    try:
        yield
    except OSError as error:
        raise write_error(error, Path(error.filename) if isinstance(error.filename, str) else path) from error


def will_need(path: Path, offset: int, nbytes: int) -> None:
    """Ask the kernel to read these bytes of `path` ahead; a hint, so failure is no error."""
    _advise(path, offset, nbytes, os.POSIX_FADV_WILLNEED)


def drop_cache(path: Path, offset: int = 0, nbytes: int = 0) -> None:
    """Let the kernel forget these bytes of `path` (all for nbytes 0): a model must not push out the rest."""
    _advise(path, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _advise(path: Path, offset: int, nbytes: int, advice: int) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, offset, nbytes, advice)
        finally:
            os.close(descriptor)


def drop_mapped(address: int, nbytes: int) -> None:
    """Give back the whole pages within `nbytes` of a file mapping; the next touch reads them again."""
    begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)

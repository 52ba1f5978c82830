"""What the kernel keeps of files in memory: reading ahead, and dropping what will not be read again.

A conversion reads each source byte once. Without these calls the hundreds of gigabytes of a model would push
everything else out of the page cache.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

from moebox.units import ceil_div

_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True)


def will_need(path: Path, offset: int, nbytes: int) -> None:
    """Ask the kernel to read these bytes of `path` ahead; a hint, so a failure is ignored."""
    _advise(path, offset, nbytes, os.POSIX_FADV_WILLNEED)


def drop_cache(path: Path, offset: int = 0, nbytes: int = 0) -> None:
    """Ask the kernel to drop these bytes of `path` from the page cache; 0 bytes mean the rest of the file."""
    _advise(path, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _advise(path: Path, offset: int, nbytes: int, advice: int) -> None:
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, offset, nbytes, advice)
        finally:
            os.close(descriptor)


def drop_mapped(address: int, nbytes: int) -> None:
    """Unmap the whole pages within `nbytes` of a file mapping; the next touch reads them again."""
    begin = ceil_div(address, mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > begin:
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)

"""Writing one output shard: any thread writes any tensor, in any order, and the file is hashed meanwhile.

A shard is written in `DST/.moebox/` and gets its final name when every byte is on the disk.
"""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from moebox.errors import MoeboxError
from moebox.files import publish, writing
from moebox.quantize.output.journal import WORK_FOLDER
from moebox.quantize.output.shards import Shard
from moebox.quantize.page_cache import drop_cache

_HASH_CHUNK_BYTES = 4 << 20
Buffer = bytes | memoryview


class ShardWriter:
    """One shard while it is written.

    The whole file is allocated at once, so that a disk that is too small fails before the work is done. One
    thread per shard hashes the front of the file, up to the first byte that is not written yet. Several
    shards are hashed at the same time, because SHA-256 without CPU support runs at 0.2-0.5 GB/s, slower than
    many disks.

    Raises:
        PlanError: the disk is full.
        CheckpointError: the destination cannot be written.
    """

    def __init__(self, dst: Path, shard: Shard) -> None:
        self._final = dst / shard.file
        self._partial = dst / WORK_FOLDER / f"{shard.file}.partial"
        self._size = shard.size
        self._extents: dict[int, int] = {}
        self._front = 0
        self._aborted = False
        self._ready = threading.Condition()
        self._sha256 = hashlib.sha256()
        self._hash_error: OSError | None = None
        with writing(self._partial):
            self._descriptor = os.open(
                self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644
            )
            try:
                _allocate(self._descriptor, self._size)
            except OSError:
                os.close(self._descriptor)
                self._partial.unlink(missing_ok=True)
                raise
        self._hasher = threading.Thread(target=self._hash, name=f"hash {shard.file}", daemon=True)
        self._hasher.start()
        try:
            self.write(0, [shard.header])
        except MoeboxError:
            self.abort()
            raise

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write `buffers` back to back at `offset`. Any thread may call it; extents must not overlap."""
        position = offset
        with writing(self._partial):
            for buffer in buffers:
                view = memoryview(buffer).cast("B")
                while view:
                    written = os.pwrite(self._descriptor, view, position)
                    position += written
                    view = view[written:]
        with self._ready:
            self._extents[offset] = position
            while self._front in self._extents:
                self._front = self._extents.pop(self._front)
            self._ready.notify()

    def finish(self) -> str:
        """Wait for the hash, publish the file under its final name, and return its SHA-256, hex.

        The caller has written every byte.
        """
        self._hasher.join()
        with writing(self._partial):
            if self._hash_error is not None:
                raise self._hash_error
            publish(self._descriptor, self._partial, self._final)
        self._close()
        drop_cache(self._final)
        return self._sha256.hexdigest()

    def abort(self) -> None:
        """Stop hashing and remove the partial file."""
        with self._ready:
            self._aborted = True
            self._ready.notify()
        self._hasher.join()
        self._close()
        self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _hash(self) -> None:
        chunk = bytearray(_HASH_CHUNK_BYTES)
        position = 0
        while position < self._size:
            with self._ready:
                self._ready.wait_for(lambda: self._aborted or self._front > position)  # noqa: B023
                if self._aborted:
                    return
                available = min(self._front - position, len(chunk))
            view = memoryview(chunk)[:available]
            try:
                count = os.preadv(self._descriptor, [view], position)
                if not count:
                    raise OSError(errno.EIO, "the file was cut short while it was written")
            except OSError as error:
                self._hash_error = error
                return
            self._sha256.update(view[:count])
            position += count


def _allocate(descriptor: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(descriptor, nbytes)  # a file system that cannot allocate ahead


def remove_partials(dst: Path) -> None:
    """Delete the partial files that a killed run left."""
    for partial in (dst / WORK_FOLDER).glob("*.partial"):
        partial.unlink()
    for partial in dst.glob(".*.partial"):
        partial.unlink()

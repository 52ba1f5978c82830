"""Measures how fast a drive is read at several queue depths, without the page cache."""

from __future__ import annotations

import itertools
import mmap
import random
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moebox import _kernels
from moebox.errors import CheckpointError
from moebox.units import GIGA

DEPTHS = (1, 2, 4, 8, 16, 32)
NEARLY_ALL = 0.95
"""Share of the best bandwidth that the chosen depth must reach: a smaller depth needs fewer threads."""
READ_BYTES = 24_772_608
"""One expert of Kimi K2."""
LEAST_BYTES = 256 << 20
"""Files of fewer bytes in all are not measured: the drive, or its host, may have them in a cache."""
ROUNDS = 2
"""Times that each depth is measured; the best figure counts, since other programs may use the drive."""
DEPTH_S = 0.25
"""Time for which each depth is measured in a round."""
LONGEST_S = 10.0
"""Time after which no further depth is measured, for slow drives."""
_QUEUED = 3
_PAGE = 4096


@dataclass(frozen=True)
class DriveSpeed:
    """A drive's read bandwidth.

    Attributes:
        by_depth: queue depth -> GB/s, in ascending order of depth.
        direct: whether all reads used O_DIRECT; otherwise some may have come from the page cache.
    """

    by_depth: dict[int, float]
    direct: bool

    @property
    def gbps(self) -> float:
        """The best bandwidth."""
        return max(self.by_depth.values())

    @property
    def depth(self) -> int:
        """The smallest queue depth that reaches `NEARLY_ALL` of the best bandwidth."""
        return next(depth for depth, gbps in self.by_depth.items() if gbps >= NEARLY_ALL * self.gbps)

    def figures(self) -> dict[str, float]:
        """The figures that the machine's profile keeps of a drive."""
        by_depth = {f"depth_{depth}_gbps": gbps for depth, gbps in self.by_depth.items()}
        return {"gbps": self.gbps, "depth": self.depth, **by_depth}


def measure_drive(
    files: Sequence[Path], piece_bytes: int, depths: tuple[int, ...] = DEPTHS
) -> DriveSpeed | None:
    """Measure a drive by reading random parts of files that lie on it; None where the files are too small.

    Args:
        files: on one drive.
        piece_bytes: bytes of one read, a multiple of 4096; a queue depth counts such reads.
        depths: queue depths, ascending.

    Raises:
        CheckpointError: a file cannot be read.
    """
    sizes = {path: path.stat().st_size for path in files}
    read_bytes = min(READ_BYTES, max(sizes.values(), default=0) // _PAGE * _PAGE)
    if sum(sizes.values()) < LEAST_BYTES:
        return None
    places = _places(list(sizes.values()), read_bytes)
    buffers = [np.frombuffer(mmap.mmap(-1, read_bytes), np.uint8) for _ in range(_QUEUED)]
    by_depth: dict[int, float] = {}
    direct, began_s = True, time.perf_counter()
    for depth in depths * ROUNDS:
        if by_depth and time.perf_counter() - began_s > LONGEST_S:
            break
        try:
            reader = _kernels.Reader(depth, piece_bytes)
            numbers = [reader.add_file([str(path)]) for path in sizes]
            direct = direct and all(map(reader.direct, numbers))
            by_depth[depth] = max(by_depth.get(depth, 0.0), _gbps(reader, places, buffers))
        except _kernels.ReadFailure as failure:
            raise CheckpointError(f"{failure.args[0]}", "Check the drive, or restore the file.") from None
    return DriveSpeed(by_depth, direct)


def _places(sizes: Sequence[int], read_bytes: int) -> Iterator[tuple[int, int, int]]:
    """All runs (file, offset, bytes) in a random order, again and again."""
    places = [
        (file, offset, read_bytes)
        for file, size in enumerate(sizes)
        for offset in range(0, size - read_bytes + 1, read_bytes)
    ]
    random.Random(0).shuffle(places)
    return itertools.cycle(places)


def _gbps(
    reader: _kernels.Reader,
    places: Iterator[tuple[int, int, int]],
    buffers: Sequence[np.ndarray[tuple[int], np.dtype[np.uint8]]],
) -> float:
    """Bandwidth of one measurement. Reads are queued ahead, so that the drive always has enough of them."""
    nbytes, began_s = 0, time.perf_counter()
    tickets = deque((reader.submit([next(places)], buffer), buffer) for buffer in buffers)
    while tickets:
        ticket, buffer = tickets.popleft()
        reader.wait(ticket)
        nbytes += len(buffer)
        if time.perf_counter() - began_s < DEPTH_S:
            tickets.append((reader.submit([next(places)], buffer), buffer))
    return nbytes / (time.perf_counter() - began_s) / GIGA

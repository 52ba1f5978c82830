"""The interfaces of a source of experts' bytes: read at once, or in the background by tickets.

A key is `moe_index * E + expert`, E n_routed_experts. An expert's extent is its six tensors, one behind the
other (`checkpoint/layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class DriveTraffic:
    """What was read from one drive.

    Attributes:
        folder: on the drive.
        depth: reads under way at once, at most.
        nbytes: read.
        busy_s: seconds in which at least one read was under way.
    """

    folder: str
    depth: int
    nbytes: int
    busy_s: float


@dataclass(frozen=True)
class StoreTraffic:
    """What was read from all drives since the store was opened."""

    drives: tuple[DriveTraffic, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of experts."""
        return sum(drive.nbytes for drive in self.drives)

    @property
    def busy_s(self) -> float:
        """Seconds in which the busiest drive had a read under way."""
        return max((drive.busy_s for drive in self.drives), default=0.0)


class Source(Protocol):
    """Gives experts' bytes, one expert at a time; used from several threads."""

    def in_order(self, keys: Sequence[int]) -> list[int]:
        """`keys` in the order in which they are read fastest."""
        ...

    def read(self, key: int, row: Bytes) -> None:
        """Write an expert's extent to `row`, uint8 [nbytes]."""


class Store(Source, Protocol):
    """Reads experts in the background. Each read has a ticket, which `wait` or `cancel` ends."""

    def submit(self, key: int, row: Bytes, *, prefetch: bool = False) -> int:
        """Begin to read an expert's extent into `row`, uint8 [nbytes]; returns a ticket.

        A `prefetch` is read when no other read is queued.
        """
        ...

    def ready(self, ticket: int) -> bool:
        """Whether the read has ended, successfully or not."""
        ...

    def wait(self, ticket: int) -> None:
        """Wait until the read has ended. Raises CheckpointError."""
        ...

    def promote(self, ticket: int) -> None:
        """Give a prefetch the priority of other reads."""
        ...

    def cancel(self, ticket: int) -> int:
        """Stop the read, or drop what it has read; returns the bytes that were read for nothing."""
        ...

    def traffic(self) -> StoreTraffic:
        """What was read so far."""
        ...

"""Where a request's experts were found, and the bytes that moved for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Counts of one request, or of all requests so far.

    The bytes of an expert that was read from a drive, and then uploaded, count in both ways.

    Attributes:
        gpu_hits, ram_hits, disk_hits: experts used, by the tier where they were found. An expert counts once
            for each layer of a token or of a prompt's chunk.
        pcie_bytes: weights uploaded, or read by the GPU straight from RAM.
        cpu_bytes: weights that the CPU read from RAM to compute with.
        disk_bytes: weights read from drives, wrong prefetches included.
    """

    gpu_hits: int = 0
    ram_hits: int = 0
    disk_hits: int = 0
    pcie_bytes: int = 0
    cpu_bytes: int = 0
    disk_bytes: int = 0

    @property
    def hits(self) -> int:
        """Experts used, wherever they were found."""
        return self.gpu_hits + self.ram_hits + self.disk_hits

    def __sub__(self, before: Traffic) -> Traffic:
        """What was added since `before`; both are running totals."""
        return Traffic(*(getattr(self, name) - getattr(before, name) for name in TRAFFIC_FIELDS))

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in TRAFFIC_FIELDS))


TRAFFIC_FIELDS = tuple(Traffic.__dataclass_fields__)

"""What moved for the experts of a request: counted by the tiers, kept by `cost`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traffic:
    """Where a request's experts were found, and what moved for them.

    An expert that was read from disk and then uploaded or computed by the CPU counts on both roads.

    Attributes:
        gpu_hits, ram_hits, disk_hits: experts used, each counted once per layer and pass, by where they lay.
        pcie_bytes: weights uploaded, or read by the GPU straight from RAM.
        cpu_bytes: weights that the CPU read from RAM to compute with.
        disk_bytes: weights read from drives, those read ahead for nothing included.
    """

    gpu_hits: int = 0
    ram_hits: int = 0
    disk_hits: int = 0
    pcie_bytes: int = 0
    cpu_bytes: int = 0
    disk_bytes: int = 0

    @property
    def hits(self) -> int:
        """Experts used, wherever they lay."""
        return self.gpu_hits + self.ram_hits + self.disk_hits

    def __sub__(self, before: Traffic) -> Traffic:
        """What came since `before`, where both are running totals."""
        return Traffic(*(getattr(self, name) - getattr(before, name) for name in TRAFFIC_FIELDS))

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in TRAFFIC_FIELDS))


TRAFFIC_FIELDS = tuple(Traffic.__dataclass_fields__)

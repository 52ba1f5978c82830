"""How a prompt layer's missing experts are shared between the two roads.

The PCIe road uploads from the front, experts with most tokens first; the CPU road computes from the back,
those with fewest first, batch by batch. While a batch runs, uploads are queued that will last a little longer
than it; then the split is computed anew from the live costs, until the roads meet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moebox.offload.memory.gpu_slab import UPLOAD_GROUP
from moebox.offload.prefill.cold_reads import LayerReads
from moebox.offload.prefill.cpu_batches import CpuBatches
from moebox.offload.prefill.layer_uploads import LayerUploads
from moebox.offload.prefill.road_costs import Counts, RoadCosts, cpu_share

BATCH_S = 6e-3
"""Seconds of a CPU batch: long against the cost of computing the split anew, short against a layer."""
QUEUE_FACTOR = 1.2
QUEUE_S = 1e-3
"""Uploads are queued for `QUEUE_FACTOR` times the seconds of the CPU's batch, and `QUEUE_S` more."""


@dataclass
class MissQueue:
    """Missing experts that neither road has taken: those numbered `first` to before `last`."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def take_front(self, n: int) -> int:
        """Take the n experts with most tokens; returns the number of the first one."""
        self.first += n
        return self.first - n

    def take_back(self, n: int) -> int:
        """Take the n experts with fewest tokens; returns the number of the first one."""
        self.last -= n
        return self.last


@dataclass(frozen=True)
class TwoRoads:
    """Both roads of one layer.

    Attributes:
        uploads, cpu: the roads.
        costs: live figures of both.
        counts: tokens of each of the layer's experts.
        tail_s: seconds that the CPU's sum takes on its way to the GPU.
    """

    uploads: LayerUploads
    cpu: CpuBatches
    costs: RoadCosts
    counts: Counts
    tail_s: float

    def share(self, misses: MissQueue) -> None:
        """Queue or start all of `misses`; a batch may still run on the CPU in the end."""
        while misses:
            n = self._next_batch(misses)
            batch_s = self.cpu.begin(misses.take_back(n), n) if n else float("inf")
            while misses and self.uploads.queued_s() < QUEUE_FACTOR * batch_s + QUEUE_S:
                n_uploads = min(UPLOAD_GROUP, len(misses))
                self.uploads.upload(misses.take_front(n_uploads), n_uploads)
            if misses:
                self.cpu.end()

    def share_cold(self, reads: LayerReads, first: int, release_rows: Callable[[], None]) -> None:
        """Share the experts from number `first` on, as they arrive from the drive.

        Args:
            release_rows: waits until neither road uses RAM's rows.
        """
        while batch := reads.next_batch(release_rows):
            self.cpu.end()
            self.uploads.times.mark_idle(self.uploads.mark())
            self.share(MissQueue(first, first + len(batch)))
            first += len(batch)
            release_rows()
            reads.end_batch()

    def _next_batch(self, misses: MissQueue) -> int:
        left = self.counts[misses.first : misses.last]
        return cpu_share(self.costs, left, self.uploads.queued_s(), self.tail_s, BATCH_S)

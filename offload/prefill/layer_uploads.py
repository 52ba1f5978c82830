"""The PCIe road of a prompt layer: experts are uploaded in groups, and the GPU computes each group."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from moebox.offload.device.base import Event
from moebox.offload.memory.gpu_slab import GpuSlab
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.prefill.admission import Admissions
from moebox.offload.prefill.gpu_queue import GpuQueue
from moebox.offload.prefill.road_costs import RoadCosts
from moebox.offload.prefill.routed_layer import RoutedLayer
from moebox.offload.prefill.upload_ring import Ring, UploadedGroup


@dataclass
class UploadTimes:
    """How long a layer's groups took to upload.

    Attributes:
        costs: learn from these times.
        marks: (event, n): by the event the n experts since the last mark are uploaded. With n 0, nothing was
            under way: the time until the next mark belongs to the next group alone.
    """

    costs: RoadCosts
    marks: list[tuple[Event, int]] = field(default_factory=list)

    def mark_idle(self, event: Event) -> None:
        """No upload is under way at `event`."""
        self.marks.append((event, 0))

    def learn(self) -> float:
        """Have the costs learn from all uploads, which must be complete; returns the seconds they took.

        The costs learn from the median of the groups: where the host was late, as when a kernel was compiled,
        a group's time includes time in which nothing was uploaded.
        """
        seconds = [
            (end.seconds_since(begin) / n, n)
            for (begin, _), (end, n) in zip(self.marks[:-1], self.marks[1:], strict=True)
            if n
        ]
        if seconds:
            self.costs.learn_upload(median(s for s, _ in seconds))
        return sum(s * n for s, n in seconds)


class LayerUploads:
    """Queues uploads of a routed layer's experts, and their computation behind them.

    An expert that the cache admits is uploaded to its slot there, any other to a slot of the ring.

    Attributes:
        n_experts: computed from uploads so far, those that were uploaded ahead included.
        times: of the groups, without those that were uploaded ahead.
    """

    def __init__(
        self,
        ram: RamSlab,
        gpu: GpuSlab,
        ring: Ring,
        admissions: Admissions,
        queue: GpuQueue,
        costs: RoadCosts,
        routed: RoutedLayer,
    ) -> None:
        self._ram, self._gpu, self._ring, self._admissions = ram, gpu, ring, admissions
        self._queue, self._costs, self._routed = queue, costs, routed
        self._pending: deque[tuple[Event, int]] = deque()
        self.times = UploadTimes(costs)
        self.n_experts = 0

    def compute_ahead(self, groups: Sequence[UploadedGroup]) -> None:
        """Queue the computation of the experts that were uploaded ahead and got tokens."""
        first = self._routed.first_ahead
        for group, n in zip(groups, self._routed.ahead_counts, strict=True):
            self._pending.append((group.end, len(group.slots)))
            self._gpu.device.compute_waits(group.end)
            if n:
                keys = self._routed.keys[first : first + n]
                self._compute(first, [group.slots[key] for key in keys])
                self._admit_from_ring(group, keys)
                self._ring.read_until(group.turn, self._gpu.device.mark())
            first += n

    def upload(self, first: int, n: int) -> None:
        """Queue a group: the uploads of the n experts from number `first` on, and their computation."""
        uploads = self._gpu.device.uploads
        turn = self._ring.enter(uploads)
        if not self.times.marks:
            self.times.mark_idle(uploads.record())
        keys = self._routed.keys[first : first + n]
        slots = [self._slot(key, turn, place) for place, key in enumerate(keys)]
        rows = self._ram.rows[keys].tolist()
        uploads.copy_all(
            [(self._gpu.slab[slot], self._ram.slab[row]) for slot, row in zip(slots, rows, strict=True)]
        )
        uploaded = uploads.record()
        self._admissions.uploaded(uploaded)
        self._pending.append((uploaded, n))
        self.times.marks.append((uploaded, n))
        self._gpu.device.compute_waits(uploaded)
        self._compute(first, slots)
        self._ring.read_until(turn, self._gpu.device.mark())

    def mark(self) -> Event:
        """An event behind all uploads that were queued so far."""
        return self._gpu.device.uploads.record()

    def queued_s(self) -> float:
        """Seconds that the queued uploads will take. The one under way counts half."""
        while self._pending and self._pending[0][0].done():
            self._pending.popleft()
        n = sum(n for _, n in self._pending) - (self._pending[0][1] / 2 if self._pending else 0)
        return n * self._costs.upload_s

    def _slot(self, key: int, turn: int, place: int) -> int:
        slot = self._admissions.slot(key)
        return self._ring.slot(turn, place) if slot is None else slot

    def _compute(self, first: int, slots: Sequence[int]) -> None:
        self._queue.compute(first, slots)
        self.n_experts += len(slots)

    def _admit_from_ring(self, group: UploadedGroup, keys: Sequence[int]) -> None:
        """Copy the experts that the cache admits from the ring to their slots."""
        for key in keys:
            slot = self._admissions.slot(key)
            if slot is not None:
                self._gpu.device.fetch(self._gpu.slab[slot], self._gpu.slab[group.slots[key]])
        self._admissions.uploaded(group.end)

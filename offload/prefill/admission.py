"""Which of a prompt layer's uploads the GPU's cache admits, and which experts it evicts for them.

An expert that is admitted is uploaded straight into the slot that it keeps; any other one goes through the
ring. A missing expert is admitted if it outscores the weakest resident.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from moebox.offload.device.base import Event
from moebox.offload.memory.gpu_slab import GpuSlab
from moebox.offload.memory.rows import RamRows


@dataclass
class Admissions:
    """One layer's changes of the GPU's cache, where all experts have a row in RAM.

    The host's tables change at once, while the copies are only queued. So a slot that a copy still uses is
    given to a new expert together with an event.

    Attributes:
        chosen: keys that are admitted when they are uploaded.
        victims: residents that may be evicted, the weakest last.
    """

    gpu: GpuSlab
    chosen: set[int] = field(default_factory=set)
    victims: list[int] = field(default_factory=list)
    _admitted: list[int] = field(default_factory=list)
    """Admitted since the last call of `uploaded`."""

    def plan(self, missing: Collection[int], in_use: Collection[int]) -> None:
        """Choose which of the `missing` keys are admitted, and victims for them, none of which is in use."""
        residency = self.gpu.residency
        scores = residency.scores()
        busy = set(in_use)
        weakest = [key for key in residency.weakest(len(missing) + len(busy)) if key not in busy]
        spare = max(0, residency.n_free - residency.reserve)
        for rank, key in enumerate(sorted(missing, key=lambda key: (-scores[key], key))):
            n_evicted = rank - spare
            if n_evicted >= len(weakest) or (n_evicted >= 0 and scores[key] <= scores[weakest[n_evicted]]):
                break
            self.chosen.add(key)
        self.victims = weakest[::-1]

    def slot(self, key: int) -> int | None:
        """The slot that `key` is to be uploaded to; None if it is not admitted.

        Uploads that are queued after this call wait until nothing uses the slot.
        """
        residency = self.gpu.residency
        if key not in self.chosen:
            return None
        if residency.n_free <= residency.reserve:
            self._evict()
        if not residency.n_free:
            return None
        self._admitted.append(key)
        return residency.place(key)

    def uploaded(self, event: Event) -> None:
        """The uploads to all slots given so far are queued, and complete by `event`."""
        self._admitted.clear()

    def finish(self) -> None:
        """All copies are complete."""

    def undo(self) -> None:
        """After an error: empty the cache, since some uploads may have failed. All queued work has ended."""
        self.gpu.clear()

    def _evict(self) -> None:
        self.gpu.residency.release(self.victims.pop())


@dataclass
class ExclusiveAdmissions(Admissions):
    """The same where an expert has a row or a slot, not both: a victim takes the row of an admitted expert.

    A victim's row must not be read on the host before all of `Device.downloads` is complete.
    """

    rows: RamRows = field(kw_only=True)
    _vacated: dict[int, Event] = field(default_factory=dict)
    """Slot -> the event by which the slot's last expert is downloaded."""
    _moving: int | None = None
    """The victim that is between its slot and a row."""

    def slot(self, key: int) -> int | None:
        """The slot that `key` is to be uploaded to; None if it is not admitted."""
        slot = super().slot(key)
        if slot in self._vacated:
            self.gpu.device.uploads.wait(self._vacated.pop(slot))
        return slot

    def uploaded(self, event: Event) -> None:
        """Free the rows of the experts admitted since the last call, or give them to victims."""
        self.gpu.device.downloads.wait(event)  # the victims overwrite rows that the uploads read
        self._leave_rows(event)

    def undo(self) -> None:
        """After an error: experts that still have a row lose their slot."""
        self._end_move()
        for key in self._admitted:
            if self.rows.ram.rows[key] >= 0 and self.gpu.residency.slot(key) >= 0:
                self.gpu.residency.release(key)

    def _evict(self) -> None:
        """Evict nothing: `uploaded` evicts, once the upload is queued and a victim can be downloaded."""

    def _leave_rows(self, event: Event) -> None:
        for key in self._admitted:
            self._leave_row(event, key)
        self._admitted.clear()

    def _leave_row(self, event: Event, key: int) -> None:
        if not self._needs_victim():
            self.rows.drop(key)
            return
        self._moving = self.victims.pop()
        self.rows.hand_over(key, self._moving)
        self._move()

    def _move(self) -> None:
        """Download the moving victim to its row, and free its slot.

        An interrupt may come between any two of these steps, so the order matters: the table has no row for
        an expert before the download that fills the row is queued, and the slot is freed last.
        """
        if self._moving is None:
            raise RuntimeError("no victim is moving")
        self._download(self._moving, self.rows.row(self._moving))
        self.rows.arrived(self._moving)
        self.gpu.residency.release(self._moving)
        self._moving = None

    def _end_move(self) -> None:
        """After an error: complete the victim's move, whichever of its steps was the last; wait for it.

        A victim that has no row yet stays in its slot. The slot holds the victim until `release`, so its
        download can be queued a second time.
        """
        victim = self._moving
        if victim is None or self.rows.row(victim) < 0 or self.gpu.residency.slot(victim) < 0:
            return
        self._move()
        self.gpu.device.downloads.record().synchronize()

    def _needs_victim(self) -> bool:
        residency = self.gpu.residency
        return residency.n_free < residency.reserve and bool(self.victims)

    def _download(self, victim: int, row: int) -> None:
        slot = self.gpu.residency.slot(victim)
        self.gpu.device.downloads.copy(self.rows.ram.slab[row], self.gpu.slab[slot])
        self._vacated[slot] = self.gpu.device.downloads.record()


@dataclass
class ColdAdmissions(ExclusiveAdmissions):
    """The same where RAM's rows are a cache of the drive: a victim takes a free row.

    The host begins to read into a row as soon as it is free, so an admitted expert keeps its row until the
    host knows that its upload is complete.
    """

    _leaving: deque[tuple[Event, int]] = field(default_factory=deque)
    """Admitted experts that still have a row, and the event by which they are uploaded."""

    def uploaded(self, event: Event) -> None:
        """Free the rows of experts whose upload is complete; download victims to free rows."""
        while self._leaving and self._leaving[0][0].done():
            self._drop_first()
        self._leave_rows(event)

    def finish(self) -> None:
        """All copies are complete: free the rows of all admitted experts."""
        while self._leaving:
            self._drop_first()

    def undo(self) -> None:
        """After an error: experts admitted since the last `uploaded` lose the slot, older ones their row."""
        super().undo()
        self.finish()

    def _leave_row(self, event: Event, key: int) -> None:
        self._leaving.append((event, key))
        if not self._needs_victim():
            return
        self._moving = self.victims[-1]
        if self.rows.place(self._moving) < 0:
            self._moving = None
            return
        self.victims.pop()
        self._move()

    def _drop_first(self) -> None:
        event, key = self._leaving.popleft()
        event.synchronize()
        if self.rows.ram.rows[key] >= 0 and self.gpu.residency.slot(key) >= 0:
            self.rows.drop(key)

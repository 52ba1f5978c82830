"""Which of a prefill layer's uploads stay in the cache, and whose slots they take.

An expert is uploaded straight into the slot it will keep; all others pass through the ring. It is admitted
when it outscores the weakest resident, as in decoding (`roads.py`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from moebox.offload.device.base import Event
from moebox.offload.memory.cold_rows import ColdTier
from moebox.offload.memory.gpu_slab import GpuSlab
from moebox.offload.memory.ram_slab import RamSlab


@dataclass
class Admissions:
    """One layer's changes of the cache.

    With `exclusive` an expert has a row in RAM or a slot, not both: who moves in leaves its row to who moves
    out. Both copies take a while, so a freed slot or row goes with an event; the host sees the new state at
    once and must wait for `Device.downloads` before it reads such a row.
    """

    ram: RamSlab
    gpu: GpuSlab
    exclusive: bool
    chosen: set[int] = field(default_factory=set)
    victims: list[int] = field(default_factory=list)
    """Residents that may go, the weakest last."""
    _vacated: dict[int, Event] = field(default_factory=dict)
    _moved_in: list[int] = field(default_factory=list)

    def plan(self, missing: Collection[int], in_use: Collection[int]) -> None:
        """Choose among the keys that are not resident; those in use are not to be evicted."""
        residency = self.gpu.residency
        scores = residency.scores()
        busy = set(in_use)
        weakest = [key for key in residency.weakest(len(missing) + len(busy)) if key not in busy]
        spare = max(0, residency.n_free - residency.reserve)
        for rank, key in enumerate(sorted(missing, key=lambda key: (-scores[key], key))):
            rival = rank - spare
            if rival >= len(weakest) or (rival >= 0 and scores[key] <= scores[weakest[rival]]):
                break
            self.chosen.add(key)
        self.victims = weakest[::-1]

    def slot(self, key: int) -> int | None:
        """Give `key` a slot, and queue its upload's wait for that slot; None if it is not to stay."""
        residency = self.gpu.residency
        if key not in self.chosen:
            return None
        if residency.n_free <= residency.reserve and not self.exclusive:
            residency.release(self.victims.pop())
        if not residency.n_free:
            return None
        self._moved_in.append(key)
        slot = residency.place(key)
        if slot in self._vacated:
            self.gpu.device.uploads.wait(self._vacated.pop(slot))
        return slot

    def uploaded(self, event: Event) -> None:
        """Let victims take the rows of who moved in; `event` lies behind the uploads of all slots so far."""
        if self.exclusive:
            self.gpu.device.downloads.wait(event)
            for key in self._moved_in:
                row = int(self.ram.rows[key])
                self.ram.rows[key] = -1
                self._move_out(row)
        self._moved_in.clear()

    def _move_out(self, row: int) -> None:
        residency = self.gpu.residency
        if residency.n_free >= residency.reserve or not self.victims:
            return
        victim = self.victims.pop()
        slot = residency.slot(victim)
        self.gpu.device.downloads.copy(self.ram.slab[row], self.gpu.slab[slot])
        self._vacated[slot] = self.gpu.device.downloads.record()
        self.ram.rows[victim] = row  # first, so that no interrupt leaves it nowhere
        residency.release(victim)

    def finish(self) -> None:
        """All copies are done."""

    def undo(self) -> None:
        """Forget what may not have arrived; all that was queued is done."""
        if not self.exclusive:
            self.gpu.clear()
            return
        for key in self._moved_in:
            if self.ram.rows[key] >= 0 and self.gpu.residency.slot(key) >= 0:
                self.gpu.residency.release(key)


@dataclass
class ColdAdmissions(Admissions):
    """The same where RAM's rows are a cache: a victim takes a free row, who moved in leaves its own later."""

    tier: ColdTier = field(kw_only=True)
    _moved: deque[tuple[Event, int]] = field(default_factory=deque)

    def uploaded(self, event: Event) -> None:
        """See `Admissions.uploaded`."""
        while self._moved and self._moved[0][0].done():
            self._leave_row()
        for key in self._moved_in:
            self._moved.append((event, key))
            self._make_way()
        self._moved_in.clear()

    def _make_way(self) -> None:
        residency = self.gpu.residency
        if self.victims and residency.n_free < residency.reserve:
            row = self.tier.residency.place(self.victims[-1])
            if row >= 0:
                self._move_out(row)

    def finish(self) -> None:
        """See `Admissions.finish`."""
        while self._moved:
            self._leave_row()

    def _leave_row(self) -> None:
        event, key = self._moved.popleft()
        event.synchronize()
        if self.ram.rows[key] >= 0 and self.gpu.residency.slot(key) >= 0:
            self.tier.drop(key)

    def undo(self) -> None:
        """See `Admissions.undo`."""
        super().undo()
        self.finish()

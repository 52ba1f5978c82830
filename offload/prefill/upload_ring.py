"""The ring, and uploads that begin before anyone knows whether they will be used.

When a layer has queued its last upload, PCIe would stand idle until the next layer is routed and planned. In
a large chunk nearly every expert gets tokens, so the ring fills meanwhile with experts of the next layer,
those used most of late first. The next layer finds them uploaded; what got no tokens after all is dropped.

RAM must keep still for that, so in exclusive mode, where experts change places, there are no early uploads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moebox.offload.device.base import CopyStream, Device, Event
from moebox.offload.memory.gpu_slab import STAGING_SLOTS, UPLOAD_GROUP, GpuTier
from moebox.offload.memory.ram_slab import RamTier

RING = STAGING_SLOTS // UPLOAD_GROUP
"""Groups that fit the ring."""
CERTAIN = 4
"""Tokens an expert must get on average for its use to count as certain."""


class Ring:
    """The slots that experts pass through in groups: whose turn it is, and what still reads them."""

    def __init__(self, gpu: GpuTier, groups: int = RING) -> None:
        self._gpu = gpu
        self._readers: list[Event | None] = [None] * groups
        self._turn = 0

    @property
    def n_slots(self) -> int:
        """Of all groups."""
        return len(self._readers) * UPLOAD_GROUP

    def enter(self, uploads: CopyStream) -> int:
        """Take the next turn: what `uploads` is given from here on waits until its slots are not read."""
        turn, self._turn = self._turn, (self._turn + 1) % len(self._readers)
        reader, self._readers[turn] = self._readers[turn], None
        if reader is not None:
            uploads.wait(reader)
        return turn

    def slot(self, turn: int, place: int) -> int:
        """Slot number of a place in a group."""
        return self._gpu.staging(turn * UPLOAD_GROUP + place)

    def read_until(self, turn: int, event: Event) -> None:
        """The group's slots are read until `event`."""
        self._readers[turn] = event


@dataclass(frozen=True)
class EarlyGroup:
    """Uploads of one turn of the ring, under way from `begin` to `end`; `slots` by key."""

    slots: dict[int, int]
    turn: int
    begin: Event
    end: Event


class EarlyUploads:
    """At most one layer's early uploads, from `start` until `take` or `settle`.

    Attributes:
        uploaded: experts so far, used or not.
    """

    def __init__(self, device: Device, ram: RamTier, gpu: GpuTier, ring: Ring) -> None:
        self._device, self._ram, self._gpu, self._ring = device, ram, gpu, ring
        self.uploaded = 0
        self._groups: list[EarlyGroup] = []

    def start(self, keys: range) -> None:
        """Queue the most used of a layer's `keys` that are not in the cache, as many as the ring takes."""
        chosen = self._choose(keys)
        for first in range(0, len(chosen), UPLOAD_GROUP):
            self._groups.append(self._upload(chosen[first : first + UPLOAD_GROUP]))

    def take(self) -> list[EarlyGroup]:
        """Hand over what was started, for whichever layer it was."""
        groups, self._groups = self._groups, []
        return groups

    def settle(self) -> None:
        """Wait for what was started, and forget it."""
        if groups := self.take():
            groups[-1].end.synchronize()

    def _choose(self, keys: range) -> list[int]:
        own = slice(keys.start, keys.stop)
        residency = self._gpu.residency
        missing = keys.start + np.nonzero(residency.table()[own] < 0)[0]
        order = np.argsort(-residency.scores()[missing], kind="stable")
        chosen: list[int] = missing[order[: self._ring.n_slots]].tolist()
        return chosen

    def _upload(self, keys: list[int]) -> EarlyGroup:
        uploads, turn = self._device.uploads, self._ring.enter(self._device.uploads)
        begin = uploads.record()
        slots = {key: self._ring.slot(turn, place) for place, key in enumerate(keys)}
        self.uploaded += len(slots)
        uploads.copy_all(
            [(self._gpu.slab[slot], self._ram.slab[int(self._ram.rows[key])]) for key, slot in slots.items()]
        )
        return EarlyGroup(slots, turn, begin, uploads.record())

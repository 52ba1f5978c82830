"""The ring of slots that a prompt's uploads pass through, and uploads ahead of the next layer.

When a layer has queued its last upload, nothing would cross PCIe until the next layer is routed and sorted.
In a large prompt nearly every expert gets tokens, so meanwhile the ring is filled with experts of the next
layer, those with the highest scores first. The next layer computes those that got tokens; the others were
uploaded for nothing.

RAM's rows must keep their experts until such an upload is complete. In exclusive mode they do not, so there
nothing is uploaded ahead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moebox.offload.device.base import CopyStream, Event
from moebox.offload.memory.gpu_slab import RING_SLOTS, UPLOAD_GROUP, GpuSlab
from moebox.offload.memory.ram_slab import RamSlab

RING_GROUPS = RING_SLOTS // UPLOAD_GROUP
CERTAIN = 4
"""Experts are uploaded ahead where a layer's experts get at least so many tokens in the mean."""


class Ring:
    """Slots that groups of experts pass through in turn; each group waits until its slots are not read."""

    def __init__(self, gpu: GpuSlab) -> None:
        self._gpu = gpu
        self._readers: list[Event | None] = [None] * RING_GROUPS
        self._turn = 0

    def enter(self, uploads: CopyStream) -> int:
        """Begin the next group. Copies that `uploads` is given from here on wait for the slots' last reader.

        Returns:
            The group's turn.
        """
        turn, self._turn = self._turn, (self._turn + 1) % len(self._readers)
        reader, self._readers[turn] = self._readers[turn], None
        if reader is not None:
            uploads.wait(reader)
        return turn

    def slot(self, turn: int, place: int) -> int:
        """The slot of a group's expert, by its place in the group."""
        return self._gpu.ring_slot(turn * UPLOAD_GROUP + place)

    def read_until(self, turn: int, event: Event) -> None:
        """The GPU reads the group's slots until `event`."""
        self._readers[turn] = event


@dataclass(frozen=True)
class UploadedGroup:
    """Uploads of one turn of the ring.

    Attributes:
        slots: by key.
        turn: of the ring.
        begin, end: events before the first and behind the last upload.
    """

    slots: dict[int, int]
    turn: int
    begin: Event
    end: Event


class NextLayerUploads:
    """Uploads ahead of one layer, from `start` until `take` or `discard`.

    Attributes:
        n_uploaded: experts so far, wasted ones included.
    """

    def __init__(self, ram: RamSlab, gpu: GpuSlab, ring: Ring) -> None:
        self._ram, self._gpu, self._ring = ram, gpu, ring
        self.n_uploaded = 0
        self._groups: list[UploadedGroup] = []

    def start(self, keys: range) -> None:
        """Queue uploads of those of a layer's `keys` that score highest and are not in the cache, as many as
        the ring holds."""
        chosen = self._choose(keys)
        for first in range(0, len(chosen), UPLOAD_GROUP):
            self._groups.append(self._upload(chosen[first : first + UPLOAD_GROUP]))

    def take(self) -> list[UploadedGroup]:
        """Return the started groups of any layer, and keep none of them."""
        groups, self._groups = self._groups, []
        return groups

    def discard(self) -> None:
        """Wait for the started groups, and discard them."""
        if groups := self.take():
            groups[-1].end.synchronize()

    def _choose(self, keys: range) -> list[int]:
        residency = self._gpu.residency
        missing = keys.start + np.nonzero(residency.table()[keys.start : keys.stop] < 0)[0]
        order = np.argsort(-residency.scores()[missing], kind="stable")
        chosen: list[int] = missing[order[:RING_SLOTS]].tolist()
        return chosen

    def _upload(self, keys: list[int]) -> UploadedGroup:
        uploads = self._gpu.device.uploads
        turn, begin = self._ring.enter(uploads), uploads.record()
        slots = {key: self._ring.slot(turn, place) for place, key in enumerate(keys)}
        self.n_uploaded += len(slots)
        rows = self._ram.rows[keys].tolist()
        uploads.copy_all(
            [
                (self._gpu.slab[slot], self._ram.slab[row])
                for slot, row in zip(slots.values(), rows, strict=True)
            ]
        )
        return UploadedGroup(slots, turn, begin, uploads.record())

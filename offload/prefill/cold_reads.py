"""A prompt layer's cold experts, which lie on the drive only: read into free rows of RAM.

E n_routed_experts; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np

from moebox.errors import CheckpointError
from moebox.offload.memory.cold_reader import ColdReader
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP, GpuSlab


class LayerReads:
    """Reads one layer's cold experts in batches, as many at a time as there are free rows.

    At the end the layer has the rows that its experts had at the beginning, and the free rows beyond the
    reserve. The layer's highest scores decide which experts keep these rows. Experts of other layers are not
    compared with them, since the scores of other layers do not include the prompt yet.

    Args:
        cold: reads experts, and owns the rows.
        gpu: at a batch's end, experts with a slot are skipped; `Admissions` frees their rows.
        layer: the layer's keys.
        keys: to be read, in the order in which they are needed.
        busy: keys that keep their rows until the first batch.
    """

    def __init__(
        self, cold: ColdReader, gpu: GpuSlab, layer: range, keys: Sequence[int], busy: Collection[int]
    ) -> None:
        self._rows, self._store, self._gpu = cold.rows, cold.store, gpu
        self._memory = self._rows.ram.slab.numpy()[:, : self._rows.ram.layout.nbytes]
        self._left, self._reading, self._batch = deque(keys), deque[tuple[int, int]](), list[int]()
        self._reserve = self._rows.residency.reserve
        self._window = max(1, min(2 * UPLOAD_GROUP, self._reserve))
        self._rows.make_room(self._reserve, list(busy))
        self._rank(layer, keys)
        self._read_ahead()

    def _rank(self, layer: range, keys: Sequence[int]) -> None:
        """Choose which of the keys stay in RAM, and which of the layer's experts in RAM leave for them."""
        scores, table = self._rows.residency.scores(), self._rows.ram.rows
        in_ram = layer.start + np.flatnonzero(table[layer.start : layer.stop] >= 0)
        candidates = np.concatenate([in_ram, np.array(keys)])
        order = candidates[np.lexsort((candidates, -scores[candidates]))].tolist()
        n_rows = len(in_ram) + max(0, self._rows.n_free - self._reserve)
        self._staying = set(order[:n_rows])
        self._leaving = [key for key in order[n_rows:] if table[key] >= 0]

    def _read_ahead(self) -> None:
        """Begin reads until `_window` are under way, or no row is free."""
        while self._left and len(self._reading) < self._window:
            row = self._rows.place(self._left[0])
            if row < 0:
                return
            key = self._left.popleft()
            self._reading.append((key, self._store.submit(key, self._memory[row])))

    def next_batch(self, release_rows: Callable[[], None]) -> list[int]:
        """Wait for the next expert; take it, and those behind it that are there too, at most a group.

        Args:
            release_rows: waits until nothing uses RAM's rows; called if there was no row to read into.

        Returns:
            The keys of the batch; empty if all were read.

        Raises:
            CheckpointError: an expert could not be read.
        """
        if self._left and not self._reading:
            release_rows()
            self._rows.make_room(self._reserve)
            self._read_ahead()
        if self._reading:
            self._batch.append(self._arrival())
        while len(self._batch) < UPLOAD_GROUP and self._next_is_ready():
            self._batch.append(self._arrival())
        return self._batch

    def _next_is_ready(self) -> bool:
        return bool(self._reading) and self._store.ready(self._reading[0][1])

    def _arrival(self) -> int:
        key, ticket = self._reading[0]
        try:
            self._store.wait(ticket)
        except CheckpointError:
            self._reading.popleft()
            self._rows.drop(key)
            raise
        self._reading.popleft()
        self._rows.arrived(key)
        return key

    def end_batch(self) -> None:
        """The batch is computed, and nothing uses its rows: drop the experts that do not stay; read on."""
        for key in self._batch:
            if self._gpu.residency.slot(key) >= 0:
                continue
            if key not in self._staying:
                self._rows.drop(key)
            elif self._leaving:
                self._drop_leaving()
        self._batch = []
        self._read_ahead()

    def _drop_leaving(self) -> None:
        key = self._leaving.pop()
        if self._rows.ram.rows[key] >= 0 and self._gpu.residency.slot(key) < 0:
            self._rows.drop(key)

    def cancel(self) -> None:
        """Cancel all reads; experts that have arrived stay."""
        while self._reading:
            key, ticket = self._reading.popleft()
            self._store.cancel(ticket)
            self._rows.drop(key)

"""One prompt layer's experts that lie on disk only, read into free rows of RAM.

E n_routed_experts, k num_experts_per_tok; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np

from moebox.errors import CheckpointError
from moebox.offload.memory.cold_rows import ColdTier
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP, GpuSlab


class LayerReads:
    """One layer's cold experts of a prompt, on their way through free rows of RAM.

    In the end those of the layer that score highest have the rows that its experts had before. Other layers'
    are no rivals: their scores lack what this prompt is yet to add.

    Args:
        tier: for their rows.
        gpu: who has a slot there gives its row up elsewhere.
        layer: the layer's keys.
        cold: keys to be read, in the order in which they are needed.
        busy: keys that keep their rows until the first batch.
    """

    def __init__(
        self, tier: ColdTier, gpu: GpuSlab, layer: range, cold: Sequence[int], busy: Collection[int]
    ) -> None:
        self._tier, self._gpu = tier, gpu
        self._memory = tier.ram.slab.numpy()[:, : tier.ram.layout.nbytes]
        self._left, self._reading, self._batch = deque(cold), deque[tuple[int, int]](), list[int]()
        self._window = max(1, min(2 * UPLOAD_GROUP, tier.residency.reserve))
        tier.make_room(busy)
        self._rank(layer, cold)
        self._go_on()

    def _rank(self, layer: range, cold: Sequence[int]) -> None:
        residency = self._tier.residency
        rivals = layer.start + np.flatnonzero(self._tier.ram.rows[layer.start : layer.stop] >= 0)
        keys = np.concatenate([rivals, np.array(cold)])
        order = keys[np.lexsort((keys, -residency.scores()[keys]))].tolist()
        rows = len(rivals) + max(0, residency.n_free - residency.reserve)
        self._staying = set(order[:rows])
        self._leaving = [key for key in order[rows:] if self._tier.ram.rows[key] >= 0]

    def _go_on(self) -> None:
        """Read as many as there are rows for."""
        while self._left and len(self._reading) < self._window:
            row = self._tier.residency.place(self._left[0])
            if row < 0:
                return
            key = self._left.popleft()
            self._reading.append((key, self._tier.store.submit(key, self._memory[row])))

    def next_batch(self, let_go: Callable[[], None]) -> list[int]:
        """Wait for the next expert, and take those behind it that are there, too: a group at most.

        Args:
            let_go: waits until nobody uses any row; called where there was none to read into.

        Returns:
            Their keys; none: that was all.

        Raises:
            CheckpointError: an expert could not be read.
        """
        if self._left and not self._reading:
            let_go()
            self._tier.make_room(())
            self._go_on()
        while (
            self._reading and len(self._batch) < UPLOAD_GROUP and (not self._batch or self._first_is_ready())
        ):
            self._batch.append(self._arrival())
        return self._batch

    def _first_is_ready(self) -> bool:
        return self._tier.store.ready(self._reading[0][1])

    def _arrival(self) -> int:
        key, ticket = self._reading[0]
        try:
            self._tier.store.wait(ticket)
        except CheckpointError:
            self._reading.popleft()
            self._tier.drop(key)
            raise
        self._reading.popleft()
        self._tier.ram.rows[key] = self._tier.residency.slot(key)
        return key

    def end_batch(self) -> None:
        """The batch is computed, and nobody uses its rows: who is to stay stays, and reading goes on."""
        for key in self._batch:
            if self._gpu.residency.slot(key) >= 0:
                continue
            if key not in self._staying:
                self._tier.drop(key)
            elif self._leaving:
                self._make_way()
        self._batch = []
        self._go_on()

    def _make_way(self) -> None:
        key = self._leaving.pop()
        if self._tier.ram.rows[key] >= 0 and self._gpu.residency.slot(key) < 0:
            self._tier.drop(key)

    def cancel(self) -> None:
        """Read no more; what has arrived may stay."""
        while self._reading:
            key, ticket = self._reading.popleft()
            self._tier.store.cancel(ticket)
            self._tier.drop(key)

"""Where RAM and the GPU do not hold the model together: the disk has the rest of it.

An expert lies in a slot, in a row of RAM, or is cold: on disk only. A cold one is read into a free row, where
the CPU computes it or the GPU uploads it from, and competes for its row with the others then; who loses it is
just forgotten. For a token that is the work of `csrc/cold.cpp`, for a prompt of what stands below.

E n_routed_experts, k num_experts_per_tok; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from moebox import _kernels
from moebox.errors import CheckpointError
from moebox.offload.decode.host_step import HALF_LIFE_TOKENS, Residency
from moebox.offload.device.base import Event
from moebox.offload.disk.store import ExpertStore
from moebox.offload.memory.gpu_slab import GpuTier
from moebox.offload.memory.ram_slab import RamTier
from moebox.offload.prefill.admission import Admissions
from moebox.offload.prefill.upload_ring import GROUP

LEAST_ROWS = 3
"""Times k rows of RAM: for a layer's experts, for those that come down from the GPU, and to read into."""


class ColdTier(_kernels.ColdTier):
    """RAM as a cache of the disk.

    `ram.rows` says whose bytes are there; a key whose read or download is under way has a row in `residency`
    only.

    Attributes:
        ram, store: the rows, and where experts are read from.
        residency: a slot of it is a row; `reserve` of them are free before a step reads.
    """

    def __init__(self, ram: RamTier, store: ExpertStore) -> None:
        """Rows count as free; see `take_over`."""
        self.ram, self.store = ram, store
        spare = spare_rows(ram.n_rows, ram.config.num_experts_per_tok)
        self.residency = Residency(
            ram.n_keys, ram.n_rows, spare, HALF_LIFE_TOKENS, ram.config.n_routed_experts
        )
        extents = [(store.runs(key), store.checksum(key)) for key in range(ram.n_keys)]
        super().__init__(self.residency, store.reader, extents)

    @property
    def capacity(self) -> int:
        """Experts that RAM holds beside the reserve."""
        return self.ram.n_rows - self.residency.reserve

    def take_over(self) -> None:
        """Give everyone the row that `ram.rows` says: the first ones, without a gap. Scores stay."""
        for key in self.residency.slots():
            if key >= 0:
                self.residency.release(int(key))
        held = np.flatnonzero(self.ram.rows >= 0)
        for key in held[np.argsort(self.ram.rows[held])].tolist():
            self.ram.rows[key] = self.residency.place(key)

    def make_room(self, busy: Collection[int]) -> None:
        """Let the weakest leave RAM, but none of `busy`, until the reserve is free."""
        missing = self.residency.reserve - self.residency.n_free
        if missing > 0:
            weakest = self.residency.weakest(missing + len(busy))
            for key in islice((key for key in weakest if key not in busy), missing):
                self.drop(key)

    def drop(self, key: int) -> None:
        """The key leaves RAM, or is read no more."""
        self.residency.release(key)
        self.ram.rows[key] = -1

    @contextmanager
    def reads(self) -> Iterator[None]:
        """Around a token: say what failed; a read that no copy was left for as `CheckpointError`."""
        try:
            yield
        except _kernels.ReadFailure as failure:
            raise self.store.error(failure, self.failed) from None
        finally:
            self.store.traffic()  # logs which copies were given up


def least_rows(top_k: int) -> int:
    """Rows of RAM without which cold experts cannot be run."""
    return LEAST_ROWS * top_k


def spare_rows(n_rows: int, top_k: int) -> int:
    """Rows that are kept free: a token's layer reads up to k experts, a prompt's two groups at a time."""
    return min(top_k + 2 * GROUP, n_rows // LEAST_ROWS)


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
        self, tier: ColdTier, gpu: GpuTier, layer: range, cold: Sequence[int], busy: Collection[int]
    ) -> None:
        self._tier, self._gpu = tier, gpu
        self._memory = tier.ram.slab.numpy()[:, : tier.ram.layout.nbytes]
        self._left, self._reading, self._batch = deque(cold), deque[tuple[int, int]](), list[int]()
        self._window = max(1, min(2 * GROUP, tier.residency.reserve))
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
        while self._reading and len(self._batch) < GROUP and (not self._batch or self._first_is_ready()):
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

    def settle(self) -> None:
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

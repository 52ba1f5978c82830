"""Experts in RAM rows, the others on the drive: reads into rows, prefetches, and eviction.

A missing expert is read into a free row. After a layer the weakest experts are evicted, new ones included,
until `reserve` rows are free again. An evicted expert is just dropped, since the drive has it. L MoE layers,
E experts each; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebox.kernels import cpu
from moebox.offload.disk.base import Store
from moebox.offload.experts import Progress
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.memory.rows import RamRows
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS, Residency


@dataclass
class CacheCounts:
    """Demands so far: `hits` found their expert in RAM, for `prefetched` ones a prefetch had begun, and
    `reads` began a read of their own."""

    hits: int = 0
    prefetched: int = 0
    reads: int = 0


class RamCache:
    """Keeps experts in the rows of a slab, and reads others from a store. Used by one thread.

    A key that was demanded keeps its row until `done` or `abandon`. Its weights come from `wait`, which
    returns when the row holds them.

    Attributes:
        ram: the slab.
        rows: which key has which row.
        residency: scores of all keys, and the rows as its slots.
        store: missing experts are read from it; None where all experts are in RAM.
        reserve: rows that are kept free between layers, for missing experts and prefetches.
        counts: of demands.
    """

    def __init__(
        self,
        ram: RamSlab,
        store: Store | None = None,
        reserve: int = 0,
        half_life: float = SCORE_HALF_LIFE_TOKENS,
    ) -> None:
        """Take over what the slab holds; `reserve` counts only where experts are missing.

        Raises:
            ValueError: experts are missing and there is no store.
        """
        self.ram = ram
        self.store = store
        self.reserve = reserve if ram.n_rows < ram.n_keys else 0
        self.counts = CacheCounts()
        self._memory = ram.slab.numpy()[:, : ram.layout.nbytes]
        self._table = memoryview(ram.rows)  # type: ignore[arg-type]  # read faster than an array, key by key
        self._half_life = half_life
        self._tickets: dict[int, int] = {}
        self._held: set[int] = set()
        self._prefetching: set[int] = set()
        self._take_over()

    def fill(self, keys: Sequence[int], progress: Progress | None = None) -> None:
        """Empty the rows, clear all scores, and read `keys` from the store, at the drive's speed.

        Args:
            keys: at most as many as rows.
            progress: called with ("experts", bytes done, bytes in all).

        Raises:
            CheckpointError: an expert could not be read.
        """
        self.abandon()
        self.ram.fill(self._disk(), keys, progress)
        self._take_over()

    def _take_over(self) -> None:
        self.rows = RamRows(self.ram, half_life=self._half_life)
        self.residency: Residency = self.rows.residency  # kept: each access makes a new object
        if self.store is None and self.residency.n_resident < self.ram.n_keys:
            raise ValueError(f"{self.residency.n_resident} of {self.ram.n_keys} experts, and no store")

    def _disk(self) -> Store:
        if self.store is None:
            raise ValueError("all experts are in RAM: there is no store")
        return self.store

    @property
    def n_free(self) -> int:
        """Rows that are free now."""
        return self.residency.n_free

    @property
    def complete(self) -> bool:
        """Whether all experts have a row, so that none is ever evicted."""
        return self.ram.n_rows == self.ram.n_keys

    def row(self, key: int) -> int:
        """The row that holds the key, or that it is being read into; -1 if it has none."""
        return self.residency.slot(key)

    def in_ram(self, key: int) -> bool:
        """Whether the key's bytes are in RAM: they were there from the start, or `wait` has returned them."""
        return bool(self._table[key] >= 0)

    def ready(self, key: int) -> bool:
        """Whether `wait` will return at once."""
        if self.in_ram(key):
            return True
        ticket = self._tickets.get(key)
        return ticket is not None and self._disk().ready(ticket)

    def use(self, keys: npt.NDArray[np.int32], counts: npt.NDArray[np.float32] | None = None) -> None:
        """Add counts, fp32 [n], 1 each by default, to the scores of keys, int32 [n]."""
        self.residency.use(keys, counts)

    def update_values(self, keys: Sequence[int]) -> None:
        """Have the value model learn from a decoded token's picks of one layer, after `use` of them."""
        self.residency.update_values(np.array(keys, np.int32))

    def demand(self, *keys: int) -> None:
        """Keep the keys' rows from now on, and begin to read those that are missing.

        A prefetch that is under way goes on, with the priority of other reads.

        Raises:
            ValueError: more keys are held than there are rows.
        """
        self._held.update(keys)
        missing = []
        for key in keys:
            if self.in_ram(key):
                self.counts.hits += 1
            elif key in self._prefetching:
                self._prefetching.discard(key)
                self._disk().promote(self._tickets[key])
                self.counts.prefetched += 1
            elif key not in self._tickets:
                missing.append(key)
        if missing:
            self._make_room(sum(self.row(key) < 0 for key in missing))
        for key in missing:
            self._begin(key, prefetch=False)
            self.counts.reads += 1

    def wait(self, key: int) -> cpu.Expert:
        """The weights of a key that was demanded, once they are in RAM.

        Raises:
            CheckpointError: they could not be read; the key has no row then.
        """
        if not self.in_ram(key):
            try:
                self._disk().wait(self._tickets[key])
            except Exception:
                del self._tickets[key]
                self.rows.drop(key)
                raise
            self.rows.arrived(key)
            del self._tickets[key]
        return self.ram.expert(self.row(key))

    def done(self, keys: Sequence[int]) -> None:
        """The keys are not in use any more, and may be evicted."""
        self._held.difference_update(keys)

    def trim(self) -> None:
        """Evict until `reserve` rows are free or hold prefetches.

        Only as many of the weakest experts as rows are missing are candidates. A candidate that is held stays
        until `trim` is called after `done`; no stronger expert is evicted instead. So some rows are free for
        prefetches while a layer is still computed.
        """
        missing = self.reserve - len(self._prefetching) - self.n_free
        if missing <= 0:
            return
        for key in self.rows.weakest(missing, list(self._prefetching)):
            if self.in_ram(key) and key not in self._held:
                self.rows.drop(key)

    def prefetch(self, key: int) -> bool:
        """Begin to read a key into a free row, when no other read is queued.

        Returns:
            False if no row is free, or the key has one.
        """
        if self.row(key) >= 0 or not self.n_free:
            return False
        self._prefetching.add(key)
        self._begin(key, prefetch=True)
        return True

    def cancel_prefetch(self, key: int) -> int:
        """Cancel a prefetch that was not demanded, and free its row; returns the bytes read for nothing."""
        if key not in self._prefetching:
            return 0
        wasted = self._disk().cancel(self._tickets[key])
        del self._tickets[key]
        self._prefetching.discard(key)
        self.rows.drop(key)
        return wasted

    def cancel_prefetches(self) -> None:
        """Cancel all prefetches that were not demanded."""
        for key in list(self._prefetching):
            self.cancel_prefetch(key)

    def abandon(self) -> None:
        """After an error or an interrupt: cancel all reads and prefetches, and hold no key any more."""
        for key, ticket in list(self._tickets.items()):
            self._disk().cancel(ticket)
            del self._tickets[key]
            self.rows.drop(key)
        self._held.clear()
        self._prefetching.clear()

    def _begin(self, key: int, *, prefetch: bool) -> None:
        # An interrupt before `submit` leaves a key with a row and no read; the next demand reads into it.
        row = self.row(key)
        if row < 0:
            row = self.rows.place(key)
        self._tickets[key] = self._disk().submit(key, self._memory[row], prefetch=prefetch)

    def _make_room(self, n_free: int) -> None:
        """Evict the weakest experts that are not in use, then cancel prefetches, until `n_free` rows are
        free."""
        self.rows.make_room(n_free, [*self._held, *self._tickets])
        for key in list(self._prefetching)[: max(0, n_free - self.n_free)]:
            self.cancel_prefetch(key)
        if self.n_free < n_free:
            raise ValueError(f"{len(self._held)} experts in use, {self.ram.n_rows} rows")

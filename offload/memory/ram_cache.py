"""Experts in RAM rows and the others on disk: who has a row, which reads are under way, who makes room.

The policy is that of the GPU's slots (`roads.Residency`): a miss is read into a free row, and after the layer
the weakest residents go, the newcomers among them, until `reserve` rows are free again. A victim is just
forgotten, since the disk has it. L MoE layers, E experts each; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moebox.kernels import cpu
from moebox.offload.disk.store import StoreTraffic
from moebox.offload.experts import Progress
from moebox.offload.memory.ram_slab import Bytes, RamTier, Source
from moebox.offload.residency import HALF_LIFE_TOKENS, Residency


class Store(Source, Protocol):
    """Where experts are read from without waiting: see `ExpertStore`."""

    def submit(self, key: int, row: Bytes, *, prefetch: bool = False) -> int:
        """Begin to read an expert's extent into `row` [nbytes]; returns a ticket."""
        ...

    def ready(self, ticket: int) -> bool:
        """Whether a read has ended, well or not."""
        ...

    def wait(self, ticket: int) -> None:
        """Wait for a read, whose ticket ends. Raises CheckpointError."""
        ...

    def promote(self, ticket: int) -> None:
        """Have a prefetch read as one that is waited for."""
        ...

    def cancel(self, ticket: int) -> int:
        """End a read and its ticket, well or not; returns bytes that were read for nothing."""
        ...

    def traffic(self) -> StoreTraffic:
        """What was read so far."""
        ...


@dataclass
class CacheCounts:
    """Demands so far: `hits` found their expert in RAM, for `foreseen` ones a speculative read had begun, and
    `reads` began one of their own."""

    hits: int = 0
    foreseen: int = 0
    reads: int = 0


class RamCache:
    """Which experts are in RAM, and reads of others into its rows. Used by one thread.

    A key that was demanded keeps its row until `done` or `abandon`. Weights can be trusted from `wait` on,
    which is the only way to them.

    Attributes:
        ram: the rows; its `rows` say who has one, or will have once its read has ended.
        residency: of the rows, a slot being a row.
        store: where misses are read from; None where all experts are in RAM.
        reserve: rows that are kept free between layers, for misses and speculation.
        counts: of demands.
    """

    def __init__(
        self,
        ram: RamTier,
        store: Store | None = None,
        reserve: int = 0,
        half_life: float = HALF_LIFE_TOKENS,
    ) -> None:
        """Take over what the tier holds; `reserve` counts only where experts are missing.

        Raises:
            ValueError: experts are missing and there is no store.
        """
        self.ram = ram
        self.store = store
        self.reserve = reserve if ram.n_rows < ram.n_keys else 0
        self.counts = CacheCounts()
        self._memory = ram.slab.numpy()[:, : ram.layout.nbytes]
        self._half_life = half_life
        self._tickets: dict[int, int] = {}
        self._held: set[int] = set()
        self._speculative: set[int] = set()
        self._take_over()

    def fill(self, keys: Sequence[int], progress: Progress | None = None) -> None:
        """Forget what the rows hold, and read `keys` from the store, at the disk's speed.

        Args:
            keys: at most as many as rows.
            progress: called with ("experts", bytes done, bytes in all).

        Raises:
            CheckpointError: as `ExpertStore.read`.
        """
        self.abandon()
        self.ram.fill(self._disk(), keys, progress)
        self._take_over()

    def _take_over(self) -> None:
        rows = self.ram.rows
        self.residency = Residency(
            self.ram.n_keys, self.ram.n_rows, 0, self._half_life, self.ram.config.n_routed_experts
        )
        held = np.flatnonzero(rows >= 0)
        self._loaded = bytearray((rows >= 0).tobytes())
        for key in held[np.argsort(rows[held])].tolist():
            self.residency.place(key)
        if self.store is None and len(held) < self.ram.n_keys:
            raise ValueError(f"{len(held)} of {self.ram.n_keys} experts, and no store")

    def _disk(self) -> Store:
        if self.store is None:
            raise ValueError("all experts are in RAM: there is no store")
        return self.store

    @property
    def n_spare(self) -> int:
        """Rows that are free now."""
        return self.residency.n_free

    def row(self, key: int) -> int:
        """The row that holds the key or receives it now; -1 if there is none."""
        return self.residency.slot(key)

    def resident(self, key: int) -> bool:
        """Whether the key's bytes are in RAM, and not of a speculative read that nobody has asked for."""
        return bool(self._loaded[key])

    def ready(self, key: int) -> bool:
        """Whether `wait` will not block."""
        if self._loaded[key]:
            return True
        ticket = self._tickets.get(key)
        return ticket is not None and self._disk().ready(ticket)

    def use(self, keys: npt.NDArray[np.int32], counts: npt.NDArray[np.float32] | None = None) -> None:
        """Add to the keys' scores; see `Residency.use`."""
        self.residency.use(keys, counts)

    def foresee(self, keys: Sequence[int]) -> None:
        """A decoded token's picks of one layer, used before: see `Residency.update_values`."""
        self.residency.update_values(np.array(keys, np.int32))

    @property
    def complete(self) -> bool:
        """Whether all experts have a row for good, so that no score matters."""
        return self.ram.n_rows == self.ram.n_keys

    def demand(self, *keys: int) -> None:
        """Keep the keys' rows from now on, and begin to read those that are missing.

        A read that speculation began goes on as one that is waited for.

        Raises:
            ValueError: more keys are held than there are rows.
        """
        self._held.update(keys)
        missing = []
        for key in keys:
            if self._loaded[key]:
                self.counts.hits += 1
            elif key in self._speculative:
                self._speculative.discard(key)
                self._disk().promote(self._tickets[key])
                self.counts.foreseen += 1
            elif key not in self._tickets:
                missing.append(key)
        if missing:
            self._make_room(sum(self.row(key) < 0 for key in missing))
        for key in missing:
            self._begin(key, prefetch=False)
            self.counts.reads += 1

    def wait(self, key: int) -> cpu.Expert:
        """The weights of a key that was demanded, as soon as they are there.

        Raises:
            CheckpointError: they could not be read; the key has no row then.
        """
        if not self._loaded[key]:
            try:
                self._disk().wait(self._tickets[key])
            except Exception:
                del self._tickets[key]
                self._forget(key)
                raise
            self._loaded[key] = True
            del self._tickets[key]
        return self.ram.expert(self.row(key))

    def done(self, keys: Sequence[int]) -> None:
        """The keys are not in use any more: they may go."""
        self._held.difference_update(keys)

    def trim(self) -> None:
        """Forget the weakest until `reserve` rows are free or being read into by speculation.

        Those in use are among the weakest, too, and stay for now; once they are done, `trim` lets them go.
        So the rows of the others are free for speculation early, and no one else leaves for it.
        """
        missing = self.reserve - len(self._speculative) - self.residency.n_free
        if missing <= 0:
            return
        n_weakest = min(missing + len(self._speculative), self.residency.n_resident)
        weakest = [key for key in self.residency.weakest(n_weakest) if key not in self._speculative]
        for key in weakest[:missing]:
            if self._loaded[key] and key not in self._held:
                self._forget(key)

    def speculate(self, key: int) -> bool:
        """Begin to read a key into a free row, behind all reads that are waited for.

        Returns:
            False if no row is free, or the key has one.
        """
        if self.row(key) >= 0 or not self.residency.n_free:
            return False
        self._speculative.add(key)
        self._begin(key, prefetch=True)
        return True

    def drop(self, key: int) -> int:
        """Give a speculative read up, and its row; returns the bytes that were read for nothing."""
        if key not in self._speculative:
            return 0
        wasted = self._disk().cancel(self._tickets[key])
        del self._tickets[key]
        self._speculative.discard(key)
        self._forget(key)
        return wasted

    def drop_all(self) -> None:
        """Give all speculative reads up."""
        for key in list(self._speculative):
            self.drop(key)

    def abandon(self) -> None:
        """End all reads, wait for what is in flight, and hold nothing: after an error or an interrupt."""
        for key, ticket in list(self._tickets.items()):
            self._disk().cancel(ticket)
            del self._tickets[key]
            self._forget(key)
        self._held.clear()
        self._speculative.clear()

    def _begin(self, key: int, *, prefetch: bool) -> None:
        # An interrupt in between leaves a row whose bytes nobody trusts, and that is read again where it is.
        row = self.row(key)
        if row < 0:
            row = self.residency.place(key)
        self.ram.rows[key] = row
        self._tickets[key] = self._disk().submit(key, self._memory[row], prefetch=prefetch)

    def _forget(self, key: int) -> None:
        self._loaded[key] = False
        self.ram.rows[key] = -1
        self.residency.release(key)

    def _make_room(self, n_free: int) -> None:
        """Forget the weakest residents that are not in use until so many rows are free."""
        missing = n_free - self.residency.n_free
        if missing <= 0:
            return
        in_use = len(self._held) + len(self._tickets)
        candidates = self.residency.weakest(min(missing + in_use, self.residency.n_resident))
        victims = [key for key in candidates if self._loaded[key] and key not in self._held][:missing]
        for key in victims:
            self._forget(key)
        for key in list(self._speculative)[: missing - len(victims)]:
            self.drop(key)
        if self.residency.n_free < n_free:
            raise ValueError(f"{len(self._held)} experts in use, {self.ram.n_rows} rows")

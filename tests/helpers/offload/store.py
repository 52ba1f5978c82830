"""Experts from a real store, and a store whose reads end at random, to find early uses of a row."""

import numpy as np

from moebox.errors import CheckpointError
from moebox.kernels import cpu
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.disk.store import ExpertStore
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.prefetch.ab_trial import Trial

GARBAGE = 0xEE


def cpu_experts(checkpoint: Checkpoint, rows: int | None = None, threads: int = 2) -> CpuExperts:
    """A checkpoint's experts, by default all of them in RAM."""
    config = checkpoint.config
    n_keys = config.n_keys
    store = ExpertStore.open(checkpoint)
    return CpuExperts.load(
        config, store, cpu.ThreadPool(threads, pin=False), n_keys if rows is None else rows
    )


class AlwaysOn(Trial):
    """A trial in which the feature is always on; keeps what it was told last."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.trying = True, False

    def observe(self, seconds, to_read):
        self.seen = seconds, to_read
        return False


class SlowStore:
    """Implements `Store` over a slab that holds all experts.

    A row is garbage from `submit` until its read ends: in `wait`, or at random in any call of `ready`.
    """

    def __init__(self, whole: RamSlab, seed: int = 0, chance: float = 0.3) -> None:
        self.whole = whole
        self.rng = np.random.default_rng(seed)
        self.chance = chance
        self.broken: set[int] = set()
        self.reads: list[int] = []
        self.promoted: list[int] = []
        self._open: dict[int, tuple[int, np.ndarray]] = {}
        self._ended: set[int] = set()
        self._next = 0

    @property
    def under_way(self) -> list[int]:
        """Keys of the tickets that have not ended."""
        return [key for key, _ in self._open.values()]

    def submit(self, key, row, *, prefetch=False):
        assert not any(np.shares_memory(row, other) for _, other in self._open.values())
        row[:] = GARBAGE
        self._next += 1
        self._open[self._next] = key, row
        self.reads.append(key)
        return self._next

    def ready(self, ticket):
        for other in self._open:
            if self.rng.random() < self.chance:
                self._end(other)
        return ticket in self._ended

    def wait(self, ticket):
        self._end(ticket)
        key, _ = self._open.pop(ticket)
        if key in self.broken:
            raise CheckpointError(f"expert {key}: broken")

    def promote(self, ticket):
        self.promoted.append(self._open[ticket][0])

    def cancel(self, ticket):
        _, row = self._open.pop(ticket)
        row[:] = GARBAGE
        return row.nbytes if ticket in self._ended else 0

    def read(self, key, row):
        row[:] = self.whole.slab[self.whole.rows[key], : row.size].numpy()

    def in_order(self, keys):
        return list(keys)

    def _end(self, ticket):
        if ticket not in self._ended:
            self._ended.add(ticket)
            key, row = self._open[ticket]
            if key not in self.broken:
                self.read(key, row)

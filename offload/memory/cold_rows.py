"""Where RAM and the GPU do not hold the model together: the disk has the rest of it.

An expert lies in a slot, in a row of RAM, or is cold: on disk only. A cold one is read into a free row, where
the CPU computes it or the GPU uploads it from, and competes for its row with the others then; who loses it is
just forgotten. For a token that is the work of `csrc/cold.cpp`, for a prompt of what stands below.

E n_routed_experts, k num_experts_per_tok; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np

from moebox import _kernels
from moebox.offload.disk.store import ExpertStore
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.residency import HALF_LIFE_TOKENS, Residency

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

    def __init__(self, ram: RamSlab, store: ExpertStore) -> None:
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
    return min(top_k + 2 * UPLOAD_GROUP, n_rows // LEAST_ROWS)

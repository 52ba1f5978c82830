"""Cold experts: those that lie neither in RAM nor on the GPU, because the two do not hold the model together.

A cold expert is read from the drive into a free row of RAM. The CPU computes it there, or it is uploaded from
there. Then it competes for its row with the experts that have one; the one that loses is dropped, since the
drive still has it. While a token is decoded, `csrc/decode/cold_reader.cpp` reads; for a prompt,
`prefill/cold_reads.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from moebox import _kernels
from moebox.offload.disk.store import ExpertStore
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP
from moebox.offload.memory.rows import RamRows
from moebox.offload.residency import Residency

LEAST_ROWS = 3
"""RAM must have so many times k rows: for a layer's experts, for victims of the GPU, and to read into."""


class ColdReader(_kernels.ColdReader):
    """Reads cold experts into rows of RAM.

    Attributes:
        rows: of RAM.
        store: the experts are read from it.
    """

    def __init__(self, rows: RamRows, store: ExpertStore) -> None:
        self.rows, self.store = rows, store
        extents = [(store.runs(key), store.checksum(key)) for key in range(rows.ram.n_keys)]
        super().__init__(rows, store.reader, extents)

    @property
    def residency(self) -> Residency:
        """The `Residency` of the rows."""
        return self.rows.residency

    @contextmanager
    def reads(self) -> Iterator[None]:
        """Around a token: raises `CheckpointError`, which names the expert, if a read fails."""
        try:
            yield
        except _kernels.ReadFailure as failure:
            raise self.store.error(failure, self.failed) from None
        finally:
            self.store.traffic()  # logs which copies of shards are not used any more


def least_rows(top_k: int) -> int:
    """The fewest rows of RAM with which cold experts can be read."""
    return LEAST_ROWS * top_k


def spare_rows(n_rows: int, top_k: int) -> int:
    """Rows that are free before reads: a token's layer reads up to k experts, a prompt's two groups."""
    return min(top_k + 2 * UPLOAD_GROUP, n_rows // LEAST_ROWS)

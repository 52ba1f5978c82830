"""Which expert has which row of RAM.

`RamRows` places and drops experts and makes room for others. Three parts of the program share it: the RAM
cache of a box without a GPU (`ram_cache.py`), the reads of cold experts (`cold_reader.py`,
`prefill/cold_reads.py`, `csrc/decode/cold_reader.cpp`), and the exchange of rows and slots in exclusive mode
(`prefill/admission.py`, `csrc/decode/slot_eviction.cpp`).
"""

from __future__ import annotations

from moebox import _kernels
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS


class RamRows(_kernels.RamRows):
    """The rows of a slab, whose `rows` is the table.

    Attributes:
        ram: the slab. `ram.rows[key]` is set once all bytes of the key are in its row.
        residency: a slot of it is a row. It has a row for a key as soon as the row is the key's.
    """

    def __init__(self, ram: RamSlab, reserve: int = 0, half_life: float = SCORE_HALF_LIFE_TOKENS) -> None:
        """Take over what the slab holds. `reserve` rows are free before a step of decoding reads."""
        self.ram = ram
        super().__init__(ram.rows, ram.n_rows, reserve, half_life, ram.config.n_routed_experts)

    @property
    def n_free(self) -> int:
        """Rows that are free now."""
        return self.residency.n_free

    @property
    def capacity(self) -> int:
        """Experts that RAM holds while the reserve is free."""
        return self.ram.n_rows - self.residency.reserve

    def row(self, key: int) -> int:
        """The key's row, complete or not; -1 if it has none."""
        return self.residency.slot(key)

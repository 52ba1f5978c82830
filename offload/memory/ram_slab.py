"""Experts in RAM: one slab of rows, pinned where there is a GPU.

A row holds one expert's bytes as they lie on disk (`checkpoint/layout.py`) and starts on a page. The CPU
computes from rows, and uploads copy from them. L MoE layers, E experts each; a key is
`moe_index * E + expert`.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.kernels import cpu
from moebox.offload.checkpoint.layout import ExpertLayout
from moebox.offload.device.base import Device
from moebox.offload.disk.base import Source
from moebox.offload.disk.synthetic import SyntheticSource
from moebox.offload.experts import Progress
from moebox.units import PAGE_BYTES, ceil_div

PIN_BYTES = 4 << 30
"""Bytes that are pinned at once, rounded down to whole rows: a copy may not cross two pinned pieces."""
FAULT_BYTES = 256 << 20
"""Bytes whose pages one task faults in."""
READERS = 8
"""Threads that fault memory in, and threads that fill it."""


class RamSlab:
    """Rows of experts in RAM.

    Attributes:
        config: of the model.
        layout: of a row.
        stride: bytes from row to row, a multiple of a page.
        slab: uint8 [n_rows, stride].
        rows: int32 [L * E]: a key's row, or -1.
    """

    def __init__(
        self,
        config: ModelConfig,
        n_rows: int | None = None,
        device: Device | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Allocate the slab, with a row for every expert by default, and pin it for `device`.

        Args:
            progress: called with ("memory", bytes done, bytes in all).

        Raises:
            PlanError: the system does not give, or does not pin, so much memory.
        """
        self.config = config
        self.layout = ExpertLayout(config)
        self.stride = row_stride(config)
        n_keys = config.n_keys
        self.slab = _map_anonymous(n_keys if n_rows is None else n_rows, self.stride)
        self.rows: npt.NDArray[np.int32] = np.full(n_keys, -1, np.int32)
        self._experts: dict[int, cpu.Expert] = {}
        self._unpin = contextlib.ExitStack()
        weakref.finalize(self, self._unpin.close)
        _fault_in(self.slab, progress)
        if device is not None:
            self._pin(device)

    @property
    def n_rows(self) -> int:
        """Rows of the slab."""
        return len(self.slab)

    @property
    def n_keys(self) -> int:
        """Experts of the model, L * E."""
        return len(self.rows)

    def close(self) -> None:
        """Unpin the memory; it stays readable."""
        self._unpin.close()

    def expert(self, row: int) -> cpu.Expert:
        """The row's expert for the CPU kernels: views, so that they see what the row holds when they run."""
        if row not in self._experts:
            self._experts[row] = cpu.Expert(*row_tensors(self.slab[row], self.layout))
        return self._experts[row]

    def fill_synthetic(self, seed: int = 0, keys: Iterable[int] | None = None) -> None:
        """Fill with random experts, see `SyntheticSource`."""
        self.fill(SyntheticSource(self.config, seed), keys)

    def fill(
        self, source: Source, keys: Iterable[int] | None = None, progress: Progress | None = None
    ) -> None:
        """Empty the rows, and read `keys`, all by default, into the first rows, in their order.

        Args:
            source: of the experts' bytes.
            progress: called with ("experts", bytes done, bytes in all).

        Raises:
            CheckpointError: as the source's `read`.
            ValueError: more keys than rows.
        """
        chosen = list(range(self.n_keys) if keys is None else keys)
        if len(chosen) > self.n_rows:
            raise ValueError(f"{len(chosen)} experts for {self.n_rows} rows")
        self.rows.fill(-1)
        self.rows[chosen] = np.arange(len(chosen), dtype=np.int32)
        memory = self.slab.numpy()
        nbytes = self.layout.nbytes

        def read(key: int) -> None:
            source.read(key, memory[self.rows[key], :nbytes])

        _in_threads(read, source.in_order(chosen), nbytes, "experts", progress)

    def _pin(self, device: Device) -> None:
        rows = max(1, PIN_BYTES // self.stride)
        for first in range(0, self.n_rows, rows):
            self._unpin.callback(device.pin(self.slab[first : first + rows]))


def row_stride(config: ModelConfig) -> int:
    """Bytes from one row or slot to the next: an expert's, rounded up to whole pages."""
    return ceil_div(config.expert_bytes, PAGE_BYTES) * PAGE_BYTES


def row_tensors(row: Tensor, layout: ExpertLayout) -> list[Tensor]:
    """An expert's six tensors as views of its `row`, uint8 [stride]."""
    dtypes = {"I32": torch.int32, "BF16": torch.bfloat16}
    parts = zip(layout.offsets, layout.sizes, layout.dtypes, layout.shapes, strict=True)
    return [
        row[offset : offset + size].view(dtypes[dtype]).view(shape) for offset, size, dtype, shape in parts
    ]


def _map_anonymous(n_rows: int, stride: int) -> Tensor:
    """Private memory, in huge pages where the system has them: fewer page faults, and faster pinning."""
    nbytes = n_rows * stride
    if not nbytes:
        return torch.empty(0, stride, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise PlanError(
            f"{nbytes} bytes of RAM for experts: {error.strerror}", "Give a smaller --ram."
        ) from None
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(n_rows, stride)


def _fault_in(slab: Tensor, progress: Progress | None) -> None:
    flat = slab.numpy().reshape(-1)

    def touch(first: int) -> None:
        flat[first : first + FAULT_BYTES : PAGE_BYTES] = 0

    _in_threads(touch, list(range(0, flat.size, FAULT_BYTES)), FAULT_BYTES, "memory", progress)


def _in_threads(
    task: Callable[[int], None], items: list[int], nbytes: int, stage: str, progress: Progress | None
) -> None:
    """Run `task` for each item, of `nbytes` each, in threads; the first failure is raised."""
    with ThreadPoolExecutor(READERS) as executor:
        try:
            for done, _ in enumerate(executor.map(task, items), 1):
                if progress is not None:
                    progress(stage, done * nbytes, len(items) * nbytes)
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise

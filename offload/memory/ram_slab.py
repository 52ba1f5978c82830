"""Experts in RAM: one slab of rows in the on-disk layout, pinned where there is a GPU.

A row holds one expert's extent (`layout.py`) and starts on a page; the CPU computes from it and PCIe copies
from it. L MoE layers, E experts each; a key is `moe_index * E + expert`.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.config import GROUP_SIZE, ModelConfig
from moebox.errors import PlanError
from moebox.kernels import cpu
from moebox.offload.checkpoint.layout import ExpertLayout
from moebox.offload.device.base import Device
from moebox.offload.experts import Progress
from moebox.units import PAGE_BYTES, ceil_div

Bytes = npt.NDArray[np.uint8]

PIN_BYTES = 4 << 30
"""Bytes that are pinned at once; whole rows, since a copy may not cross from one piece to the next."""
FAULT_BYTES = 256 << 20
READERS = 8
"""Threads that fault memory in and fill it."""


class Source(Protocol):
    """Where experts' bytes come from."""

    def in_order(self, keys: Sequence[int]) -> list[int]:
        """`keys` in the order that is best to read."""
        ...

    def read(self, key: int, row: Bytes) -> None:
        """Write an expert's extent to `row` [nbytes]; called from several threads."""


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
        """Experts that fit."""
        return len(self.slab)

    @property
    def n_keys(self) -> int:
        """Experts there are."""
        return len(self.rows)

    def close(self) -> None:
        """Unpin the memory; it stays readable."""
        self._unpin.close()

    def expert(self, row: int) -> cpu.Expert:
        """What the CPU kernel takes: views of whatever the row holds when it is computed."""
        if row not in self._experts:
            self._experts[row] = cpu.Expert(*row_tensors(self.slab[row], self.layout))
        return self._experts[row]

    def fill_synthetic(self, seed: int = 0, keys: Iterable[int] | None = None) -> None:
        """Random experts whose outputs are near their inputs in size; a key's bytes depend on `seed` only."""
        self.fill(SyntheticSource(self.config, seed), keys)

    def fill(
        self, source: Source, keys: Iterable[int] | None = None, progress: Progress | None = None
    ) -> None:
        """Forget what the rows hold, and read `keys`, all by default, into the first rows, in their order.

        Args:
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
    """Bytes from one expert to the next, in RAM and in the GPU's slab: whole pages."""
    return ceil_div(config.expert_bytes, PAGE_BYTES) * PAGE_BYTES


def row_tensors(row: Tensor, layout: ExpertLayout) -> list[Tensor]:
    """An expert's six tensors as views of its `row`, uint8 [stride]."""
    dtypes = {"I32": torch.int32, "BF16": torch.bfloat16}
    parts = zip(layout.offsets, layout.sizes, layout.dtypes, layout.shapes, strict=True)
    return [
        row[offset : offset + size].view(dtypes[dtype]).view(shape) for offset, size, dtype, shape in parts
    ]


def _map_anonymous(n_rows: int, stride: int) -> Tensor:
    """Private memory in huge pages where the system has them: fewer faults, and pinning is faster."""
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
    """Run `task` for each item, of `nbytes` each; the first failure ends it and is raised."""
    with ThreadPoolExecutor(READERS) as executor:
        try:
            for done, _ in enumerate(executor.map(task, items), 1):
                if progress is not None:
                    progress(stage, done * nbytes, len(items) * nbytes)
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise


class SyntheticSource:
    """Random experts, cut from a few random megabytes at random places."""

    STEP_BYTES = 64
    PLACES = 1 << 14

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._layout = ExpertLayout(config)
        self._seed = seed
        generator = np.random.default_rng(seed)
        self._parts = [self._random_part(i, generator) for i in range(len(self._layout.sizes))]

    def _random_part(self, tensor: int, generator: np.random.Generator) -> Bytes:
        nbytes = self._layout.sizes[tensor] + self.STEP_BYTES * self.PLACES
        if self._layout.dtypes[tensor] == "I32":
            return generator.integers(0, 256, nbytes, np.uint8)
        columns = self._layout.shapes[tensor][1] * GROUP_SIZE
        scales = (0.05 + 0.35 * generator.random(nbytes // 2, np.float32)) / columns**0.5
        bits = (scales.view(np.uint32) + 0x8000) >> 16  # to bf16; the sum cannot overflow below 1
        return np.ascontiguousarray(bits.astype(np.uint16).view(np.uint8))

    def in_order(self, keys: Sequence[int]) -> list[int]:
        """See `Source`."""
        return list(keys)

    def read(self, key: int, row: Bytes) -> None:
        """See `Source`."""
        places = np.random.default_rng([self._seed, key]).integers(0, self.PLACES, len(self._parts))
        for part, place, offset, size in zip(
            self._parts, places, self._layout.offsets, self._layout.sizes, strict=True
        ):
            first = int(place) * self.STEP_BYTES
            row[offset : offset + size] = part[first : first + size]

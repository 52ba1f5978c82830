"""Random experts, for benchmarks and tests without a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moebox.config import GROUP_SIZE, ModelConfig
from moebox.offload.checkpoint.layout import ExpertLayout
from moebox.offload.disk.base import Bytes

STEP_BYTES = 64
OFFSETS = 1 << 14


class SyntheticSource:
    """A `Source` of random experts: each tensor is cut out of a few random megabytes at a random offset.

    An expert's bytes depend on `seed` and its key only, and its output has about the size of its input.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._layout = ExpertLayout(config)
        self._seed = seed
        generator = np.random.default_rng(seed)
        self._random = [self._random_bytes(i, generator) for i in range(len(self._layout.sizes))]

    def in_order(self, keys: Sequence[int]) -> list[int]:
        """`keys` as they are: any order is as fast."""
        return list(keys)

    def read(self, key: int, row: Bytes) -> None:
        """Write an expert's extent to `row`, uint8 [nbytes]."""
        offsets = np.random.default_rng([self._seed, key]).integers(0, OFFSETS, len(self._random))
        for random, offset, begin, size in zip(
            self._random, offsets, self._layout.offsets, self._layout.sizes, strict=True
        ):
            first = int(offset) * STEP_BYTES
            row[begin : begin + size] = random[first : first + size]

    def _random_bytes(self, tensor: int, generator: np.random.Generator) -> Bytes:
        nbytes = self._layout.sizes[tensor] + STEP_BYTES * OFFSETS
        if self._layout.dtypes[tensor] == "I32":
            return generator.integers(0, 256, nbytes, np.uint8)
        columns = self._layout.shapes[tensor][1] * GROUP_SIZE
        scales = (0.05 + 0.35 * generator.random(nbytes // 2, np.float32)) / columns**0.5
        bits = (scales.view(np.uint32) + 0x8000) >> 16  # rounds to bf16; cannot overflow for scales below 1
        return np.ascontiguousarray(bits.astype(np.uint16).view(np.uint8))

"""Pinned memory through which the host and the GPU exchange a prompt layer's routing, inputs and sums."""

from __future__ import annotations

import torch

from moebox.offload.device.base import Device
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP

GROUP_TABLE_WORDS = 2 * UPLOAD_GROUP + 1
"""int32 words that describe a group of experts to the GPU: their slots, then their offsets."""
ZERO_ROWS = 512


class Staging:
    """Pinned memory for layers of up to `capacity` tokens.

    Between layers `sums` is zero, or the copies that zero it are queued on `downloads`.

    Attributes:
        capacity: tokens.
        ids, router_weights: int64 and fp32 [capacity, k], what the router chose.
        hidden: bf16 [capacity, H], the experts' input.
        sums: fp32 [capacity, H], what the CPU adds.
        tokens, weights: int32 and fp32 [capacity * k], by pair of token and expert.
        residents: int32 [2 * E + 1], slots and offsets of experts in the cache.
        tables: int32 [E, GROUP_TABLE_WORDS], one row for each group that is uploaded.
    """

    def __init__(self, device: Device, capacity: int, top_k: int, n_experts: int, hidden_size: int) -> None:
        self.capacity = capacity
        self.ids = device.pinned((capacity, top_k), torch.int64)
        self.router_weights = device.pinned((capacity, top_k), torch.float32)
        self.hidden = device.pinned((capacity, hidden_size), torch.bfloat16)
        self.sums = device.pinned((capacity, hidden_size), torch.float32)
        self.tokens = device.pinned((capacity * top_k,), torch.int32)
        self.weights = device.pinned((capacity * top_k,), torch.float32)
        self.residents = device.pinned((2 * n_experts + 1,), torch.int32)
        self.tables = device.pinned((n_experts, GROUP_TABLE_WORDS), torch.int32)  # at worst, groups of one
        self._zeros = device.empty((min(capacity, ZERO_ROWS), hidden_size), torch.float32).zero_()
        self._downloads = device.downloads
        self._downloads.wait(device.mark())

    def clear_sums(self, n_tokens: int) -> None:
        """Queue copies that zero the first rows of `sums`. They use PCIe, to spare the CPU's time."""
        for first in range(0, n_tokens, len(self._zeros)):
            rows = self.sums[first : min(first + len(self._zeros), n_tokens)]
            self._downloads.copy(rows, self._zeros[: len(rows)])

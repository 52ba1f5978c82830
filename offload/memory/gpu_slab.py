"""Experts in GPU memory: one slab of slots.

A slot holds one expert's bytes, as a row in RAM does. The first slots are a cache, whose `Residency` says
which expert has which slot. The last `RING_SLOTS` are the ring that a prompt's uploads pass through.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.offload.device.base import Device
from moebox.offload.memory.ram_slab import RamSlab, row_stride
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS, Residency

log = logging.getLogger("moebox")

UPLOAD_GROUP = 8
"""Experts that a prompt's layer uploads and computes together."""
RING_SLOTS = 2 * UPLOAD_GROUP
"""Slots beside the cache: a ring of two groups."""
SHRINK = 0.9
"""If memory does not suffice for n slots, `SHRINK * n` are tried next."""


class GpuSlab:
    """A slab of slots, and the table of the experts in the cache.

    Attributes:
        device: that has the slab.
        shape: of an expert, (H, I).
        slab: uint8 [n_slots + RING_SLOTS, stride] on the device.
        stride: bytes from slot to slot.
        n_slots: slots of the cache.
        residency: of the cache; `reserve` slots of it are kept free for a decode step's uploads.
    """

    def __init__(self, config: ModelConfig, device: Device, n_slots: int) -> None:
        """Allocate the slab; fewer slots than asked for where the device's memory does not suffice.

        Raises:
            PlanError: not even the ring fits.
        """
        self.device = device
        self.shape = (config.hidden_size, config.moe_intermediate_size)
        self.stride = row_stride(config)
        n_keys = config.n_keys
        self.slab = _allocate(device, n_slots, self.stride)
        self.n_slots = len(self.slab) - RING_SLOTS
        reserve = min(config.num_experts_per_tok, self.n_slots // 2)
        self.residency = Residency(
            n_keys, self.n_slots, reserve, SCORE_HALF_LIFE_TOKENS, config.n_routed_experts
        )

    @property
    def address(self) -> int:
        """Where the slab starts in the device's memory."""
        return self.slab.data_ptr()

    @property
    def n_cached(self) -> int:
        """Experts that the cache holds between layers, while the reserve is free."""
        return self.n_slots - self.residency.reserve

    def clear(self) -> None:
        """Empty the cache; scores stay."""
        for key in self.residency.slots():
            if key >= 0:
                self.residency.release(int(key))

    def ring_slot(self, place: int) -> int:
        """The slot at a place in the ring; places go round."""
        return self.n_slots + place % RING_SLOTS

    def fill(self, ram: RamSlab, keys: Iterable[int]) -> None:
        """Upload experts from their rows in RAM into free slots of the cache, and wait for them."""
        for key in keys:
            slot = self.residency.place(key)
            self.device.uploads.copy(self.slab[slot], ram.slab[int(ram.rows[key])])
        self.device.uploads.record().synchronize()

    def measure_gbps(self, ram: RamSlab) -> float:
        """GB/s of uploads from RAM, measured with one upload to each slot of the ring."""
        uploads = self.device.uploads
        begin = uploads.record()
        for place in range(RING_SLOTS):
            uploads.copy(self.slab[self.ring_slot(place)], ram.slab[place % ram.n_rows])
        end = uploads.record()
        end.synchronize()
        return RING_SLOTS * self.stride / end.seconds_since(begin) / 1e9


def spread_keys(layers: int, n_experts: int) -> list[int]:
    """All keys, in an order in which the first n are spread evenly over the layers."""
    keys = np.arange(layers * n_experts).reshape(layers, n_experts)
    return [int(key) for key in keys.T.reshape(-1)]


def _allocate(device: Device, n_slots: int, stride: int) -> Tensor:
    wanted = n_slots
    while True:
        try:
            slab = device.empty((n_slots + RING_SLOTS, stride), torch.uint8)
        except torch.OutOfMemoryError:
            if not n_slots:
                raise PlanError(
                    f"no GPU memory for the {RING_SLOTS * stride} bytes that prefill stages experts in",
                    "Give a smaller context, free GPU memory, or use --device cpu.",
                ) from None
            n_slots = min(int(n_slots * SHRINK), n_slots - 1)
            continue
        if n_slots < wanted:
            log.warning(
                "GPU memory for %d experts, not for the planned %d: others took some meanwhile; "
                "more experts come from RAM",
                n_slots,
                wanted,
            )
        return slab

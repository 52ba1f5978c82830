"""A slot: one expert's bytes on the device, in the layout they have on disk.

Gate, up and down, each packed int32 [out, in/8] then scales bf16 [out, in/32]. Slots stand `stride` bytes
apart in a slab, uint8 [slots, stride].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 32
"""Inputs that share one scale."""


class SlotLayout(NamedTuple):
    """Bytes from a slot's start to each of its six tensors."""

    gate: int
    gate_scale: int
    up: int
    up_scale: int
    down: int
    down_scale: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole expert: the down projection is as large as the gate."""
        return self.down + self.up


def slot_layout(shape: tuple[int, int]) -> SlotLayout:
    """Where an expert's tensors lie.

    Args:
        shape: (hidden_size, moe_intermediate_size).

    Raises:
        ValueError: one of them is not a positive multiple of 32.
    """
    if any(size <= 0 or size % GROUP for size in shape):
        raise ValueError(f"shape is {shape}, both must be positive multiples of {GROUP}")
    weights = shape[0] * shape[1]
    packed, matrix = weights // 2, weights // 2 + weights // GROUP * 2
    starts = (0, matrix, 2 * matrix)
    return SlotLayout(*(start + part for start in starts for part in (0, packed)))


def check_slab(slab: Tensor, layout: SlotLayout) -> None:
    """Refuse a slab that cannot hold experts of this layout, or whose slots are not aligned to 16 bytes.

    Raises:
        ValueError: says what was given and what is needed.
    """
    if slab.ndim != 2 or slab.element_size() != 1 or slab.stride(1) != 1:
        raise ValueError(f"slab is {slab.dtype} {list(slab.shape)}, must be uint8 [slots, stride]")
    if slab.shape[1] < layout.nbytes or slab.stride(0) % 16:
        raise ValueError(
            f"slots of {slab.shape[1]} bytes, {slab.stride(0)} apart: an expert has {layout.nbytes} bytes "
            "and slots must start at multiples of 16"
        )


def check_array(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor that is not contiguous, of this shape and this dtype.

    Raises:
        ValueError: says what was given and what is needed.
    """
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, strides {tensor.stride()}: "
            f"contiguous {dtype} {list(shape)} is needed"
        )

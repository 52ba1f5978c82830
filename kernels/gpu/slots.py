"""The layout of a slot: room for one expert's bytes on the device, which are laid out as on disk.

A slot holds gate, up and down, each as packed int32 [out, in/8] and then scales bf16 [out, in/32]. A slab,
uint8 [slots, stride], holds slots `stride` bytes apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moebox.config import GROUP_SIZE


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
        """Bytes of the whole expert. Its three matrices have the same size, which is where `up` starts."""
        return self.down + self.up


def slot_layout(shape: tuple[int, int]) -> SlotLayout:
    """The layout of an expert of a shape.

    Args:
        shape: (hidden_size, moe_intermediate_size).

    Raises:
        ValueError: a size is not a positive multiple of 32.
    """
    if any(size <= 0 or size % GROUP_SIZE for size in shape):
        raise ValueError(f"shape is {shape}, both must be positive multiples of {GROUP_SIZE}")
    weights = shape[0] * shape[1]
    packed, matrix = weights // 2, weights // 2 + weights // GROUP_SIZE * 2
    starts = (0, matrix, 2 * matrix)
    return SlotLayout(*(start + offset for start in starts for offset in (0, packed)))


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

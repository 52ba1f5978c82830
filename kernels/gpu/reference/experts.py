"""INT4 experts in plain torch. `base.Ops` documents the functions.

All sums are fp32. Nothing is rounded to bf16 on the way, unlike in the Triton kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moebox.config import GROUP_SIZE
from moebox.kernels.gpu.slots import SlotLayout, check_slab, slot_layout

_SHIFTS = range(0, 32, 4)


def experts_one(
    slab: Tensor, shape: tuple[int, int], listed: Tensor, weights: Tensor, hidden: Tensor, out: Tensor
) -> None:
    layout = slot_layout(shape)
    check_slab(slab, layout)
    out.zero_()
    count, *slots = listed.tolist()
    for slot, weight in zip(slots[:count], weights.tolist(), strict=False):
        out += weight * _expert(slab[slot], shape, layout, hidden.float()[None])[0]


def experts_many(
    slab: Tensor,
    shape: tuple[int, int],
    slots: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    weights: Tensor,
    hidden: Tensor,
    out: Tensor,
    counts: list[int] | None = None,
) -> None:
    layout = slot_layout(shape)
    check_slab(slab, layout)
    bounds = offsets.tolist()
    for slot, begin, end in zip(slots.tolist(), bounds[:-1], bounds[1:], strict=True):
        if begin < end:
            rows = tokens[begin:end].long()
            result = _expert(slab[slot], shape, layout, hidden[rows].float())
            out.index_add_(0, rows, result * weights[begin:end, None])


def split_expert(
    ram: Tensor, shape: tuple[int, int], split: Tensor, weight: Tensor, hidden: Tensor, out: Tensor
) -> None:
    layout = slot_layout(shape)
    check_slab(ram, layout)
    row, count = split[:2].tolist()
    if row < 0:
        return
    gate, up, down = _matrices(ram[row], shape, layout)
    x = hidden.float()
    out += weight[0] * (down[:, :count] @ (F.silu(gate[:count] @ x) * (up[:count] @ x)))


def _expert(slot: Tensor, shape: tuple[int, int], layout: SlotLayout, hidden: Tensor) -> Tensor:
    """fp32 [T, H] of one expert for fp32 [T, H]."""
    gate, up, down = _matrices(slot, shape, layout)
    return F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down)


def _matrices(slot: Tensor, shape: tuple[int, int], layout: SlotLayout) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up [I, H] and down [H, I], dequantized to fp32."""
    columns, inner = shape
    return (
        _matrix(slot, layout.gate, layout.gate_scale, inner, columns),
        _matrix(slot, layout.up, layout.up_scale, inner, columns),
        _matrix(slot, layout.down, layout.down_scale, columns, inner),
    )


def _matrix(slot: Tensor, packed: int, scale: int, rows: int, columns: int) -> Tensor:
    words = slot[packed : packed + rows * columns // 2].view(torch.int32).view(rows, -1, 1)
    nibbles = words >> torch.tensor(_SHIFTS, dtype=torch.int32, device=slot.device) & 15
    scales = slot[scale : scale + rows * columns // GROUP_SIZE * 2].view(torch.bfloat16).view(rows, -1, 1)
    return ((nibbles - 8).float().view(rows, -1, GROUP_SIZE) * scales.float()).view(rows, columns)

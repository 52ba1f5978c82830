"""What `kernels.gpu.experts` computes, in plain torch: its reference, and the experts of a stand-in device.

Same names and arguments; all sums are fp32, and nothing is rounded to bf16 on the way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moebox.kernels.gpu.slots import GROUP, SlotLayout, check_slab, slot_layout

_SHIFTS = range(0, 32, 4)


def experts_one(
    slab: Tensor, shape: tuple[int, int], listed: Tensor, weights: Tensor, hidden: Tensor, out: Tensor
) -> None:
    """See `moebox.kernels.gpu.triton.experts.experts_one`."""
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
    """See `moebox.kernels.gpu.triton.experts.experts_many`."""
    layout = slot_layout(shape)
    check_slab(slab, layout)
    bounds = offsets.tolist()
    for slot, begin, end in zip(slots.tolist(), bounds[:-1], bounds[1:], strict=True):
        if begin < end:
            rows = tokens[begin:end].long()
            result = _expert(slab[slot], shape, layout, hidden[rows].float())
            out.index_add_(0, rows, result * weights[begin:end, None])


def expert_part(
    ram: Tensor, shape: tuple[int, int], part: Tensor, weight: Tensor, hidden: Tensor, out: Tensor
) -> None:
    """See `moebox.kernels.gpu.triton.part.expert_part`."""
    layout = slot_layout(shape)
    check_slab(ram, layout)
    row, count = part[:2].tolist()
    if row < 0:
        return
    columns, inner = shape
    x = hidden.float()
    gate = _matrix(ram[row], layout.gate, layout.gate_scale, inner, columns)[:count]
    up = _matrix(ram[row], layout.up, layout.up_scale, inner, columns)[:count]
    down = _matrix(ram[row], layout.down, layout.down_scale, columns, inner)[:, :count]
    out += weight[0] * (down @ (F.silu(gate @ x) * (up @ x)))


def _expert(slot: Tensor, shape: tuple[int, int], layout: SlotLayout, hidden: Tensor) -> Tensor:
    """fp32 [T, H] of one expert for fp32 [T, H]."""
    columns, inner = shape
    gate = _matrix(slot, layout.gate, layout.gate_scale, inner, columns)
    up = _matrix(slot, layout.up, layout.up_scale, inner, columns)
    down = _matrix(slot, layout.down, layout.down_scale, columns, inner)
    return F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), down)


def _matrix(slot: Tensor, packed: int, scale: int, rows: int, columns: int) -> Tensor:
    """Dequantized fp32 [rows, columns]."""
    words = slot[packed : packed + rows * columns // 2].view(torch.int32).view(rows, -1, 1)
    nibbles = words >> torch.tensor(_SHIFTS, dtype=torch.int32, device=slot.device) & 15
    scales = slot[scale : scale + rows * columns // GROUP * 2].view(torch.bfloat16).view(rows, -1, 1)
    return ((nibbles - 8).float().view(rows, -1, GROUP) * scales.float()).view(rows, columns)

"""A part of one INT4 expert on the GPU, straight from host memory (Triton).

Shapes: H hidden_size, I moe_intermediate_size, both multiples of 32. Rows of RAM: as slots, see `slots.py`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moebox.kernels.gpu.slots import GROUP, check_array, check_slab, slot_layout
from moebox.kernels.gpu.triton import one_kernels, part_kernels
from moebox.kernels.gpu.triton.experts import RowTiles
from moebox.kernels.gpu.triton.overlap import launch_options

GATE_UP_PART = RowTiles(4, 2)
DOWN_PART = RowTiles(4, 4)


def expert_part(
    ram: Tensor, shape: tuple[int, int], part: Tensor, weight: Tensor, hidden: Tensor, out: Tensor
) -> None:
    """Add what the first r inner rows of one expert give for one token, with the expert read from RAM.

    `out += weight * down[:, :r] @ (silu(gate[:r] @ hidden) * (up[:r] @ hidden))`. Each weight crosses PCIe
    once. The part is read on the device, so the call can stand in a CUDA graph. Products and sums are fp32.
    The same inputs give the same bits.

    Args:
        ram: uint8 [rows, stride], registered with CUDA; or device memory.
        shape: (H, I).
        part: int32 [2] or longer: a row of `ram`, or -1 for nothing to do; and r, from 0 to I, a multiple of
            32; of 256, the packed pieces of down's rows are whole lines of 128 bytes. May lie in pinned
            memory, as may `weight`.
        weight: fp32 [1].
        hidden: bf16 [H] on the device.
        out: fp32 [H] on the device, added to in place.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_slab(ram, slot_layout(shape))
    columns, rows = shape
    check_array("part", part, (max(2, part.numel()),), torch.int32)
    check_array("weight", weight, (1,), torch.float32)
    check_array("hidden", hidden, (columns,), torch.bfloat16)
    check_array("out", out, (columns,), torch.float32)
    step = GATE_UP_PART.warps * GATE_UP_PART.rows
    sizes = [columns, rows, columns // GROUP, rows // step, 1]
    operand, inner, offset, inner_offset, weight_copy = torch.empty(sum(sizes), device=out.device).split(
        sizes
    )
    part_copy = torch.empty(2, dtype=torch.int32, device=out.device)
    words, magic, options = columns // 8, one_kernels.MAGIC, launch_options()
    one_kernels.prepare[(triton.cdiv(words, 128),)](
        part,
        weight,
        hidden,
        part_copy,
        weight_copy,
        operand,
        offset,
        words,
        1,
        1,
        128,
        num_warps=4,
        **options,
    )
    part_kernels.gate_up[(rows // step,)](
        ram, ram.stride(0), part_copy, weight_copy, operand, offset, inner, inner_offset, 0, magic,
        columns, rows, GATE_UP_PART.warps, GATE_UP_PART.rows, num_warps=GATE_UP_PART.warps, **options,
    )  # fmt: skip
    part_kernels.down[(columns // (DOWN_PART.warps * DOWN_PART.rows),)](
        ram, ram.stride(0), part_copy, inner, inner_offset, out, 0, magic,
        columns, rows, GROUP // step, DOWN_PART.warps, DOWN_PART.rows, num_warps=DOWN_PART.warps, **options,
    )  # fmt: skip

"""A split expert on the GPU: its first inner rows, computed from its bytes in host memory.

Shapes: H hidden_size, I moe_intermediate_size, both multiples of 32. Rows of RAM are laid out as slots, see
`slots.py`. `base.Ops` documents `split_expert`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moebox.config import GROUP_SIZE
from moebox.kernels.gpu.slots import check_array, check_slab, slot_layout
from moebox.kernels.gpu.triton import one_token_kernels, split_expert_kernels
from moebox.kernels.gpu.triton.experts import RowTiles, launch_prepare
from moebox.kernels.gpu.triton.overlap import launch_options

GATE_UP_SPLIT = RowTiles(4, 2)
DOWN_SPLIT = RowTiles(4, 4)


def split_expert(
    ram: Tensor, shape: tuple[int, int], split: Tensor, weight: Tensor, hidden: Tensor, out: Tensor
) -> None:
    """Each weight crosses PCIe once. The kernels read the split on the device. Products and sums are fp32.

    With r a multiple of 256, the packed values of down's rows are whole lines of 128 bytes.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_slab(ram, slot_layout(shape))
    columns, rows = shape
    check_array("split", split, (max(2, split.numel()),), torch.int32)
    check_array("weight", weight, (1,), torch.float32)
    check_array("hidden", hidden, (columns,), torch.bfloat16)
    check_array("out", out, (columns,), torch.float32)
    step = GATE_UP_SPLIT.warps * GATE_UP_SPLIT.rows
    sizes = [columns, rows, columns // GROUP_SIZE, rows // step, 1]
    operand, inner, offset, inner_offset, weight_copy = torch.empty(sum(sizes), device=out.device).split(
        sizes
    )
    split_copy = torch.empty(2, dtype=torch.int32, device=out.device)
    magic, options = one_token_kernels.MAGIC, launch_options()
    launch_prepare(split, weight, hidden, split_copy, weight_copy, operand, offset)
    split_expert_kernels.gate_up[(rows // step,)](
        ram, ram.stride(0), split_copy, weight_copy, operand, offset, inner, inner_offset, 0, magic,
        columns, rows, GATE_UP_SPLIT.warps, GATE_UP_SPLIT.rows, num_warps=GATE_UP_SPLIT.warps, **options,
    )  # fmt: skip
    split_expert_kernels.down[(columns // (DOWN_SPLIT.warps * DOWN_SPLIT.rows),)](
        ram, ram.stride(0), split_copy, inner, inner_offset, out, 0, magic,
        columns, rows, GROUP_SIZE // step, DOWN_SPLIT.warps, DOWN_SPLIT.rows, num_warps=DOWN_SPLIT.warps,
        **options,
    )  # fmt: skip

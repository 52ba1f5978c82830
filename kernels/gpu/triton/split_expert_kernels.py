"""Triton kernels of `split_expert`: one token through the first inner rows of an expert in host memory.

The kernels read weights over PCIe into registers, each byte once. PCIe is their limit: with 512 rows or more
an H200 reads 47 to 50 GB/s, and a kernel that only reads 49 to 50. So all programs request their weights at
once, 512 contiguous bytes a warp at a time. Layouts and arithmetic are those of `one_token_kernels.py`, whose
`prepare` runs first; it also copies the split, (row, inner rows), to the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moebox.kernels.gpu.triton.int4 import GROUP_SIZE, matrix_pointers
from moebox.kernels.gpu.triton.one_token_kernels import (
    LANES,
    activations,
    axes,
    gate_up_rows,
    inner_offsets,
    products,
)
from moebox.kernels.gpu.triton.overlap import after_previous, start_next


@triton.jit(do_not_specialize_on_alignment=["split", "weight", "offset", "inner_offset"])
def gate_up(
    ram, stride, split, weight, operand, offset, inner, inner_offset, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """inner = weight * silu(gate x) * up x for the split's rows, laid out as the operand of `down`.

    Grid (I / (WARPS * ROWS),). inner fp32 [8, I / 8], inner_offset fp32 [I / (WARPS * ROWS)].
    """
    after_previous(OVERLAP)
    start_next(OVERLAP)
    first = tl.program_id(0) * (WARPS * ROWS)
    expert = tl.load(split)
    if (expert < 0) | (first >= tl.load(split + 1)):
        return
    gate_up_rows(
        ram, expert, stride, weight, operand, offset, inner, inner_offset, zero, magic,
        HIDDEN, INNER, WARPS, ROWS,
    )  # fmt: skip


@triton.jit
def _down_step(down, at, scale_at, g, group, groups):
    """Words and scales from group g on; `down` is from `matrix_pointers`."""
    ok = g + group < groups
    return tl.load((down[0] + g * 4) + at, ok[:, :, :, None], 0), tl.load((down[1] + g) + scale_at, ok, 0.0)


@triton.jit(do_not_specialize_on_alignment=["split", "inner_offset"])
def down(
    ram, stride, split, inner, inner_offset, out, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, PROGRAMS: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out += the split's columns of down, times inner. Grid (H / (WARPS * ROWS),)."""
    # The split can be read: `gate_up` waited for the end of `prepare`, which wrote it, before it let this
    # kernel start.
    expert = tl.load(split)
    groups = tl.where(expert < 0, 0, tl.load(split + 1) // GROUP_SIZE)
    group, row, warp, word = axes(WARPS, ROWS, zero)
    first = tl.program_id(0) * (WARPS * ROWS)
    weights = matrix_pointers(ram + expert.to(tl.int64) * stride, 2, HIDDEN * INNER)
    at = (first + row)[:, :, :, None] * (INNER // 8) + word
    scale_at = (first + row) * (INNER // GROUP_SIZE) + group
    tile, scale = _down_step(weights, at, scale_at, 0, group, groups)
    after_previous(OVERLAP)
    start_next(OVERLAP)
    if groups <= 0:
        return
    sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    for g in range(0, groups, LANES):
        following = _down_step(weights, at, scale_at, g + LANES, group, groups)
        ok = g + group < groups
        # Beyond the split's rows, `inner` was never written.
        x = activations(inner, word + warp[:, :, :, None] + g * 4, ok[:, :, :, None], INNER // 8, True)
        extra = inner_offsets(inner_offset, group + warp + g, ok, PROGRAMS, True)
        sums += (products(tile, x, magic) - extra) * scale.to(tl.float32)
        tile = following[0]
        scale = following[1]
    places = out + first + tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(places, tl.load(places) + tl.sum(sums, 0))

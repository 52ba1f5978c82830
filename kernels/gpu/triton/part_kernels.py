"""Triton kernels of `expert_part`: one token through the first rows of one expert that lies in host memory.

Weights are read over PCIe, straight into registers, each byte once: that is what bounds them (an H200 reads
47 to 50 GB/s from 512 rows on, a bare kernel 49 to 50), so all programs ask for their weights at once, and
512 contiguous bytes a warp at a time. Layouts and arithmetic are those of `one_kernels.py`, whose `prepare`
goes first: it fetches the part, (row, inner rows), to the device too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moebox.kernels.gpu.triton.one_kernels import (
    LANES,
    _activations,
    _axes,
    _gate_up_rows,
    _inner_offset,
    _matrix,
    _products,
)
from moebox.kernels.gpu.triton.overlap import after_previous, start_next


@triton.jit(do_not_specialize_on_alignment=["part", "weight", "offset", "inner_offset"])
def gate_up(
    ram, stride, part, weight, operand, offset, inner, inner_offset, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """inner = weight * silu(gate x) * up x for the part's rows, laid out as an operand of its own.

    Grid (I / (WARPS * ROWS),). inner fp32 [8, I / 8], inner_offset fp32 [I / (WARPS * ROWS)].
    """
    after_previous(OVERLAP)
    start_next(OVERLAP)
    first = tl.program_id(0) * (WARPS * ROWS)
    expert = tl.load(part)
    if (expert < 0) | (first >= tl.load(part + 1)):
        return
    _gate_up_rows(
        ram, expert, stride, weight, operand, offset, inner, inner_offset, zero, magic,
        HIDDEN, INNER, WARPS, ROWS,
    )  # fmt: skip


@triton.jit
def _down_step(down, at, scale_at, g, group, groups):
    """Words and scales from group g on; `down` is a pair of pointers."""
    ok = g + group < groups
    return tl.load((down[0] + g * 4) + at, ok[:, :, :, None], 0), tl.load((down[1] + g) + scale_at, ok, 0.0)


@triton.jit(do_not_specialize_on_alignment=["part", "inner_offset"])
def down(
    ram, stride, part, inner, inner_offset, out, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out += the part's columns of down(inner). Grid (H / (WARPS * ROWS),)."""
    # `prepare` wrote the part: it ended before `gate_up`, which waited for it, let this kernel start.
    expert = tl.load(part)
    groups = tl.where(expert < 0, 0, tl.load(part + 1) // 32)
    group, row, warp, word = _axes(WARPS, ROWS, zero)
    first = tl.program_id(0) * (WARPS * ROWS)
    weights = _matrix(ram + expert.to(tl.int64) * stride, 2, HIDDEN * INNER)
    at = (first + row)[:, :, :, None] * (INNER // 8) + word
    scale_at = (first + row) * (INNER // 32) + group
    tile, scale = _down_step(weights, at, scale_at, 0, group, groups)
    after_previous(OVERLAP)
    start_next(OVERLAP)
    if groups <= 0:
        return
    sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    for g in range(0, groups, LANES):
        following = _down_step(weights, at, scale_at, g + LANES, group, groups)
        ok = g + group < groups
        # What lies beyond the part was never written.
        x = _activations(inner, word + warp[:, :, :, None] + g * 4, ok[:, :, :, None], INNER // 8, True)
        extra = _inner_offset(inner_offset, group + warp + g, ok, PARTS, True)
        sums += (_products(tile, x, magic) - extra) * scale.to(tl.float32)
        tile = following[0]
        scale = following[1]
    places = out + first + tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(places, tl.load(places) + tl.sum(sums, 0))

"""Triton kernels of `experts_one`: one token through a few experts, bound by reading their weights.

Each warp walks rows in order, 32 groups of 32 weights at a time: a lane takes a group, 16 bytes of packed
weights and one scale, and multiplies in fp32. Lanes meet only at the end of a row, and no shared memory is
used. Unpacking costs 10 integer operations for 8 weights: two shifts bring the nibbles of a word to four
places of an fp32 mantissa, and one three-input operation each cuts a nibble out and sets the exponent, so
that the value reads 2^e + u, u = q + 8. The activations are laid out by k mod 8 to match; what the offsets
2^e + 8 add up to depends on the activations alone, and is subtracted once for a group.

A step's weights are fetched while the one before is multiplied. The kernels start before their predecessors
end (see `overlap.py`), and `down` fetches its first weights then.

Tensors have the axes [group, warp, row, word] with sizes [32, WARPS, ROWS, 4] or 1. Triton chooses layouts by
the contiguity it can prove; in this order of axes every operand gets the same layout, and none is exchanged.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moebox.kernels.gpu.triton.overlap import after_previous, start_next

LANES = tl.constexpr(32)
"""Groups that a warp takes at a time."""

MAGIC = (0x41800000, 0x43800000, 0x45800000, 0x47800000)
"""16, 256, 4096 and 65536 as fp32: 2^(23-p) for a nibble at bit p of the mantissa.

Passed to the kernels, since a three-input operation takes one immediate only, and that is the mask.
"""


@triton.jit
def _offsets(x, place):
    """What the offsets 2^e + 8 add to the product of a weight with `x`, by k mod 8.

    Places 0 and 4 have none: theirs would swamp the sum, so it is subtracted before multiplying.
    """
    place = place % 4
    return x * tl.where(place == 1, 4104.0, tl.where(place == 2, 264.0, tl.where(place == 3, 24.0, 0.0)))


@triton.jit(do_not_specialize_on_alignment=["listed", "weights", "listed_copy", "weights_copy"])
def prepare(
    listed, weights, hidden, listed_copy, weights_copy, operand, offset,
    WORDS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_2: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Lay the hidden state out by k mod 8, and fetch the list, which may lie in host memory, once.

    hidden bf16 [8 WORDS] -> operand fp32 [8, WORDS], offset fp32 [WORDS / 4]. Grid (WORDS / BLOCK,).
    """
    after_previous(OVERLAP)
    start_next(OVERLAP)
    # All loads before the first store: a read of host memory takes more than a microsecond.
    j = tl.arange(0, TOP_K_2)
    is_first = tl.program_id(0) == 0
    listed_ok = (j < TOP_K) & is_first
    count = tl.load(listed, is_first, 0)
    slots = tl.load(listed + 1 + j, listed_ok, 0)
    factors = tl.load(weights + j, listed_ok, 0.0)
    word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)[None, :]
    ok = word[:, None] < WORDS
    x = tl.load(hidden + word[:, None] * 8 + place, ok, 0.0).to(tl.float32)
    tl.store(operand + place * WORDS + word[:, None], x, ok)
    group = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    sums = tl.sum(tl.reshape(_offsets(x, place), [BLOCK // 4, 32]), 1)
    tl.store(offset + group, sums, group < WORDS // 4)
    tl.store(listed_copy, count, is_first)
    tl.store(listed_copy + 1 + j, slots, listed_ok)
    tl.store(weights_copy + j, factors, listed_ok)


@triton.jit
def _get(pointers, ok, MASKED: tl.constexpr):
    """A tile; beyond the last group, zeros."""
    if MASKED:
        return tl.load(pointers, ok, 0)
    return tl.load(pointers)


@triton.jit
def _activations(operand, word, ok, WORDS: tl.constexpr, MASKED: tl.constexpr):
    """What meets nibbles 0 to 7 of each word."""
    x0 = _get(operand + word, ok, MASKED)
    x1 = _get(operand + WORDS + word, ok, MASKED)
    x2 = _get(operand + 2 * WORDS + word, ok, MASKED)
    x3 = _get(operand + 3 * WORDS + word, ok, MASKED)
    x4 = _get(operand + 4 * WORDS + word, ok, MASKED)
    x5 = _get(operand + 5 * WORDS + word, ok, MASKED)
    x6 = _get(operand + 6 * WORDS + word, ok, MASKED)
    x7 = _get(operand + 7 * WORDS + word, ok, MASKED)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _cut(shifted, MASK: tl.constexpr, magic):
    """2^e + u: the nibble under the mask, in the place of the mantissa that `magic` belongs to."""
    return ((shifted & MASK) | magic).to(tl.float32, bitcast=True)


@triton.jit
def _products(words, x, magic):
    """Each group's sum of weights, offsets included, with activations: [.., 4] -> [..]."""
    low = words << 7
    high = words >> 9
    total = (_cut(low, 0x780, magic[3]) - 65544.0) * x[0]
    total += (_cut(high, 0x780, magic[3]) - 65544.0) * x[4]
    total += _cut(low, 0x7800, magic[2]) * x[1]
    total += _cut(high, 0x7800, magic[2]) * x[5]
    total += _cut(low, 0x78000, magic[1]) * x[2]
    total += _cut(high, 0x78000, magic[1]) * x[6]
    total += _cut(low, 0x780000, magic[0]) * x[3]
    total += _cut(high, 0x780000, magic[0]) * x[7]
    return tl.sum(total, 3)


@triton.jit
def _matrix(base, MATRIX: tl.constexpr, SIZE: tl.constexpr):
    """Packed values and scales of an expert's matrix 0, 1 or 2, of SIZE weights."""
    start = base + MATRIX * (SIZE // 2 + SIZE // 16)
    return start.to(tl.pointer_type(tl.int32)), (start + SIZE // 2).to(tl.pointer_type(tl.bfloat16))


@triton.jit
def _axes(WARPS: tl.constexpr, ROWS: tl.constexpr, zero):
    """Group [32, 1, 1], row within the program [1, WARPS, ROWS], warp [1, WARPS, 1], word [32, 1, 1, 4].

    `zero` hides from Triton that groups are contiguous: it would give scales a layout of their own.
    """
    group = tl.arange(0, LANES)[:, None, None]
    warp = tl.arange(0, WARPS)[None, :, None]
    row = warp * ROWS + tl.arange(0, ROWS)[None, None, :]
    word = group[:, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    return group ^ zero, row, warp * 0, word


@triton.jit
def _gate_up_step(gate, up, at, scale_at, g, group, GROUPS: tl.constexpr):
    """Words and scales of both matrices from group g on; `gate` and `up` are pairs of pointers."""
    ok = g + group < GROUPS
    ok4 = ok[:, :, :, None]
    gate_words = tl.load((gate[0] + g * 4) + at, ok4, 0)
    up_words = tl.load((up[0] + g * 4) + at, ok4, 0)
    gate_scale = tl.load((gate[1] + g) + scale_at, ok, 0.0)
    up_scale = tl.load((up[1] + g) + scale_at, ok, 0.0)
    return gate_words, up_words, gate_scale, up_scale


@triton.jit
def _gate_up_rows(
    slab, slot, stride, weight, operand, offset, inner, inner_offset, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program's rows of weight * silu(gate x) * up x for the expert in `slot` of `slab`."""
    group, row, warp, word = _axes(WARPS, ROWS, zero)
    base = slab + slot.to(tl.int64) * stride
    first = tl.program_id(0) * (WARPS * ROWS)
    gate = _matrix(base, 0, HIDDEN * INNER)
    up = _matrix(base, 1, HIDDEN * INNER)
    at = (first + row)[:, :, :, None] * (HIDDEN // 8) + word
    scale_at = (first + row) * (HIDDEN // 32) + group
    MASKED: tl.constexpr = HIDDEN % 1024 != 0
    GROUPS: tl.constexpr = HIDDEN // 32
    gate_sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    up_sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    step = _gate_up_step(gate, up, at, scale_at, 0, group, GROUPS)
    for g in range(0, GROUPS, LANES):
        following = _gate_up_step(gate, up, at, scale_at, g + LANES, group, GROUPS)
        ok = g + group < GROUPS
        x = _activations(operand, word + warp[:, :, :, None] + g * 4, ok[:, :, :, None], HIDDEN // 8, MASKED)
        extra = _get(offset + group + warp + g, ok, MASKED)
        gate_sums += (_products(step[0], x, magic) - extra) * step[2].to(tl.float32)
        up_sums += (_products(step[1], x, magic) - extra) * step[3].to(tl.float32)
        step = following
    gate_sum = tl.sum(gate_sums, 0)
    result = gate_sum / (1 + tl.exp(-gate_sum)) * tl.sum(up_sums, 0) * tl.load(weight)
    out_row = first + tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(inner + out_row % 8 * (INNER // 8) + out_row // 8, result)
    total = tl.sum(tl.sum(_offsets(result, out_row % 8), 1), 0)
    tl.store(inner_offset + tl.program_id(0), total)


@triton.jit(do_not_specialize_on_alignment=["listed", "weights", "inner_offset"])
def gate_up(
    slab, stride, listed, weights, operand, offset, inner, inner_offset, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """inner = weight * silu(gate x) * up x, laid out as an operand of its own.

    Grid (I / (WARPS * ROWS), k). inner fp32 [k, 8, I / 8], inner_offset fp32 [k, I / (WARPS * ROWS)].
    """
    after_previous(OVERLAP)
    start_next(OVERLAP)
    j = tl.program_id(1)
    if j >= tl.load(listed):
        return
    _gate_up_rows(
        slab, tl.load(listed + 1 + j), stride, weights + j, operand, offset, inner + j * INNER,
        inner_offset + j * tl.num_programs(0), zero, magic, HIDDEN, INNER, WARPS, ROWS,
    )  # fmt: skip


@triton.jit
def _inner_offset(offsets, group, ok, PARTS: tl.constexpr, MASKED: tl.constexpr):
    """A group's offsets, which `gate_up` wrote in parts."""
    total = _get(offsets + group * PARTS, ok, MASKED)
    for part in tl.static_range(1, PARTS):
        total += _get(offsets + group * PARTS + part, ok, MASKED)
    return total


@triton.jit
def _down_step(
    slab, stride, listed, count, at, scale_at, step, group, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Words and scales of a step; an expert takes as many as its groups need."""
    STEPS: tl.constexpr = (GROUPS + 31) // 32
    j = step // STEPS
    g = step % STEPS * 32
    base = slab + tl.load(listed + 1 + j, j < count, 0).to(tl.int64) * stride
    words, scales = _matrix(base, 2, ROWS * GROUPS * 32)
    ok = (g + group < GROUPS) & (j < count)
    return tl.load((words + g * 4) + at, ok[:, :, :, None], 0), tl.load((scales + g) + scale_at, ok, 0.0)


@triton.jit(do_not_specialize_on_alignment=["listed", "inner_offset"])
def down(
    slab, stride, listed, inner, inner_offset, out, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = sum over the listed experts of down(inner). Grid (H / (WARPS * ROWS),)."""
    group, row, warp, word = _axes(WARPS, ROWS, zero)
    first = tl.program_id(0) * (WARPS * ROWS)
    at = (first + row)[:, :, :, None] * (INNER // 8) + word
    scale_at = (first + row) * (INNER // 32) + group
    MASKED: tl.constexpr = INNER % 1024 != 0
    GROUPS: tl.constexpr = INNER // 32
    STEPS: tl.constexpr = (GROUPS + 31) // 32
    # `prepare` wrote the list: it ended before `gate_up`, which waited for it, let this kernel start.
    count = tl.load(listed)
    tile, scale = _down_step(slab, stride, listed, count, at, scale_at, 0, group, HIDDEN, GROUPS)
    after_previous(OVERLAP)
    start_next(OVERLAP)
    sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    for step in range(count * STEPS):
        following = _down_step(slab, stride, listed, count, at, scale_at, step + 1, group, HIDDEN, GROUPS)
        j = step // STEPS
        g = step % STEPS * 32
        ok = g + group < GROUPS
        x = _activations(
            inner + j * INNER, word + warp[:, :, :, None] + g * 4, ok[:, :, :, None], INNER // 8, MASKED
        )
        extra = _inner_offset(inner_offset + j * (GROUPS * PARTS), group + warp + g, ok, PARTS, MASKED)
        sums += (_products(tile, x, magic) - extra) * scale.to(tl.float32)
        tile = following[0]
        scale = following[1]
    lane = tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(out + first + lane, tl.sum(sums, 0))

"""Triton kernels of `experts_one`: one token through a few experts. Reading the weights is their limit.

Each warp goes through rows in order, 32 groups of 32 weights at a time. A lane takes one group, 16 bytes of
packed weights and one scale, and multiplies in fp32. Lanes add their sums only at the end of a row, and no
shared memory is used.

Unpacking costs 10 integer operations for 8 weights. Two shifts bring the nibbles of a word to four places of
an fp32 mantissa; for each nibble, one three-input operation masks it and sets the exponent, so the fp32 value
is 2^e + u with u = q + 8. The activations are laid out by k mod 8 to match. The sum of the products with the
offsets 2^e + 8 depends on the activations alone, so it is computed once and subtracted once for a group.

The next step's weights are fetched while this step's are multiplied. The kernels start before their
predecessors end (see `overlap.py`), and `down` fetches its first weights before it waits for them.

Tensors have the axes [group, warp, row, word] with sizes [32, WARPS, ROWS, 4] or 1. Triton chooses layouts by
the contiguity that it can prove. With this order of axes every operand gets the same layout, and none must be
converted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moebox.kernels.gpu.triton.int4 import GROUP_SIZE, matrix_pointers
from moebox.kernels.gpu.triton.overlap import after_previous, start_next

LANES = tl.constexpr(32)
"""Groups that a warp takes at a time."""

MAGIC = (0x41800000, 0x43800000, 0x45800000, 0x47800000)
"""16, 256, 4096 and 65536 as fp32: 2^(23-p) for a nibble at bit p of the mantissa.

The kernels get it as an argument: a three-input operation takes only one immediate, which is the mask.
"""


@triton.jit
def _offsets(x, place):
    """The product of `x` with the offset 2^e + 8 of a weight, by the weight's place in its word (k mod 8).

    It is 0 for places 0 and 4: their offset is so large that it is subtracted before multiplying.
    """
    place = place % 4
    return x * tl.where(place == 1, 4104.0, tl.where(place == 2, 264.0, tl.where(place == 3, 24.0, 0.0)))


@triton.jit(do_not_specialize_on_alignment=["listed", "weights", "listed_copy", "weights_copy"])
def prepare(
    listed, weights, hidden, listed_copy, weights_copy, operand, offset,
    WORDS: tl.constexpr, TOP_K: tl.constexpr, TOP_K_2: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Lay the hidden state out by k mod 8, and copy the list, which may be in host memory, to the device.

    hidden bf16 [8 WORDS] -> operand fp32 [8, WORDS], offset fp32 [WORDS / 4]. Grid (WORDS / BLOCK,).
    """
    after_previous(OVERLAP)
    start_next(OVERLAP)
    # All loads come before the first store: a read of host memory takes more than a microsecond.
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
    sums = tl.sum(tl.reshape(_offsets(x, place), [BLOCK // 4, GROUP_SIZE]), 1)
    tl.store(offset + group, sums, group < WORDS // 4)
    tl.store(listed_copy, count, is_first)
    tl.store(listed_copy + 1 + j, slots, listed_ok)
    tl.store(weights_copy + j, factors, listed_ok)


@triton.jit
def load_tile(pointers, ok, MASKED: tl.constexpr):
    """A tile; if MASKED, with zeros where not ok."""
    if MASKED:
        return tl.load(pointers, ok, 0)
    return tl.load(pointers)


@triton.jit
def activations(operand, word, ok, WORDS: tl.constexpr, MASKED: tl.constexpr):
    """The activations that nibbles 0 to 7 of each word are multiplied with."""
    x0 = load_tile(operand + word, ok, MASKED)
    x1 = load_tile(operand + WORDS + word, ok, MASKED)
    x2 = load_tile(operand + 2 * WORDS + word, ok, MASKED)
    x3 = load_tile(operand + 3 * WORDS + word, ok, MASKED)
    x4 = load_tile(operand + 4 * WORDS + word, ok, MASKED)
    x5 = load_tile(operand + 5 * WORDS + word, ok, MASKED)
    x6 = load_tile(operand + 6 * WORDS + word, ok, MASKED)
    x7 = load_tile(operand + 7 * WORDS + word, ok, MASKED)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _cut(shifted, MASK: tl.constexpr, magic):
    """2^e + u: the nibble under the mask, which is in the place of the mantissa that `magic` belongs to."""
    return ((shifted & MASK) | magic).to(tl.float32, bitcast=True)


@triton.jit
def products(words, x, magic):
    """Sums over a group's words of weights times activations, offsets included: [.., 4] -> [..]."""
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
def axes(WARPS: tl.constexpr, ROWS: tl.constexpr, zero):
    """Group [32, 1, 1], row within the program [1, WARPS, ROWS], warp [1, WARPS, 1], word [32, 1, 1, 4].

    `zero` is 0, but hides from Triton that groups are contiguous: else scales would get another layout.
    """
    group = tl.arange(0, LANES)[:, None, None]
    warp = tl.arange(0, WARPS)[None, :, None]
    row = warp * ROWS + tl.arange(0, ROWS)[None, None, :]
    word = group[:, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    return group ^ zero, row, warp * 0, word


@triton.jit
def _gate_up_step(gate, up, at, scale_at, g, group, GROUPS: tl.constexpr):
    """Words and scales of both matrices from group g on; `gate` and `up` are from `matrix_pointers`."""
    ok = g + group < GROUPS
    ok4 = ok[:, :, :, None]
    gate_words = tl.load((gate[0] + g * 4) + at, ok4, 0)
    up_words = tl.load((up[0] + g * 4) + at, ok4, 0)
    gate_scale = tl.load((gate[1] + g) + scale_at, ok, 0.0)
    up_scale = tl.load((up[1] + g) + scale_at, ok, 0.0)
    return gate_words, up_words, gate_scale, up_scale


@triton.jit
def gate_up_rows(
    slab, slot, stride, weight, operand, offset, inner, inner_offset, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, WARPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write a program's rows of weight * silu(gate x) * up x for the expert in `slot` of `slab`."""
    group, row, warp, word = axes(WARPS, ROWS, zero)
    base = slab + slot.to(tl.int64) * stride
    first = tl.program_id(0) * (WARPS * ROWS)
    gate = matrix_pointers(base, 0, HIDDEN * INNER)
    up = matrix_pointers(base, 1, HIDDEN * INNER)
    at = (first + row)[:, :, :, None] * (HIDDEN // 8) + word
    scale_at = (first + row) * (HIDDEN // GROUP_SIZE) + group
    MASKED: tl.constexpr = HIDDEN % (LANES * GROUP_SIZE) != 0
    GROUPS: tl.constexpr = HIDDEN // GROUP_SIZE
    gate_sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    up_sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    step = _gate_up_step(gate, up, at, scale_at, 0, group, GROUPS)
    for g in range(0, GROUPS, LANES):
        following = _gate_up_step(gate, up, at, scale_at, g + LANES, group, GROUPS)
        ok = g + group < GROUPS
        x = activations(operand, word + warp[:, :, :, None] + g * 4, ok[:, :, :, None], HIDDEN // 8, MASKED)
        extra = load_tile(offset + group + warp + g, ok, MASKED)
        gate_sums += (products(step[0], x, magic) - extra) * step[2].to(tl.float32)
        up_sums += (products(step[1], x, magic) - extra) * step[3].to(tl.float32)
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
    """inner = weight * silu(gate x) * up x, laid out as the operand of `down`.

    Grid (I / (WARPS * ROWS), k). inner fp32 [k, 8, I / 8], inner_offset fp32 [k, I / (WARPS * ROWS)].
    """
    after_previous(OVERLAP)
    start_next(OVERLAP)
    j = tl.program_id(1)
    if j >= tl.load(listed):
        return
    gate_up_rows(
        slab, tl.load(listed + 1 + j), stride, weights + j, operand, offset, inner + j * INNER,
        inner_offset + j * tl.num_programs(0), zero, magic, HIDDEN, INNER, WARPS, ROWS,
    )  # fmt: skip


@triton.jit
def inner_offsets(offsets, group, ok, PROGRAMS: tl.constexpr, MASKED: tl.constexpr):
    """A group's sum of offsets: each of the PROGRAMS of `gate_up` that have a group's rows wrote one term."""
    total = load_tile(offsets + group * PROGRAMS, ok, MASKED)
    for program in tl.static_range(1, PROGRAMS):
        total += load_tile(offsets + group * PROGRAMS + program, ok, MASKED)
    return total


@triton.jit
def _down_step(
    slab, stride, listed, count, at, scale_at, step, group, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Words and scales of a step. An expert takes as many steps as its groups need."""
    STEPS: tl.constexpr = (GROUPS + LANES - 1) // LANES
    j = step // STEPS
    g = step % STEPS * LANES
    base = slab + tl.load(listed + 1 + j, j < count, 0).to(tl.int64) * stride
    words, scales = matrix_pointers(base, 2, ROWS * GROUPS * GROUP_SIZE)
    ok = (g + group < GROUPS) & (j < count)
    return tl.load((words + g * 4) + at, ok[:, :, :, None], 0), tl.load((scales + g) + scale_at, ok, 0.0)


@triton.jit(do_not_specialize_on_alignment=["listed", "inner_offset"])
def down(
    slab, stride, listed, inner, inner_offset, out, zero, magic,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, PROGRAMS: tl.constexpr,
    WARPS: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out = sum over the listed experts of down(inner). Grid (H / (WARPS * ROWS),)."""
    group, row, warp, word = axes(WARPS, ROWS, zero)
    first = tl.program_id(0) * (WARPS * ROWS)
    at = (first + row)[:, :, :, None] * (INNER // 8) + word
    scale_at = (first + row) * (INNER // GROUP_SIZE) + group
    MASKED: tl.constexpr = INNER % (LANES * GROUP_SIZE) != 0
    GROUPS: tl.constexpr = INNER // GROUP_SIZE
    STEPS: tl.constexpr = (GROUPS + LANES - 1) // LANES
    # The list can be read: `gate_up` waited for the end of `prepare`, which wrote it, before it let this
    # kernel start.
    count = tl.load(listed)
    tile, scale = _down_step(slab, stride, listed, count, at, scale_at, 0, group, HIDDEN, GROUPS)
    after_previous(OVERLAP)
    start_next(OVERLAP)
    sums = tl.zeros([LANES, WARPS, ROWS], tl.float32)
    for step in range(count * STEPS):
        following = _down_step(slab, stride, listed, count, at, scale_at, step + 1, group, HIDDEN, GROUPS)
        j = step // STEPS
        g = step % STEPS * LANES
        ok = g + group < GROUPS
        x = activations(
            inner + j * INNER, word + warp[:, :, :, None] + g * 4, ok[:, :, :, None], INNER // 8, MASKED
        )
        extra = inner_offsets(inner_offset + j * (GROUPS * PROGRAMS), group + warp + g, ok, PROGRAMS, MASKED)
        sums += (products(tile, x, magic) - extra) * scale.to(tl.float32)
        tile = following[0]
        scale = following[1]
    lane = tl.arange(0, WARPS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    tl.store(out + first + lane, tl.sum(sums, 0))

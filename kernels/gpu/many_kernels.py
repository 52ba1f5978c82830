"""Triton kernels of `experts_many`: experts with many tokens each, on the tensor cores.

The weights are the left operand: packed words go to shared memory and from there straight to the registers
the tensor cores read, where each word is cut into eight bf16 values that meet the activations of k mod 8 = 0
to 7 in eight products. The activations are laid out by k mod 8 once per call to match; nothing else is.

A pair is a token of an expert. Its rows stand in the order of `offsets`; `first` is the first pair of a call.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Two words -> for each of eight places, the bf16 pair (q0 * s0, q1 * s1). 0x4300 is 128: u in its low bits
# makes 128 + u, exactly, and 0x4308 is 136 = 128 + 8.
_UNPACK = tl.constexpr(
    "{ .reg .b32 lo, hi, t, bias;\n"
    "prmt.b32 lo, $8, $9, 0x5410;\n"
    "prmt.b32 hi, $8, $9, 0x7632;\n"
    "mov.b32 bias, 0x43084308;\n"
    + "".join(
        (f"shr.u32 t, {half}, {4 * place};\n" if place else f"mov.b32 t, {half};\n")
        + "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;\n"
        "sub.rn.bf16x2 t, t, bias;\n"
        f"mul.rn.bf16x2 ${4 * number + place}, t, $10;\n"
        for number, half in enumerate(("lo", "hi"))
        for place in range(4)
    )
    + "}"
)


@triton.jit
def _unpack(words, scale, NATIVE: tl.constexpr):
    """The eight weights of each word, bf16. The plain way is for Triton's interpreter: 3 times as slow."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            _UNPACK,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r",
            [words, scale],
            dtype=(tl.bfloat16,) * 8,
            is_pure=True,
            pack=2,
        )
    scale = scale.to(tl.float32)
    a0 = (((words & 15) - 8) * scale).to(tl.bfloat16)
    a1 = (((words >> 4 & 15) - 8) * scale).to(tl.bfloat16)
    a2 = (((words >> 8 & 15) - 8) * scale).to(tl.bfloat16)
    a3 = (((words >> 12 & 15) - 8) * scale).to(tl.bfloat16)
    a4 = (((words >> 16 & 15) - 8) * scale).to(tl.bfloat16)
    a5 = (((words >> 20 & 15) - 8) * scale).to(tl.bfloat16)
    a6 = (((words >> 24 & 15) - 8) * scale).to(tl.bfloat16)
    a7 = (((words >> 28 & 15) - 8) * scale).to(tl.bfloat16)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def _matrix(base, MATRIX: tl.constexpr, SIZE: tl.constexpr):
    """Packed values and scales of an expert's matrix 0, 1 or 2, of SIZE weights."""
    start = base + MATRIX * (SIZE // 2 + SIZE // 16)
    return start.to(tl.pointer_type(tl.int32)), (start + SIZE // 2).to(tl.pointer_type(tl.bfloat16))


@triton.jit
def _weights(words, scales, row, word, group, ROWS: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr):
    """A tile of a matrix [ROWS, 8 WORDS] as eight bf16 tensors [row, word]; zeros beyond its edges."""
    ok = row[:, None] < ROWS
    tile = tl.load(words + row[:, None] * WORDS + word[None, :], ok & (word[None, :] < WORDS), 0)
    group_ok = ok & (group[None, :] < WORDS // 4)
    scale = tl.load(scales + row[:, None] * (WORDS // 4) + group[None, :], group_ok, 0.0)
    SHAPE: tl.constexpr = [tile.shape[0], tile.shape[1] // 4, 4]
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], SHAPE), tile.shape)
    return _unpack(tile, scale, NATIVE)


@triton.jit
def regroup(hidden, operand, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Lay rows out by k mod 8: bf16 [T, H / 8, 8] -> [T, 8, H / 8]. Grid (T, H / 8 / BLOCK)."""
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)[None, :]
    ok = word[:, None] < HIDDEN // 8
    x = tl.load(hidden + start + word[:, None] * 8 + place, ok, 0.0)
    tl.store(operand + start + place * (HIDDEN // 8) + word[:, None], x, ok)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["slots", "offsets", "tokens"])
def gate_up(
    slab, stride, slots, offsets, tokens, operand, inner, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """inner[pair] = silu(gate x) * up x, laid out by i mod 8: bf16 [pairs, 8, I / 8].

    Grid (I / ROWS, experts, tiles of tokens).
    """
    expert = tl.program_id(1)
    begin = tl.load(offsets + expert) + tl.program_id(2) * TOKENS
    end = tl.load(offsets + expert + 1)
    if begin >= end:
        return
    base = slab + tl.load(slots + expert).to(tl.int64) * stride
    gate_words, gate_scales = _matrix(base, 0, HIDDEN * INNER)
    up_words, up_scales = _matrix(base, 1, HIDDEN * INNER)
    pair = begin + tl.arange(0, TOKENS)
    token = tl.load(tokens + pair, pair < end, 0).to(tl.int64)
    # Rows by i mod 8, so that what is written lies side by side.
    m = tl.arange(0, ROWS)
    row = tl.program_id(0) * ROWS + m % (ROWS // 8) * 8 + m // (ROWS // 8)
    gate = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, HIDDEN // 8, WORDS, num_stages=STAGES):
        word = k + tl.arange(0, WORDS)
        group = k // 4 + tl.arange(0, WORDS // 4)
        a = _weights(gate_words, gate_scales, row, word, group, INNER, HIDDEN // 8, NATIVE)
        b = _weights(up_words, up_scales, row, word, group, INNER, HIDDEN // 8, NATIVE)
        for place in tl.static_range(8):
            at = operand + token[None, :] * HIDDEN + place * (HIDDEN // 8) + word[:, None]
            x = tl.load(at, word[:, None] < HIDDEN // 8, 0.0)
            gate = tl.dot(a[place], x, gate)
            up = tl.dot(b[place], x, up)
    result = gate / (1 + tl.exp(-gate)) * up
    column = row % 8 * (INNER // 8) + row // 8
    at = inner + (pair - first).to(tl.int64)[None, :] * INNER + column[:, None]
    tl.store(at, result.to(tl.bfloat16), (row[:, None] < INNER) & (pair[None, :] < end))


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["slots", "offsets"])
def down(
    slab, stride, slots, offsets, inner, result, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """result[pair] = down(inner[pair]), fp32 [pairs, H]. Grid (H / ROWS, experts, tiles of tokens)."""
    expert = tl.program_id(1)
    begin = tl.load(offsets + expert) + tl.program_id(2) * TOKENS
    end = tl.load(offsets + expert + 1)
    if begin >= end:
        return
    base = slab + tl.load(slots + expert).to(tl.int64) * stride
    words, scales = _matrix(base, 2, HIDDEN * INNER)
    pair = begin + tl.arange(0, TOKENS)
    index = (tl.minimum(pair, end - 1) - first).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, INNER // 8, WORDS, num_stages=STAGES):
        word = k + tl.arange(0, WORDS)
        group = k // 4 + tl.arange(0, WORDS // 4)
        a = _weights(words, scales, row, word, group, HIDDEN, INNER // 8, NATIVE)
        for place in tl.static_range(8):
            at = inner + index[None, :] * INNER + place * (INNER // 8) + word[:, None]
            x = tl.load(at, word[:, None] < INNER // 8, 0.0)
            sums = tl.dot(a[place], x, sums)
    at = result + index[None, :] * HIDDEN + row[:, None]
    tl.store(at, sums, (row[:, None] < HIDDEN) & (pair[None, :] < end))


@triton.jit(do_not_specialize_on_alignment=["weights"])
def combine(result, weights, order, bounds, out, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] += sum of weights * result over a token's pairs, in their order. Grid (T, H / BLOCK).

    The pairs of token t are order[bounds[t]] to order[bounds[t + 1] - 1].
    """
    token = tl.program_id(0)
    begin = tl.load(bounds + token)
    end = tl.load(bounds + token + 1)
    if begin >= end:
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = column < HIDDEN
    at = out + token.to(tl.int64) * HIDDEN + column
    sums = tl.load(at, ok, 0.0)
    for i in range(begin, end):
        pair = tl.load(order + i)
        sums += tl.load(weights + pair) * tl.load(result + pair * HIDDEN + column, ok, 0.0)
    tl.store(at, sums, ok)

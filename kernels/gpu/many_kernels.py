"""Triton kernels of `experts_many`: experts with many tokens each, on the tensor cores.

The weights are the left operand: packed words go to shared memory and from there straight to the registers
the tensor cores read, where each word is cut into eight bf16 values. A product's depth counts first k mod 8,
then the words, so that no value changes its thread; the activations are laid out by k mod 8 once per call to
match. It matters that a tile is one product: Triton then lets the tensor cores run while the next tile is
unpacked, and otherwise waits for each.

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
def _weights(
    words, scales, row, k,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix [ROWS, 8 COLUMNS], bf16 [row, 8 WORDS] by place, then word; zeros beyond its edges.

    It begins at word k of each row.
    """
    word = tl.arange(0, WORDS)[None, :]
    group = tl.arange(0, WORDS // 4)[None, :]
    ok = row[:, None] < ROWS
    if COLUMNS % WORDS == 0:
        words_ok = ok
        group_ok = ok
    else:
        words_ok = ok & (k + word < COLUMNS)
        group_ok = ok & (k // 4 + group < COLUMNS // 4)
    tile = tl.load((words + k) + (row[:, None] * COLUMNS + word), words_ok, 0)
    scale = tl.load((scales + k // 4) + (row[:, None] * (COLUMNS // 4) + group), group_ok, 0.0)
    TILE_ROWS: tl.constexpr = tile.shape[0]
    scale = tl.broadcast_to(scale[:, :, None], [TILE_ROWS, WORDS // 4, 4])
    a = _unpack(tile, tl.reshape(scale, [TILE_ROWS, WORDS]), NATIVE)
    even = tl.join(tl.join(a[0], a[4]), tl.join(a[2], a[6]))
    odd = tl.join(tl.join(a[1], a[5]), tl.join(a[3], a[7]))
    # The axes that join() adds are bits 2, 1 and 0 of the place.
    return tl.reshape(tl.permute(tl.join(even, odd), [0, 2, 3, 4, 1]), [TILE_ROWS, 8 * WORDS])


@triton.jit
def _columns(WORDS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a tile's depth lies in a row laid out by place: [8 WORDS]."""
    depth = tl.arange(0, 8 * WORDS)
    return depth // WORDS * COLUMNS + depth % WORDS


@triton.jit
def _activations(source, at, k, ok, COLUMNS: tl.constexpr, WORDS: tl.constexpr):
    """A tile of the right operand, bf16 [8 WORDS, tokens]; zeros where it does not count."""
    if COLUMNS % WORDS != 0:
        ok = ok & (k + tl.arange(0, 8 * WORDS) % WORDS < COLUMNS)[:, None]
    return tl.load((source + k) + at, ok, 0.0)


@triton.jit
def regroup(hidden, operand, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """Lay rows out by k mod 8: bf16 [T, H / 8, 8] -> [T, 8, H / 8]. Grid (T, H / 8 / BLOCK)."""
    start = tl.program_id(0).to(tl.int64) * HIDDEN
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)[None, :]
    ok = word[:, None] < HIDDEN // 8
    x = tl.load(hidden + start + word[:, None] * 8 + place, ok, 0.0)
    tl.store(operand + start + place * (HIDDEN // 8) + word[:, None], x, ok)


@triton.jit
def _gate_up_tile(
    base, tokens, operand, inner, begin, end, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = HIDDEN // 8
    gate_words, gate_scales = _matrix(base, 0, HIDDEN * INNER)
    up_words, up_scales = _matrix(base, 1, HIDDEN * INNER)
    pair = begin + tl.arange(0, TOKENS)
    token = tl.load(tokens + pair, pair < end, 0)
    at = token[None, :] * HIDDEN + _columns(WORDS, COLUMNS)[:, None]
    # Rows by i mod 8, so that what is written lies side by side.
    m = tl.arange(0, ROWS)
    row = tl.program_id(0) * ROWS + m % (ROWS // 8) * 8 + m // (ROWS // 8)
    gate = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, COLUMNS, WORDS, num_stages=STAGES):
        x = _activations(operand, at, k, pair[None, :] < end, COLUMNS, WORDS)
        gate = tl.dot(_weights(gate_words, gate_scales, row, k, INNER, COLUMNS, WORDS, NATIVE), x, gate)
        up = tl.dot(_weights(up_words, up_scales, row, k, INNER, COLUMNS, WORDS, NATIVE), x, up)
    result = gate / (1 + tl.exp(-gate)) * up
    column = row % 8 * (INNER // 8) + row // 8
    at = inner + (pair - first).to(tl.int64)[None, :] * INNER + column[:, None]
    tl.store(at, result.to(tl.bfloat16), (row[:, None] < INNER) & (pair[None, :] < end))


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["slots", "offsets", "tokens"])
def gate_up(
    slab, stride, slots, offsets, tokens, operand, inner, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, REST: tl.constexpr,
    WORDS: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """inner[pair] = silu(gate x) * up x, laid out by i mod 8: bf16 [pairs, 8, I / 8].

    Grid (I / ROWS, tiles of tokens, experts). An expert's last tile is a smaller one where REST suffices.
    """
    expert = tl.program_id(2)
    begin = tl.load(offsets + expert) + tl.program_id(1) * TOKENS
    end = tl.load(offsets + expert + 1)
    if begin >= end:
        return
    base = slab + tl.load(slots + expert).to(tl.int64) * stride
    if end - begin > REST:
        _gate_up_tile(
            base, tokens, operand, inner, begin, end, first,
            HIDDEN, INNER, ROWS, TOKENS, WORDS, STAGES, NATIVE,
        )  # fmt: skip
    elif REST > 0:
        _gate_up_tile(
            base, tokens, operand, inner, begin, end, first,
            HIDDEN, INNER, ROWS, REST, WORDS, STAGES, NATIVE,
        )  # fmt: skip


@triton.jit
def _down_tile(
    base, inner, result, begin, end, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = INNER // 8
    words, scales = _matrix(base, 2, HIDDEN * INNER)
    pair = begin + tl.arange(0, TOKENS)
    at = (pair - first)[None, :] * INNER + _columns(WORDS, COLUMNS)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, COLUMNS, WORDS, num_stages=STAGES):
        x = _activations(inner, at, k, pair[None, :] < end, COLUMNS, WORDS)
        sums = tl.dot(_weights(words, scales, row, k, HIDDEN, COLUMNS, WORDS, NATIVE), x, sums)
    at = result + (pair - first).to(tl.int64)[None, :] * HIDDEN + row[:, None]
    tl.store(at, sums, (row[:, None] < HIDDEN) & (pair[None, :] < end))


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["slots", "offsets"])
def down(
    slab, stride, slots, offsets, inner, result, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, REST: tl.constexpr,
    WORDS: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """result[pair] = down(inner[pair]), fp32 [pairs, H]. Grid (H / ROWS, tiles of tokens, experts)."""
    expert = tl.program_id(2)
    begin = tl.load(offsets + expert) + tl.program_id(1) * TOKENS
    end = tl.load(offsets + expert + 1)
    if begin >= end:
        return
    base = slab + tl.load(slots + expert).to(tl.int64) * stride
    if end - begin > REST:
        _down_tile(
            base, inner, result, begin, end, first,
            HIDDEN, INNER, ROWS, TOKENS, WORDS, STAGES, NATIVE,
        )  # fmt: skip
    elif REST > 0:
        _down_tile(
            base, inner, result, begin, end, first,
            HIDDEN, INNER, ROWS, REST, WORDS, STAGES, NATIVE,
        )  # fmt: skip


@triton.jit
def _pairs_of(tokens, token, start, n_pairs, CHUNK: tl.constexpr):
    """Indices of a chunk of pairs [CHUNK], `n_pairs` for those of other tokens."""
    index = start + tl.arange(0, CHUNK)
    return tl.where(tl.load(tokens + index, index < n_pairs, -1) == token, index, n_pairs)


@triton.jit(do_not_specialize=["n_pairs"], do_not_specialize_on_alignment=["tokens", "weights"])
def combine(
    result, tokens, weights, out, n_pairs, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr
):
    """out[t] += sum of weights * result over a token's pairs, in their order. Grid (T,), WIDTH >= H."""
    token = tl.program_id(0)
    least = n_pairs
    for start in range(0, n_pairs, CHUNK):
        least = tl.minimum(least, tl.min(_pairs_of(tokens, token, start, n_pairs, CHUNK), 0))
    if least >= n_pairs:
        return
    column = tl.arange(0, WIDTH)
    at = out + token.to(tl.int64) * HIDDEN + column
    sums = tl.load(at, column < HIDDEN, 0.0)
    for start in range(least // CHUNK * CHUNK, n_pairs, CHUNK):
        index = _pairs_of(tokens, token, start, n_pairs, CHUNK)
        pair = tl.min(index, 0)
        while pair < n_pairs:
            row = result + pair.to(tl.int64) * HIDDEN + column
            sums += tl.load(weights + pair) * tl.load(row, column < HIDDEN, 0.0)
            pair = tl.min(tl.where(index > pair, index, n_pairs), 0)
    tl.store(at, sums, column < HIDDEN)

"""Triton kernels of `experts_many`: experts with many tokens each, on the tensor cores.

The weights are the left operand. Packed words go to shared memory and from there to the registers that the
tensor cores read, where each word becomes eight bf16 values. So that no value must move to another thread,
the depth of a product runs over places first (a value's place in its word, k mod 8), then over words. The
activations are laid out to match, in blocks of 8 WORDS values: [blocks, 8, WORDS], with zeros at the end.

A pair is an expert and one of its tokens. Pairs stand in the order of `offsets`; `first` is the first pair of
a call.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moebox.kernels.gpu.triton.int4 import matrix_pointers


def _unpacking(half: int) -> str:
    """PTX that turns two words into the bf16 pairs (q0 * s0, q1 * s1) of four of their eight places.

    0x4300 is 128 in bf16; with u in its low bits it is 128 + u, exactly. 0x4308 is 136 = 128 + 8.
    """
    lines = [
        "{ .reg .b32 half, t, bias;",
        f"prmt.b32 half, $4, $5, {('0x5410', '0x7632')[half]};",
        "mov.b32 bias, 0x43084308;",
    ]
    for place in range(4):
        lines += [
            f"shr.u32 t, half, {4 * place};",
            "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;",
            "sub.rn.bf16x2 t, t, bias;",
            f"mul.rn.bf16x2 ${place}, t, $6;",
        ]
    return "\n".join([*lines, "}"])


_UNPACK_LOW = tl.constexpr(_unpacking(0))
_UNPACK_HIGH = tl.constexpr(_unpacking(1))


@triton.jit
def _unpack(words, scale, HALF: tl.constexpr, NATIVE: tl.constexpr):
    """Four of the eight weights of each word, bf16.

    Without NATIVE, in operations that Triton's interpreter and older devices have.
    """
    if NATIVE:
        return tl.inline_asm_elementwise(
            _UNPACK_HIGH if HALF else _UNPACK_LOW,
            "=&r,=&r,=&r,=&r,r,r,r",
            [words, scale],
            dtype=(tl.bfloat16,) * 4,
            is_pure=True,
            pack=2,
        )
    scale = scale.to(tl.float32)
    a0 = (((words >> 16 * HALF & 15) - 8) * scale).to(tl.bfloat16)
    a1 = (((words >> 16 * HALF + 4 & 15) - 8) * scale).to(tl.bfloat16)
    a2 = (((words >> 16 * HALF + 8 & 15) - 8) * scale).to(tl.bfloat16)
    a3 = (((words >> 16 * HALF + 12 & 15) - 8) * scale).to(tl.bfloat16)
    return a0, a1, a2, a3


@triton.jit
def _weights(words, scale, HALF: tl.constexpr, NATIVE: tl.constexpr):
    """Half of a tile's depth: words and scales [rows, WORDS] -> bf16 [rows, 4 WORDS]."""
    ROWS: tl.constexpr = words.shape[0]
    WORDS: tl.constexpr = words.shape[1]
    a = _unpack(words, scale, HALF, NATIVE)
    # The axes that join() adds are bits 1 and 0 of the place.
    places = tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3]))
    return tl.reshape(tl.permute(places, [0, 2, 3, 1]), [ROWS, 4 * WORDS])


@triton.jit
def _packed(words, scales, row, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr):
    """Words and scales [row, WORDS] of a matrix [ROWS, 8 COLUMNS] from word k of each row; zeros beyond."""
    word = tl.arange(0, WORDS)[None, :]
    group = tl.arange(0, WORDS // 4)[None, :]
    words_ok = row[:, None] < ROWS
    groups_ok = words_ok
    if COLUMNS % WORDS != 0:
        words_ok = words_ok & (k + word < COLUMNS)
        groups_ok = groups_ok & (k // 4 + group < COLUMNS // 4)
    tile = tl.load((words + k) + (row[:, None] * COLUMNS + word), words_ok, 0)
    scale = tl.load((scales + k // 4) + (row[:, None] * (COLUMNS // 4) + group), groups_ok, 0.0)
    scale = tl.broadcast_to(scale[:, :, None], [tile.shape[0], WORDS // 4, 4])
    return tile, tl.reshape(scale, [tile.shape[0], WORDS])


@triton.jit
def regroup(hidden, operand, HIDDEN: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Lay rows out in blocks: bf16 [T, H] -> [T, blocks, 8, WORDS]. Grid (T, all words / BLOCK)."""
    PADDED: tl.constexpr = (HIDDEN // 8 + WORDS - 1) // WORDS * WORDS
    token = tl.program_id(0).to(tl.int64)
    word = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[:, None]
    place = tl.arange(0, 8)[None, :]
    x = tl.load(hidden + token * HIDDEN + word * 8 + place, word < HIDDEN // 8, 0.0)
    at = word // WORDS * (8 * WORDS) + place * WORDS + word % WORDS
    tl.store(operand + token * (8 * PADDED) + at, x, word < PADDED)


@triton.jit
def _gate_up_tile(
    base, tokens, operand, inner, begin, end, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    OUT_WORDS: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = HIDDEN // 8
    PADDED: tl.constexpr = (COLUMNS + WORDS - 1) // WORDS * WORDS
    gate_words, gate_scales = matrix_pointers(base, 0, HIDDEN * INNER)
    up_words, up_scales = matrix_pointers(base, 1, HIDDEN * INNER)
    pair = begin + tl.arange(0, TOKENS)
    ok = pair[None, :] < end
    token = tl.load(tokens + pair, pair < end, 0)
    at = token[None, :] * (8 * PADDED) + tl.arange(0, 4 * WORDS)[:, None]
    # Rows are taken by i mod 8, so that neighbouring threads write neighbouring values.
    m = tl.arange(0, ROWS)
    row = tl.program_id(0) * ROWS + m % (ROWS // 8) * 8 + m // (ROWS // 8)
    gate = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, COLUMNS, WORDS, num_stages=STAGES):
        words, scale = _packed(gate_words, gate_scales, row, k, INNER, COLUMNS, WORDS)
        low = tl.load((operand + 8 * k) + at, ok, 0.0)
        high = tl.load((operand + 8 * k + 4 * WORDS) + at, ok, 0.0)
        gate = tl.dot(_weights(words, scale, 0, NATIVE), low, gate)
        gate = tl.dot(_weights(words, scale, 1, NATIVE), high, gate)
        words, scale = _packed(up_words, up_scales, row, k, INNER, COLUMNS, WORDS)
        up = tl.dot(_weights(words, scale, 0, NATIVE), low, up)
        up = tl.dot(_weights(words, scale, 1, NATIVE), high, up)
    result = gate / (1 + tl.exp(-gate)) * up
    OUT_PADDED: tl.constexpr = (INNER // 8 + OUT_WORDS - 1) // OUT_WORDS * OUT_WORDS
    word = row // 8
    column = word // OUT_WORDS * (8 * OUT_WORDS) + row % 8 * OUT_WORDS + word % OUT_WORDS
    at = inner + (pair - first).to(tl.int64)[None, :] * (8 * OUT_PADDED) + column[:, None]
    tl.store(at, result.to(tl.bfloat16), (word[:, None] < OUT_PADDED) & ok)


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["slots", "offsets", "tokens"])
def gate_up(
    slab, stride, slots, offsets, tokens, operand, inner, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, REST: tl.constexpr,
    WORDS: tl.constexpr, OUT_WORDS: tl.constexpr, STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """inner[pair] = silu(gate x) * up x, laid out for `down`: bf16 [pairs, blocks, 8, OUT_WORDS].

    Grid (8 OUT_WORDS blocks / ROWS, tiles of tokens, experts). An expert's last tile has REST tokens where
    these are enough.
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
            HIDDEN, INNER, ROWS, TOKENS, WORDS, OUT_WORDS, STAGES, NATIVE,
        )  # fmt: skip
    elif REST > 0:
        _gate_up_tile(
            base, tokens, operand, inner, begin, end, first,
            HIDDEN, INNER, ROWS, REST, WORDS, OUT_WORDS, STAGES, NATIVE,
        )  # fmt: skip


@triton.jit
def _down_tile(
    base, inner, result, begin, end, first,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, WORDS: tl.constexpr,
    STAGES: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = INNER // 8
    PADDED: tl.constexpr = (COLUMNS + WORDS - 1) // WORDS * WORDS
    down_words, down_scales = matrix_pointers(base, 2, HIDDEN * INNER)
    pair = begin + tl.arange(0, TOKENS)
    ok = pair[None, :] < end
    at = (pair - first)[None, :] * (8 * PADDED) + tl.arange(0, 4 * WORDS)[:, None]
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for k in tl.range(0, COLUMNS, WORDS, num_stages=STAGES):
        words, scale = _packed(down_words, down_scales, row, k, HIDDEN, COLUMNS, WORDS)
        low = tl.load((inner + 8 * k) + at, ok, 0.0)
        high = tl.load((inner + 8 * k + 4 * WORDS) + at, ok, 0.0)
        sums = tl.dot(_weights(words, scale, 0, NATIVE), low, sums)
        sums = tl.dot(_weights(words, scale, 1, NATIVE), high, sums)
    at = result + (pair - first).to(tl.int64)[None, :] * HIDDEN + row[:, None]
    tl.store(at, sums, (row[:, None] < HIDDEN) & ok)


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
def _pairs_of(tokens, token, start, n_pairs, BLOCK_PAIRS: tl.constexpr):
    """Indices of the pairs from `start` on, [BLOCK_PAIRS]; `n_pairs` in place of a pair of another token."""
    index = start + tl.arange(0, BLOCK_PAIRS)
    return tl.where(tl.load(tokens + index, index < n_pairs, -1) == token, index, n_pairs)


@triton.jit(do_not_specialize=["n_pairs"], do_not_specialize_on_alignment=["tokens", "weights"])
def combine(
    result,
    tokens,
    weights,
    out,
    n_pairs,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    """out[t] += the sum of weights * result over a token's pairs, in their order. Grid (T,), WIDTH >= H."""
    token = tl.program_id(0)
    least = n_pairs
    for start in range(0, n_pairs, BLOCK_PAIRS):
        least = tl.minimum(least, tl.min(_pairs_of(tokens, token, start, n_pairs, BLOCK_PAIRS), 0))
    if least >= n_pairs:
        return
    column = tl.arange(0, WIDTH)
    at = out + token.to(tl.int64) * HIDDEN + column
    sums = tl.load(at, column < HIDDEN, 0.0)
    for start in range(least // BLOCK_PAIRS * BLOCK_PAIRS, n_pairs, BLOCK_PAIRS):
        index = _pairs_of(tokens, token, start, n_pairs, BLOCK_PAIRS)
        pair = tl.min(index, 0)
        while pair < n_pairs:
            row = result + pair.to(tl.int64) * HIDDEN + column
            sums += tl.load(weights + pair) * tl.load(row, column < HIDDEN, 0.0)
            pair = tl.min(tl.where(index > pair, index, n_pairs), 0)
    tl.store(at, sums, column < HIDDEN)

"""Multi-head latent attention (arXiv 2405.04434, section 2.1) of one token over the compressed cache.

Shapes: A heads, R kv_lora_rank, P qk_rope_head_dim, S tokens in the cache. All heads have the same keys, the
cache's rows, and the same values, the first R columns of these rows; so a program reads a row once for a
block of heads. S is known only on the device, so the grid is fixed and each program takes a share of the S
rows. `base.Ops` documents the public functions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebox.kernels.gpu.triton.overlap import after_previous, launch_options, start_next

LOG2_E = 1.4426950408889634
BLOCK_TOKENS = 64
"""Rows of the cache that a program takes at a time; its share is a multiple of it."""
PROGRAMS = 132
"""Programs that an H200 runs at once."""
SHORT_CAPACITY = 8192
"""Tokens of a short cache, where programs with fewer heads are faster: more of them share the tokens."""
MERGE_SPLITS = 64
"""Shares that `_merge` reads at a time."""
MERGE_COLUMNS = 64
ABSORB_COLUMNS = 64
VALUE_ROWS = 8
"""Columns or rows of a program of `_merge`, `_absorb` and `_value_up`."""


@triton.jit
def _norm_row(src, weight, dst, eps, WIDTH: tl.constexpr):
    index = tl.arange(0, triton.next_power_of_2(WIDTH))
    inside = index < WIDTH
    x = tl.load(src + index, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps)
    y = x * scale * tl.load(weight + index, mask=inside, other=0.0)
    tl.store(dst + index, y.to(dst.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_row(src, rotations, place, capacity, dst, ROPE: tl.constexpr):
    """Rotate the pairs `(src[2j], src[2j + 1])` by the rotations of position `place`."""
    pair = tl.arange(0, triton.next_power_of_2(ROPE // 2))
    inside = pair < ROPE // 2
    angle = rotations + place * (ROPE // 2) + pair
    cos = tl.load(angle, mask=inside)
    sin = tl.load(angle + capacity * (ROPE // 2), mask=inside)
    even = tl.load(src + 2 * pair, mask=inside).to(tl.float32)
    odd = tl.load(src + 2 * pair + 1, mask=inside).to(tl.float32)
    tl.store(dst + 2 * pair, (even * cos - odd * sin).to(dst.dtype.element_ty), mask=inside)
    tl.store(dst + 2 * pair + 1, (odd * cos + even * sin).to(dst.dtype.element_ty), mask=inside)


@triton.jit
def _latents(
    q_kv,
    q_weight,
    kv_weight,
    rotations,
    capacity,
    position,
    cache,
    query,
    eps,
    QUERY: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    after_previous(OVERLAP)
    if tl.program_id(0) == 0:
        place = tl.load(position)
        row = cache + place * (RANK + ROPE)
        _norm_row(q_kv + QUERY, kv_weight, row, eps, RANK)
        _rotate_row(q_kv + QUERY + RANK, rotations, place, capacity, row + RANK, ROPE)
    else:
        _norm_row(q_kv, q_weight, query, eps, QUERY)


def latents(
    q_kv: Tensor,
    q_weight: Tensor | None,
    kv_weight: Tensor,
    rotations: Tensor,
    position: Tensor,
    cache: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """One program norms the query, one writes the cache's new row."""
    rank, rope = kv_weight.shape[0], 2 * rotations.shape[2]
    width = q_kv.shape[0] - rank - rope
    query = q_kv[:width] if q_weight is None else torch.empty_like(q_kv[:width])
    _latents[(1 if q_weight is None else 2,)](
        q_kv,
        kv_weight if q_weight is None else q_weight,
        kv_weight,
        rotations,
        rotations.shape[1],
        position,
        cache,
        query,
        eps,
        QUERY=width,
        RANK=rank,
        ROPE=rope,
        **launch_options(),
    )
    return query


@triton.jit
def _absorb(
    q,
    kv_b,
    rotations,
    capacity,
    position,
    out,
    head_rows,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    head, block = tl.program_id(0), tl.program_id(1)
    q += head * (NOPE + ROPE)
    out += head * (RANK + ROPE)
    if block == tl.num_programs(1) - 1:
        after_previous(OVERLAP)
        _rotate_row(q + NOPE, rotations, tl.load(position), capacity, out + RANK, ROPE)
    else:
        row = tl.arange(0, triton.next_power_of_2(NOPE))[:, None]
        column = block * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        inside = (row < NOPE) & (column < RANK)
        weights = tl.load(kv_b + (head * head_rows + row) * RANK + column, mask=inside, other=0.0)
        after_previous(OVERLAP)
        x = tl.load(q + row, mask=row < NOPE, other=0.0).to(tl.float32)
        sums = tl.sum(weights.to(tl.float32) * x, 0)
        column = block * BLOCK_R + tl.arange(0, BLOCK_R)
        tl.store(out + column, sums.to(out.dtype.element_ty), mask=column < RANK)


def absorb(q: Tensor, kv_b: Tensor, rotations: Tensor, position: Tensor) -> Tensor:
    """Each head has programs for blocks of columns, and one for the rotation."""
    heads, head_rows, rank = kv_b.shape
    rope = 2 * rotations.shape[2]
    out = torch.empty(heads, rank + rope, dtype=q.dtype, device=q.device)
    block = min(ABSORB_COLUMNS, triton.next_power_of_2(rank))
    _absorb[(heads, triton.cdiv(rank, block) + 1)](
        q,
        kv_b,
        rotations,
        rotations.shape[1],
        position,
        out,
        head_rows,
        NOPE=q.shape[0] // heads - rope,
        ROPE=rope,
        RANK=rank,
        BLOCK_R=block,
        num_warps=8,
        **launch_options(),
    )
    return out


@triton.jit
def _value_up(
    o,
    kv_b,
    out,
    first,
    head_rows,
    V: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    head = tl.program_id(0)
    row = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    column = tl.arange(0, triton.next_power_of_2(RANK))[None, :]
    inside = (row[:, None] < V) & (column < RANK)
    weights = tl.load(
        kv_b + (head * head_rows + first + row[:, None]) * RANK + column, mask=inside, other=0.0
    )
    after_previous(OVERLAP)
    x = tl.load(o + head * RANK + column, mask=column < RANK, other=0.0).to(tl.float32)
    sums = tl.sum(weights.to(tl.float32) * x, 1)
    tl.store(out + head * V + row, sums.to(out.dtype.element_ty), mask=row < V)


def value_up(o: Tensor, kv_b: Tensor, v_head_dim: int) -> Tensor:
    """Each head has programs for blocks of rows."""
    heads, head_rows, rank = kv_b.shape
    out = torch.empty(heads * v_head_dim, dtype=kv_b.dtype, device=kv_b.device)
    block = min(VALUE_ROWS, triton.next_power_of_2(v_head_dim))
    _value_up[(heads, triton.cdiv(v_head_dim, block))](
        o,
        kv_b,
        out,
        head_rows - v_head_dim,
        head_rows,
        V=v_head_dim,
        RANK=rank,
        BLOCK_V=block,
        num_warps=2,
        **launch_options(),
    )
    return out


@triton.jit
def _share(position, splits, BLOCK_S: tl.constexpr):
    """The number of tokens, and how many of them each program takes: a multiple of `BLOCK_S`."""
    total = tl.load(position).to(tl.int32) + 1
    return total, tl.cdiv(tl.cdiv(total, splits), BLOCK_S) * BLOCK_S


@triton.jit
def _attend(
    q,
    cache,
    position,
    partial,
    log_sums,
    scale,
    heads,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Softmax and sum over one program's share of the tokens, for a block of heads.

    Writes the normed sum to `partial [splits, A, R]` and the scores' log2-sum-exp2 to `log_sums [splits, A]`.
    """
    start_next(OVERLAP)
    after_previous(OVERLAP)
    split = tl.program_id(0)
    total, share = _share(position, tl.num_programs(0), BLOCK_S)
    begin = split * share
    end = tl.minimum(begin + share, total)
    if begin < end:
        head = tl.program_id(1) * BLOCK_A + tl.arange(0, BLOCK_A)
        r = tl.arange(0, max(16, triton.next_power_of_2(RANK)))
        p = tl.arange(0, max(16, triton.next_power_of_2(ROPE)))
        row = q + head[:, None] * (RANK + ROPE)
        there = head[:, None] < heads
        q_latent = tl.load(row + r[None, :], mask=there & (r[None, :] < RANK), other=0.0)
        q_rope = tl.load(row + RANK + p[None, :], mask=there & (p[None, :] < ROPE), other=0.0)
        highest = tl.full((BLOCK_A,), float("-inf"), tl.float32)
        sums = tl.zeros((BLOCK_A,), tl.float32)
        mixed = tl.zeros((BLOCK_A, r.shape[0]), tl.float32)
        for start in range(begin, end, BLOCK_S):
            token = start + tl.arange(0, BLOCK_S)
            keys = cache + token[:, None].to(tl.int64) * (RANK + ROPE)
            seen = token[:, None] < end
            latent = tl.load(keys + r[None, :], mask=seen & (r[None, :] < RANK), other=0.0)
            rope = tl.load(keys + RANK + p[None, :], mask=seen & (p[None, :] < ROPE), other=0.0)
            scores = tl.dot(q_latent, tl.trans(latent))
            scores = tl.dot(q_rope, tl.trans(rope), scores) * scale
            scores = tl.where(token[None, :] < end, scores, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            fade = tl.exp2(highest - higher)
            sums = sums * fade + tl.sum(weights, 1)
            mixed = tl.dot(weights.to(latent.dtype), latent, mixed * fade[:, None])
            highest = higher
        place = split * heads + head
        inside = there & (r[None, :] < RANK)
        tl.store(partial + place[:, None] * RANK + r[None, :], mixed / sums[:, None], mask=inside)
        tl.store(log_sums + place, highest + tl.log2(sums), mask=head < heads)


@triton.jit
def _merge(
    partial,
    log_sums,
    position,
    out,
    heads,
    splits,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Sum the shares' results, each weighted with its fraction of the whole softmax."""
    start_next(OVERLAP)
    after_previous(OVERLAP)
    head = tl.program_id(0)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total, share = _share(position, splits, BLOCK_S)
    used = tl.cdiv(total, share)
    highest = float("-inf")
    sums = 0.0
    mixed = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, used, SPLITS):
        split = start + tl.arange(0, SPLITS)
        place = split * heads + head
        logs = tl.load(log_sums + place, mask=split < used, other=float("-inf"))
        inside = (split[:, None] < used) & (r[None, :] < RANK)
        values = tl.load(partial + place[:, None] * RANK + r[None, :], mask=inside, other=0.0)
        higher = tl.maximum(highest, tl.max(logs, 0))
        weights = tl.exp2(logs - higher)
        fade = tl.exp2(highest - higher)
        sums = sums * fade + tl.sum(weights, 0)
        mixed = mixed * fade + tl.sum(values * weights[:, None], 0)
        highest = higher
    tl.store(out + head * RANK + r, mixed / sums, mask=r < RANK)


def mla_decode(q: Tensor, cache: Tensor, position: Tensor, scale: float, rank: int) -> Tensor:
    """Flash decoding: programs attend to shares of the tokens, then a second kernel merges the shares."""
    heads, width = q.shape
    block_a, warps = attend_blocks(heads, cache.shape[0])
    blocks = triton.cdiv(heads, block_a)
    splits = max(1, min(PROGRAMS // blocks, triton.cdiv(cache.shape[0], BLOCK_TOKENS)))
    partial = torch.empty(splits, heads, rank, dtype=torch.float32, device=q.device)
    log_sums = torch.empty(splits, heads, dtype=torch.float32, device=q.device)
    sizes = {"RANK": rank, "ROPE": width - rank, "BLOCK_A": block_a, "BLOCK_S": BLOCK_TOKENS}
    _attend[(splits, blocks)](
        q,
        cache,
        position,
        partial,
        log_sums,
        scale * LOG2_E,
        heads,
        **sizes,
        num_warps=warps,
        num_stages=2,
        **launch_options(),
    )
    return _merged(partial, log_sums, position)


def attend_blocks(heads: int, capacity: int) -> tuple[int, int]:
    """Heads of a program, and its warps.

    With more heads the cache is read less often; with fewer, programs start sooner.
    """
    if capacity <= SHORT_CAPACITY or heads <= 32:
        return 16, 4
    return 64, 8


def _merged(partial: Tensor, log_sums: Tensor, position: Tensor) -> Tensor:
    splits, heads, rank = partial.shape
    out = torch.empty(heads, rank, dtype=torch.float32, device=partial.device)
    block = min(MERGE_COLUMNS, triton.next_power_of_2(rank))
    _merge[(heads, triton.cdiv(rank, block))](
        partial,
        log_sums,
        position,
        out,
        heads,
        splits,
        RANK=rank,
        BLOCK_R=block,
        SPLITS=min(MERGE_SPLITS, triton.next_power_of_2(splits)),
        BLOCK_S=BLOCK_TOKENS,
        num_warps=4,
        **launch_options(),
    )
    return out

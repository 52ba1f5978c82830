"""The dense parts of a decode step: norms and matrix times vector, bound by what they read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TERMS = 4


@triton.jit
def _combine_norm(
    x, a, b, c, d, weight, out, eps, WIDTH: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr
):
    index = tl.arange(0, BLOCK)
    inside = index < WIDTH
    total = tl.load(x + index, mask=inside, other=0.0)
    if TERMS > 0:
        total += tl.load(a + index, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 1:
        total += tl.load(b + index, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 2:
        total += tl.load(c + index, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 3:
        total += tl.load(d + index, mask=inside, other=0.0).to(tl.float32)
    if TERMS > 0:
        tl.store(x + index, total, mask=inside)
    scale = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    normed = total * scale * tl.load(weight + index, mask=inside, other=0.0)
    tl.store(out + index, normed.to(out.dtype.element_ty), mask=inside)


def combine_norm(
    x: Tensor, terms: Sequence[Tensor], weight: Tensor, eps: float, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """See `Ops.combine_norm`: one program, since a sum over all of `x` comes between its two halves."""
    width = x.shape[0]
    out = torch.empty(width, dtype=out_dtype, device=x.device)
    operands = [*terms, *[x] * (MAX_TERMS - len(terms))]
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _combine_norm[(1,)](
        x, *operands, weight, out, eps, WIDTH=width, TERMS=len(terms), BLOCK=block, num_warps=warps
    )
    return out


@triton.jit
def _gemv(x, w, out, n, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = w + row[:, None].to(tl.int64) * K
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        column = start + tl.arange(0, BLOCK_K)[None, :]
        inside = (column < K) & (row[:, None] < n)
        weights = tl.load(rows + column, mask=inside, other=0.0, eviction_policy="evict_first")
        sums += weights.to(tl.float32) * tl.load(x + column, mask=column < K, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(sums, 1).to(out.dtype.element_ty), mask=row < n)


def gemv(x: Tensor, w: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """See `Ops.gemv`: a few whole rows a program, all of its loads independent."""
    n, k = w.shape
    out = torch.empty(n, dtype=out_dtype or w.dtype, device=w.device)
    block_n, block_k, warps, unroll = gemv_blocks(n, k, w.element_size())
    grid = (triton.cdiv(n, block_n),)
    _gemv[grid](x, w, out, n, K=k, BLOCK_N=block_n, BLOCK_K=block_k, UNROLL=unroll, num_warps=warps)
    return out


def gemv_blocks(n: int, k: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows and columns of a block, warps, and blocks loaded at once."""
    block_k = min(triton.next_power_of_2(k), 2048 // itemsize)
    block_n = 4 if n * k * itemsize > 1 << 24 else 1
    return block_n, block_k, 4, 4


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < WIDTH
    gate = tl.load(gate_up + index, mask=inside).to(tl.float32)
    up = tl.load(gate_up + WIDTH + index, mask=inside).to(tl.float32)
    tl.store(out + index, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `Ops.silu_mul`."""
    width, block = gate_up.shape[0] // 2, 256
    out = torch.empty(width, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(triton.cdiv(width, block),)](gate_up, out, WIDTH=width, BLOCK=block, num_warps=2)
    return out

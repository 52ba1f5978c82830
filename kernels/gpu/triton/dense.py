"""Norms and matrix times vector of one token. Memory bandwidth is their limit. See `base.Ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebox.kernels.gpu.triton.overlap import after_previous, launch_options, start_next

MAX_TERMS = 4
"""Terms that `combine_norm` adds at most."""
GEMV_REGISTERS = 128
"""Registers of a thread. With 128 four programs share a multiprocessor; with 130 three do, a sixth slower."""


@triton.jit
def _combine_norm(
    x,
    a,
    b,
    c,
    d,
    weight,
    out,
    eps,
    WIDTH: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    start_next(OVERLAP)
    index = tl.arange(0, BLOCK)
    inside = index < WIDTH
    scale = tl.load(weight + index, mask=inside, other=0.0)
    after_previous(OVERLAP)
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
    scale *= tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
    tl.store(out + index, (total * scale).to(out.dtype.element_ty), mask=inside)


def combine_norm(
    x: Tensor, terms: Sequence[Tensor], weight: Tensor, eps: float, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """One program: the norm needs the sum over all of `x`."""
    width = x.shape[0]
    out = torch.empty(width, dtype=out_dtype, device=x.device)
    operands = [*terms, *[x] * (MAX_TERMS - len(terms))]
    block = triton.next_power_of_2(width)
    _combine_norm[(1,)](
        x,
        *operands,
        weight,
        out,
        eps,
        WIDTH=width,
        TERMS=len(terms),
        BLOCK=block,
        num_warps=min(32, max(1, block // 256)),
        **launch_options(),
    )
    return out


@triton.jit
def _gemv(x, w, out, n, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):
    start_next(OVERLAP)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = w + row[:, None].to(tl.int64) * K
    place = tl.arange(0, BLOCK_K)[None, :]
    inside = (place < K) & (row[:, None] < n)
    weights = tl.load(rows + place, mask=inside, other=0.0, eviction_policy="evict_first")
    after_previous(OVERLAP)
    sums = weights.to(tl.float32) * tl.load(x + place, mask=place < K, other=0.0).to(tl.float32)
    for _ in tl.static_range(1, (K + BLOCK_K - 1) // BLOCK_K):
        place += BLOCK_K
        inside = (place < K) & (row[:, None] < n)
        weights = tl.load(rows + place, mask=inside, other=0.0, eviction_policy="evict_first")
        sums += weights.to(tl.float32) * tl.load(x + place, mask=place < K, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(sums, 1).to(out.dtype.element_ty), mask=row < n)


def gemv(x: Tensor, w: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """Each program has a few whole rows and reads their first block before the previous kernel has ended."""
    n, k = w.shape
    out = torch.empty(n, dtype=out_dtype or w.dtype, device=w.device)
    block_n, block_k = gemv_blocks(n, k)
    _gemv[(triton.cdiv(n, block_n),)](
        x,
        w,
        out,
        n,
        K=k,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=4,
        maxnreg=GEMV_REGISTERS if k <= 7 * block_k else None,  # longer rows would spill
        **launch_options(),
    )
    return out


def gemv_blocks(n: int, k: int) -> tuple[int, int]:
    """Rows and columns of a block: the fastest of twenty choices for each of K2's shapes (docs/LOG.md)."""
    return 1 if n <= 1024 else 2 if k <= 4096 else 4, min(triton.next_power_of_2(k), 1024)


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    start_next(OVERLAP)
    after_previous(OVERLAP)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < WIDTH
    gate = tl.load(gate_up + index, mask=inside).to(tl.float32)
    up = tl.load(gate_up + WIDTH + index, mask=inside).to(tl.float32)
    tl.store(out + index, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    width, block = gate_up.shape[0] // 2, 256
    out = torch.empty(width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (triton.cdiv(width, block),)
    _silu_mul[grid](gate_up, out, WIDTH=width, BLOCK=block, num_warps=2, **launch_options())
    return out

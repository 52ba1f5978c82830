"""INT4 experts on the GPU, straight from slots that hold an expert's bytes as they lie on disk (Triton).

Shapes: T tokens, H hidden_size, I moe_intermediate_size, both multiples of 32; n experts of one call, m pairs
of expert and token, k the most experts of one token. Slots: see `slots.py`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moebox.kernels.gpu.slots import GROUP, check_array, check_slab, slot_layout
from moebox.kernels.gpu.triton import many_kernels, one_kernels
from moebox.kernels.gpu.triton.overlap import launch_options

MAX_PAIRS = 8192
"""Pairs of one round of `experts_many`: their results take 4 (H + I / 2) bytes each."""


class RowTiles(NamedTuple):
    """How `experts_one` shares rows out: each program has `warps` warps of `rows` rows."""

    warps: int
    rows: int


class Tiles(NamedTuple):
    """A product's tiles in `experts_many`: rows and packed words of weights, tokens, and how it is run.

    `rest` is a smaller number of tokens for what an expert has left after whole tiles, or 0; `registers` a
    limit per thread.
    """

    rows: int
    tokens: int
    rest: int
    words: int
    warps: int
    stages: int
    registers: int | None = None


GATE_UP_ONE = RowTiles(4, 2)
DOWN_ONE = RowTiles(4, 4)
GATE_UP_MANY = Tiles(64, 64, 32, 16, 4, 3, 168)
DOWN_MANY = Tiles(128, 64, 32, 16, 8, 3, 128)


def experts_one(
    slab: Tensor, shape: tuple[int, int], listed: Tensor, weights: Tensor, hidden: Tensor, out: Tensor
) -> None:
    """One token through listed experts: `out = sum of weights[j] * expert_j(hidden)`; zeros for none.

    How many there are is read on the device, so the call can stand in a CUDA graph. Products and sums are
    fp32. The same inputs give the same bits.

    Args:
        slab: uint8 [slots, stride].
        shape: (H, I).
        listed: int32 [1 + k]: a count, then as many slots. May lie in pinned host memory, as may `weights`.
        weights: fp32 [k].
        hidden: bf16 [H].
        out: fp32 [H], overwritten.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    layout = slot_layout(shape)
    check_slab(slab, layout)
    columns, rows = shape
    top_k = weights.shape[0]
    check_array("listed", listed, (1 + top_k,), torch.int32)
    check_array("weights", weights, (top_k,), torch.float32)
    check_array("hidden", hidden, (columns,), torch.bfloat16)
    check_array("out", out, (columns,), torch.float32)
    step = GATE_UP_ONE.warps * GATE_UP_ONE.rows
    operand, offset, inner, inner_offset, weights_copy = torch.empty(
        columns + columns // GROUP + top_k * (rows + rows // step) + top_k, device=slab.device
    ).split([columns, columns // GROUP, top_k * rows, top_k * (rows // step), top_k])
    listed_copy = torch.empty(1 + top_k, dtype=torch.int32, device=slab.device)
    words, magic, options = columns // 8, one_kernels.MAGIC, launch_options()
    one_kernels.prepare[(triton.cdiv(words, 128),)](
        listed, weights, hidden, listed_copy, weights_copy, operand, offset,
        words, top_k, triton.next_power_of_2(top_k), 128, num_warps=4, **options,
    )  # fmt: skip
    one_kernels.gate_up[(rows // step, top_k)](
        slab, slab.stride(0), listed_copy, weights_copy, operand, offset, inner, inner_offset, 0, magic,
        columns, rows, GATE_UP_ONE.warps, GATE_UP_ONE.rows, num_warps=GATE_UP_ONE.warps, **options,
    )  # fmt: skip
    one_kernels.down[(columns // (DOWN_ONE.warps * DOWN_ONE.rows),)](
        slab, slab.stride(0), listed_copy, inner, inner_offset, out, 0, magic,
        columns, rows, GROUP // step, DOWN_ONE.warps, DOWN_ONE.rows, num_warps=DOWN_ONE.warps, **options,
    )  # fmt: skip


def experts_many(
    slab: Tensor,
    shape: tuple[int, int],
    slots: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    weights: Tensor,
    hidden: Tensor,
    out: Tensor,
    counts: list[int] | None = None,
) -> None:
    """Add each expert's output for its tokens to `out`, as `moebox.kernels.cpu.experts_forward` does.

    The expert in `slots[i]` gets the pairs j from `offsets[i]` to `offsets[i + 1]`, and
    `out[tokens[j]] += weights[j] * expert_i(hidden[tokens[j]])`. Weights and inner activations are rounded
    to bf16, sums are fp32. The same inputs give the same bits.

    Args:
        slab: uint8 [slots, stride].
        shape: (H, I).
        slots: int32 [n], on the device as are all tensors.
        offsets: int32 [n + 1], ascending from 0 to m.
        tokens: int32 [m], rows of `hidden`.
        weights: fp32 [m].
        hidden: bf16 [T, H].
        out: fp32 [T, H], added to in place.
        counts: tokens of each expert, known on the host; without them the call waits for the device.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    check_slab(slab, slot_layout(shape))
    n_tokens, n_pairs, n_experts = hidden.shape[0], tokens.shape[0], slots.shape[0]
    check_array("slots", slots, (n_experts,), torch.int32)
    check_array("offsets", offsets, (n_experts + 1,), torch.int32)
    check_array("tokens", tokens, (n_pairs,), torch.int32)
    check_array("weights", weights, (n_pairs,), torch.float32)
    check_array("hidden", hidden, (n_tokens, shape[0]), torch.bfloat16)
    check_array("out", out, (n_tokens, shape[0]), torch.float32)
    if counts is None:
        counts = offsets.diff().tolist()
    if len(counts) != n_experts or sum(counts) != n_pairs:
        raise ValueError(
            f"{len(counts)} counts of {sum(counts)} pairs, for {n_experts} experts and {n_pairs} pairs"
        )
    if n_pairs == 0:
        return
    operand = _regroup(hidden)
    first = 0
    for begin, end in _rounds(counts):
        last = first + sum(counts[begin:end])
        result = _pair_results(
            slab, shape, slots[begin:end], offsets[begin : end + 1], tokens, operand, first, counts[begin:end]
        )
        _combine(result, tokens[first:last], weights[first:last], out)
        first = last


@cache
def multiplies_bf16_pairs() -> bool:
    """Whether the device has bf16x2 arithmetic (compute capability 9.0); older ones unpack the plain way."""
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def _rounds(counts: list[int]) -> list[tuple[int, int]]:
    """Ranges of experts with at most `MAX_PAIRS` pairs each, unless one expert alone has more."""
    rounds, begin, pairs = [], 0, 0
    for i, count in enumerate(counts):
        if pairs + count > MAX_PAIRS and i > begin:
            rounds.append((begin, i))
            begin, pairs = i, 0
        pairs += count
    return [*rounds, (begin, len(counts))]


def _padded(columns: int, tiles: Tiles) -> int:
    """Columns of a row laid out in blocks of 8 `words`."""
    block = 8 * tiles.words
    return -(-columns // block) * block


def _regroup(hidden: Tensor) -> Tensor:
    """bf16 [T, padded H]: each row in blocks, as `gate_up` reads it."""
    n_tokens, columns = hidden.shape
    padded = _padded(columns, GATE_UP_MANY)
    operand = torch.empty(n_tokens, padded, dtype=torch.bfloat16, device=hidden.device)
    grid = (n_tokens, triton.cdiv(padded // 8, 256))
    many_kernels.regroup[grid](hidden, operand, columns, GATE_UP_MANY.words, 256)
    return operand


def _pair_results(
    slab: Tensor,
    shape: tuple[int, int],
    slots: Tensor,
    offsets: Tensor,
    tokens: Tensor,
    operand: Tensor,
    first: int,
    counts: list[int],
) -> Tensor:
    """fp32 [pairs, H]: each expert's output for each of its tokens, not weighted yet."""
    columns, rows = shape
    n_pairs, most = sum(counts), max(counts)
    native = multiplies_bf16_pairs()
    inner_columns = _padded(rows, DOWN_MANY)
    inner = torch.empty(n_pairs, inner_columns, dtype=torch.bfloat16, device=slab.device)
    result = torch.empty(n_pairs, columns, device=slab.device)
    tiles = GATE_UP_MANY
    grid = (triton.cdiv(inner_columns, tiles.rows), triton.cdiv(most, tiles.tokens), len(counts))
    many_kernels.gate_up[grid](
        slab, slab.stride(0), slots, offsets, tokens, operand, inner, first, columns, rows,
        tiles.rows, tiles.tokens, tiles.rest, tiles.words, DOWN_MANY.words, tiles.stages, native,
        num_warps=tiles.warps, maxnreg=tiles.registers,
    )  # fmt: skip
    tiles = DOWN_MANY
    grid = (triton.cdiv(columns, tiles.rows), triton.cdiv(most, tiles.tokens), len(counts))
    many_kernels.down[grid](
        slab, slab.stride(0), slots, offsets, inner, result, first, columns, rows,
        tiles.rows, tiles.tokens, tiles.rest, tiles.words, tiles.stages, native,
        num_warps=tiles.warps, maxnreg=tiles.registers,
    )  # fmt: skip
    return result


def _combine(result: Tensor, tokens: Tensor, weights: Tensor, out: Tensor) -> None:
    """Add the pairs' results to their tokens, in the order of the pairs."""
    n_tokens, columns = out.shape
    many_kernels.combine[(n_tokens,)](
        result, tokens, weights, out, len(tokens), columns, triton.next_power_of_2(columns), 1024, num_warps=8
    )

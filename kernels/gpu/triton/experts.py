"""INT4 experts computed from slots, which hold an expert's bytes as they are on disk.

Shapes: T tokens, H hidden_size, I moe_intermediate_size, both multiples of 32; n experts of one call, m pairs
of expert and token, k the most experts of one token. Slots: see `slots.py`. `base.Ops` documents
`experts_one` and `experts_many`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from moebox.config import GROUP_SIZE
from moebox.kernels.gpu.base import ROUND_PAIRS
from moebox.kernels.gpu.slots import check_array, check_slab, slot_layout
from moebox.kernels.gpu.triton import many_tokens_kernels, one_token_kernels
from moebox.kernels.gpu.triton.overlap import launch_options

PREPARE_WORDS = 128
"""Packed words that a program of `prepare` lays out activations for."""
REGROUP_WORDS = 256
"""Packed words that a program of `regroup` lays out activations for."""
COMBINE_PAIRS = 1024
"""Pairs that `combine` searches at a time."""


class RowTiles(NamedTuple):
    """How kernels for one token share rows out: each program has `warps` warps of `rows` rows each."""

    warps: int
    rows: int


class Tiles(NamedTuple):
    """The tiles of a product in `experts_many`, and how its kernel is launched.

    Attributes:
        rows, words: of the weights: rows and packed words.
        tokens: of the activations.
        rest: a smaller number of tokens, for those that an expert has left after whole tiles; or 0.
        warps, stages: of the kernel.
        registers: a limit for each thread, or None.
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
    """The kernels read on the device how many slots are listed. Products and sums are fp32.

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
        columns + columns // GROUP_SIZE + top_k * (rows + rows // step) + top_k, device=slab.device
    ).split([columns, columns // GROUP_SIZE, top_k * rows, top_k * (rows // step), top_k])
    listed_copy = torch.empty(1 + top_k, dtype=torch.int32, device=slab.device)
    magic, options = one_token_kernels.MAGIC, launch_options()
    launch_prepare(listed, weights, hidden, listed_copy, weights_copy, operand, offset)
    one_token_kernels.gate_up[(rows // step, top_k)](
        slab, slab.stride(0), listed_copy, weights_copy, operand, offset, inner, inner_offset, 0, magic,
        columns, rows, GATE_UP_ONE.warps, GATE_UP_ONE.rows, num_warps=GATE_UP_ONE.warps, **options,
    )  # fmt: skip
    one_token_kernels.down[(columns // (DOWN_ONE.warps * DOWN_ONE.rows),)](
        slab, slab.stride(0), listed_copy, inner, inner_offset, out, 0, magic,
        columns, rows, GROUP_SIZE // step, DOWN_ONE.warps, DOWN_ONE.rows, num_warps=DOWN_ONE.warps, **options,
    )  # fmt: skip


def launch_prepare(
    listed: Tensor,
    weights: Tensor,
    hidden: Tensor,
    listed_copy: Tensor,
    weights_copy: Tensor,
    operand: Tensor,
    offset: Tensor,
) -> None:
    """Launch `one_token_kernels.prepare`.

    Args:
        listed, weights: int32 [1 + k] or longer, and fp32 [k], on the device or in pinned memory.
        hidden: bf16 [H].
        listed_copy, weights_copy: as long, on the device; written, as are the others.
        operand: fp32 [H], activations in the kernels' order.
        offset: fp32 [H / 32].
    """
    words, top_k = hidden.shape[0] // 8, weights.shape[0]
    one_token_kernels.prepare[(triton.cdiv(words, PREPARE_WORDS),)](
        listed, weights, hidden, listed_copy, weights_copy, operand, offset,
        words, top_k, triton.next_power_of_2(top_k), PREPARE_WORDS, num_warps=4, **launch_options(),
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
    """Weights and inner activations are rounded to bf16, sums are fp32.

    Without `counts`, the call waits for the device.

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
    """Whether the device has bf16x2 arithmetic (since compute capability 9.0)."""
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def _rounds(counts: list[int]) -> list[tuple[int, int]]:
    """Ranges of experts with at most `ROUND_PAIRS` pairs each, unless one expert alone has more."""
    rounds, begin, pairs = [], 0, 0
    for i, count in enumerate(counts):
        if pairs + count > ROUND_PAIRS and i > begin:
            rounds.append((begin, i))
            begin, pairs = i, 0
        pairs += count
    return [*rounds, (begin, len(counts))]


def _padded(columns: int, tiles: Tiles) -> int:
    """Columns of a row, padded to whole blocks of 8 `words`."""
    block = 8 * tiles.words
    return -(-columns // block) * block


def _regroup(hidden: Tensor) -> Tensor:
    """bf16 [T, padded H]: each row in the blocks that `gate_up` reads."""
    n_tokens, columns = hidden.shape
    padded = _padded(columns, GATE_UP_MANY)
    operand = torch.empty(n_tokens, padded, dtype=torch.bfloat16, device=hidden.device)
    grid = (n_tokens, triton.cdiv(padded // 8, REGROUP_WORDS))
    many_tokens_kernels.regroup[grid](hidden, operand, columns, GATE_UP_MANY.words, REGROUP_WORDS)
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
    """fp32 [pairs, H]: each expert's output for each of its tokens, not weighted."""
    columns, rows = shape
    n_pairs, most = sum(counts), max(counts)
    native = multiplies_bf16_pairs()
    inner_columns = _padded(rows, DOWN_MANY)
    inner = torch.empty(n_pairs, inner_columns, dtype=torch.bfloat16, device=slab.device)
    result = torch.empty(n_pairs, columns, device=slab.device)
    tiles = GATE_UP_MANY
    grid = (triton.cdiv(inner_columns, tiles.rows), triton.cdiv(most, tiles.tokens), len(counts))
    many_tokens_kernels.gate_up[grid](
        slab, slab.stride(0), slots, offsets, tokens, operand, inner, first, columns, rows,
        tiles.rows, tiles.tokens, tiles.rest, tiles.words, DOWN_MANY.words, tiles.stages, native,
        num_warps=tiles.warps, maxnreg=tiles.registers,
    )  # fmt: skip
    tiles = DOWN_MANY
    grid = (triton.cdiv(columns, tiles.rows), triton.cdiv(most, tiles.tokens), len(counts))
    many_tokens_kernels.down[grid](
        slab, slab.stride(0), slots, offsets, inner, result, first, columns, rows,
        tiles.rows, tiles.tokens, tiles.rest, tiles.words, tiles.stages, native,
        num_warps=tiles.warps, maxnreg=tiles.registers,
    )  # fmt: skip
    return result


def _combine(result: Tensor, tokens: Tensor, weights: Tensor, out: Tensor) -> None:
    """Add the pairs' weighted results to their tokens in `out`, in the order of the pairs."""
    n_tokens, columns = out.shape
    many_tokens_kernels.combine[(n_tokens,)](
        result, tokens, weights, out, len(tokens), columns, triton.next_power_of_2(columns), COMBINE_PAIRS,
        num_warps=8,
    )  # fmt: skip

"""A layer's pairs of token and expert, sorted in the order in which a prompt's experts are computed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebox.offload.prefill.road_costs import Counts
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS


@dataclass
class Pairs:
    """m pairs of token and expert, sorted by the expert's turn, then by falling number of tokens.

    Attributes:
        experts: ids of the n experts that have tokens.
        starts: int64 [n_turns + 1], the index in `experts` at which each turn begins.
        counts: int64 [n], how many pairs each expert has.
        offsets: int64 [n + 1], the index of each expert's first pair.
        tokens: int32 [m], each pair's token.
        order: [m], each pair's index in the flat ids.
    """

    experts: list[int]
    starts: npt.NDArray[np.int64]
    counts: Counts
    offsets: Counts
    tokens: npt.NDArray[np.int32]
    order: npt.NDArray[np.intp]


def sort_pairs(ids: npt.NDArray[np.int64], turns: npt.NDArray[np.int32], n_turns: int) -> Pairs:
    """Sort a layer's pairs.

    Args:
        ids: int64 [T, k], each token's experts.
        turns: int32 [E], each expert's turn, below `n_turns`; experts of lower turns come first.
    """
    flat = ids.reshape(-1)
    all_counts = np.bincount(flat, minlength=len(turns))
    experts = np.nonzero(all_counts)[0]
    experts = experts[np.lexsort((-all_counts[experts], turns[experts]))]
    ranks = np.zeros(len(turns), np.uint16)  # numpy sorts 16-bit integers by radix
    ranks[experts] = np.arange(len(experts))
    order = np.argsort(ranks[flat], kind="stable")
    tokens = (order // ids.shape[1]).astype(np.int32)
    counts = all_counts[experts]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    starts = np.searchsorted(turns[experts], np.arange(n_turns + 1))
    return Pairs(experts.tolist(), starts, counts, offsets, tokens, order)


def recent_use(ids: npt.NDArray[np.int64], n_experts: int) -> npt.NDArray[np.float32]:
    """What a prompt's tokens add to the scores of a layer's experts, as if they had been decoded.

    Args:
        ids: int64 [T, k].

    Returns:
        fp32 [E], the sum over an expert's tokens t of `2 ** (-(T - 1 - t) / SCORE_HALF_LIFE_TOKENS)`.
    """
    n_tokens, top_k = ids.shape
    ages = np.arange(n_tokens - 1, -1, -1)
    weights = np.repeat(np.exp2(-ages / SCORE_HALF_LIFE_TOKENS), top_k)
    return np.bincount(ids.reshape(-1), weights, n_experts).astype(np.float32)

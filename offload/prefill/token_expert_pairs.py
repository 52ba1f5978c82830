"""A layer's pairs of token and expert, in the order in which prefill computes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebox.offload.prefill.road_costs import Counts
from moebox.offload.residency import HALF_LIFE_TOKENS


@dataclass
class Pairs:
    """A layer's pairs of token and expert, sorted: by turns, then by falling number of tokens.

    Attributes:
        experts: ids of the n experts.
        starts: int64 [n_turns + 1], where in `experts` each turn begins.
        counts, offsets: int64 [n] and [n + 1], pairs of each expert.
        tokens: int32 [m].
        order: [m], where each pair stood in the flat ids.
    """

    experts: list[int]
    starts: npt.NDArray[np.int64]
    counts: Counts
    offsets: Counts
    tokens: npt.NDArray[np.int32]
    order: npt.NDArray[np.intp]


def sort_pairs(ids: npt.NDArray[np.int64], turns: npt.NDArray[np.int32], n_turns: int) -> Pairs:
    """Sort a layer's expert ids [T, k]; `turns` [E], each below `n_turns`, says which experts come first."""
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
    """Each expert's use as of the last token, older ones decayed as in decoding: fp32 [E]."""
    n_tokens, top_k = ids.shape
    ages = np.arange(n_tokens - 1, -1, -1)
    weights = np.repeat(np.exp2(-ages / HALF_LIFE_TOKENS), top_k)
    return np.bincount(ids.reshape(-1), weights, n_experts).astype(np.float32)

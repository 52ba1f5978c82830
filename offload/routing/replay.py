"""Replays routing traces against a cache of experts, and counts the picks that hit.

The picks of a layer are looked up together. Misses get room beside the experts in the cache. Before the next
layer's picks are looked up, the cache evicts experts until the others fit: a miss that the policy values less
than all residents is evicted at once. The GPU's cache does the same while a token is decoded
(`HostStep`), and here every policy does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moebox._kernels import Policy, replay_hits
from moebox.errors import RequestError
from moebox.offload.residency import SCORE_HALF_LIFE_TOKENS
from moebox.offload.routing.trace import RoutingTrace

POLICIES = ("decayed", "lru", "lfu", "belady")
"""Which expert a cache evicts. decayed: the expert with the lowest value, as the caches of RAM and GPU do.
lru: the least recently used. lfu: the least often used since the trace began. belady: the expert whose next
pick comes last; it reads later picks of the trace, and no policy hits more."""

_KNOWN = {policy.name: policy for policy in Policy}


def hit_curve(
    trace: RoutingTrace,
    budgets: Sequence[float],
    policies: Sequence[str] = POLICIES,
    warmup: int | None = None,
) -> dict[str, list[float]]:
    """Shares of picks that caches of several sizes hit, for each policy.

    Args:
        trace: the picks.
        budgets: sizes of the cache as shares of all experts, each above 0 and at most 1.
        policies: of `POLICIES`, or "score": the decayed score without the value model.
        warmup: tokens at the start that fill the cache and are not counted; None: a tenth of all tokens.

    Returns:
        For each policy, one share from 0 to 1 for each budget.

    Raises:
        RequestError: a budget out of range, or as `replay`.
    """
    wrong = [budget for budget in budgets if not 0 < budget <= 1]
    if wrong:
        raise RequestError(f"budget {wrong[0]:g}: must be above 0 and at most 1 of all experts")
    n_keys = trace.layers * trace.n_experts
    skipped = trace.tokens // 10 if warmup is None else warmup
    return {
        policy: [replay(trace, slots_of(budget, n_keys), policy, skipped) for budget in budgets]
        for policy in policies
    }


def slots_of(budget: float, n_keys: int) -> int:
    """Experts that fit a budget, which is a share of all of them; at least 1."""
    return max(1, round(budget * n_keys))


def replay(trace: RoutingTrace, slots: int, policy: str = "decayed", warmup: int = 0) -> float:
    """Share of picks that a cache of `slots` experts, shared by all layers, hits.

    Args:
        trace: the picks.
        slots: experts that stay in the cache from layer to layer, at least 1.
        policy: as in `hit_curve`.
        warmup: tokens at the start that fill the cache and are not counted.

    Raises:
        RequestError: another policy, no slots, or a warm-up of all tokens.
    """
    if not 0 <= warmup < trace.tokens:
        raise RequestError(f"replay with a warm-up of {warmup} of {trace.tokens} tokens")
    counted = hits_of_tokens(trace, slots, policy)[warmup:]
    return float(counted.sum() / (counted.size * trace.layers * trace.top_k))


def hits_of_tokens(trace: RoutingTrace, slots: int, policy: str = "decayed") -> npt.NDArray[np.int32]:
    """Hits among the L * k picks of each token, int32 [T]; arguments and errors as `replay`."""
    if policy not in _KNOWN:
        raise RequestError(f"policy {policy!r}; there are {', '.join(POLICIES)}")
    if slots < 1:
        raise RequestError(f"replay with {slots} slots")
    ids = np.ascontiguousarray(trace.ids)
    return replay_hits(ids, trace.n_experts, slots, _KNOWN[policy], SCORE_HALF_LIFE_TOKENS)

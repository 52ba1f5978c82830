"""Routing traces replayed against a cache of experts: what share of the picks it would hit.

A layer's picks are looked up together. Misses are loaded beside what the cache holds; when the next layer's
picks are looked up, the weakest go until the rest fit, so that a miss weaker than all residents is computed
and forgotten. So it is in the GPU's tier (`HostStep`), and all policies are replayed like that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from moebox._kernels import Policy, replay_hits
from moebox.errors import RequestError
from moebox.offload.residency import HALF_LIFE_TOKENS
from moebox.offload.routing.trace import RoutingTrace

POLICIES = ("decayed", "lru", "lfu", "belady")
"""decayed: what the tiers do. lru: the least recently used goes. lfu: the least often used since the trace
began goes. belady: whoever is needed again last goes, which no policy that sees only the past can beat."""

_KNOWN = {policy.name: policy for policy in Policy}


def hit_curve(
    trace: RoutingTrace,
    budgets: Sequence[float],
    policies: Sequence[str] = POLICIES,
    warmup: int | None = None,
) -> dict[str, list[float]]:
    """Share of picks that caches of several sizes hit, for each policy.

    Args:
        trace: what was picked.
        budgets: shares of all experts that fit, each above 0 and at most 1.
        policies: of `POLICIES`, or "score": the decayed score alone, which neither foresees nor knows layers.
        warmup: tokens at the start that fill the cache without being counted; None: a tenth of them.

    Returns:
        For each policy, one share from 0 to 1 per budget.

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
    """Share of picks that a cache of `slots` experts over all layers hits.

    Args:
        trace: what was picked.
        slots: experts that stay from layer to layer, at least 1.
        policy: as in `hit_curve`.
        warmup: tokens at the start that fill the cache without being counted.

    Raises:
        RequestError: another policy, no slots, or nothing left to count.
    """
    if not 0 <= warmup < trace.tokens:
        raise RequestError(f"replay with a warm-up of {warmup} of {trace.tokens} tokens")
    counted = hits_of_tokens(trace, slots, policy)[warmup:]
    return float(counted.sum() / (counted.size * trace.layers * trace.top_k))


def hits_of_tokens(trace: RoutingTrace, slots: int, policy: str = "decayed") -> npt.NDArray[np.int32]:
    """Hits of each token, int32 [T], of its L * k picks; arguments and errors as `replay`."""
    if policy not in _KNOWN:
        raise RequestError(f"policy {policy!r}; there are {', '.join(POLICIES)}")
    if slots < 1:
        raise RequestError(f"replay with {slots} slots")
    ids = np.ascontiguousarray(trace.ids)
    return replay_hits(ids, trace.n_experts, slots, _KNOWN[policy], HALF_LIFE_TOKENS)

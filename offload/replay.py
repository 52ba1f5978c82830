"""Routing traces replayed against a cache of experts: what share of the picks it would hit.

A layer's picks are looked up together. Then all of them are offered a slot, and the weakest go until the
rest fit: a miss weaker than every resident is computed and forgotten. So it is in the tiers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from moebox.errors import RequestError
from moebox.offload.roads import HALF_LIFE_TOKENS
from moebox.offload.trace import RoutingTrace

Levels = npt.NDArray[np.float64]
Keys = npt.NDArray[np.int32]

POLICIES = ("decayed", "lru", "lfu", "belady")
"""decayed: what the tiers do. lru: the least recently used goes. lfu: the least often used since the trace
began goes. belady: whoever is needed again last goes, which no policy that sees only the past can beat."""


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
        policies: of `POLICIES`.
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
        policy: [replay(trace, max(1, round(budget * n_keys)), policy, skipped) for budget in budgets]
        for policy in policies
    }


def replay(trace: RoutingTrace, slots: int, policy: str = "decayed", warmup: int = 0) -> float:
    """Share of picks that a cache of `slots` experts over all layers hits.

    Args:
        trace: what was picked.
        slots: cache size in experts, at least 1.
        policy: one of `POLICIES`.
        warmup: tokens at the start that fill the cache without being counted.

    Raises:
        RequestError: another policy, no slots, or nothing left to count.
    """
    if policy not in _LEVELS:
        raise RequestError(f"policy {policy!r}; there are {', '.join(POLICIES)}")
    if slots < 1 or not 0 <= warmup < trace.tokens:
        raise RequestError(f"replay with {slots} slots and a warm-up of {warmup} of {trace.tokens} tokens")
    hits = _hits(trace, slots, _LEVELS[policy](trace))
    return float(hits[warmup:].sum() / ((trace.tokens - warmup) * trace.layers * trace.top_k))


def _hits(trace: RoutingTrace, slots: int, used: Callable[[Levels, int, int, Keys], None]) -> Keys:
    """Hits of each token, int32 [T]; `used(levels, token, layer, keys)` raises the levels of picks."""
    levels: Levels = np.full(trace.layers * trace.n_experts, -np.inf)
    resident = np.zeros(len(levels), bool)
    hits = np.zeros(trace.tokens, np.int32)
    for token, layers in enumerate(trace.keys()):
        for layer, keys in enumerate(layers):
            hits[token] += np.count_nonzero(resident[keys])
            used(levels, token, layer, keys)
            resident[keys] = True
            held = np.flatnonzero(resident)
            if len(held) > slots:
                resident[held[np.lexsort((-held, levels[held]))[: len(held) - slots]]] = False
    return hits


def _decayed(trace: RoutingTrace) -> Callable[[Levels, int, int, Keys], None]:
    def used(levels: Levels, token: int, layer: int, keys: Keys) -> None:
        levels[keys] = np.logaddexp2(levels[keys], token / HALF_LIFE_TOKENS)

    return used


def _lru(trace: RoutingTrace) -> Callable[[Levels, int, int, Keys], None]:
    def used(levels: Levels, token: int, layer: int, keys: Keys) -> None:
        levels[keys] = token * trace.layers + layer

    return used


def _lfu(trace: RoutingTrace) -> Callable[[Levels, int, int, Keys], None]:
    def used(levels: Levels, token: int, layer: int, keys: Keys) -> None:
        levels[keys] = np.maximum(levels[keys], 0) + 1

    return used


def _belady(trace: RoutingTrace) -> Callable[[Levels, int, int, Keys], None]:
    following = next_use(trace)

    def used(levels: Levels, token: int, layer: int, keys: Keys) -> None:
        levels[keys] = -following[token, layer]

    return used


def next_use(trace: RoutingTrace) -> Levels:
    """For each pick [T, L, k], the layer step (`token * L + layer`) that picks the same key next, or inf."""
    steps = np.full(trace.layers * trace.n_experts, np.inf)
    following: Levels = np.empty(trace.ids.shape)
    every = trace.keys()
    for token in range(trace.tokens - 1, -1, -1):
        following[token] = steps[every[token]]
        steps[every[token]] = token * trace.layers + np.arange(trace.layers)[:, None]
    return following


_LEVELS = {"decayed": _decayed, "lru": _lru, "lfu": _lfu, "belady": _belady}

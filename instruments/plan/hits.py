"""Predicts how often a picked expert is resident, by replaying a routing trace against a cache of any size.

The trace is the best of three, and every plan names it: one that the user recorded, this model's own
statistics on this box, or a synthetic one with the locality that is published of large models
(`offload/routing/trace.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from moebox.config import ModelConfig
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.replay import replay
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.routing.trace import RoutingTrace, synthetic_trace
from moebox.units import ceil_div

LAYERS = 4
"""Layers that are replayed: hits depend on the share of the experts that is resident, not on their number."""
TOKENS = 600
"""The last tokens of a longer trace, and the length of a synthetic one."""
SEED = 1
"""Seed of synthetic traces: another one than the benchmark's, whose hits a plan must predict, not repeat."""
FEWEST_TOKENS = 64
"""A model's statistics of fewer decoded tokens predict worse than what is published of other models."""
WARMUP_SHARE = 0.25
"""Share of a trace that brings the cache into its usual state before hits are counted."""

Prompts = Callable[[int], RoutingTrace]


class HitPredictor:
    """Predicts the share of picks that hit from the share of all experts that is resident, by a replay.

    The replayed cache is full from the start, as after loading: every expert is picked once before the trace.

    Args:
        trace: what a router picked.
        source: where the trace comes from, for people.
        prompts: makes a longer trace of one layer, of the given number of tokens; None: prompts are routed as
            in `trace`.
    """

    def __init__(self, trace: RoutingTrace, source: str, prompts: Prompts | None = None) -> None:
        self.source = source
        layers = np.unique(np.linspace(0, trace.layers - 1, LAYERS).round().astype(int))
        ids = np.ascontiguousarray(trace.ids[-TOKENS:, layers])
        self._trace = RoutingTrace(ids, trace.n_experts, trace.source)
        scan = _scan(self._trace)
        self._filled = RoutingTrace(np.concatenate([scan, ids]), trace.n_experts, trace.source)
        self._warmup = len(scan) + int(len(ids) * WARMUP_SHARE)
        self._prompts = prompts
        self._hits: dict[int, float] = {}
        self._counts: dict[int, list[int]] = {}

    def hits(self, share: float) -> float:
        """Hit rate, from 0 to 1, with `share` of the experts resident."""
        keys = self._trace.layers * self._trace.n_experts
        slots = min(round(share * keys), keys)
        if slots in (0, keys):
            return float(slots == keys)
        if slots not in self._hits:
            self._hits[slots] = replay(self._filled, slots, "decayed", self._warmup)
        return self._hits[slots]

    def expert_counts(self, tokens: int) -> list[int]:
        """For each expert that a prompt of `tokens` tokens uses in a layer: the number of tokens that pick
        it.

        The order is not defined. Counts of a prompt longer than the trace are scaled up from the trace's.
        """
        if tokens not in self._counts:
            ids = (self._prompts(tokens) if self._prompts else self._trace).ids[:tokens, 0]
            counts = np.bincount(ids.ravel()) * tokens // len(ids)
            self._counts[tokens] = [int(count) for count in counts if count]
        return self._counts[tokens]


def _scan(trace: RoutingTrace) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """int32 [ceil(E / k), L, k]: tokens that together pick every expert of every layer."""
    experts, top_k = trace.n_experts, trace.top_k
    tokens = ceil_div(experts, top_k)
    rows = (np.arange(tokens * top_k) % experts).reshape(tokens, 1, top_k)
    return np.repeat(rows, trace.layers, axis=1).astype(np.int32)


def find_hit_predictor(config: ModelConfig, folder: Path | None, trace: Path | None) -> HitPredictor:
    """The predictor with the best source.

    Args:
        config: the model's.
        folder: its checkpoint, where it is here.
        trace: a file of `--record-trace`, which is preferred to all other sources.

    Raises:
        RequestError: `trace` is no trace, or is of a model of another shape.
    """
    if trace is not None:
        recorded = RoutingTrace.load(trace)
        recorded.check(*config.routing_shape, 1)
        return HitPredictor(recorded, f"{trace.name}, {recorded.tokens:,} recorded tokens, replayed")
    if folder is not None:
        decoded = RouterStatistics.open(ModelIdentity.of(folder, config)).trace()
        if decoded is not None and decoded.tokens >= FEWEST_TOKENS:
            source = f"the last {decoded.tokens:,} tokens of this model on this box, replayed"
            return HitPredictor(decoded, source)
    return published_hit_predictor(config)


def published_hit_predictor(config: ModelConfig) -> HitPredictor:
    """A predictor with the locality that others measured on large mixtures of experts."""
    layers, experts, top_k = config.routing_shape
    return HitPredictor(
        synthetic_trace(TOKENS, min(layers, LAYERS), experts, top_k, SEED),
        "locality that is published of large models (offload/routing/trace.py), replayed",
        prompts=lambda tokens: synthetic_trace(tokens, 1, experts, top_k, SEED),
    )

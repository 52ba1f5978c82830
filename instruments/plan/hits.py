"""How often an expert will be where it is quick to reach: routing replayed against caches of any size.

Three sources, the best that there is, named in every plan: a trace that the user recorded, this model's own
statistics on this box, or the published locality of large models (`offload/routing/trace.py`).
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

LAYERS = 4
"""Layers that are replayed: hits depend on the share of the experts that is resident, not on their number."""
TOKENS = 600
"""The last tokens of a longer trace, and the length of a made-up one."""
SEED = 1
"""Of made-up traces: not the benchmark's, whose hits are to be foretold, not replayed."""
FEWEST_TOKENS = 64
"""A record of fewer says less about a model than what is published of others."""
WARMUP_SHARE = 0.25
"""Part of a trace that settles the cache before hits are counted."""

Prompts = Callable[[int], RoutingTrace]


class HitCurve:
    """Share of picks that hit, by the share of all experts that is resident; replayed when first asked for.

    The cache is full from the start, as it is after loading: every expert is met once before the trace.

    Args:
        trace: what a router picked.
        source: where it comes from, for people.
        prompts: makes a longer trace of one layer, of so many tokens; None: prompts look like `trace`.
    """

    def __init__(self, trace: RoutingTrace, source: str, prompts: Prompts | None = None) -> None:
        self.source = source
        layers = np.unique(np.linspace(0, trace.layers - 1, LAYERS).round().astype(int))
        ids = np.ascontiguousarray(trace.ids[-TOKENS:, layers])
        self._kept = RoutingTrace(ids, trace.n_experts, trace.source)
        scan = _scan(self._kept)
        self._filled = RoutingTrace(np.concatenate([scan, ids]), trace.n_experts, trace.source)
        self._warmup = len(scan) + int(len(ids) * WARMUP_SHARE)
        self._prompts = prompts
        self._known: dict[int, float] = {}
        self._counts: dict[int, list[int]] = {}

    def hits(self, share: float) -> float:
        """Hit rate with `share` of the experts resident."""
        keys = self._kept.layers * self._kept.n_experts
        slots = min(round(share * keys), keys)
        if slots in (0, keys):
            return float(slots == keys)
        if slots not in self._known:
            self._known[slots] = replay(self._filled, slots, "decayed", self._warmup)
        return self._known[slots]

    def expert_counts(self, tokens: int) -> list[int]:
        """Tokens of each expert that a prompt of so many meets in a layer, in any order.

        A prompt longer than a recorded trace is taken for several of its length.
        """
        if tokens not in self._counts:
            ids = (self._prompts(tokens) if self._prompts else self._kept).ids[:tokens, 0]
            counts = np.bincount(ids.ravel()) * tokens // len(ids)
            self._counts[tokens] = [int(count) for count in counts if count]
        return self._counts[tokens]


def _scan(trace: RoutingTrace) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """int32 [E / k rounded up, L, k]: tokens that between them pick every expert of every layer."""
    experts, top_k = trace.n_experts, trace.top_k
    tokens = -(-experts // top_k)
    rows = (np.arange(tokens * top_k) % experts).reshape(tokens, 1, top_k)
    return np.repeat(rows, trace.layers, axis=1).astype(np.int32)


def find_curve(config: ModelConfig, folder: Path | None, trace: Path | None) -> HitCurve:
    """The best that is known of a model's routing.

    Args:
        config: the model's.
        folder: its checkpoint, where it is here.
        trace: a file of `--record-trace`, which comes before all else.

    Raises:
        RequestError: `trace` is none, or of a model of another shape.
    """
    if trace is not None:
        recorded = RoutingTrace.load(trace)
        recorded.check(len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok, 1)
        return HitCurve(recorded, f"{trace.name}, {recorded.tokens:,} recorded tokens, replayed")
    if folder is not None:
        seen = RouterStatistics.open(ModelIdentity.of(folder, config)).trace()
        if seen is not None and seen.tokens >= FEWEST_TOKENS:
            return HitCurve(seen, f"the last {seen.tokens:,} tokens of this model on this box, replayed")
    return published_curve(config)


def published_curve(config: ModelConfig) -> HitCurve:
    """What others measured on large mixtures of experts, as far as the model's shape allows."""
    layers = min(len(config.moe_layers), LAYERS)
    experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    return HitCurve(
        synthetic_trace(TOKENS, layers, experts, top_k, SEED),
        "locality that is published of large models (offload/routing/trace.py), replayed",
        prompts=lambda tokens: synthetic_trace(tokens, 1, experts, top_k, SEED),
    )

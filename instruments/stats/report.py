"""`moebox stats`: what the router statistics of a model say, as figures.

Shapes: L MoE layers, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from moebox.config import load_config
from moebox.errors import RequestError
from moebox.offload.experts import TIERS
from moebox.offload.routing.counts import LAYERS_AHEAD, Longs, Placement, RoutingCounts
from moebox.offload.routing.identity import ModelIdentity
from moebox.offload.routing.replay import POLICIES, hit_curve, slots_of
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.routing.trace import RoutingTrace

BUDGETS = (0.05, 0.1, 0.2, 0.5)

REPLAYED_LAYER_STEPS = 30_000
"""`moebox stats MODEL` replays the last `REPLAYED_LAYER_STEPS / L` decoded tokens."""

Grid = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StatsOptions:
    """What `moebox stats` does.

    Attributes:
        model: the checkpoint's folder; None: only a trace is replayed.
        png: the file to draw the maps to.
        reset: forget the model's statistics instead of showing them.
        merge: statistics files of other boxes to add before the report.
        replay: a trace to replay instead of the tokens that the model decoded last.
        budgets: shares of all experts that fit the replayed cache.
        policies: of `offload/routing/replay.py`.
    """

    model: Path | None
    png: Path | None = None
    reset: bool = False
    merge: tuple[Path, ...] = ()
    replay: Path | None = None
    budgets: tuple[float, ...] = BUDGETS
    policies: tuple[str, ...] = POLICIES


@dataclass(frozen=True)
class HitCurve:
    """Share of picks that caches of several sizes would have hit.

    Attributes:
        source: of the trace.
        tokens: of the trace; the first tenth of them only fills the cache.
        budgets: shares of all experts that fit the cache.
        hits: policy -> a share from 0 to 1 for each budget.
    """

    source: str
    tokens: int
    budgets: tuple[float, ...]
    hits: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class SavedPlacement:
    """Where each expert lay when a process last saved the statistics.

    Attributes:
        tiers: [L][E], indices of `names`.
        at_s: when it was saved, in seconds since 1970.
        process: number of the process.
        running: whether that process still runs.
        names: of the tiers, the slowest first.
    """

    tiers: list[list[int]]
    at_s: float
    process: int
    running: bool
    names: tuple[str, ...] = TIERS


@dataclass(frozen=True)
class StatsReport:
    """A model's routing.

    Attributes:
        model, digest: name and digest of the model.
        file: the statistics.
        layers: the MoE layers' numbers in the model, L of them.
        n_experts, top_k: E and k.
        tokens: that were counted, prompts included.
        decoded_kept: decoded tokens whose picks are kept one by one.
        saved_at_s: when the file was written, in seconds since 1970.
        use: [L][E], decayed uses in multiples of the layer's mean.
        unused_for: [L][E], tokens since the last use; -1: never used.
        rank: [L][E], rank of each expert among all by use; 0 is the most used.
        shares: budget -> share of all uses that the most used experts have, as many as fit the budget.
        recall: layers ahead -> share of picks that were predicted; None: nothing was predicted yet.
        places: where experts lie, if a process has saved it.
        curve: the replay; None if nothing was decoded yet.
    """

    model: str
    file: str
    digest: str
    layers: list[int]
    n_experts: int
    top_k: int
    tokens: int
    decoded_kept: int
    saved_at_s: float
    use: list[list[float]]
    unused_for: list[list[int]]
    rank: list[list[int]]
    shares: dict[str, float]
    recall: dict[str, float | None]
    places: SavedPlacement | None
    curve: HitCurve | None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


@dataclass(frozen=True)
class Forgotten:
    """Statistics that were removed: of which model, from which file, of how many tokens."""

    model: str
    file: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def report_stats(options: StatsOptions) -> StatsReport | HitCurve | Forgotten:
    """Report on a model, or forget its statistics, or replay a trace without a model.

    Raises:
        ConfigError, CheckpointError: `options.model` is not a checkpoint.
        RequestError: there are no statistics yet, or a file to merge or to replay is not usable.
    """
    if options.model is None:
        if options.replay is None:
            raise RequestError("no model", "Give a checkpoint's folder, or --replay with a trace's file.")
        return replay_trace(RoutingTrace.load(options.replay), options)
    config = load_config(options.model)
    statistics = RouterStatistics.open(ModelIdentity.of(options.model, config))
    if options.reset:
        return _forget(statistics)
    for path in options.merge:
        statistics.merge(load_counts(path))
    return report_model(statistics, config.moe_layers.start, options)


def report_model(statistics: RouterStatistics, first_layer: int, options: StatsOptions) -> StatsReport:
    """Report on `statistics`; `first_layer` is the number of the model's first MoE layer.

    Raises:
        RequestError: no token was counted yet, or the trace to replay is not usable.
    """
    counts = statistics.counts()
    if not counts.tokens:
        raise RequestError(
            f"{statistics.identity.name}: no router statistics yet; they would be in {statistics.path}",
            "Run the model: it keeps them unless --no-statistics is given.",
        )
    if options.replay is None:
        trace = statistics.trace()
        trace = None if trace is None else _last_tokens(trace)
    else:
        trace = RoutingTrace.load(options.replay)
        trace.check(*statistics.identity.shape, tokens=1)
    curve = None if trace is None else replay_trace(trace, options)
    return _report(statistics, counts, curve, first_layer, options.budgets)


def _forget(statistics: RouterStatistics) -> Forgotten:
    forgotten = Forgotten(statistics.identity.name, str(statistics.path), statistics.tokens)
    statistics.reset()
    return forgotten


def load_counts(path: Path) -> RoutingCounts:
    """Read a statistics file that the user named; `RequestError` if it is not one."""
    try:
        return RoutingCounts.load(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror or error}") from None


def replay_trace(trace: RoutingTrace, options: StatsOptions) -> HitCurve:
    """The hit curve of `trace` with the budgets and policies of `options`."""
    hits = hit_curve(trace, options.budgets, options.policies)
    return HitCurve(trace.source, trace.tokens, options.budgets, hits)


def _last_tokens(trace: RoutingTrace) -> RoutingTrace:
    tokens = max(1, REPLAYED_LAYER_STEPS // trace.layers)
    return RoutingTrace(trace.ids[-tokens:], trace.n_experts, trace.source)


def _report(
    statistics: RouterStatistics,
    counts: RoutingCounts,
    curve: HitCurve | None,
    first_layer: int,
    budgets: Sequence[float],
) -> StatsReport:
    rank: Longs = np.argsort(np.array(statistics.order())).reshape(counts.uses.shape)
    unused = np.where(counts.last_use < 0, -1, counts.tokens - 1 - counts.last_use)
    return StatsReport(
        model=statistics.identity.name,
        file=str(statistics.path),
        digest=counts.digest,
        layers=list(range(first_layer, first_layer + counts.layers)),
        n_experts=counts.n_experts,
        top_k=counts.top_k,
        tokens=counts.tokens,
        decoded_kept=len(counts.recent),
        saved_at_s=statistics.path.stat().st_mtime,
        use=np.round(_relative(counts.uses), 4).tolist(),
        unused_for=unused.tolist(),
        rank=rank.tolist(),
        shares=_shares(counts.uses, budgets),
        recall={str(ahead): statistics.recall(ahead) for ahead in range(1, LAYERS_AHEAD + 1)},
        places=_places(counts.placement),
        curve=curve,
    )


def _relative(uses: Grid) -> Grid:
    relative: Grid = uses / np.maximum(uses.mean(1, keepdims=True), 1e-30)
    return relative


def _shares(uses: Grid, budgets: Sequence[float]) -> dict[str, float]:
    summed = np.cumsum(-np.sort(-uses.ravel()))
    return {
        f"{budget:.4g}": round(float(summed[slots_of(budget, len(summed)) - 1] / summed[-1]), 4)
        for budget in budgets
    }


def _places(placement: Placement | None) -> SavedPlacement | None:
    if placement is None:
        return None
    return SavedPlacement(placement.tiers.tolist(), placement.at_s, placement.process, still_runs(placement))


def still_runs(placement: Placement) -> bool:
    """Whether the process that saved the placement still runs; a later process may have the same number."""
    try:
        return bool(psutil.Process(placement.process).create_time() <= placement.at_s <= time.time())
    except psutil.Error:
        return False

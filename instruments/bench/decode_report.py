"""Decoding of a benchmark's run: times and bytes beside the floor, per token, per layer and at full depth.

L MoE layers. Seconds are wall-clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moebox.config import ModelConfig
from moebox.instruments.bench.cost import RunCost, run_cost_dict
from moebox.instruments.bench.measured_model import MeasuredModel
from moebox.instruments.bench.roads import LAYER_FIELDS, RoadFigures, Samples, mean_per_token, road_figures
from moebox.offload.machine.floor import Ceilings, DecodeBytes, DecodeFloor, decode_floor

_LAYER_MEANS = ("hits", "uploads", "part", "cpu", "cold", "wait_s", "schedule_s")


@dataclass(frozen=True)
class DecodeLayer:
    """Means over tokens of one MoE layer, timed from the end of the layer before to its own end.

    The time includes attention and, in the first MoE layer, everything before it. hits, uploads, part, cpu,
    cold, wait_s and schedule_s are as in `LAYER_FIELDS`.
    """

    layer: int
    seconds: float
    hits: float
    uploads: float
    part: float
    cpu: float
    cold: float
    wait_s: float
    schedule_s: float
    roads: RoadFigures
    floor_s: float

    @property
    def of_floor(self) -> float:
        """Floor over measured seconds: 1 is as fast as bytes over bandwidth allow."""
        return self.floor_s / self.seconds


@dataclass(frozen=True)
class FullDepth:
    """A token of the whole model, extrapolated from a shallow run: `fixed_s + moe_layers * layer_s`.

    `fixed_s` is what a token takes outside its MoE layers.
    """

    moe_layers: int
    layer_s: float
    fixed_s: float
    token_s: float
    floor_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return 1 / self.token_s

    @property
    def of_floor(self) -> float:
        """Floor over extrapolated seconds: 1 is as fast as bytes over bandwidth allow."""
        return self.floor_s / self.token_s


@dataclass(frozen=True)
class DecodeReport:
    """Decoding at batch 1; `token_s` and bytes are means over tokens.

    Attributes:
        tokens: that were measured.
        cached_tokens: tokens in the cache when the first measured token was decoded.
        token_s, token_p50_s, token_p95_s: mean, median and 95th percentile of a token's seconds.
        hit_rate: share of the picks whose expert was on the GPU.
        in_memory: share of the picks whose expert was on the GPU or in RAM.
        schedule_p95_s: 95th percentile of a layer's `schedule_s`.
        roads: of a token, all layers together.
        floor: of a token.
        spent: energy and time of all tokens, where they were measured.
        layers: one entry for each MoE layer.
        full_depth: the same token at the whole model's depth.
    """

    tokens: int
    cached_tokens: int
    token_s: float
    token_p50_s: float
    token_p95_s: float
    hit_rate: float
    in_memory: float
    schedule_p95_s: float
    roads: RoadFigures
    floor: DecodeFloor
    spent: RunCost | None
    layers: list[DecodeLayer]
    full_depth: FullDepth

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return 1 / self.token_s

    @property
    def of_floor(self) -> float:
        """Floor over measured seconds: 1 is as fast as bytes over bandwidth allow."""
        return self.floor.seconds / self.token_s

    @property
    def spent_at_full_depth(self) -> RunCost | None:
        """Energy of the whole model if it draws the watts of this run for as long as it would take."""
        return None if self.spent is None else self.spent.times(self.full_depth.token_s / self.token_s)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: all fields, and derived figures beside them."""
        full = self.full_depth
        layers = [asdict(layer) | {"of_floor": layer.of_floor} for layer in self.layers]
        return asdict(replace(self, spent=None)) | {
            **run_cost_dict(self.spent),
            "tokens_per_s": self.tokens_per_s,
            "of_floor": self.of_floor,
            "layers": layers,
            "full_depth": {
                **asdict(full),
                **run_cost_dict(self.spent_at_full_depth),
                "tokens_per_s": full.tokens_per_s,
                "of_floor": full.of_floor,
            },
        }


def decode_report(
    samples: Samples,
    token_s: Sequence[float],
    model: MeasuredModel,
    ceilings: Ceilings,
    *,
    cached_tokens: int,
    spent: RunCost | None = None,
) -> DecodeReport:
    """Sum up the decoding of a run.

    Args:
        samples: float64 [tokens, L, len(LAYER_FIELDS)].
        token_s: each token's seconds.
        model: the model that ran.
        ceilings: of the box.
        cached_tokens: in the cache when the first token was decoded.
        spent: energy and time of all tokens.
    """
    columns = {name: samples[:, :, i] for i, name in enumerate(LAYER_FIELDS)}
    spans = columns["wait_s"] + columns["layer_s"]
    layers = [_decode_layer(layer, columns, spans, model, ceilings) for layer in range(samples.shape[1])]
    picks = max((columns["hits"] + _misses(columns)).sum(), 1)
    mean_s = float(np.mean(token_s))
    moved = _moved_bytes(columns, model.config, model.backbone.token(model.moe_layers))
    return DecodeReport(
        tokens=len(token_s),
        cached_tokens=cached_tokens,
        token_s=mean_s,
        token_p50_s=float(np.median(token_s)),
        token_p95_s=float(np.quantile(token_s, 0.95)),
        hit_rate=float(columns["hits"].sum() / picks),
        in_memory=1 - float(columns["cold"].sum() / picks),
        schedule_p95_s=float(np.quantile(columns["schedule_s"], 0.95)),
        roads=road_figures(columns, model.config, ceilings),
        floor=decode_floor(moved, ceilings),
        spent=spent,
        layers=layers,
        full_depth=_full_depth(mean_s, spans, moved, model, ceilings),
    )


def _decode_layer(
    layer: int, columns: Mapping[str, Samples], spans: Samples, model: MeasuredModel, ceilings: Ceilings
) -> DecodeLayer:
    own = {name: column[:, layer] for name, column in columns.items()}
    backbone = model.backbone.moe_layer + (model.backbone.dense_layers if layer == 0 else 0)
    return DecodeLayer(
        layer=layer,
        seconds=float(spans[:, layer].mean()),
        roads=road_figures(own, model.config, ceilings),
        floor_s=decode_floor(_moved_bytes(own, model.config, backbone), ceilings).seconds,
        **{name: float(own[name].mean()) for name in _LAYER_MEANS},
    )


def _misses(columns: Mapping[str, Samples]) -> Samples:
    """Experts that were not on the GPU; a split expert counts in `part` and in `cpu` by its shares."""
    return columns["uploads"] + columns["part"] + columns["cpu"] + columns["cold"]


def _moved_bytes(columns: Mapping[str, Samples], config: ModelConfig, backbone: float) -> DecodeBytes:
    """Mean bytes that a token reads: the backbone's, its hits', its misses', and of those the cold ones'."""
    size, misses = config.expert_bytes, _misses(columns)
    return DecodeBytes(
        backbone,
        size * mean_per_token(columns["hits"]),
        size * mean_per_token(misses),
        size * mean_per_token(columns["cold"]),
    )


def _full_depth(
    token_s: float, spans: Samples, moved: DecodeBytes, model: MeasuredModel, ceilings: Ceilings
) -> FullDepth:
    """Extrapolate a token to the whole model's depth.

    The first MoE layer's time includes the dense layers and the launch, so `layer_s` is the mean of the
    others.
    """
    layer_s = float(spans[:, 1:].mean() if spans.shape[1] > 1 else spans.mean())
    fixed_s = token_s - model.moe_layers * layer_s
    scale = model.full_moe_layers / model.moe_layers
    backbone = model.backbone.token(model.full_moe_layers)
    full = DecodeBytes(backbone, moved.hits * scale, moved.ram_misses * scale, moved.nvme_misses * scale)
    return FullDepth(
        moe_layers=model.full_moe_layers,
        layer_s=layer_s,
        fixed_s=fixed_s,
        token_s=fixed_s + model.full_moe_layers * layer_s,
        floor_s=decode_floor(full, ceilings).seconds,
    )

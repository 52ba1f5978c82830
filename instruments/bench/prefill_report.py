"""Prompts of a benchmark's run: times beside the floor, per prompt, per layer and at full depth.

Seconds are wall-clock.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moebox.instruments.bench.cost import RunCost, run_cost_dict
from moebox.instruments.bench.measured_model import MeasuredModel
from moebox.instruments.bench.roads import RoadFigures, road_figures
from moebox.offload.machine.floor import Ceilings, PrefillFloor

ROAD_FIELDS = ("hits", "uploads", "cpu", "cold", "upload_s", "cpu_s", "read_s")
"""Experts by where they were found and computed, and seconds of PCIe, CPU and disk, see `roads.py`."""


@dataclass(frozen=True)
class LayerWork:
    """One MoE layer of a prompt, all chunks together, timed from the end of the layer before to its own end.

    hits, uploads, cpu and cold count experts; upload_s, cpu_s and read_s are seconds, NaN where
    they are not known.
    """

    seconds: float
    hits: int
    uploads: int
    cpu: int
    upload_s: float
    cpu_s: float
    floor: PrefillFloor
    cold: int = 0
    read_s: float = math.nan

    @property
    def times_floor(self) -> float:
        """Measured seconds over the floor: 1 is as fast as bandwidths and rates of operations allow."""
        return self.seconds / self.floor.seconds


@dataclass(frozen=True, kw_only=True)
class PrefillLayer(LayerWork):
    """A layer's number among the MoE layers, its work, and the bytes and GB/s of each road."""

    layer: int
    roads: RoadFigures

    def to_dict(self) -> dict[str, Any]:
        """For `--json`, which has no NaN: None stands for what is not known."""
        values = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }
        return values | {"times_floor": self.times_floor, "floor_s": self.floor.seconds}


@dataclass(frozen=True)
class PrefillReport:
    """One prompt length.

    Attributes:
        tokens: of the prompt.
        runs: how many were measured.
        seconds: median of the runs, from token ids to the last token's logits.
        spent: energy and time of all runs, where they were measured.
        layers: the MoE layers of the median run.
        full_depth_s: `seconds` extrapolated to the whole model's depth.
    """

    tokens: int
    runs: int
    seconds: float
    spent: RunCost | None
    layers: list[PrefillLayer]
    full_depth_s: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the prompt a second."""
        return self.tokens / self.seconds

    @property
    def times_floor(self) -> float:
        """The MoE layers' time over the sum of their floors."""
        return sum(layer.seconds for layer in self.layers) / sum(layer.floor.seconds for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`: all fields, and derived figures beside them."""
        derived = {"tokens_per_s": self.tokens_per_s, "times_floor": self.times_floor}
        layers = [layer.to_dict() for layer in self.layers]
        return asdict(replace(self, spent=None)) | derived | run_cost_dict(self.spent) | {"layers": layers}


def prefill_report(
    tokens: int,
    seconds: Sequence[float],
    layers: Sequence[LayerWork],
    model: MeasuredModel,
    ceilings: Ceilings,
    spent: RunCost | None = None,
) -> PrefillReport:
    """Sum up the runs of a prompt.

    Args:
        tokens: of the prompt.
        seconds: of each run.
        layers: the MoE layers of the median run.
        model: the model that ran.
        ceilings: of the box.
        spent: energy and time of all runs.
    """
    median_s = float(np.median(seconds))
    in_layers_s = sum(layer.seconds for layer in layers)
    scale = model.full_moe_layers / model.moe_layers
    return PrefillReport(
        tokens=tokens,
        runs=len(seconds),
        seconds=median_s,
        spent=spent,
        layers=[_prefill_layer(i, work, model, ceilings) for i, work in enumerate(layers)],
        full_depth_s=median_s - in_layers_s + scale * in_layers_s,
    )


def _prefill_layer(layer: int, work: LayerWork, model: MeasuredModel, ceilings: Ceilings) -> PrefillLayer:
    columns = {name: np.array([getattr(work, name)], np.float64) for name in ROAD_FIELDS}
    roads = road_figures(columns | {"part": np.zeros(1)}, model.config, ceilings)
    return PrefillLayer(layer=layer, roads=roads, **vars(work))

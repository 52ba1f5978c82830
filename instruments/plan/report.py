"""A plan: where a model lies on a box, and how fast it runs there; `--json` prints `to_dict`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.instruments.plan.box import Box
from moebox.instruments.plan.hits import HitPredictor
from moebox.instruments.plan.placement import RAM, MemoryPlacement, place_memory
from moebox.instruments.plan.speed import DecodePrediction, PickShares, PrefillPrediction, SpeedModel
from moebox.runtime.engine.cpu_runner import default_dtype
from moebox.runtime.model.precision import planned_bytes
from moebox.units import GIGA

SHORT_CONTEXT = 4096
"""Cached tokens of the first decode figure."""
PROMPTS = (512, 4096)
PIN_GBPS = 8.0
"""Rate of faulting memory in and pinning it, on the H200's box."""


@dataclass(frozen=True)
class PlannedModel:
    """The model: `folder` where its checkpoint is here, `note` what the plan adds to its name."""

    name: str
    config: ModelConfig
    folder: Path | None = None
    note: str = ""


@dataclass(frozen=True)
class Loading:
    """Time until the first prompt can begin, in stages one after the other."""

    stages: tuple[tuple[str, float, float], ...]
    """(what, bytes, GB/s)"""

    @property
    def seconds(self) -> float:
        """Seconds of all stages together."""
        return sum(nbytes / (gbps * GIGA) for _, nbytes, gbps in self.stages)


@dataclass(frozen=True)
class Change:
    """A change of the box or the context: its decoding speed, and the gain, 0.5 being half as fast again."""

    what: str
    tokens_per_s: float
    gain: float


@dataclass(frozen=True)
class Plan:
    """All of a plan.

    Attributes:
        model: what is planned.
        box: what it is planned for.
        placement: what lies where.
        hits_from: the source of the predicted hits.
        pick_shares: where picked experts are found.
        speed_model: predicts tokens and prompts of other lengths.
        decode: behind few cached tokens, and behind as many as fit.
        prefill: a prompt of each length.
        loading: until the first prompt can begin.
        changes: what would help, the largest gain first.
    """

    model: PlannedModel
    box: Box
    placement: MemoryPlacement
    hits_from: str
    pick_shares: PickShares
    speed_model: SpeedModel
    decode: tuple[DecodePrediction, ...]
    prefill: tuple[PrefillPrediction, ...]
    loading: Loading
    changes: tuple[Change, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of decoding, behind few cached tokens."""
        return self.decode[0].tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts; bytes, seconds and 1e9 bytes a second."""
        box = self.box
        return {
            "model": self.model.name,
            "note": self.model.note,
            "box": {
                "name": box.name,
                "free_vram": box.free_vram,
                "free_ram": box.free_ram,
                "ram_room": box.ram_room,
                "ceilings": box.ceilings.to_dict(),
                "efficiency": box.efficiency.to_dict(),
                "sources": list(box.sources),
            },
            "expert_bytes": self.model.config.expert_bytes,
            "places": self.placement.to_dict(),
            "hits": asdict(self.pick_shares) | {"source": self.hits_from},
            "decode": [prediction.to_dict() for prediction in self.decode],
            "prefill": [prediction.to_dict() for prediction in self.prefill],
            "loading": {"seconds": self.loading.seconds, "stages": list(self.loading.stages)},
            "changes": [asdict(change) for change in self.changes],
        }


def plan_on(
    model: PlannedModel,
    box: Box,
    predictor: HitPredictor,
    context: int | None = None,
    backbone: str = "bf16",
) -> Plan:
    """Plan a model on a box; `predictor` says how often picks hit.

    Raises:
        PlanError: it does not fit.
    """
    config = model.config
    dtype = torch.bfloat16 if box.has_gpu else default_dtype(config, backbone)
    if box.has_gpu and backbone != "bf16":
        raise PlanError(f"backbone = {backbone!r} on a GPU, which runs it in bf16", "Leave --backbone out.")
    placement = place_memory(config, box, context, backbone, dtype)
    return predict(model, box, predictor, placement, dtype)


def predict(
    model: PlannedModel,
    box: Box,
    predictor: HitPredictor,
    placement: MemoryPlacement,
    dtype: torch.dtype,
) -> Plan:
    """Predict how fast a model runs that is placed so."""
    config = model.config
    gpu_share, near_share = (
        count / placement.keys for count in (placement.gpu_experts, placement.near_experts)
    )
    gpu_hits = predictor.hits(gpu_share)
    near_hits = max(predictor.hits(near_share), gpu_hits)
    pick_shares = PickShares(gpu_hits, near_hits - gpu_hits, 1 - near_hits)
    unquantized = planned_bytes(config.backbone_shapes(), dtype, "bf16")
    scale = placement.backbone_bytes / unquantized
    speed_model = SpeedModel(config, box.ceilings, box.efficiency, dtype.itemsize, scale)
    cached = sorted({min(SHORT_CONTEXT, placement.context), placement.context})
    lengths = sorted({min(tokens, placement.context, placement.chunk_tokens) for tokens in PROMPTS})
    disk_share = placement.disk_experts / placement.keys
    return Plan(
        model=model,
        box=box,
        placement=placement,
        hits_from=predictor.source,
        pick_shares=pick_shares,
        speed_model=speed_model,
        decode=tuple(speed_model.decode(pick_shares, tokens) for tokens in cached),
        prefill=tuple(
            speed_model.prefill(predictor.expert_counts(tokens), tokens, gpu_share, disk_share)
            for tokens in lengths
        ),
        loading=_loading(box, placement, config, unquantized),
    )


def _loading(box: Box, placement: MemoryPlacement, config: ModelConfig, backbone_bytes: int) -> Loading:
    """Stages of loading: the disk is read once; with a GPU RAM is pinned before, and VRAM filled after it."""
    disk_gbps = box.efficiency.nvme * box.ceilings.nvme_gbps
    read_bytes = placement.near_experts * config.expert_bytes + backbone_bytes
    stages = [("read from the disk", float(read_bytes), disk_gbps)]
    if box.has_gpu:
        ram_bytes = sum(part.nbytes for part in placement.parts if part.place == RAM)
        uploaded = backbone_bytes + placement.gpu_experts * config.expert_bytes
        stages.insert(0, ("take and pin RAM", float(ram_bytes), PIN_GBPS))
        stages.append(("upload to the GPU", float(uploaded), box.ceilings.pcie_gbps))
    return Loading(tuple(stages))

"""A plan: the memory plan of a model on a box, and what it means in time; `--json` prints `to_dict`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.instruments.plan.box import Box
from moebox.instruments.plan.hits import HitCurve
from moebox.instruments.plan.placement import RAM, Places, place
from moebox.instruments.plan.speed import Chances, DecodePrediction, PrefillPrediction, Speeds
from moebox.runtime.engine.cpu_runner import default_dtype
from moebox.runtime.model.precision import planned_bytes
from moebox.units import GIGA

SHORT_CONTEXT = 4096
"""Tokens in the cache of the decode figure that comes first."""
PROMPTS = (512, 4096)
PIN_GBPS = 8.0
"""Faulting memory in and pinning it, on the H200's box."""


@dataclass(frozen=True)
class Subject:
    """The model: `folder` where it is here, `note` what is to be said of it."""

    name: str
    config: ModelConfig
    folder: Path | None = None
    note: str = ""


@dataclass(frozen=True)
class Loading:
    """Seconds until the first prompt can begin, in stages one after the other."""

    stages: tuple[tuple[str, float, float], ...]
    """(what, bytes, GB/s)"""

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(nbytes / (gbps * GIGA) for _, nbytes, gbps in self.stages)


@dataclass(frozen=True)
class Change:
    """Another box, or other options, and what they would give. `tokens_per_s` of decoding."""

    what: str
    tokens_per_s: float
    gain: float


@dataclass(frozen=True)
class Plan:
    """All of a plan. `decode`: behind few tokens, and behind as many as fit."""

    subject: Subject
    box: Box
    places: Places
    hits_from: str
    chances: Chances
    speeds: Speeds
    decode: tuple[DecodePrediction, ...]
    prefill: tuple[PrefillPrediction, ...]
    loading: Loading
    changes: tuple[Change, ...] = ()

    @property
    def tokens_per_s(self) -> float:
        """Of decoding, behind few tokens."""
        return self.decode[0].tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts; bytes, seconds and 1e9 bytes a second."""
        box = self.box
        return {
            "model": self.subject.name,
            "note": self.subject.note,
            "box": {
                "name": box.name,
                "free_vram": box.free_vram,
                "free_ram": box.free_ram,
                "ram_room": box.ram_room,
                "ceilings": box.ceilings.to_dict(),
                "efficiency": box.efficiency.to_dict(),
                "sources": list(box.sources),
            },
            "expert_bytes": self.subject.config.expert_bytes,
            "places": self.places.to_dict(),
            "hits": asdict(self.chances) | {"source": self.hits_from},
            "decode": [prediction.to_dict() for prediction in self.decode],
            "prefill": [prediction.to_dict() for prediction in self.prefill],
            "loading": {"seconds": self.loading.seconds, "stages": list(self.loading.stages)},
            "changes": [asdict(change) for change in self.changes],
        }


def plan_on(
    subject: Subject, box: Box, curve: HitCurve, context: int | None = None, backbone: str = "bf16"
) -> Plan:
    """Plan a model on a box, `curve` saying how it routes.

    Raises:
        PlanError: it does not fit.
    """
    config = subject.config
    dtype = torch.bfloat16 if box.has_gpu else default_dtype(config, backbone)
    if box.has_gpu and backbone != "bf16":
        raise PlanError(f"backbone = {backbone!r} on a GPU, which runs it in bf16", "Leave --backbone out.")
    return predict(subject, box, curve, place(config, box, context, backbone, dtype), dtype)


def predict(subject: Subject, box: Box, curve: HitCurve, places: Places, dtype: torch.dtype) -> Plan:
    """What a memory plan means in time."""
    config = subject.config
    gpu = curve.hits(places.gpu_experts / places.keys)
    near = max(curve.hits(places.near_experts / places.keys), gpu)
    found = Chances(gpu, near - gpu, 1 - near)
    whole = planned_bytes(config.backbone_shapes(), dtype, "bf16")
    speeds = Speeds(config, box.ceilings, box.efficiency, dtype.itemsize, places.backbone_bytes / whole)
    cached = sorted({min(SHORT_CONTEXT, places.context), places.context})
    lengths = sorted({min(tokens, places.context, places.chunk_tokens) for tokens in PROMPTS})
    gpu_share, disk_share = places.gpu_experts / places.keys, places.disk_experts / places.keys
    return Plan(
        subject=subject,
        box=box,
        places=places,
        hits_from=curve.source,
        chances=found,
        speeds=speeds,
        decode=tuple(speeds.decode(found, tokens) for tokens in cached),
        prefill=tuple(
            speeds.prefill(curve.expert_counts(tokens), tokens, gpu_share, disk_share) for tokens in lengths
        ),
        loading=_loading(box, places, config, whole),
    )


def _loading(box: Box, places: Places, config: ModelConfig, backbone: int) -> Loading:
    """Everything near is read from the disk once; with a GPU RAM is pinned before, and VRAM filled after."""
    disk_gbps = box.efficiency.nvme * box.ceilings.nvme_gbps
    read = places.near_experts * config.expert_bytes + backbone
    stages = [("read from the disk", float(read), disk_gbps)]
    if box.has_gpu:
        rows = sum(part.nbytes for part in places.parts if part.place == RAM)
        uploaded = backbone + places.gpu_experts * config.expert_bytes
        stages.insert(0, ("take and pin RAM", float(rows), PIN_GBPS))
        stages.append(("upload to the GPU", float(uploaded), box.ceilings.pcie_gbps))
    return Loading(tuple(stages))

"""What a benchmark run says: times and bytes beside the floor, per layer, per token and at full depth.

Only arithmetic: `bench.py` measures, `bench_text.py` prints. L MoE layers. Seconds are wall-clock; an expert
is a hit where it lay on the GPU, an upload where PCIe brought it, cold where it was read from disk and then
computed by the CPU, and the CPU's where it lay in RAM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moebox.config import ModelConfig
from moebox.instruments.bench.cost import Spent
from moebox.offload.machine.floor import (
    BackboneBytes,
    Ceilings,
    DecodeBytes,
    DecodeFloor,
    PrefillFloor,
    backbone_bytes,
    decode_floor,
)
from moebox.offload.prefetch.prefetch import PrefetchReport
from moebox.units import GIGA

LAYER_FIELDS = (
    *("hits", "uploads", "part", "cpu", "cold"),
    *("wait_s", "schedule_s", "cpu_s", "upload_s", "read_s", "layer_s"),
)
"""Columns of a token's layers. hits, uploads, cpu, cold: experts. wait_s: the host waited for the layer's
routing, while the GPU computed. schedule_s: the host's cost on the critical path. cpu_s, upload_s, read_s: of
each road, NaN where it is not known. layer_s: routing known until the CPU's sum was handed over."""

Samples = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Subject:
    """What was measured, and at what depth.

    `full_moe_layers` is the depth that a shallow run stands for; `item_bytes` an element of the backbone.
    """

    name: str
    config: ModelConfig
    full_moe_layers: int
    item_bytes: int = 2

    @property
    def moe_layers(self) -> int:
        """L of the run."""
        return len(self.config.moe_layers)

    @property
    def backbone(self) -> BackboneBytes:
        """What a token reads besides experts."""
        return backbone_bytes(self.config, self.item_bytes)


@dataclass(frozen=True)
class Roads:
    """Bytes of experts on each road, in a token or a chunk, and the speed of those that were timed.

    `of_ceiling` is the achieved GB/s over the road's own measured one; None where nothing went that way.
    """

    hit_bytes: float
    upload_bytes: float
    cpu_bytes: float
    read_bytes: float
    upload_gbps: float | None
    cpu_gbps: float | None
    read_gbps: float | None
    upload_of_ceiling: float | None
    cpu_of_ceiling: float | None
    read_of_ceiling: float | None


@dataclass(frozen=True)
class DecodeLayer:
    """Means over tokens of one MoE layer, from the last layer's end to this one's: attention and experts."""

    layer: int
    seconds: float
    hits: float
    uploads: float
    part: float
    cpu: float
    cold: float
    wait_s: float
    schedule_s: float
    roads: Roads
    floor_s: float

    @property
    def of_floor(self) -> float:
        """1 is as fast as bytes over bandwidth allow."""
        return self.floor_s / self.seconds


@dataclass(frozen=True)
class FullDepth:
    """A shallow run, taken for the whole model: layers times the mean layer, and what is there once."""

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
        """1 is as fast as bytes over bandwidth allow."""
        return self.floor_s / self.token_s


@dataclass(frozen=True)
class DecodeReport:
    """Decoding, batch 1. `token_s` and bytes are means over tokens; `cached_tokens` as it began.

    Of all picks `hit_rate` lay on the GPU, and `in_memory` there or in RAM.
    """

    tokens: int
    cached_tokens: int
    token_s: float
    token_p50_s: float
    token_p95_s: float
    hit_rate: float
    in_memory: float
    schedule_p95_s: float
    roads: Roads
    floor: DecodeFloor
    spent: Spent | None
    layers: list[DecodeLayer]
    full_depth: FullDepth

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return 1 / self.token_s

    @property
    def of_floor(self) -> float:
        """1 is as fast as bytes over bandwidth allow."""
        return self.floor.seconds / self.token_s

    @property
    def spent_at_full_depth(self) -> Spent | None:
        """As if the whole model had drawn the watts of this run for as long as it would take."""
        return None if self.spent is None else self.spent.times(self.full_depth.token_s / self.token_s)


def decode_report(
    samples: Samples,
    token_s: Sequence[float],
    subject: Subject,
    ceilings: Ceilings,
    *,
    cached_tokens: int,
    spent: Spent | None = None,
) -> DecodeReport:
    """Sum up a decode run.

    Args:
        samples: float64 [tokens, L, len(LAYER_FIELDS)].
        token_s: each token's seconds.
        subject: what was run.
        ceilings: of the box.
        cached_tokens: in the cache as the first token began.
        spent: by all tokens.
    """
    columns = {name: samples[:, :, i] for i, name in enumerate(LAYER_FIELDS)}
    spans = columns["wait_s"] + columns["layer_s"]
    layers = [_decode_layer(layer, columns, spans, subject, ceilings) for layer in range(samples.shape[1])]
    picks = columns["hits"] + _misses(columns)
    mean_s = float(np.mean(token_s))
    moved = _token_bytes(columns, subject)
    return DecodeReport(
        tokens=len(token_s),
        cached_tokens=cached_tokens,
        token_s=mean_s,
        token_p50_s=float(np.median(token_s)),
        token_p95_s=float(np.quantile(token_s, 0.95)),
        hit_rate=float(columns["hits"].sum() / max(picks.sum(), 1)),
        in_memory=1 - float(columns["cold"].sum() / max(picks.sum(), 1)),
        schedule_p95_s=float(np.quantile(columns["schedule_s"], 0.95)),
        roads=_roads(columns, subject, ceilings),
        floor=decode_floor(moved, ceilings),
        spent=spent,
        layers=layers,
        full_depth=_full_depth(mean_s, spans, columns, subject, ceilings),
    )


def _decode_layer(
    layer: int, columns: dict[str, Samples], spans: Samples, subject: Subject, ceilings: Ceilings
) -> DecodeLayer:
    own = {name: column[:, layer] for name, column in columns.items()}
    backbone = subject.backbone
    moved = DecodeBytes(
        backbone.moe_layer + (backbone.dense_layers if layer == 0 else 0), *_expert_bytes(own, subject)
    )
    return DecodeLayer(
        layer=layer,
        seconds=float(spans[:, layer].mean()),
        hits=float(own["hits"].mean()),
        uploads=float(own["uploads"].mean()),
        part=float(own["part"].mean()),
        cpu=float(own["cpu"].mean()),
        cold=float(own["cold"].mean()),
        wait_s=float(own["wait_s"].mean()),
        schedule_s=float(own["schedule_s"].mean()),
        roads=_roads(own, subject, ceilings),
        floor_s=decode_floor(moved, ceilings).seconds,
    )


def _token_bytes(columns: dict[str, Samples], subject: Subject) -> DecodeBytes:
    return DecodeBytes(subject.backbone.token(subject.moe_layers), *_expert_bytes(columns, subject))


def _misses(counts: dict[str, Samples]) -> Samples:
    """Experts that were not resident; a divided one is part of both roads."""
    return counts["uploads"] + counts["part"] + counts["cpu"] + counts["cold"]


def _expert_bytes(counts: dict[str, Samples], subject: Subject) -> tuple[float, float, float]:
    """Mean bytes of a token's hits, its misses, and of those the ones that came from disk."""
    size = subject.config.expert_bytes
    misses, cold = _misses(counts), counts["cold"]
    return size * _mean_token(counts["hits"]), size * _mean_token(misses), size * _mean_token(cold)


def _mean_token(values: Samples) -> float:
    """Mean over tokens of the sum over layers; `values` [tokens] or [tokens, layers]."""
    return float(values.reshape(len(values), -1).sum(axis=1).mean())


def _roads(own: dict[str, Samples], subject: Subject, ceilings: Ceilings) -> Roads:
    """What the GPU reads of divided experts goes over PCIe as uploads do, and is counted with them."""
    size = subject.config.expert_bytes
    over_pcie = own["uploads"] + own["part"]
    upload_gbps = _gbps(over_pcie * size, own["upload_s"])
    cpu_gbps = _gbps(own["cpu"] * size, own["cpu_s"])
    read_gbps = _gbps(own["cold"] * size, own["read_s"])
    return Roads(
        hit_bytes=size * _mean_token(own["hits"]),
        upload_bytes=size * _mean_token(over_pcie),
        cpu_bytes=size * _mean_token(own["cpu"]),
        read_bytes=size * _mean_token(own["cold"]),
        upload_gbps=upload_gbps,
        cpu_gbps=cpu_gbps,
        read_gbps=read_gbps,
        upload_of_ceiling=_ratio(upload_gbps, ceilings.pcie_gbps),
        cpu_of_ceiling=_ratio(cpu_gbps, ceilings.ram_gbps),
        read_of_ceiling=_ratio(read_gbps, ceilings.nvme_gbps),
    )


def _gbps(nbytes: Samples, seconds: Samples) -> float | None:
    """Of what was timed."""
    timed = np.isfinite(seconds) & (seconds > 0) & (nbytes > 0)
    if not timed.any():
        return None
    return float(nbytes[timed].sum() / seconds[timed].sum() / GIGA)


def _ratio(value: float | None, ceiling: float) -> float | None:
    return value / ceiling if value is not None and ceiling else None


def _full_depth(
    token_s: float, spans: Samples, columns: dict[str, Samples], subject: Subject, ceilings: Ceilings
) -> FullDepth:
    """The first MoE layer's time has the dense layers and the launch in it, so the mean is of the others."""
    layer_s = float(spans[:, 1:].mean() if spans.shape[1] > 1 else spans.mean())
    fixed_s = token_s - subject.moe_layers * layer_s
    moved = _token_bytes(columns, subject)
    grown = subject.full_moe_layers / subject.moe_layers
    backbone = subject.backbone.token(subject.full_moe_layers)
    full = DecodeBytes(backbone, moved.hits * grown, moved.ram_misses * grown, moved.nvme_misses * grown)
    return FullDepth(
        moe_layers=subject.full_moe_layers,
        layer_s=layer_s,
        fixed_s=fixed_s,
        token_s=fixed_s + subject.full_moe_layers * layer_s,
        floor_s=decode_floor(full, ceilings).seconds,
    )


@dataclass(frozen=True)
class PrefillLayer:
    """One MoE layer of a prompt: from the last layer's end to this one's, attention and experts.

    hits, uploads, cpu, cold count experts; `cpu_s`, `upload_s` and `read_s` are what each road took.
    """

    layer: int
    seconds: float
    hits: int
    uploads: int
    cpu: int
    cold: int
    upload_s: float
    cpu_s: float
    read_s: float
    roads: Roads
    floor: PrefillFloor

    @property
    def times_floor(self) -> float:
        """1 is as fast as bytes over bandwidth, or operations over rate, allow."""
        return self.seconds / self.floor.seconds


@dataclass(frozen=True)
class PrefillReport:
    """One prompt length: the median of `runs`, from token ids to the last token's logits."""

    tokens: int
    runs: int
    seconds: float
    spent: Spent | None
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


@dataclass(frozen=True)
class LayerWork:
    """What was seen of one MoE layer of a prompt; NaN seconds are not known."""

    seconds: float
    hits: int
    uploads: int
    cpu: int
    upload_s: float
    cpu_s: float
    floor: PrefillFloor
    cold: int = 0
    read_s: float = math.nan


def prefill_report(
    tokens: int,
    seconds: Sequence[float],
    layers: Sequence[LayerWork],
    subject: Subject,
    ceilings: Ceilings,
    spent: Spent | None = None,
) -> PrefillReport:
    """Sum up the runs of a prompt; `layers` are those of the median run, `spent` is of all runs."""
    median_s = float(np.median(seconds))
    in_layers = sum(layer.seconds for layer in layers)
    grown = subject.full_moe_layers / subject.moe_layers
    return PrefillReport(
        tokens=tokens,
        runs=len(seconds),
        seconds=median_s,
        spent=spent,
        layers=[_prefill_layer(i, work, subject, ceilings) for i, work in enumerate(layers)],
        full_depth_s=median_s - in_layers + grown * in_layers,
    )


def _prefill_layer(layer: int, work: LayerWork, subject: Subject, ceilings: Ceilings) -> PrefillLayer:
    counted = ("hits", "uploads", "cpu", "cold", "upload_s", "cpu_s", "read_s")
    own = {name: np.array([getattr(work, name)], np.float64) for name in counted} | {"part": np.zeros(1)}
    return PrefillLayer(
        layer=layer,
        seconds=work.seconds,
        hits=work.hits,
        uploads=work.uploads,
        cpu=work.cpu,
        cold=work.cold,
        upload_s=work.upload_s,
        cpu_s=work.cpu_s,
        read_s=work.read_s,
        roads=_roads(own, subject, ceilings),
        floor=work.floor,
    )


@dataclass(frozen=True)
class BenchReport:
    """All of a run; `to_dict` is what `--json` prints.

    Attributes:
        subject: what was run.
        machine: names and versions.
        plan: lines of arithmetic: how a budget became slots.
        residents: slots of experts on the GPU, in the run and at full depth.
        routing: where the picks came from.
        ceilings: measured at the start.
        prefill: a report per prompt length.
        decode: None where no tokens were asked for.
        notes: what was left out, and why.
        prefetch: what decoding read ahead, warm-up included; None with a GPU, or all experts in memory.
    """

    subject: Subject
    machine: dict[str, Any]
    plan: list[str]
    residents: dict[str, int]
    routing: dict[str, Any]
    ceilings: Ceilings
    prefill: list[PrefillReport]
    decode: DecodeReport | None
    notes: list[str] = field(default_factory=list)
    prefetch: PrefetchReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, texts, lists and dicts; derived figures beside what they come from."""
        return {
            "model": self.subject.name,
            "moe_layers": self.subject.moe_layers,
            "full_moe_layers": self.subject.full_moe_layers,
            "expert_bytes": self.subject.config.expert_bytes,
            "backbone_bytes_per_token": self.subject.backbone.token(self.subject.moe_layers),
            "machine": self.machine,
            "plan": self.plan,
            "residents": self.residents,
            "routing": self.routing,
            "ceilings": self.ceilings.to_dict(),
            "prefill": [_prefill_dict(report) for report in self.prefill],
            "decode": None if self.decode is None else _decode_dict(self.decode),
            "notes": self.notes,
            "prefetch": None if self.prefetch is None else self.prefetch.to_dict(),
        }


def _prefill_dict(report: PrefillReport) -> dict[str, Any]:
    layers = [
        _finite(asdict(layer)) | {"times_floor": layer.times_floor, "floor_s": layer.floor.seconds}
        for layer in report.layers
    ]
    derived = {"tokens_per_s": report.tokens_per_s, "times_floor": report.times_floor}
    return asdict(replace(report, spent=None)) | derived | _spent_dict(report.spent) | {"layers": layers}


def _decode_dict(report: DecodeReport) -> dict[str, Any]:
    full = report.full_depth
    layers = [asdict(layer) | {"of_floor": layer.of_floor} for layer in report.layers]
    return asdict(replace(report, spent=None)) | {
        **_spent_dict(report.spent),
        "tokens_per_s": report.tokens_per_s,
        "of_floor": report.of_floor,
        "layers": layers,
        "full_depth": {
            **asdict(full),
            **_spent_dict(report.spent_at_full_depth),
            "tokens_per_s": full.tokens_per_s,
            "of_floor": full.of_floor,
        },
    }


def _spent_dict(spent: Spent | None) -> dict[str, Any]:
    return {"energy": None, "cost": None} if spent is None else spent.to_dict()


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """NaN is no JSON: None stands for what is not known."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in values.items()
    }

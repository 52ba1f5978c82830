"""The experts of a model that is being measured: they route by a trace, and time each layer.

L MoE layers, T tokens, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.instruments.bench.prefill_report import ROAD_FIELDS, LayerWork
from moebox.instruments.bench.roads import LAYER_FIELDS, Samples
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.decode.host_step import FIELDS
from moebox.offload.device.base import Device, Event
from moebox.offload.experts import Experts
from moebox.offload.gpu_experts import GpuExperts
from moebox.offload.machine.floor import Ceilings, PrefillFloor, expert_flops, layer_flops, prefill_floor
from moebox.offload.prefetch.prefetch import Prefetcher, PrefetchReport
from moebox.offload.routing.trace import TraceRouting
from moebox.offload.traffic import Traffic
from moebox.units import GIGA

NAN = float("nan")


class InstrumentedExperts(Experts, Protocol):
    """Experts that route by a trace, if there is one, and time each layer.

    Attributes:
        routing: the trace; None: the model's router picks.
    """

    routing: TraceRouting | None

    def begin(self) -> None:
        """Discard the figures of the last pass; called right before each pass."""

    def decode_layers(self) -> Samples:
        """float64 [L, len(LAYER_FIELDS)] of the token that has just been decoded."""
        ...

    def prefill_layers(self, ceilings: Ceilings) -> list[LayerWork]:
        """Each MoE layer of the prompt that has just been computed, all chunks together."""
        ...

    def prefetch(self) -> PrefetchReport | None:
        """What all decoding so far has read or uploaded ahead; None where nothing is moved ahead."""
        ...


@dataclass
class _ChunkLayer:
    """One layer of one chunk.

    `ids` [T, k] are the picks, `resident` [E] the experts that were on the GPU; seconds include attention,
    `layer_s` does not.
    """

    layer: int
    ids: Tensor
    seconds: float = NAN
    resident: npt.NDArray[np.bool_] | None = None
    hits: int = 0
    uploads: int = 0
    cpu: int = 0
    cold: int = 0
    upload_s: float = NAN
    cpu_s: float = NAN
    read_s: float = NAN
    layer_s: float = NAN


class InstrumentedCpuExperts:
    """`InstrumentedExperts` on the CPU, which computes within the call, so that a clock suffices.

    A layer's `read_s` is the time in which the drives were busy since the layer before. With prefetch they
    also read for other layers, so that only the sum of `read_s` over layers belongs to the sum of bytes. Of
    the time in which the CPU computes a layer, `cpu_s` is the share of the experts that were in RAM, by
    number.
    """

    def __init__(self, experts: CpuExperts, config: ModelConfig, routing: TraceRouting | None) -> None:
        self.nbytes = experts.nbytes
        self.routing = routing
        self._experts, self._config = experts, config
        self._layers: list[_ChunkLayer] = []
        self._ended_s = self._read_s = 0.0

    def begin(self) -> None:
        self._layers.clear()
        self._read_s = self._experts.read_s
        self._ended_s = time.perf_counter()

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        moe = layer - self._config.first_k_dense_replace
        if self.routing is not None:
            expert_ids = self.routing.prefill(moe, len(hidden))
        began_s = time.perf_counter()
        out = self._experts.forward(layer, expert_ids, weights, hidden)
        ended_s = time.perf_counter()
        last, before_s, self._read_s = self._experts.last, self._read_s, self._experts.read_s
        in_ram = last.hits / (last.hits + last.cold)
        measured = _ChunkLayer(moe, expert_ids, ended_s - self._ended_s, cpu=last.hits, cold=last.cold)
        measured.layer_s, measured.read_s = ended_s - began_s, self._read_s - before_s
        measured.cpu_s = (measured.layer_s - last.wait_s) * in_ram
        self._layers.append(measured)
        self._ended_s = time.perf_counter()
        return out

    def traffic(self) -> Traffic:
        return self._experts.traffic()

    def decode_layers(self) -> Samples:
        unused = dict.fromkeys(LAYER_FIELDS, 0.0)
        rows = [
            unused | vars(measured) | {"wait_s": measured.seconds - measured.layer_s}
            for measured in self._layers
        ]
        return np.array([[row[name] for name in LAYER_FIELDS] for row in rows])

    def prefill_layers(self, ceilings: Ceilings) -> list[LayerWork]:
        return _by_layer(self._layers, self._config, ceilings)

    def prefetch(self) -> PrefetchReport | None:
        prefetcher = self._experts.prefetcher
        return prefetcher.report() if isinstance(prefetcher, Prefetcher) else None


class InstrumentedGpuExperts:
    """`InstrumentedExperts` with a GPU: marks on the compute stream are read when the pass is over."""

    def __init__(self, experts: GpuExperts, config: ModelConfig, routing: TraceRouting | None) -> None:
        self.nbytes = experts.nbytes
        self._experts, self._config = experts, config
        self._device: Device = experts.device
        self._layers: list[_ChunkLayer] = []
        self._marks: list[Event] = []
        self.routing = experts.routing = routing
        self._columns = [FIELDS.index(name) for name in LAYER_FIELDS]

    def begin(self) -> None:
        self._layers.clear()
        self._marks = [self._device.mark()]

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        moe = layer - self._config.first_k_dense_replace
        resident = self._experts.gpu.residency.table().reshape(-1, self._config.n_routed_experts)[moe] >= 0
        out = self._experts.forward(layer, expert_ids, weights, hidden)
        ids = expert_ids if self.routing is None else self.routing.last
        self._layers.append(_ChunkLayer(moe, ids, resident=resident))
        self._marks.append(self._device.mark())
        return out

    def traffic(self) -> Traffic:
        return self._experts.traffic()

    def decode_layers(self) -> Samples:
        self._experts.synchronize()
        return self._experts.decode_host.stats[:, self._columns]

    def prefill_layers(self, ceilings: Ceilings) -> list[LayerWork]:
        self._device.synchronize()
        self._experts.synchronize()
        records = list(self._experts.prefill.records)[-len(self._layers) :]
        for i, (measured, record) in enumerate(zip(self._layers, records, strict=True)):
            measured.seconds = self._marks[i + 1].seconds_since(self._marks[i])
            measured.hits, measured.uploads, measured.cpu = record.residents, record.uploads, record.cpu
            measured.upload_s, measured.cpu_s = record.upload_s, record.cpu_s
            measured.cold, measured.read_s = record.cold, record.read_s
        return _by_layer(self._layers, self._config, ceilings)

    def prefetch(self) -> PrefetchReport | None:
        experts = self._experts
        if experts.ahead is None or (self.routing is not None and experts.predictions is None):
            return None
        return experts.ahead.report()


def _by_layer(measured: Sequence[_ChunkLayer], config: ModelConfig, ceilings: Ceilings) -> list[LayerWork]:
    return [
        _layer_work([chunk for chunk in measured if chunk.layer == layer], config, ceilings)
        for layer in range(len(config.moe_layers))
    ]


def _layer_work(chunks: list[_ChunkLayer], config: ModelConfig, ceilings: Ceilings) -> LayerWork:
    """All chunks of one layer together."""
    floors, cached = [], 0
    for chunk in chunks:
        floors.append(_floor(chunk, cached, config, ceilings))
        cached += len(chunk.ids)
    return LayerWork(
        floor=PrefillFloor(
            sum(floor.seconds for floor in floors),
            sum(floor.moving_s for floor in floors),
            sum(floor.computing_s for floor in floors),
            sum(floor.cpu_experts for floor in floors),
        ),
        **{name: sum(getattr(chunk, name) for chunk in chunks) for name in ("seconds", *ROAD_FIELDS)},
    )


def _floor(chunk: _ChunkLayer, cached: int, config: ModelConfig, ceilings: Ceilings) -> PrefillFloor:
    counts = torch.bincount(chunk.ids.cpu().reshape(-1), minlength=config.n_routed_experts).numpy()
    resident = np.zeros(len(counts), bool) if chunk.resident is None else chunk.resident
    other = layer_flops(config, len(chunk.ids), cached)
    other += expert_flops(config) * float(counts[resident].sum())
    missing = counts[~resident & (counts > 0)].tolist()
    floor = prefill_floor(missing, config.expert_bytes, expert_flops(config), other, ceilings)
    if not ceilings.nvme_gbps:
        return floor
    read_s = chunk.cold * config.expert_bytes / (ceilings.nvme_gbps * GIGA)
    return replace(floor, seconds=max(floor.seconds, read_s))

"""Stands between the model and its experts during a benchmark: injects a trace, and sees where time goes.

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
from moebox.instruments.bench.report import LAYER_FIELDS, LayerWork, Samples
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


class Watch(Experts, Protocol):
    """The experts of a model that is being measured."""

    routing: TraceRouting | None

    def begin(self) -> None:
        """Call right before each pass."""

    def decode_layers(self) -> Samples:
        """float64 [L, len(LAYER_FIELDS)] of the token that has just been decoded."""
        ...

    def prefill_layers(self, ceilings: Ceilings) -> list[LayerWork]:
        """Each MoE layer of the prompt that has just gone through, all chunks together."""
        ...

    def prefetch(self) -> PrefetchReport | None:
        """What was read ahead in all decoding so far; None: nothing can be."""
        ...


@dataclass
class _Seen:
    """A layer of one chunk: routed ids [T, k], who was on the GPU, and what each road took."""

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


class CpuWatch:
    """Over the CPU's experts: everything happens when it is called, so a clock suffices. See `Watch`.

    A layer's `read_s` are the seconds in which the drives were busy since the layer before: with prefetch
    they read for others, too, so that only the sum over layers goes with the sum of bytes. Of the time that
    the CPU computes, cold experts have their share by number.
    """

    def __init__(self, experts: CpuExperts, config: ModelConfig, routing: TraceRouting | None) -> None:
        self.nbytes = experts.nbytes
        self.routing = routing
        self._experts, self._config = experts, config
        self._seen: list[_Seen] = []
        self._ended_s = self._read_s = 0.0

    def begin(self) -> None:
        """See `Watch`."""
        self._seen.clear()
        self._read_s = self._experts.read_s
        self._ended_s = time.perf_counter()

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """See `Experts.forward`."""
        moe = layer - self._config.first_k_dense_replace
        if self.routing is not None:
            expert_ids = self.routing.prefill(moe, len(hidden))
        began_s = time.perf_counter()
        out = self._experts.forward(layer, expert_ids, weights, hidden)
        ended_s = time.perf_counter()
        last, before_s, self._read_s = self._experts.last, self._read_s, self._experts.read_s
        in_ram = last.hits / (last.hits + last.cold)
        seen = _Seen(moe, expert_ids, ended_s - self._ended_s, cpu=last.hits, cold=last.cold)
        seen.layer_s, seen.read_s = ended_s - began_s, self._read_s - before_s
        seen.cpu_s = (seen.layer_s - last.wait_s) * in_ram
        self._seen.append(seen)
        self._ended_s = time.perf_counter()
        return out

    def traffic(self) -> Traffic:
        """See `Experts.traffic`."""
        return self._experts.traffic()

    def decode_layers(self) -> Samples:
        """See `Watch`."""
        rows = [
            {
                "cpu": seen.cpu,
                "cold": seen.cold,
                "wait_s": seen.seconds - seen.layer_s,
                "cpu_s": seen.cpu_s,
                "read_s": seen.read_s,
                "layer_s": seen.layer_s,
            }
            for seen in self._seen
        ]
        empty = dict.fromkeys(LAYER_FIELDS, 0.0) | {"upload_s": NAN}
        return np.array([[(empty | row)[name] for name in LAYER_FIELDS] for row in rows])

    def prefill_layers(self, ceilings: Ceilings) -> list[LayerWork]:
        """See `Watch`."""
        return _by_layer(self._seen, self._config, ceilings)

    def prefetch(self) -> PrefetchReport | None:
        """See `Watch`."""
        prefetcher = self._experts.prefetcher
        return prefetcher.report() if isinstance(prefetcher, Prefetcher) else None


class GpuWatch:
    """Over the tiers: marks on the compute stream, read when all is over. See `Watch`."""

    def __init__(self, experts: GpuExperts, config: ModelConfig, routing: TraceRouting | None) -> None:
        self.nbytes = experts.nbytes
        self._experts, self._config = experts, config
        self._device: Device = experts.device
        self._seen: list[_Seen] = []
        self._marks: list[Event] = []
        self.routing = experts.routing = routing
        self._columns = [FIELDS.index(name) for name in LAYER_FIELDS]

    def begin(self) -> None:
        """See `Watch`."""
        self._seen.clear()
        self._marks = [self._device.mark()]

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """See `Experts.forward`."""
        moe = layer - self._config.first_k_dense_replace
        resident = self._experts.gpu.residency.table().reshape(-1, self._config.n_routed_experts)[moe] >= 0
        out = self._experts.forward(layer, expert_ids, weights, hidden)
        ids = expert_ids if self.routing is None else self.routing.last
        self._seen.append(_Seen(moe, ids, resident=resident))
        self._marks.append(self._device.mark())
        return out

    def traffic(self) -> Traffic:
        """See `Experts.traffic`."""
        return self._experts.traffic()

    def decode_layers(self) -> Samples:
        """See `Watch`."""
        self._experts.synchronize()
        return self._experts.decode_host.stats[:, self._columns]

    def prefill_layers(self, ceilings: Ceilings) -> list[LayerWork]:
        """See `Watch`."""
        self._device.synchronize()
        self._experts.synchronize()
        records = list(self._experts.prefill.records)[-len(self._seen) :]
        for i, (seen, record) in enumerate(zip(self._seen, records, strict=True)):
            seen.seconds = self._marks[i + 1].seconds_since(self._marks[i])
            seen.hits, seen.uploads, seen.cpu = record.residents, record.uploads, record.cpu
            seen.upload_s, seen.cpu_s = record.upload_s, record.cpu_s
            seen.cold, seen.read_s = record.cold, record.read_s
        return _by_layer(self._seen, self._config, ceilings)

    def prefetch(self) -> PrefetchReport | None:
        """See `Watch`: experts that were uploaded ahead."""
        experts = self._experts
        if experts.ahead is None or (self.routing is not None and experts.predictions is None):
            return None
        return experts.ahead.report()


def _by_layer(seen: Sequence[_Seen], config: ModelConfig, ceilings: Ceilings) -> list[LayerWork]:
    return [
        _layer_work([chunk for chunk in seen if chunk.layer == layer], config, ceilings)
        for layer in range(len(config.moe_layers))
    ]


def _layer_work(chunks: list[_Seen], config: ModelConfig, ceilings: Ceilings) -> LayerWork:
    """All chunks of one layer together."""
    floors, cached = [], 0
    for chunk in chunks:
        floors.append(_floor(chunk, cached, config, ceilings))
        cached += len(chunk.ids)
    return LayerWork(
        seconds=sum(chunk.seconds for chunk in chunks),
        hits=sum(chunk.hits for chunk in chunks),
        uploads=sum(chunk.uploads for chunk in chunks),
        cpu=sum(chunk.cpu for chunk in chunks),
        cold=sum(chunk.cold for chunk in chunks),
        upload_s=sum(chunk.upload_s for chunk in chunks),
        cpu_s=sum(chunk.cpu_s for chunk in chunks),
        read_s=sum(chunk.read_s for chunk in chunks),
        floor=PrefillFloor(
            sum(floor.seconds for floor in floors),
            sum(floor.moving_s for floor in floors),
            sum(floor.computing_s for floor in floors),
            sum(floor.cpu_experts for floor in floors),
        ),
    )


def _floor(chunk: _Seen, cached: int, config: ModelConfig, ceilings: Ceilings) -> PrefillFloor:
    counts = torch.bincount(chunk.ids.cpu().reshape(-1), minlength=config.n_routed_experts).numpy()
    resident = np.zeros(len(counts), bool) if chunk.resident is None else chunk.resident
    other = layer_flops(config, len(chunk.ids), cached)
    other += expert_flops(config) * float(counts[resident].sum())
    missing = counts[~resident & (counts > 0)].tolist()
    floor = prefill_floor(missing, config.expert_bytes, expert_flops(config), other, ceilings)
    if not ceilings.nvme_gbps:
        return floor
    return replace(floor, seconds=max(floor.seconds, _read_floor_s(chunk, config, ceilings)))


def _read_floor_s(chunk: _Seen, config: ModelConfig, ceilings: Ceilings) -> float:
    return chunk.cold * config.expert_bytes / (ceilings.nvme_gbps * GIGA)

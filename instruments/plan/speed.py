"""How fast a plan will run: the floor of `offload/machine/floor.py`, and the losses against it.

The floor divides bytes by bandwidths. The losses are measured once for a box, or assumed to be those of a box
that was measured: the share of each bandwidth that the code reaches, and the seconds that a layer takes
besides its bytes. A token's time is the sum of backbone, cache, overhead and experts, where

    backbone = bytes / (reached * bandwidth), cache likewise, overhead = L * layer_s + token_s,
    experts  = L * the longest of GPU, RAM and disk in a layer.

L MoE layers, k experts a token, each of `expert_bytes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from moebox.config import ModelConfig
from moebox.offload.machine.floor import (
    Ceilings,
    DecodeBytes,
    DecodeFloor,
    backbone_bytes,
    decode_floor,
    expert_flops,
    layer_flops,
    prefill_floor,
)
from moebox.units import GIGA


@dataclass(frozen=True)
class Efficiency:
    """The shares of a box's ceilings that the code reaches, from 0 to 1, and the seconds that it adds.

    Attributes:
        source: where the figures come from.
        backbone: share of RAM's or the GPU's bandwidth, reading attention, shared experts, dense layers and
            head.
        experts: share of the same bandwidth, reading experts where the backbone lies.
        roads: share of `Ceilings.both_roads_gbps`, for experts that are split between the CPU and PCIe.
        attention: share of RAM's or the GPU's bandwidth, reading the cache.
        nvme: share of the disk's bandwidth.
        layer_s, token_s: seconds that a layer, and a token, takes besides its bytes.
        read_s: seconds from a read's request to the disk's first byte.
        prefill: (tokens, share of the floor that is reached) of prompts, ascending.
    """

    source: str
    backbone: float
    experts: float
    roads: float
    attention: float
    nvme: float
    layer_s: float
    token_s: float
    read_s: float
    prefill: tuple[tuple[int, float], ...]

    NAMES: ClassVar[frozenset[str]] = frozenset(
        ("backbone", "experts", "roads", "attention", "nvme", "layer_s", "token_s", "read_s")
    )
    """Figures that the machine's profile keeps, besides those of prompts."""

    def of_prefill_floor(self, tokens: int) -> float:
        """Share of the floor that a prompt reaches, linear in log(tokens) between known lengths."""
        lengths, parts = zip(*self.prefill, strict=True)
        return float(np.interp(math.log(tokens), np.log(lengths), parts))

    def to_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """The figures that the machine's profile keeps; `from_figures` reads them."""
        plain = {name: value for name, value in asdict(self).items() if name in self.NAMES}
        return plain | {f"{_PREFILL}{tokens}": part for tokens, part in self.prefill}

    @classmethod
    def from_figures(cls, figures: Mapping[str, float], source: str) -> Efficiency | None:
        """The reverse of `figures`; None where one is missing, as in another version's profile."""
        prefill = sorted(
            (int(name.removeprefix(_PREFILL)), part)
            for name, part in figures.items()
            if name.startswith(_PREFILL)
        )
        if not figures.keys() >= cls.NAMES or not prefill:
            return None
        return cls(source=source, prefill=tuple(prefill), **{name: figures[name] for name in cls.NAMES})


_PREFILL = "prefill_"

H200_BOX = Efficiency(
    source="measured with one H200 and 16 Emerald Rapids cores (docs/benchmarks.md); of the disk assumed",
    backbone=0.93,
    experts=0.65,
    roads=0.64,
    attention=0.36,
    nvme=0.9,
    layer_s=38e-6,
    token_s=250e-6,
    read_s=150e-6,
    prefill=((512, 1 / 1.77), (4096, 1 / 1.33)),
)
"""The measurements behind the figures. backbone, layer_s: dense kernels read 3.8-4.1 of 4.27 TB/s; a layer
without experts takes 114 us, 71 us of them for its bytes. experts: 8 resident ones take 68-75 us a layer.
roads: layers with 3.5 and 2.4 misses take 0.747 and 0.541 ms. attention: 115 MB of cache take 76 us."""

CPU_BOX = Efficiency(
    source="experts as on 15 Emerald Rapids cores (docs/benchmarks.md); all else assumed, not measured",
    backbone=0.6,
    experts=0.75,
    roads=H200_BOX.roads,
    attention=0.03,
    nvme=0.9,
    layer_s=1e-3,
    token_s=1e-3,
    read_s=500e-6,
    prefill=((128, 0.7),),
)


@dataclass(frozen=True)
class ColdReads:
    """Time that cold experts add to a layer: `latency_s + cold * expert_bytes / (gbps * 1e9)`."""

    latency_s: float
    gbps: float


@dataclass(frozen=True)
class PickShares:
    """Shares of all picks by the place where the expert is found; they add up to 1. Without a GPU `gpu` is
    0."""

    gpu: float
    ram: float
    disk: float


@dataclass(frozen=True)
class DecodePrediction:
    """One token at batch 1.

    Attributes:
        cached_tokens: in the cache when the token is decoded.
        moved: bytes of backbone and experts.
        cache_bytes: bytes of the cache that attention reads.
        floor: bytes over bandwidths.
        backbone_s, attention_s, overhead_s, experts_s: the parts of `seconds`, see the module.
        layer_roads: seconds, summed over layers, of experts on the GPU ("gpu"), of experts in RAM, which are
            split between CPU and PCIe ("ram"), and of reads ("disk"). The three run at the same time;
            `experts_s` is the sum over layers of the slowest.
    """

    cached_tokens: int
    moved: DecodeBytes
    cache_bytes: float
    floor: DecodeFloor
    backbone_s: float
    attention_s: float
    overhead_s: float
    experts_s: float
    layer_roads: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of one token."""
        return self.backbone_s + self.attention_s + self.overhead_s + self.experts_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second."""
        return 1 / self.seconds

    @property
    def of_floor(self) -> float:
        """1 is as fast as bytes over bandwidth allow."""
        return self.floor.seconds / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with derived ones."""
        derived = {"seconds": self.seconds, "tokens_per_s": self.tokens_per_s, "of_floor": self.of_floor}
        return asdict(self) | derived


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one layer's experts: `roads` as in `DecodePrediction.layer_roads`, `seconds` in all."""

    roads: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class SpeedModel:
    """Predicts tokens and prompts of a model on a box.

    Attributes:
        config: of the model.
        ceilings: of the box.
        efficiency: the shares of the ceilings that are reached.
        item_bytes: bytes of an element of the cache, and of an unquantized backbone.
        backbone_scale: bytes of the backbone as loaded, in int8 or nf4, over its unquantized bytes.
    """

    config: ModelConfig
    ceilings: Ceilings
    efficiency: Efficiency
    item_bytes: int = 2
    backbone_scale: float = 1.0

    def decode(self, shares: PickShares, cached_tokens: int = 0) -> DecodePrediction:
        """One token whose experts are found as `shares` says."""
        config, reached, fast = self.config, self.efficiency, self.ceilings.fast_gbps * GIGA
        layers = len(config.moe_layers)
        cache = cached_tokens * config.num_hidden_layers * config.kv_width * self.item_bytes
        moved = self.moved(shares)
        layer = self._mean_layer(shares)
        return DecodePrediction(
            cached_tokens=cached_tokens,
            moved=moved,
            cache_bytes=cache,
            floor=decode_floor(replace(moved, backbone=moved.backbone + cache), self.ceilings),
            backbone_s=moved.backbone / (reached.backbone * fast),
            attention_s=cache / (reached.attention * fast),
            overhead_s=layers * reached.layer_s + reached.token_s,
            experts_s=layers * layer.seconds,
            layer_roads={name: layers * seconds for name, seconds in layer.roads.items()},
        )

    def moved(self, shares: PickShares) -> DecodeBytes:
        """Bytes of a token. Without a GPU an expert in RAM counts as a miss of the CPU, as in `bench`."""
        config = self.config
        layers, _, top_k = config.routing_shape
        picked = layers * top_k * config.expert_bytes
        backbone = backbone_bytes(config, self.item_bytes).token(layers) * self.backbone_scale
        from_ram = shares.ram + (0 if self.ceilings.has_gpu else shares.disk)
        return DecodeBytes(backbone, picked * shares.gpu, picked * from_ram, picked * shares.disk)

    def _mean_layer(self, shares: PickShares) -> LayerTime:
        """Mean over layers: the number of a layer's cold picks has a binomial distribution, and a layer waits
        for its own only."""
        k = self.config.num_experts_per_tok
        roads = {"gpu": 0.0, "ram": 0.0, "disk": 0.0}
        mean_s = 0.0
        for cold in range(k + 1):
            weight = math.comb(k, cold) * shares.disk**cold * (1 - shares.disk) ** (k - cold)
            if weight:
                layer = self.layer_time(cold, shares)
                mean_s += weight * layer.seconds
                roads = {name: roads[name] + weight * layer.roads[name] for name in roads}
        return LayerTime(roads, mean_s)

    def layer_time(self, cold: int, shares: PickShares) -> LayerTime:
        """A layer of which `cold` picks are on the disk, and the others on the GPU and in RAM as in `shares`.

        The CPU computes the experts in RAM while the disk is read, and each cold expert when it has arrived.
        The layer ends when the CPU has computed all, and not before it has computed the last that arrived:
        `max(gpu, ram, disk + one expert on the CPU)`.
        """
        ceilings, reached, nbytes = self.ceilings, self.efficiency, self.config.expert_bytes
        warm = self.config.num_experts_per_tok - cold
        on_gpu = warm * shares.gpu / max(shares.gpu + shares.ram, 1e-12)
        cpu_s = nbytes / (reached.experts * ceilings.ram_gbps * GIGA)
        if ceilings.has_gpu:
            gpu_s = on_gpu * nbytes / (reached.experts * ceilings.fast_gbps * GIGA)
            split_s = nbytes / (reached.roads * ceilings.both_roads_gbps * GIGA)
            ram_s = (warm - on_gpu) * split_s + cold * cpu_s
        else:
            gpu_s, ram_s = 0.0, (warm + cold) * cpu_s
        disk_s = last_s = 0.0
        if cold:
            if not ceilings.nvme_gbps:
                raise ValueError("experts on a disk of no bandwidth")
            disk_s = reached.read_s + cold * nbytes / (reached.nvme * ceilings.nvme_gbps * GIGA)
            last_s = cpu_s
        return LayerTime({"gpu": gpu_s, "ram": ram_s, "disk": disk_s}, max(gpu_s, ram_s, disk_s + last_s))

    def prefill(
        self, counts: Sequence[int], tokens: int, gpu_share: float, disk_share: float
    ) -> PrefillPrediction:
        """A prompt that is computed in one chunk.

        Args:
            counts: for each expert that the prompt uses in a layer, its tokens.
            tokens: of the prompt.
            gpu_share: share of the experts that are on the GPU.
            disk_share: share of the experts that are on the disk; a layer reads them once, while it computes.
        """
        config = self.config
        ordered = sorted(counts, reverse=True)
        resident = round(gpu_share * len(ordered))
        # Which experts are resident does not depend on the prompt: they are spread evenly over `ordered`.
        step = len(ordered) / resident if resident else math.inf
        chosen = {int(i * step) for i in range(resident)}
        missing = [count for i, count in enumerate(ordered) if i not in chosen]
        flops = expert_flops(config)
        other = layer_flops(config, tokens) + flops * (sum(ordered) - sum(missing))
        floor = prefill_floor(missing, config.expert_bytes, flops, other, self.ceilings)
        cold_bytes = disk_share * len(ordered) * config.expert_bytes
        disk_s = cold_bytes / (self.ceilings.nvme_gbps * GIGA) if cold_bytes else 0.0
        layers = len(config.moe_layers)
        working_s = floor.seconds / self.efficiency.of_prefill_floor(tokens)
        return PrefillPrediction(
            tokens=tokens,
            layer_moving_s=floor.moving_s,
            layer_computing_s=floor.computing_s,
            layer_disk_s=disk_s,
            floor_s=layers * max(floor.seconds, disk_s),
            seconds=layers * max(working_s, disk_s / self.efficiency.nvme),
        )


@dataclass(frozen=True)
class PrefillPrediction:
    """The MoE layers of a prompt, which take nearly all of its time.

    layer_moving_s, layer_computing_s and layer_disk_s are floors of one layer.
    """

    tokens: int
    layer_moving_s: float
    layer_computing_s: float
    layer_disk_s: float
    floor_s: float
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the prompt a second."""
        return self.tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with derived ones."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}

"""How fast a plan will run: the floor of `offload/machine/floor.py`, and the losses against it, by part.

The floor divides bytes by bandwidths. What comes beside it is measured once for a box, or taken over from one
that was measured, by name: the part of each bandwidth that the code reaches, and what a layer costs whatever
its bytes. Shapes: L MoE layers, k experts a token, each of `expert_bytes`.
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
    """What the code makes of a box's ceilings.

    Attributes:
        source: where the figures come from.
        backbone: of RAM's or the GPU's bandwidth, reading attention, shared experts, dense layers and head.
        experts: of it, reading experts where the backbone lies.
        roads: of `Ceilings.both_roads_gbps`, for experts that the CPU and PCIe share out.
        attention: of RAM's or the GPU's bandwidth, reading the cache.
        nvme: of the disk's bandwidth.
        layer_s, token_s: what a layer, and what a token costs beside bytes.
        read_s: from asking the disk to its first byte.
        prefill: (tokens, part of the floor reached) of prompts, ascending.
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
    """Figures that the machine's profile keeps, beside those of prompts."""

    def of_prefill_floor(self, tokens: int) -> float:
        """Part of the floor that a prompt of this length reaches: between known lengths by their ratio."""
        lengths, parts = zip(*self.prefill, strict=True)
        return float(np.interp(math.log(tokens), np.log(lengths), parts))

    def to_dict(self) -> dict[str, Any]:
        """All figures by name."""
        return asdict(self)

    def figures(self) -> dict[str, float]:
        """What the machine's profile keeps; `from_figures` reads it."""
        plain = {name: value for name, value in asdict(self).items() if name in self.NAMES}
        return plain | {f"{_PREFILL}{tokens}": part for tokens, part in self.prefill}

    @classmethod
    def from_figures(cls, figures: Mapping[str, float], source: str) -> Efficiency | None:
        """What `figures` gave; None where one is missing, as in a profile of another version."""
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
"""Backbone: dense kernels at 3.8-4.1 of 4.27 TB/s; a layer without experts 114 us, of which 71 are bytes.
Experts: 8 resident ones 68-75 us a layer. Roads: 0.747 and 0.541 ms a layer with 3.5 and 2.4 misses.
Attention: 76 us for 115 MB of cache."""


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
    """What experts on the disk cost a layer: once where one is missing, and then each, at `gbps`."""

    latency_s: float
    gbps: float


@dataclass(frozen=True)
class Chances:
    """Where a pick's expert is found: shares of all picks, which add up to 1. Without a GPU `gpu` is 0."""

    gpu: float
    ram: float
    disk: float


@dataclass(frozen=True)
class DecodePrediction:
    """One token, batch 1, behind `cached_tokens`.

    `layer_roads` are seconds of all layers on each road, which run at the same time: the GPU's experts, the
    CPU's and PCIe's, the disk's. `experts_s` is what the slowest of them takes, layer by layer.
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
        """Of the token."""
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
class Speeds:
    """A model on a box: predicts tokens and prompts.

    Attributes:
        config: the model.
        ceilings: of the box.
        efficiency: what of them is reached.
        item_bytes: of an element of the cache, and of an unquantized backbone.
        backbone_scale: what int8 or nf4 leave of the backbone's bytes.
    """

    config: ModelConfig
    ceilings: Ceilings
    efficiency: Efficiency
    item_bytes: int = 2
    backbone_scale: float = 1.0

    def decode(self, chances: Chances, cached_tokens: int = 0) -> DecodePrediction:
        """One token with experts found as `chances` says."""
        config, reached, fast = self.config, self.efficiency, self.ceilings.fast_gbps * GIGA
        layers = len(config.moe_layers)
        width = config.kv_lora_rank + config.qk_rope_head_dim
        cache = cached_tokens * config.num_hidden_layers * width * self.item_bytes
        moved = self.moved(chances)
        roads, experts_s = self._layer(chances)
        return DecodePrediction(
            cached_tokens=cached_tokens,
            moved=moved,
            cache_bytes=cache,
            floor=decode_floor(replace(moved, backbone=moved.backbone + cache), self.ceilings),
            backbone_s=moved.backbone / (reached.backbone * fast),
            attention_s=cache / (reached.attention * fast),
            overhead_s=layers * reached.layer_s + reached.token_s,
            experts_s=layers * experts_s,
            layer_roads={name: layers * seconds for name, seconds in roads.items()},
        )

    def moved(self, chances: Chances) -> DecodeBytes:
        """Bytes of a token. Without a GPU an expert in RAM is a miss on the way to the CPU, as in `bench`."""
        config = self.config
        picked = len(config.moe_layers) * config.num_experts_per_tok * config.expert_bytes
        backbone = backbone_bytes(config, self.item_bytes).token(len(config.moe_layers))
        backbone *= self.backbone_scale
        from_ram = chances.ram + (0 if self.ceilings.has_gpu else chances.disk)
        return DecodeBytes(backbone, picked * chances.gpu, picked * from_ram, picked * chances.disk)

    def _layer(self, chances: Chances) -> tuple[dict[str, float], float]:
        """Mean seconds of each road in a layer, and of the layer's experts, the roads running together.

        How many of a layer's picks are on the disk varies from layer to layer, and a layer waits for its own.
        """
        k = self.config.num_experts_per_tok
        road_sums = {"gpu": 0.0, "ram": 0.0, "disk": 0.0}
        total = 0.0
        for missing in range(k + 1):
            weight = math.comb(k, missing) * chances.disk**missing * (1 - chances.disk) ** (k - missing)
            if weight:
                roads, seconds = self._layer_with(missing, k - missing, chances)
                total += weight * seconds
                road_sums = {name: road_sums[name] + weight * roads[name] for name in roads}
        return road_sums, total

    def _layer_with(self, missing: int, present: int, chances: Chances) -> tuple[dict[str, float], float]:
        """The same for a layer of which so many picks are on the disk.

        The CPU computes what RAM has while the disk is read, and each expert from the disk when it is there:
        the layer ends when the CPU has done all, but not before it has done the one that came last.
        """
        ceilings, reached, nbytes = self.ceilings, self.efficiency, self.config.expert_bytes
        on_gpu = present * chances.gpu / max(chances.gpu + chances.ram, 1e-12)
        cpu_s = nbytes / (reached.experts * ceilings.ram_gbps * GIGA)
        if ceilings.has_gpu:
            gpu_s = on_gpu * nbytes / (reached.experts * ceilings.fast_gbps * GIGA)
            road_s = nbytes / (reached.roads * ceilings.both_roads_gbps * GIGA)
            ram_s = (present - on_gpu) * road_s + missing * cpu_s
        else:
            gpu_s, ram_s = 0.0, (present + missing) * cpu_s
        disk_s = 0.0
        if missing:
            if not ceilings.nvme_gbps:
                raise ValueError("experts on a disk of no bandwidth")
            disk_s = reached.read_s + missing * nbytes / (reached.nvme * ceilings.nvme_gbps * GIGA)
        last_s = cpu_s if missing else 0.0
        return {"gpu": gpu_s, "ram": ram_s, "disk": disk_s}, max(gpu_s, ram_s, disk_s + last_s)

    def prefill(
        self, counts: Sequence[int], tokens: int, gpu_share: float, disk_share: float
    ) -> PrefillPrediction:
        """A prompt that goes through in one chunk.

        Args:
            counts: tokens of each expert that it uses in a layer.
            tokens: of the prompt.
            gpu_share, disk_share: of the experts; the disk's are read once a layer, beside all else.
        """
        config = self.config
        ordered = sorted(counts, reverse=True)
        resident = round(gpu_share * len(ordered))  # any of them: what is resident is not what a prompt needs
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
    """A prompt: the MoE layers, which are nearly all of it. `layer_` figures are the floor of one layer."""

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

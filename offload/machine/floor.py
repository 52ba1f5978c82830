"""The floor: the least time of a token or a prompt, from bytes and operations over measured rates.

For one token (docs/architecture.md, "The floor"):
`t = max(backbone / B_hbm + hits / B_hbm + misses / (B_cpu + B_pcie), cold / B_nvme)`.
For a prompt, in each layer: the longer of bytes over `B_pcie + share of B_cpu` and operations over rate.
All bandwidths are measured on the box, reading only. Times are in seconds, rates in 1e9 bytes or 1e12
operations per second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from moebox.config import ModelConfig
from moebox.units import GIGA, TERA

_FP32 = ("norm.weight", "mlp.gate.weight", "e_score_correction_bias")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of the box; 0 where the box lacks the part, or where it was not measured.

    Attributes:
        ram_gbps: RAM read by the thread pool, without other traffic.
        hbm_gbps: GPU memory, reading only.
        hbm_copy_gbps: GPU memory, a copy's reads and writes added up.
        pcie_gbps, pcie_down_gbps: uploads from pinned memory, and downloads, each without other traffic.
        ram_beside_gbps, pcie_beside_gbps: RAM read by the pool, and uploads, both at the same time.
        nvme_gbps: the drives.
        cpu_tflops: the thread pool's experts, for many tokens.
        gpu_tflops: bf16 matrix products on the GPU.
    """

    ram_gbps: float
    hbm_gbps: float = 0.0
    hbm_copy_gbps: float = 0.0
    pcie_gbps: float = 0.0
    pcie_down_gbps: float = 0.0
    ram_beside_gbps: float = 0.0
    pcie_beside_gbps: float = 0.0
    nvme_gbps: float = 0.0
    cpu_tflops: float = 0.0
    gpu_tflops: float = 0.0

    @property
    def has_gpu(self) -> bool:
        """Whether GPU memory was measured."""
        return self.hbm_gbps > 0

    @property
    def fast_gbps(self) -> float:
        """Bandwidth of the memory that has the backbone: GPU memory, by its better figure, or RAM."""
        return max(self.hbm_gbps, self.hbm_copy_gbps) or self.ram_gbps

    @property
    def both_roads_gbps(self) -> float:
        """B_cpu + B_pcie, each measured alone: the floor's divisor. Together the roads may reach less."""
        return self.ram_gbps + self.pcie_gbps

    @property
    def together_gbps(self) -> float:
        """B_cpu + B_pcie, measured at the same time; where that was not measured, `both_roads_gbps`."""
        return self.ram_beside_gbps + self.pcie_beside_gbps or self.both_roads_gbps

    def to_dict(self) -> dict[str, float]:
        """All figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one token reads.

    Attributes:
        backbone: of the backbone.
        hits: of resident experts.
        ram_misses: of experts in RAM.
        nvme_misses: of experts on a drive.
    """

    backbone: float
    hits: float
    ram_misses: float
    nvme_misses: float = 0.0

    def scaled(self, factor: float) -> DecodeBytes:
        """All parts times `factor`."""
        parts = (self.backbone, self.hits, self.ram_misses, self.nvme_misses)
        return DecodeBytes(*(factor * part for part in parts))


@dataclass(frozen=True)
class DecodeFloor:
    """The least time of one token, and its parts.

    Attributes:
        seconds: `max(backbone_s + hits_s + misses_s, nvme_s)`.
        backbone_s, hits_s, misses_s, nvme_s: time to read each part of `DecodeBytes`.
        together_s: `seconds` with the bandwidths of both roads measured at the same time, which a perfect
            split could reach.
    """

    seconds: float
    backbone_s: float
    hits_s: float
    misses_s: float
    nvme_s: float
    together_s: float


def decode_floor(moved: DecodeBytes, ceilings: Ceilings) -> DecodeFloor:
    """The floor of one token, or of one layer of it."""
    fast = ceilings.fast_gbps * GIGA
    backbone_s, hits_s = moved.backbone / fast, moved.hits / fast
    misses_s = _over(moved.ram_misses, ceilings.both_roads_gbps)
    nvme_s = _over(moved.nvme_misses, ceilings.nvme_gbps)
    together_s = backbone_s + hits_s + _over(moved.ram_misses, ceilings.together_gbps)
    return DecodeFloor(
        max(backbone_s + hits_s + misses_s, nvme_s),
        backbone_s,
        hits_s,
        misses_s,
        nvme_s,
        max(together_s, nvme_s),
    )


@dataclass(frozen=True)
class PrefillFloor:
    """The least time of one layer of a chunk.

    Attributes:
        seconds: the longer of moving and computing; without a GPU their sum.
        moving_s: time in which the missing experts are computed by the CPU or uploaded.
        computing_s: time of the GPU's operations, with those of uploaded experts; without a GPU, of all
            operations but the experts'.
        cpu_experts: missing experts for the CPU in the split with the least `moving_s`; one expert may be
            split.
    """

    seconds: float
    moving_s: float
    computing_s: float
    cpu_experts: float


def prefill_floor(
    counts: Sequence[int], expert_bytes: int, expert_flops: float, other_flops: float, ceilings: Ceilings
) -> PrefillFloor:
    """The floor of one layer: both roads take missing experts, while the GPU computes everything else.

    The experts with fewest tokens go to the CPU, each in `max(bytes / B_cpu, flops / F_cpu)`; the others are
    uploaded at B_pcie. `moving_s` is least where both roads end at the same time. Without a GPU the CPU
    computes all experts and everything else.

    Args:
        counts: tokens of each missing expert.
        expert_bytes: bytes of one expert.
        expert_flops: operations of one expert for one token.
        other_flops: operations of the rest of the layer, resident experts included.
        ceilings: `gpu_tflops` and `cpu_tflops` of 0 leave that bound out.
    """
    cpu_s = [_cpu_seconds(count, expert_bytes, expert_flops, ceilings) for count in sorted(counts)]
    if not ceilings.has_gpu:
        computing_s = _over(other_flops, ceilings.cpu_tflops, TERA)
        return PrefillFloor(sum(cpu_s) + computing_s, sum(cpu_s), computing_s, len(cpu_s))
    moving_s, cpu_experts = _split(cpu_s, expert_bytes / (ceilings.pcie_gbps * GIGA))
    uploaded = sorted(counts)[int(cpu_experts) :]
    computing_s = _over(other_flops + expert_flops * sum(uploaded), ceilings.gpu_tflops, TERA)
    return PrefillFloor(max(moving_s, computing_s), moving_s, computing_s, cpu_experts)


def _split(cpu_s: list[float], upload_s: float) -> tuple[float, float]:
    """Time and place at which the CPU, from the front, and uploads, from the back, meet."""
    spent = 0.0
    for done, seconds in enumerate(cpu_s):
        left = len(cpu_s) - done
        if spent + seconds >= (left - 1) * upload_s:
            # They meet within this expert: the CPU computes a share x of it, the rest is uploaded.
            x = min(max((left * upload_s - spent) / (seconds + upload_s), 0.0), 1.0)
            return spent + x * seconds, done + x
        spent += seconds
    return spent, float(len(cpu_s))


def _cpu_seconds(count: int, expert_bytes: int, expert_flops: float, ceilings: Ceilings) -> float:
    read = expert_bytes / (ceilings.ram_gbps * GIGA)
    return max(read, _over(count * expert_flops, ceilings.cpu_tflops, TERA))


def _over(amount: float, rate: float, unit: float = GIGA) -> float:
    return amount / (rate * unit) if rate else 0.0


def expert_flops(config: ModelConfig) -> float:
    """Operations of one routed expert for one token: a multiplication and an addition for each weight."""
    return 2.0 * sum(rows * columns for rows, columns in config.expert_shapes().values())


@dataclass(frozen=True)
class BackboneBytes:
    """Bytes that a token reads of the backbone.

    Attributes:
        moe_layer: of one MoE layer.
        dense_layers: of all dense layers together.
        head: of the final norm and the head.
    """

    moe_layer: float
    dense_layers: float
    head: float

    def token(self, moe_layers: int) -> float:
        """Bytes of a whole token."""
        return self.moe_layer * moe_layers + self.dense_layers + self.head


def backbone_bytes(config: ModelConfig, item_bytes: int = 2) -> BackboneBytes:
    """Bytes that a token reads of the backbone, where matrices take `item_bytes` for each element.

    Routers and norms are fp32. The one row that a token reads of the embedding is left out.
    """
    moe_layer = dense_layers = head = 0.0
    for name, shape in config.backbone_shapes().items():
        nbytes = math.prod(shape) * (4 if name.endswith(_FP32) else item_bytes)
        layer = _LAYER.search(name)
        if layer is None:
            head += 0 if name.endswith("embed_tokens.weight") else nbytes
        elif int(layer.group(1)) < config.first_k_dense_replace:
            dense_layers += nbytes
        elif int(layer.group(1)) == config.first_k_dense_replace:
            moe_layer += nbytes
    return BackboneBytes(moe_layer, dense_layers, head)


def layer_flops(config: ModelConfig, tokens: int, cached: int = 0) -> float:
    """Operations of an MoE layer without its routed experts, for `tokens` that follow `cached` others."""
    stem = config.layer_name(config.first_k_dense_replace) + "."
    shapes = [shape for name, shape in config.backbone_shapes().items() if name.startswith(stem)]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    pairs = tokens * cached + tokens * (tokens + 1) / 2
    per_pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2.0 * (tokens * matrices + pairs * per_pair)

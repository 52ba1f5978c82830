"""The floor: how fast a token or a prompt could be, from bytes over measured bandwidths.

For one token (docs/architecture.md, "The floor"):
`t = backbone/B_hbm + hits/B_hbm + misses/(B_cpu + B_pcie)`, and no faster than `nvme/B_nvme`.
For a prompt, per layer: bytes over `B_pcie + share of B_cpu`, or operations over rate, whichever is longer.
All bandwidths are measured on the box, reading only. Bytes are bytes, rates 1e9 bytes or 1e12 operations per
second, times seconds.
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
    """What the box can do, measured; 0 is a part that the box lacks or that was not measured.

    Attributes:
        ram_gbps: RAM read by the thread pool alone.
        hbm_gbps: GPU memory, reading only.
        hbm_copy_gbps: GPU memory, a copy's reads and writes together.
        pcie_gbps, pcie_down_gbps: upload from pinned memory alone, and the way back alone.
        ram_beside_gbps, pcie_beside_gbps: both at the same time.
        nvme_gbps: the disk.
        cpu_tflops: the pool's rate for many tokens.
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
        """Where the backbone lies: GPU memory by its better figure, or RAM."""
        return max(self.hbm_gbps, self.hbm_copy_gbps) or self.ram_gbps

    @property
    def both_roads_gbps(self) -> float:
        """B_cpu + B_pcie, each alone: what the floor divides by. Together they may do less."""
        return self.ram_gbps + self.pcie_gbps

    @property
    def together_gbps(self) -> float:
        """Both roads measured at the same time; with one road only, that one."""
        return self.ram_beside_gbps + self.pcie_beside_gbps or self.both_roads_gbps

    def to_dict(self) -> dict[str, float]:
        """All figures by name."""
        return asdict(self)


@dataclass(frozen=True)
class DecodeBytes:
    """What one token moves: backbone read, experts resident beside it, experts in RAM, experts on disk."""

    backbone: float
    hits: float
    ram_misses: float
    nvme_misses: float = 0.0

    def scaled(self, factor: float) -> DecodeBytes:
        """As many times as much of each."""
        parts = (self.backbone, self.hits, self.ram_misses, self.nvme_misses)
        return DecodeBytes(*(factor * part for part in parts))


@dataclass(frozen=True)
class DecodeFloor:
    """Seconds that one token takes at least, and what they are made of.

    `together_s` is the same with the roads' bandwidths measured at the same time: what a perfect split could
    reach on this box. The floor itself takes each road alone.
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
    """Seconds that one layer of a chunk takes at least: the longer of moving bytes and computing.

    `cpu_experts` of the missing experts go to the CPU in the split that makes `moving_s` shortest, which may
    cut through one expert.
    """

    seconds: float
    moving_s: float
    computing_s: float
    cpu_experts: float


def prefill_floor(
    counts: Sequence[int], expert_bytes: int, expert_flops: float, other_flops: float, ceilings: Ceilings
) -> PrefillFloor:
    """One layer: missing experts on both roads at once, everything else computed meanwhile.

    The experts with fewest tokens go to the CPU, each at `max(bytes / B_cpu, flops / F_cpu)`; the others are
    uploaded at B_pcie. Where both would finish together lies the floor of moving. Without a GPU the CPU takes
    all of them and everything else.

    Args:
        counts: tokens of each missing expert.
        expert_bytes: bytes of one expert.
        expert_flops: operations of one expert for one token.
        other_flops: operations of the rest of the layer, with experts that are resident.
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
    """The CPU works from the front, uploads from the back: when and where they meet."""
    spent = 0.0
    for done, seconds in enumerate(cpu_s):
        left = len(cpu_s) - done
        if spent + seconds >= (left - 1) * upload_s:
            # They meet within this expert: x of it on the CPU, the rest is uploaded.
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
    """Operations of one routed expert for one token: a multiply and an add per weight."""
    return 2.0 * sum(rows * columns for rows, columns in config.expert_shapes().values())


@dataclass(frozen=True)
class BackboneBytes:
    """What a token reads of the backbone: in each MoE layer, in all dense layers, in final norm and head."""

    moe_layer: float
    dense_layers: float
    head: float

    def token(self, moe_layers: int) -> float:
        """Bytes of a whole token."""
        return self.moe_layer * moe_layers + self.dense_layers + self.head


def backbone_bytes(config: ModelConfig, item_bytes: int = 2) -> BackboneBytes:
    """Count a token's backbone; matrices take `item_bytes` an element, routers and norms are fp32.

    Of the embedding a token reads one row, which is left out.
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
    """Operations of an MoE layer besides its routed experts, for `tokens` that follow `cached` others."""
    stem = config.layer_name(config.first_k_dense_replace) + "."
    shapes = [shape for name, shape in config.backbone_shapes().items() if name.startswith(stem)]
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    pairs = tokens * cached + tokens * (tokens + 1) / 2
    per_pair = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2.0 * (tokens * matrices + pairs * per_pair)

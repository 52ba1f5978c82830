"""What lies where, byte by byte: the memory plan that loading obeys, laid out for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from moebox.config import ModelConfig
from moebox.instruments.plan.box import Box
from moebox.offload.memory.ram_slab import row_stride
from moebox.runtime.engine.cpu_plan import CpuPlan, plan_cpu_memory
from moebox.runtime.engine.gpu_plan import RESERVE_BYTES, GpuPlan, plan_gpu_memory

GPU, RAM, DISK = "GPU", "RAM", "disk"
BACKBONE = "backbone: attention, shared experts, dense layers, head"
STATISTICS = "router statistics"
SPARE_ROWS = "rows for experts that are being read"


@dataclass(frozen=True)
class MemoryPart:
    """Some bytes of one place; `experts` is how many experts they hold."""

    place: str
    what: str
    nbytes: int
    experts: int = 0


@dataclass(frozen=True)
class MemoryPlacement:
    """What lies on the GPU, in RAM and on the disk.

    Attributes:
        parts: all bytes that are taken, place by place.
        context: tokens of cache.
        chunk_tokens: tokens of a prompt that go through the model at once.
        keys: routed experts of the model.
        gpu_experts: experts with a slot on the GPU.
        near_experts: different experts on the GPU or in RAM, for which the disk is not read.
        backbone_bytes: as loaded.
    """

    parts: tuple[MemoryPart, ...]
    context: int
    chunk_tokens: int
    keys: int
    gpu_experts: int
    near_experts: int
    backbone_bytes: int

    @property
    def disk_experts(self) -> int:
        """Experts that only the disk has."""
        return self.keys - self.near_experts

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, with derived ones."""
        return asdict(self) | {"disk_experts": self.disk_experts}


def place_memory(
    config: ModelConfig, box: Box, context: int | None, backbone: str, dtype: torch.dtype
) -> MemoryPlacement:
    """Plan a box's memory with the planner that loading uses there.

    Raises:
        PlanError: it does not fit, with the numbers.
    """
    if not box.has_gpu:
        plan = plan_cpu_memory(config, dtype, backbone, box.ram, context, box.free_ram)
        return cpu_placement(config, plan)
    return gpu_placement(
        config,
        plan_gpu_memory(
            config,
            vram=box.vram,
            free_vram=box.free_vram,
            ram=box.ram,
            free_ram=box.free_ram,
            context=context,
        ),
    )


def gpu_placement(config: ModelConfig, plan: GpuPlan) -> MemoryPlacement:
    """The parts of a plan with a GPU; slots that are kept free for uploads count as staging."""
    keys, stride, rows = config.n_keys, row_stride(config), plan.ram_rows
    passing_bytes = (plan.slots - plan.hot) * stride
    parts = [
        *_model_parts(GPU, plan),
        MemoryPart(GPU, "staging of uploads", plan.staging_bytes + passing_bytes),
        MemoryPart(GPU, "reserve: kernels, graphs, libraries", RESERVE_BYTES),
        MemoryPart(GPU, "hot experts", plan.hot * stride, plan.hot),
        MemoryPart(RAM, STATISTICS, plan.learned_bytes),
        *_rows(plan.warm, rows - plan.warm, stride, "warm experts" if plan.exclusive else "all experts"),
        *_cold(config, plan.cold),
    ]
    return MemoryPlacement(
        tuple(parts),
        plan.context,
        plan.chunk_tokens,
        keys,
        plan.hot,
        keys - plan.cold,
        plan.backbone_bytes,
    )


def cpu_placement(config: ModelConfig, plan: CpuPlan) -> MemoryPlacement:
    """The parts of a plan without a GPU; unless all experts fit, some rows are kept free for reads."""
    top_k, rows = config.num_experts_per_tok, plan.rows
    spare = 0 if plan.experts_fit else min(top_k, rows - top_k)
    parts = [
        *_model_parts(RAM, plan),
        MemoryPart(RAM, STATISTICS, plan.learned_bytes),
        *_rows(rows - spare, spare, plan.row_bytes, "warm experts" if spare else "all experts"),
        *_cold(config, plan.n_keys - rows + spare),
    ]
    return MemoryPlacement(
        tuple(parts),
        plan.context,
        plan.chunk_tokens,
        plan.n_keys,
        0,
        rows - spare,
        plan.backbone_bytes,
    )


def _model_parts(place: str, plan: GpuPlan | CpuPlan) -> tuple[MemoryPart, ...]:
    """What lies where the backbone lies, besides experts."""
    return (
        MemoryPart(place, BACKBONE, plan.backbone_bytes),
        MemoryPart(place, f"cache for {plan.context:,} tokens", plan.kv_bytes),
        MemoryPart(
            place, f"workspace of prompts, {plan.chunk_tokens:,} tokens at once", plan.workspace_bytes
        ),
    )


def _rows(experts: int, spare: int, row_bytes: int, what: str) -> list[MemoryPart]:
    parts = [MemoryPart(RAM, what, experts * row_bytes, experts)]
    if spare > 0:
        parts.append(MemoryPart(RAM, SPARE_ROWS, spare * row_bytes))
    return parts


def _cold(config: ModelConfig, count: int) -> tuple[MemoryPart, ...]:
    return (MemoryPart(DISK, "cold experts", count * config.expert_bytes, count),) if count else ()

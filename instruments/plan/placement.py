"""What goes where, byte by byte: what the planner of CPU or GPU decides, laid out for people."""

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
SPARE_ROWS = "rows for experts that are being read"
LEARNED = "router statistics"


@dataclass(frozen=True)
class Part:
    """Some bytes in a place. `experts`: how many they hold, where they hold any."""

    place: str
    what: str
    nbytes: int
    experts: int = 0


@dataclass(frozen=True)
class Places:
    """A memory plan.

    Attributes:
        parts: every byte that is taken, place by place.
        context: tokens of cache.
        chunk_tokens: of a prompt that go through at once.
        keys: routed experts of the model.
        gpu_experts: those with a slot on the GPU.
        near_experts: different ones on the GPU or in RAM, for which the disk is not read.
        backbone_bytes: as loaded.
    """

    parts: tuple[Part, ...]
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


def place(config: ModelConfig, box: Box, context: int | None, backbone: str, dtype: torch.dtype) -> Places:
    """Share a box's memory out, as loading there would.

    Raises:
        PlanError: it does not fit, with the numbers.
    """
    if not box.has_gpu:
        plan = plan_cpu_memory(config, dtype, backbone, box.ram, context, box.free_ram)
        return cpu_places(config, plan)
    return gpu_places(
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


def gpu_places(config: ModelConfig, plan: GpuPlan) -> Places:
    """The parts of a plan with a GPU; slots that are kept free for what passes through hold no expert."""
    keys, stride, rows = config.n_keys, row_stride(config), plan.ram_rows
    passing_bytes = (plan.slots - plan.hot) * stride
    parts = [
        Part(GPU, "backbone: attention, shared experts, dense layers, head", plan.backbone_bytes),
        Part(GPU, f"cache for {plan.context:,} tokens", plan.kv_bytes),
        Part(GPU, f"workspace of prompts, {plan.chunk_tokens:,} tokens at once", plan.workspace_bytes),
        Part(GPU, "staging of uploads", plan.staging_bytes + passing_bytes),
        Part(GPU, "reserve: kernels, graphs, libraries", RESERVE_BYTES),
        Part(GPU, "hot experts", plan.hot * stride, plan.hot),
        Part(RAM, LEARNED, plan.learned_bytes),
        Part(RAM, "warm experts" if plan.exclusive else "all experts", plan.warm * stride, plan.warm),
    ]
    if plan.warm < rows:
        parts.append(Part(RAM, SPARE_ROWS, (rows - plan.warm) * stride))
    return Places(
        (*parts, *_cold(config, plan.cold)),
        plan.context,
        plan.chunk_tokens,
        keys,
        plan.hot,
        keys - plan.cold,
        plan.backbone_bytes,
    )


def cpu_places(config: ModelConfig, plan: CpuPlan) -> Places:
    """The parts of a plan without a GPU; where experts are missing, some rows are kept free for reads."""
    top_k, rows = config.num_experts_per_tok, plan.rows
    spare = 0 if plan.experts_fit else min(top_k, rows - top_k)
    parts = [
        Part(RAM, "backbone: attention, shared experts, dense layers, head", plan.backbone_bytes),
        Part(RAM, f"cache for {plan.context:,} tokens", plan.kv_bytes),
        Part(RAM, f"workspace of prompts, {plan.chunk_tokens:,} tokens at once", plan.workspace_bytes),
        Part(RAM, LEARNED, plan.learned_bytes),
        Part(RAM, "warm experts" if spare else "all experts", (rows - spare) * plan.row_bytes, rows - spare),
    ]
    if spare:
        parts.append(Part(RAM, SPARE_ROWS, spare * plan.row_bytes))
    cold = plan.n_keys - rows + spare
    return Places(
        (*parts, *_cold(config, cold)),
        plan.context,
        plan.chunk_tokens,
        plan.n_keys,
        0,
        rows - spare,
        plan.backbone_bytes,
    )


def _cold(config: ModelConfig, count: int) -> tuple[Part, ...]:
    return (Part(DISK, "cold experts", count * config.expert_bytes, count),) if count else ()

"""Whether a model fits a GPU and the RAM beside it: decided from the config, before anything is loaded.

VRAM = backbone + cache for the context + workspace of a prefill chunk + staging for uploads + reserve +
experts. RAM holds the router statistics and all experts. Where RAM is too small for all experts, an expert
lies either in RAM or in VRAM. Experts that fit neither stay on disk and are read as they are routed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.kernels.gpu.base import ROUND_PAIRS
from moebox.offload.memory.cold_reader import least_rows, spare_rows
from moebox.offload.memory.gpu_slab import RING_SLOTS
from moebox.offload.memory.ram_slab import row_stride
from moebox.runtime.engine.plan_parts import (
    BackbonePlan,
    check_budget,
    check_context,
    clamp_context,
    learned_bytes,
    ram_room_bytes,
    tokens_in_cache_share,
)
from moebox.runtime.model.compute import EXPANDED_BYTES
from moebox.runtime.model.kv_cache import bytes_per_token
from moebox.runtime.model.precision import planned_bytes
from moebox.units import gib

CHUNK_TOKENS = 8192
"""Tokens of a prompt that go through the GPU at once, where memory allows: each chunk reads every expert."""
SMALLEST_CHUNK_TOKENS = 256
WORKSPACE_SHARE = 0.1
"""Share of the memory beside backbone and cache that a chunk's intermediate values may take."""
RESERVE_BYTES = 768 << 20
"""VRAM that is left to kernels, graphs, libraries' workspaces and fragmentation."""


@dataclass(frozen=True)
class GpuPlan(BackbonePlan):
    """What a load takes of VRAM and RAM, in bytes, tokens and experts.

    Attributes:
        staging_bytes: VRAM that a prompt's uploads pass through.
        slots: experts that VRAM holds beside everything else, uploads on their way included.
        ram_rows: experts that RAM holds, reads on their way included.
        exclusive: an expert lies in RAM or in VRAM, not in both; else RAM holds the experts of VRAM, too.
        hot: experts that stay in VRAM.
        warm: experts that stay in RAM.
        cold: experts that lie on disk only.
        learned_bytes: RAM for router statistics and value models.
    """

    staging_bytes: int
    slots: int
    ram_rows: int
    exclusive: bool
    hot: int = 0
    warm: int = 0
    cold: int = 0
    learned_bytes: int = 0

    @property
    def unquantized_backbone_bytes(self) -> int:
        """The same as `backbone_bytes`: on a GPU the backbone stays bf16."""
        return self.backbone_bytes

    @property
    def fixed_bytes(self) -> int:
        """VRAM that everything but the experts takes."""
        parts = (self.backbone_bytes, self.kv_bytes, self.workspace_bytes, self.staging_bytes)
        return sum(parts) + RESERVE_BYTES


def plan_gpu_memory(
    config: ModelConfig,
    *,
    vram: int | None,
    free_vram: int,
    ram: int | None,
    free_ram: int,
    context: int | None,
) -> GpuPlan:
    """Share VRAM and RAM out.

    Args:
        vram: bytes of VRAM that the model may take; None: what is free.
        free_vram: free bytes of the device.
        ram: bytes of RAM that experts and router statistics may take; None: what is free.
        free_ram: free bytes of the machine.
        context: tokens that a conversation may hold; None: what memory allows.

    Raises:
        PlanError: with the numbers, when it does not fit.
    """
    check_context(config, context)
    check_budget("VRAM", vram, free_vram)
    check_budget("RAM", ram, free_ram)
    room = free_vram if vram is None else vram
    plan = _fixed_parts(config, room, context)
    if plan.fixed_bytes > room:
        raise PlanError(
            f"the GPU needs {gib(plan.fixed_bytes)} before the first expert ({describe_fixed(plan)}); "
            f"{'the VRAM budget is' if vram is not None else 'free are'} {gib(room)}: "
            f"{gib(plan.fixed_bytes - room)} are missing",
            "Give a larger --vram or a smaller --context, or use --device cpu.",
        )
    most = config.n_keys + config.num_experts_per_tok  # k slots stay free for uploads
    slots = min((room - plan.fixed_bytes) // row_stride(config), most)
    return _share_experts(config, plan, slots, ram_room_bytes(ram, free_ram))


def least_vram_bytes(config: ModelConfig, context: int) -> int:
    """VRAM without which a model cannot be loaded: everything but the experts, with the smallest chunks."""
    return _fixed_parts(config, 0, context).fixed_bytes


def describe_fixed(plan: GpuPlan) -> str:
    """The parts of `fixed_bytes` in words."""
    return (
        f"{plan.describe_cache()} + workspace {gib(plan.workspace_bytes)} for chunks of "
        f"{plan.chunk_tokens} + staging {gib(plan.staging_bytes)} + reserve {gib(RESERVE_BYTES)}"
    )


def _fixed_parts(config: ModelConfig, room: int, context: int | None) -> GpuPlan:
    backbone_bytes = planned_bytes(config.backbone_shapes(), torch.bfloat16, "bf16")
    per_token = bytes_per_token(config, torch.bfloat16) + 4 * config.qk_rope_head_dim  # with its rotation
    left = room - backbone_bytes - RESERVE_BYTES
    if context is None:
        context = clamp_context(config, tokens_in_cache_share(left, per_token))
    kv_bytes = context * per_token
    chunk = _chunk_tokens(config, context, int((left - kv_bytes) * WORKSPACE_SHARE))
    return GpuPlan(
        context=context,
        chunk_tokens=chunk,
        backbone_bytes=backbone_bytes,
        kv_bytes=kv_bytes,
        workspace_bytes=workspace_bytes(config, chunk, context),
        staging_bytes=RING_SLOTS * row_stride(config),
        slots=0,
        ram_rows=0,
        exclusive=False,
    )


def _chunk_tokens(config: ModelConfig, context: int, room: int) -> int:
    """The largest power of two whose workspace fits `room`, from the smallest to the largest chunk."""
    chunk = CHUNK_TOKENS
    while chunk > SMALLEST_CHUNK_TOKENS:
        if chunk < 2 * context and workspace_bytes(config, chunk, context) <= room:
            break
        chunk //= 2
    return chunk


def workspace_bytes(config: ModelConfig, chunk: int, context: int) -> int:
    """The most VRAM that a chunk's intermediate values take in any layer."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    expanded = 2 * context * heads * (3 * config.qk_head_dim + config.v_head_dim)
    # Bytes for each token: the residual before and after the layer (fp32), its norm in fp32 and in bf16; then
    # the widest of attention (queries, positional parts as complex numbers, mixed values), dense MLP (gate
    # and up, silu and product) and experts (regrouped input and two sums, beside the pairs of a round).
    queries = heads * (4 * config.qk_head_dim + 16 * config.qk_rope_head_dim + 6 * config.v_head_dim)
    widest = max(queries, 8 * config.intermediate_size, 10 * hidden)
    pairs = min(max(ROUND_PAIRS, chunk), chunk * config.num_experts_per_tok)
    per_pair = 4 * hidden + 2 * config.moe_intermediate_size
    return chunk * (16 * hidden + widest) + pairs * per_pair + min(EXPANDED_BYTES, expanded)


def _share_experts(config: ModelConfig, plan: GpuPlan, slots: int, ram_room: int) -> GpuPlan:
    keys, top_k = config.n_keys, config.num_experts_per_tok
    hot = min(max(slots - top_k, 0), keys)  # k slots are for uploads
    rows, learned = _rows(config, ram_room, residencies=1)
    if rows + hot >= keys:
        warm = keys if rows == keys else keys - hot
    else:
        rows, learned = _rows(config, ram_room, residencies=2)  # one of slots, one of rows
        _check_cold_rows(config, rows, learned)
        warm = rows - spare_rows(rows, top_k)
    return replace(
        plan,
        slots=slots,
        ram_rows=rows,
        exclusive=rows < keys,
        hot=hot,
        warm=warm,
        cold=keys - hot - warm if rows < keys else 0,
        learned_bytes=learned,
    )


def _rows(config: ModelConfig, ram_room: int, residencies: int) -> tuple[int, int]:
    """Experts that RAM holds beside router statistics and value models, and the bytes of these."""
    learned = learned_bytes(config, residencies)
    return min(max(ram_room - learned, 0) // row_stride(config), config.n_keys), learned


def _check_cold_rows(config: ModelConfig, rows: int, learned: int) -> None:
    row_bytes, least = row_stride(config), least_rows(config.num_experts_per_tok)
    if rows < least:
        raise PlanError(
            f"RAM holds {gib(rows * row_bytes)} of experts beside {gib(learned)} of router statistics; to "
            f"read others from disk, room for {least} is needed, {gib(least * row_bytes)}: "
            f"{gib((least - rows) * row_bytes)} are missing",
            "Give more --ram.",
        )

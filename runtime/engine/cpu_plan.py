"""Whether a model fits a box without a GPU: decided from the config, before anything is loaded.

RAM = backbone + cache for the context + workspace of a chunk + router statistics + experts. Experts that do
not fit stay on disk and are read as they are routed (`offload/memory/ram_cache.py`).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from dataclasses import dataclass

import psutil
import torch

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.kernels.cpu import BATCH_PAIRS, PART_TOKENS
from moebox.offload.machine.hardware import available_ram_bytes
from moebox.offload.memory.ram_slab import row_stride
from moebox.runtime.engine.plan_parts import (
    SMALLEST_CONTEXT,
    BackbonePlan,
    check_budget,
    check_context,
    clamp_context,
    learned_bytes,
    ram_room_bytes,
    tokens_in_cache_share,
)
from moebox.runtime.model.compute import CPU_SCORES_BYTES
from moebox.runtime.model.kv_cache import bytes_per_token
from moebox.runtime.model.precision import planned_bytes
from moebox.units import gib

CHUNK_TOKENS = PART_TOKENS
"""Tokens of a prompt that go through the CPU at once: limits the memory that a chunk takes, and the work that
an interrupt loses."""
LARGEST_CHUNK_TOKENS = 8 * PART_TOKENS
"""The limit of a chunk where experts are on disk, since every chunk reads them again. A large chunk is
computed in parts of `PART_TOKENS`, as smaller ones are."""
CHUNK_SHARE = 0.05
"""Share of the experts' memory that a chunk may take for its values between two layers, in addition to those
of its first part."""
LARGE_BLOCK_BYTES = 4 << 20
"""Freed blocks of this size go back to the system at once: `return_large_blocks`."""
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class CpuPlan(BackbonePlan):
    """What a load takes of RAM, in bytes, tokens and experts.

    Attributes:
        unquantized_backbone_bytes: the backbone in the model's dtype, without int8 or nf4.
        learned_bytes: router statistics and value model.
        rows: experts that RAM holds.
        n_keys: experts of the model.
        row_bytes: RAM of one expert.
        program_bytes: RAM that the process held before; it comes on top of the budget.
    """

    unquantized_backbone_bytes: int
    learned_bytes: int
    rows: int
    n_keys: int
    row_bytes: int
    program_bytes: int

    @property
    def experts_bytes(self) -> int:
        """RAM of the experts' rows."""
        return self.rows * self.row_bytes

    @property
    def experts_fit(self) -> bool:
        """Whether all experts stay in RAM."""
        return self.rows == self.n_keys

    @property
    def planned_bytes(self) -> int:
        """RAM that the model takes in all: what a budget must hold."""
        parts = (self.backbone_bytes, self.kv_bytes, self.workspace_bytes, self.learned_bytes)
        return sum(parts) + self.experts_bytes


def plan_cpu_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    backbone: str,
    ram: int | None,
    context: int | None,
    free_ram: int | None = None,
) -> CpuPlan:
    """Share RAM out.

    Args:
        dtype: the backbone's, before int8 or nf4.
        backbone: one of `precision.PRECISIONS`.
        ram: bytes that the model may take in all; None: what is free.
        context: tokens that a conversation may hold; None: what memory allows.
        free_ram: free bytes of the machine; None: those of this machine, now.

    Raises:
        PlanError: with the numbers, when it does not fit.
    """
    check_context(config, context)
    available = available_ram_bytes() if free_ram is None else free_ram
    check_budget("RAM", ram, available)
    room = ram_room_bytes(ram, available)
    smallest = context or min(SMALLEST_CONTEXT, config.max_position_embeddings)
    least = _plan(config, dtype, backbone, smallest, least_ram_rows(config))
    if least.planned_bytes > room:
        raise PlanError(
            f"the model needs {gib(least.planned_bytes)} ({describe(least)}); "
            f"{'the RAM budget is' if ram is not None else 'free memory is'} {gib(room)}: "
            f"{gib(least.planned_bytes - room)} are missing",
            "Give a larger RAM budget or a smaller context, or load the backbone as int8 or nf4.",
        )
    tokens = context or _affordable_context(config, dtype, backbone, room)

    def plan(rows: int) -> CpuPlan:
        return _plan(config, dtype, backbone, tokens, rows)

    whole = plan(config.n_keys)
    if whole.planned_bytes <= room:
        return whole
    return plan(bisect_right(range(whole.rows), room, key=lambda rows: plan(rows).planned_bytes) - 1)


def least_ram_rows(config: ModelConfig) -> int:
    """Experts that RAM must hold at least, 2 k: a layer computes k of them while k others are read."""
    return min(2 * config.num_experts_per_tok, config.n_keys)


def budget_for_share(
    config: ModelConfig, dtype: torch.dtype, backbone: str, context: int, share: float
) -> int:
    """The least `ram`, in bytes, with which a share (0 to 1) of all experts has a row."""
    rows = max(least_ram_rows(config), round(share * config.n_keys))
    return _plan(config, dtype, backbone, context, rows).planned_bytes


def _plan(config: ModelConfig, dtype: torch.dtype, backbone: str, context: int, rows: int) -> CpuPlan:
    shapes, chunk = config.backbone_shapes(), _chunk_tokens(config, context, rows)
    return CpuPlan(
        backbone_bytes=planned_bytes(shapes, dtype, backbone),
        unquantized_backbone_bytes=planned_bytes(shapes, dtype, "bf16"),
        context=context,
        kv_bytes=context * bytes_per_token(config, dtype),
        chunk_tokens=chunk,
        workspace_bytes=workspace_bytes(config, chunk, context),
        learned_bytes=learned_bytes(config, int(rows < config.n_keys)),
        rows=rows,
        n_keys=config.n_keys,
        row_bytes=row_stride(config),
        program_bytes=int(psutil.Process().memory_info().rss),
    )


def _chunk_tokens(config: ModelConfig, context: int, rows: int) -> int:
    """The smallest chunk; where experts are on disk, doubled while context and `CHUNK_SHARE` allow."""
    chunk = CHUNK_TOKENS
    room = CHUNK_SHARE * rows * row_stride(config)
    while rows < config.n_keys and 2 * chunk <= min(context, LARGEST_CHUNK_TOKENS):
        if (2 * chunk - PART_TOKENS) * _between_layers(config) > room:
            break
        chunk *= 2
    return chunk


def _between_layers(config: ModelConfig) -> int:
    """Bytes that a token takes between two layers: residual, norm, experts' sum and next norm, in fp32."""
    return 16 * config.hidden_size


def _affordable_context(config: ModelConfig, dtype: torch.dtype, backbone: str, room: int) -> int:
    """Tokens for which there is room beside all experts; where not all fit, those of the cache's share."""
    smallest = min(SMALLEST_CONTEXT, config.max_position_embeddings)
    without, with_one = (_plan(config, dtype, backbone, tokens, 0).planned_bytes for tokens in (0, 1))
    per_token, left = with_one - without, room - without
    beside_all = (left - config.n_keys * row_stride(config)) // per_token
    beside_least = (left - least_ram_rows(config) * row_stride(config)) // per_token
    share = min(tokens_in_cache_share(left, per_token), beside_least)
    return clamp_context(config, beside_all if beside_all >= smallest else share)


def workspace_bytes(config: ModelConfig, chunk: int, context: int) -> int:
    """The most RAM that a chunk's intermediate values take in any layer, computed in fp32."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    # Bytes for each token of a part: what is added to the residual; then the wider of attention (queries,
    # positional parts as complex numbers, mixed values) and the dense MLP.
    queries = heads * (8 * config.qk_head_dim + 16 * config.qk_rope_head_dim + 8 * config.v_head_dim)
    widest = max(queries, 12 * config.intermediate_size)
    # For the whole context one head's keys and values and the latents, in fp32; then four times the scores.
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    attention = 4 * context * (latent + 3 * config.qk_head_dim + config.v_head_dim) + 4 * CPU_SCORES_BYTES
    part = min(chunk, PART_TOKENS)
    pairs = min(BATCH_PAIRS, part * config.num_experts_per_tok)
    kernel = pairs * (4 * hidden + 8 * config.moe_intermediate_size)
    return chunk * _between_layers(config) + part * (4 * hidden + widest) + attention + kernel


def describe(plan: CpuPlan) -> str:
    """The parts of `planned_bytes` in words."""
    return (
        f"{plan.describe_cache()} + workspace {gib(plan.workspace_bytes)} + "
        f"router statistics {gib(plan.learned_bytes)} + "
        f"{plan.rows} of {plan.n_keys} experts {gib(plan.experts_bytes)}"
    )


def return_large_blocks() -> None:
    """Have glibc give freed blocks of `LARGE_BLOCK_BYTES` back to the system at once.

    By default glibc keeps freed blocks of up to 32 MiB, and a chunk's values fragment its heap: a model with
    340 MB of experts took 1.7 times the planned workspace. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)

"""What a box without a GPU holds: backbone, cache and a chunk's values, and experts in all RAM that is left.

Experts beyond it stay on disk and are read as they are routed (`offload/memory/ram_cache.py`).
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
from moebox.offload.routing.counts import RECENT_TOKENS
from moebox.runtime.model.compute import CPU_SCORES_BYTES
from moebox.runtime.model.kv_cache import bytes_per_token
from moebox.runtime.model.precision import planned_bytes
from moebox.units import gib

CHUNK_TOKENS = PART_TOKENS
"""Tokens of a prompt that go through the CPU at once: bounds memory, and how much an interrupt loses."""
LARGEST_CHUNK_TOKENS = 8 * PART_TOKENS
"""Where experts are on disk: each chunk reads them again. It is computed in parts, as smaller ones are."""
CHUNK_SHARE = 0.05
"""Of the memory for experts, what the values between layers of a chunk may take beyond the first part's."""
SMALLEST_CONTEXT = 512
"""Tokens of cache that a plan must have room for, unless the model or the caller asks for less."""
SYSTEM_SHARE = 0.05
"""Part of the free memory that is left to the system."""
CACHE_SHARE = 0.15
"""Part of the memory beside the backbone that the cache may take where experts have to stay on disk and no
context was asked for."""
LARGE_BLOCK_BYTES = 4 << 20
"""See `return_large_blocks`."""
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class MemoryPlan:
    """What a load takes of RAM, in bytes, tokens and experts.

    Attributes:
        backbone_bytes, unquantized_backbone_bytes: as loaded, and in the model's dtype.
        context: tokens that a conversation may hold.
        kv_bytes: cache of one that fills it.
        chunk_tokens: of a prompt, that go through the model together.
        workspace_bytes: values of a chunk on its way, at most.
        learned_bytes: what is known of the router.
        rows: experts that RAM holds.
        n_keys: experts there are.
        row_bytes: of one.
        program_bytes: what the process held before; it comes on top of the budget.
    """

    backbone_bytes: int
    unquantized_backbone_bytes: int
    context: int
    kv_bytes: int
    chunk_tokens: int
    workspace_bytes: int
    learned_bytes: int
    rows: int
    n_keys: int
    row_bytes: int
    program_bytes: int

    @property
    def experts_bytes(self) -> int:
        """The experts' rows in RAM."""
        return self.rows * self.row_bytes

    @property
    def experts_fit(self) -> bool:
        """Whether all experts stay in RAM."""
        return self.rows == self.n_keys

    @property
    def planned_bytes(self) -> int:
        """All that the model takes: what a budget must hold."""
        parts = (self.backbone_bytes, self.kv_bytes, self.workspace_bytes, self.learned_bytes)
        return sum(parts) + self.experts_bytes


def plan_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    backbone: str,
    ram: int | None,
    context: int | None,
    free_ram: int | None = None,
) -> MemoryPlan:
    """Share RAM out; sizes in bytes, `context` in tokens, None for what is free or reasonable.

    Args:
        ram: budget of all that the model takes.
        free_ram: what the machine has to give; None: this one, now.

    Raises:
        PlanError: with the numbers, when it does not fit.
    """
    check_context(config, context)
    available = available_ram_bytes() if free_ram is None else free_ram
    if ram is not None and ram > available:
        raise PlanError(
            f"RAM budget of {gib(ram)}, but only {gib(available)} are free", "Give a smaller budget."
        )
    room = int(available * (1 - SYSTEM_SHARE)) if ram is None else ram
    smallest = context or min(SMALLEST_CONTEXT, config.max_position_embeddings)
    least = _plan(config, dtype, backbone, smallest, least_rows(config))
    if least.planned_bytes > room:
        raise PlanError(
            f"the model needs {gib(least.planned_bytes)} ({describe(least)}); "
            f"{'the RAM budget is' if ram is not None else 'free memory is'} {gib(room)}: "
            f"{gib(least.planned_bytes - room)} are missing",
            "Give a larger RAM budget or a smaller context, or load the backbone as int8 or nf4.",
        )
    tokens = context or _affordable_context(config, dtype, backbone, room)

    def plan(rows: int) -> MemoryPlan:
        return _plan(config, dtype, backbone, tokens, rows)

    whole = plan(config.n_keys)
    if whole.planned_bytes <= room:
        return whole
    return plan(bisect_right(range(whole.rows), room, key=lambda rows: plan(rows).planned_bytes) - 1)


def least_rows(config: ModelConfig) -> int:
    """Experts that RAM must hold at least: those of one token's layer, and as many again on their way."""
    return min(2 * config.num_experts_per_tok, config.n_keys)


def budget_for_share(
    config: ModelConfig, dtype: torch.dtype, backbone: str, context: int, share: float
) -> int:
    """The least `ram` with which a share (0 to 1) of all experts has a row."""
    rows = max(least_rows(config), round(share * config.n_keys))
    return _plan(config, dtype, backbone, context, rows).planned_bytes


def _plan(config: ModelConfig, dtype: torch.dtype, backbone: str, context: int, rows: int) -> MemoryPlan:
    shapes, chunk = config.backbone_shapes(), _chunk_tokens(config, context, rows)
    return MemoryPlan(
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
    """Where experts are on disk the largest power of two that memory and context are worth."""
    chunk = CHUNK_TOKENS
    room = CHUNK_SHARE * rows * row_stride(config)
    while rows < config.n_keys and 2 * chunk <= min(context, LARGEST_CHUNK_TOKENS):
        if (2 * chunk - PART_TOKENS) * _between_layers(config) > room:
            break
        chunk *= 2
    return chunk


def _between_layers(config: ModelConfig) -> int:
    """Bytes that a token has in its chunk: residual, norm and experts' sum in fp32, and the next norm."""
    return 16 * config.hidden_size


def _affordable_context(config: ModelConfig, dtype: torch.dtype, backbone: str, room: int) -> int:
    """What is left beside all experts; where they do not fit, a share of the memory."""
    smallest = min(SMALLEST_CONTEXT, config.max_position_embeddings)
    without, with_one = (_plan(config, dtype, backbone, tokens, 0).planned_bytes for tokens in (0, 1))
    per_token, left = with_one - without, room - without
    beside_all = (left - config.n_keys * row_stride(config)) // per_token
    beside_least = (left - least_rows(config) * row_stride(config)) // per_token
    share = min(int(left * CACHE_SHARE) // per_token, beside_least)
    affordable = beside_all if beside_all >= smallest else max(smallest, share)
    return min(config.max_position_embeddings, affordable)


def workspace_bytes(config: ModelConfig, chunk: int, context: int) -> int:
    """RAM that a chunk's intermediate values take at most, in a layer of any kind, computed in fp32."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    # Bytes a token of a part: what is added to the residual; then the widest of attention (queries,
    # positional parts through complex numbers, mixed values) and dense MLP.
    queries = heads * (8 * config.qk_head_dim + 16 * config.qk_rope_head_dim + 8 * config.v_head_dim)
    widest = max(queries, 12 * config.intermediate_size)
    # A head's keys and values for all of the context, its latents in fp32, and scores on their way.
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    attention = 4 * context * (latent + 3 * config.qk_head_dim + config.v_head_dim) + 4 * CPU_SCORES_BYTES
    part = min(chunk, PART_TOKENS)
    pairs = min(BATCH_PAIRS, part * config.num_experts_per_tok)
    kernel = pairs * (4 * hidden + 8 * config.moe_intermediate_size)
    return chunk * _between_layers(config) + part * (4 * hidden + widest) + attention + kernel


def learned_bytes(config: ModelConfig, residencies: int) -> int:
    """RAM for what is learned of the router, bytes: old and new statistics (`offload/routing/counts.py`) and
    the value model of each residency (`offload/csrc/residency/value_model.h`)."""
    layers, experts = len(config.moe_layers), config.n_routed_experts
    uses, pairs = 16 * layers * experts, 4 * (layers - 1) * experts**2
    recent = 2 * RECENT_TOKENS * layers * config.num_experts_per_tok
    return 2 * (uses + pairs + recent) + residencies * 12 * layers * experts**2


def describe(plan: MemoryPlan) -> str:
    """The parts of a plan in words."""
    return (
        f"backbone {gib(plan.backbone_bytes)} + cache {gib(plan.kv_bytes)} for {plan.context} tokens + "
        f"workspace {gib(plan.workspace_bytes)} + router statistics {gib(plan.learned_bytes)} + "
        f"{plan.rows} of {plan.n_keys} experts {gib(plan.experts_bytes)}"
    )


def return_large_blocks() -> None:
    """Have glibc give freed blocks of `LARGE_BLOCK_BYTES` back to the system at once.

    Otherwise it keeps blocks of up to 32 MiB, and a chunk's values leave the heap in pieces: 1.7 times the
    workspace in a model of 340 MB of experts. Other C libraries are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def check_context(config: ModelConfig, context: int | None) -> None:
    """Raise `PlanError` where more tokens, or fewer than one, are asked for than the model goes to."""
    if context is not None and not 1 <= context <= config.max_position_embeddings:
        raise PlanError(
            f"context of {context} tokens; the model goes from 1 to {config.max_position_embeddings}"
        )

"""Who runs the model's passes: the engine's one question, and the answer on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.kernels import cpu
from moebox.offload.checkpoint import Checkpoint
from moebox.offload.experts import open_experts, prefault
from moebox.runtime.backbone import planned_bytes
from moebox.runtime.kv_cache import KVCache
from moebox.runtime.linear import native_bf16
from moebox.runtime.loader import LoadOptions, load_backbone
from moebox.runtime.memory import MemoryPlan, plan_memory
from moebox.runtime.model import KimiK2

CHUNK_TOKENS = 1024
"""Tokens of a prompt that go through the CPU at once: bounds memory, and how much an interrupt loses."""

MULTITHREADED_FROM = 1 << 22
"""Tokens times hidden_size squared from which torch uses all threads; the experts' own pool always does."""


SMALL_BACKBONE_BYTES = 64 << 20


class Runner(Protocol):
    """Runs a loaded model, wherever its weights are.

    Attributes:
        model: the backbone's modules.
        dtype: what they compute in.
        chunk_tokens: tokens that go through the model at once.
    """

    model: KimiK2
    dtype: torch.dtype
    chunk_tokens: int

    def new_cache(self, context: int) -> KVCache:
        """An empty cache for up to `context` tokens.

        Raises:
            RequestError: there is no memory left for it.
        """
        ...

    def forward(
        self,
        token_ids: list[int],
        cache: KVCache,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run tokens that follow the cache, and commit them to it when they are done.

        Args:
            token_ids: 1 to `chunk_tokens` ids.
            cache: made by `new_cache`.
            last_only: only the last token's logits are wanted.
            between_layers: called before each layer, or before the only step of a runner that cannot stop
                between layers; what it raises ends the pass.

        Returns:
            fp32 [T, vocab_size] on the CPU, or [1, vocab_size] of the last.
        """
        ...


class CpuRunner:
    """Everything on the CPU: the backbone through torch, the experts through the pool of the kernels."""

    def __init__(self, model: KimiK2, pool: cpu.ThreadPool, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.chunk_tokens = CHUNK_TOKENS
        self._pool = pool

    def new_cache(self, context: int) -> KVCache:
        """See `Runner.new_cache`; memory is taken as tokens come."""
        return KVCache(self.model.config, self.dtype, context)

    def forward(
        self,
        token_ids: list[int],
        cache: KVCache,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        """See `Runner.forward`."""
        # Waking torch's threads for a small product takes longer than the product.
        large = len(token_ids) * self.model.config.hidden_size**2 >= MULTITHREADED_FROM
        torch.set_num_threads(self._pool.threads if large else 1)
        hidden = self.model(token_ids, cache, between_layers)
        return self.model.logits(hidden[-1:] if last_only else hidden)


def load_on_cpu(checkpoint: Checkpoint, options: LoadOptions) -> tuple[Runner, MemoryPlan]:
    """Load a checkpoint that was checked into RAM; see `Engine.load`."""
    if options.vram:
        raise PlanError(
            f"vram = {options.vram} bytes: the CPU was asked to compute, or torch sees no GPU",
            "Leave the VRAM budget out.",
        )
    config = checkpoint.config
    dtype = options.dtype or default_dtype(config, options.backbone)
    plan = plan_memory(config, dtype, options.backbone, options.ram, options.context)
    pool = cpu.ThreadPool(options.threads)
    experts = open_experts(checkpoint, pool)
    model = load_backbone(checkpoint, experts, dtype, options.backbone, options.progress)
    if plan.experts_fit:
        prefault(checkpoint, options.progress)
    return CpuRunner(model, pool, dtype), plan


def default_dtype(config: ModelConfig, backbone: str) -> torch.dtype:
    """bf16; fp32 for a small backbone on a CPU without bf16 instructions: it has no values to convert."""
    small = planned_bytes(config.backbone_shapes(), torch.float32, "bf16") <= SMALL_BACKBONE_BYTES
    return torch.float32 if small and backbone == "bf16" and not native_bf16() else torch.bfloat16

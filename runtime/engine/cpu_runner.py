"""Who runs the model's passes: the engine's one question, and the answer on the CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.errors import PlanError
from moebox.kernels import cpu
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.disk.store import ExpertStore
from moebox.offload.prefetch.prefetch import Prefetcher
from moebox.offload.traffic import Traffic
from moebox.runtime.engine.base import Runner
from moebox.runtime.engine.cpu_plan import CHUNK_TOKENS, MemoryPlan, plan_memory, return_large_blocks
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.engine.recording import open_recording
from moebox.runtime.engine.router_lookahead import GateLookahead
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.kv_cache import KVCache
from moebox.runtime.model.linear import native_bf16
from moebox.runtime.model.loader import load_backbone
from moebox.runtime.model.mlp import joined
from moebox.runtime.model.precision import planned_bytes

MULTITHREADED_FROM = 1 << 22
"""Tokens times hidden_size squared from which torch uses all threads; the experts' own pool always does."""


SMALL_BACKBONE_BYTES = 64 << 20


class CpuRunner:
    """Everything on the CPU: the backbone through torch, the experts through the pool of the kernels.

    Args:
        model: has its experts.
        pool: computes them.
        dtype: of the backbone.
        chunk_tokens: tokens that go through the model at once.
        resources: what `close` closes; the runner's end does, too.
        recorded: closed by `close` only, before the others.
    """

    def __init__(
        self,
        model: KimiK2,
        pool: cpu.ThreadPool,
        dtype: torch.dtype,
        chunk_tokens: int = CHUNK_TOKENS,
        resources: ExitStack | None = None,
        recorded: ExitStack | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.chunk_tokens = chunk_tokens
        self._pool = pool
        self._resources, self._recorded = resources or ExitStack(), recorded or ExitStack()
        weakref.finalize(self, self._resources.close)

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
        part = min(len(token_ids), self.model.processor.part_tokens)
        rest = len(token_ids) % part
        if rest and self._threads(rest) != self._threads(part):  # they round as many threads do
            parts = (token_ids[:-rest], token_ids[-rest:])
            logits = [
                self.forward(own, cache, last_only=last_only, between_layers=between_layers) for own in parts
            ]
            return logits[-1] if last_only else joined(logits)
        torch.set_num_threads(self._threads(part))
        hidden = self.model(token_ids, cache, between_layers)
        if last_only:
            return self.model.logits(hidden[-1:])
        return joined([self.model.logits(rows) for rows in torch.split(hidden, part)])

    def _threads(self, count: int) -> int:
        """Of torch: waking them for a small product takes longer than the product."""
        large = count * self.model.config.hidden_size**2 >= MULTITHREADED_FROM
        return self._pool.threads if large else 1

    def traffic(self) -> Traffic:
        """See `Runner.traffic`."""
        return self.model.experts.traffic()

    def close(self) -> None:
        """See `Runner.close`."""
        self._recorded.close()
        self._resources.close()


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
    return_large_blocks()
    pool = cpu.ThreadPool(options.threads)
    with ExitStack() as opened, ExitStack() as recorded:
        recording = open_recording(checkpoint, options.statistics, options.record_trace)
        recorded.callback(recording.close)
        store = ExpertStore.open(checkpoint, options.stores, verify=options.verify_reads)
        opened.callback(store.close)
        model = load_backbone(checkpoint, None, dtype, options.backbone, options.progress)
        experts = CpuExperts.load(config, store, pool, plan.rows, recording.statistics, options.progress)
        opened.callback(experts.cache.abandon)
        experts.recorder = recording.recorder
        recording.placed_by(experts)
        if options.prefetch and not plan.experts_fit:
            guesses = GateLookahead(model)
            experts.prefetcher = Prefetcher(
                experts.cache, guesses, recording.statistics, config.n_routed_experts
            )
        model.connect(experts)
        return CpuRunner(model, pool, dtype, plan.chunk_tokens, opened.pop_all(), recorded.pop_all()), plan


def default_dtype(config: ModelConfig, backbone: str) -> torch.dtype:
    """bf16; fp32 for a small backbone on a CPU without bf16 instructions: it has no values to convert."""
    small = planned_bytes(config.backbone_shapes(), torch.float32, "bf16") <= SMALL_BACKBONE_BYTES
    return torch.float32 if small and backbone == "bf16" and not native_bf16() else torch.bfloat16

"""The runner of a box without a GPU, and how a checkpoint is loaded for it."""

from __future__ import annotations

from collections.abc import Callable

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
from moebox.runtime.engine.cpu_plan import CHUNK_TOKENS, CpuPlan, plan_cpu_memory, return_large_blocks
from moebox.runtime.engine.options import LoadOptions
from moebox.runtime.engine.recording import open_recording
from moebox.runtime.engine.resources import Resources
from moebox.runtime.engine.router_lookahead import RouterLookahead
from moebox.runtime.model.kimi_k2 import KimiK2
from moebox.runtime.model.kv_cache import KVCache
from moebox.runtime.model.linear import native_bf16
from moebox.runtime.model.loader import load_backbone
from moebox.runtime.model.mlp import joined
from moebox.runtime.model.precision import planned_bytes

MULTITHREADED_FROM = 1 << 22
"""tokens * hidden_size**2 from which torch uses all threads. The experts' own pool always uses all of its."""
SMALL_BACKBONE_BYTES = 64 << 20
"""Up to this size, in fp32, a backbone is loaded as fp32 where the CPU has no bf16 instructions."""


class CpuRunner:
    """Implements `Runner` on the CPU: torch computes the backbone, the kernels' thread pool the experts.

    Args:
        model: the model, connected to its experts.
        pool: the experts' threads; torch uses as many.
        dtype: of the backbone.
        chunk_tokens: tokens that go through the model at once.
        resources: closed with the runner.
    """

    def __init__(
        self,
        model: KimiK2,
        pool: cpu.ThreadPool,
        dtype: torch.dtype,
        chunk_tokens: int = CHUNK_TOKENS,
        resources: Resources | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.chunk_tokens = chunk_tokens
        self._pool = pool
        self._resources = resources or Resources()
        self._resources.close_with(self)

    def new_cache(self, context: int) -> KVCache:
        return KVCache(self.model.config, self.dtype, context)

    def forward(
        self,
        token_ids: list[int],
        cache: KVCache,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> Tensor:
        part = min(len(token_ids), self.model.processor.part_tokens)
        rest = len(token_ids) % part
        if rest and self._threads(rest) != self._threads(part):  # threads decide how sums round
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
        """Threads that torch uses for `count` tokens: for a small product, waking threads takes longer."""
        large = count * self.model.config.hidden_size**2 >= MULTITHREADED_FROM
        return self._pool.threads if large else 1

    def traffic(self) -> Traffic:
        return self.model.experts.traffic()

    def close(self) -> None:
        self._resources.close()


def load_on_cpu(checkpoint: Checkpoint, options: LoadOptions) -> tuple[Runner, CpuPlan]:
    """Load a checkpoint, whose names and formats were checked, into RAM.

    Raises:
        CheckpointError: a tensor is missing, cannot be read, or does not match the config.
        PlanError: the options ask for a GPU, or the model does not fit RAM.
    """
    if options.vram:
        raise PlanError(
            f"vram = {options.vram} bytes: the CPU was asked to compute, or torch sees no GPU",
            "Leave the VRAM budget out.",
        )
    config = checkpoint.config
    dtype = options.dtype or default_dtype(config, options.backbone)
    plan = plan_cpu_memory(config, dtype, options.backbone, options.ram, options.context)
    return_large_blocks()
    pool = cpu.ThreadPool(options.threads)
    with Resources() as resources:
        recording = open_recording(checkpoint, options.statistics, options.record_trace)
        resources.add_recording(recording.close)
        store = ExpertStore.open(checkpoint, options.stores, verify=options.verify_reads)
        resources.add(store.close)
        model = load_backbone(checkpoint, dtype, options.backbone, options.progress)
        experts = CpuExperts.load(config, store, pool, plan.rows, recording.statistics, options.progress)
        resources.add(experts.cache.abandon)
        recording.connect(experts)
        if options.prefetch and not plan.experts_fit:
            predictor = RouterLookahead(model)
            experts.prefetcher = Prefetcher(
                experts.cache, predictor, recording.statistics, config.n_routed_experts
            )
        model.connect(experts)
        return CpuRunner(model, pool, dtype, plan.chunk_tokens, resources), plan


def default_dtype(config: ModelConfig, backbone: str) -> torch.dtype:
    """bf16; for a small backbone on a CPU without bf16 instructions fp32, which needs no conversions."""
    small = planned_bytes(config.backbone_shapes(), torch.float32, "bf16") <= SMALL_BACKBONE_BYTES
    return torch.float32 if small and backbone == "bf16" and not native_bf16() else torch.bfloat16

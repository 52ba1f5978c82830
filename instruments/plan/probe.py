"""What this box makes of a model's own widths: a few layers of random weights, run for some seconds.

A plan needs to know what is lost against the floor, which differs from CPU to CPU. The small model has the
widths, the layers' kinds and the code of the real one, with all experts in RAM.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moebox.config import ModelConfig
from moebox.instruments.bench.instrument import CpuWatch
from moebox.instruments.bench.report import LAYER_FIELDS
from moebox.instruments.measure.random_model import experts_in_ram, synthetic_model
from moebox.instruments.plan.speed import H200_BOX, ColdReads, Efficiency
from moebox.kernels import cpu
from moebox.offload.checkpoint.safetensors import Checkpoint
from moebox.offload.cpu_experts import CpuExperts
from moebox.offload.disk.store import ExpertStore
from moebox.offload.machine.floor import Ceilings, backbone_bytes
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.routing.trace import TraceRouting, synthetic_trace
from moebox.runtime.engine.cpu_plan import least_ram_rows
from moebox.runtime.engine.cpu_runner import CpuRunner, default_dtype
from moebox.runtime.model.kv_cache import KVCache
from moebox.runtime.model.loader import check_quantized
from moebox.units import GIGA

EXPERTS_BYTES = 768 << 20
"""Experts of the small model: many times what caches hold, where the real model has so many."""
MOE_LAYERS = 2
VOCABULARY = 8192
DENSE_INNER = 2048
FEW_CACHED, MANY_CACHED = 16, 2048
WARMUP_TOKENS = 2
DECODE_S = 1.0
"""How long tokens are decoded, with few and with many of them cached."""
PROMPT_TOKENS = 128
COLD_S, COLD_LAYERS = 1.5, 8
"""How long, and how many layers at least, with experts missing."""
BETWEEN_S = 0.002
"""Between two of them, as attention would be: threads that sleep meanwhile take their time to wake."""
FORGETTING_TOKENS = 1000
"""Many half-lives of an expert's score."""


def small_config(config: ModelConfig) -> ModelConfig:
    """A model of the same widths that takes a gigabyte or two; one that is small anyway stays as it is."""
    if config.experts_bytes <= EXPERTS_BYTES:
        return config
    experts = EXPERTS_BYTES // (MOE_LAYERS * config.expert_bytes)
    return replace(
        config,
        num_hidden_layers=config.first_k_dense_replace + MOE_LAYERS,
        first_k_dense_replace=config.first_k_dense_replace,
        n_routed_experts=max(2 * config.num_experts_per_tok, min(experts, config.n_routed_experts)),
        n_group=1,
        topk_group=1,
        vocab_size=min(config.vocab_size, VOCABULARY),
        intermediate_size=min(config.intermediate_size, DENSE_INNER),
    )


def probe_cpu(config: ModelConfig, ceilings: Ceilings, threads: int | None = None) -> Efficiency:
    """Run a small model of `config`'s widths on the CPU; takes about five seconds and two gigabytes.

    Raises:
        PlanError: there is no memory for it.
    """
    small = small_config(config)
    with torch.inference_mode():
        return _Probe(small, ceilings, threads).efficiency()


def probe_disk(folder: Path, stores: Sequence[Path] = (), threads: int | None = None) -> ColdReads:
    """Compute experts of a real checkpoint that are missing, k at once and one alone; takes a few seconds.

    Raises:
        CheckpointError: the experts are not INT4, or cannot be read.
        PlanError: there is no memory for the few that it holds.
    """
    checkpoint = Checkpoint.open(folder, stores=stores)
    check_quantized(checkpoint)
    config = checkpoint.config
    with ExpertStore.open(checkpoint) as store:
        rows = least_ram_rows(config)
        experts = CpuExperts.load(config, store, cpu.ThreadPool(threads), rows)
        seconds = _cold_layers(experts)
        experts.cache.abandon()
    return cold_reads(config, **seconds)


def cold_reads(config: ModelConfig, all_s: float, alone_s: float, there_s: float) -> ColdReads:
    """What explains the time of k missing experts, of a missing one that nothing else is computed beside, and
    of that one when it is there."""
    top_k = config.num_experts_per_tok
    # On a busy box they differ by chance: then each counts at least half of what it took on average.
    each_s = max((all_s - alone_s) / max(top_k - 1, 1), all_s / (2 * top_k))
    return ColdReads(max(alone_s - there_s - each_s, 0.0), config.expert_bytes / each_s / GIGA)


def _cold_layers(experts: CpuExperts) -> dict[str, float]:
    """Medians, named as the arguments of `cold_reads`."""
    config, generator = experts.config, np.random.default_rng(0)
    k = config.num_experts_per_tok
    found: dict[str, list[float]] = {"all_s": [], "alone_s": [], "there_s": []}
    began_s, turns = time.perf_counter(), 0
    while time.perf_counter() - began_s < COLD_S or turns < COLD_LAYERS:
        turns += 1
        moe = int(generator.integers(len(config.moe_layers)))
        first = moe * config.n_routed_experts
        order = generator.permutation(config.n_routed_experts).tolist()
        missing = sorted(order, key=lambda expert: experts.cache.resident(first + expert))
        found["all_s"].append(_cold_layer(experts, moe, missing[:k]))
        found["alone_s"].append(_cold_layer(experts, moe, missing[k : k + 1]))
        found["there_s"].append(_layer(experts, moe, missing[k : k + 1]))
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def _cold_layer(experts: CpuExperts, moe: int, ids: list[int]) -> float:
    """Seconds of a layer with picks that are missing: the next one finds them in RAM."""
    experts.cache.residency.tick += FORGETTING_TOKENS  # what was met before them makes room
    return _layer(experts, moe, ids)


def _layer(experts: CpuExperts, moe: int, ids: list[int]) -> float:
    hidden = torch.randn(1, experts.config.hidden_size)
    chosen, weights = torch.tensor([ids]), torch.full((1, len(ids)), 1 / len(ids))
    _keep_busy(BETWEEN_S)
    layer = experts.config.moe_layers[moe]
    return _seconds(partial(experts.forward, layer, chosen, weights, hidden))


class _Probe:
    def __init__(self, config: ModelConfig, ceilings: Ceilings, threads: int | None) -> None:
        self.config, self.ceilings = config, ceilings
        pool = cpu.ThreadPool(threads)
        ram = RamSlab(config)
        ram.fill_synthetic()
        dtype = default_dtype(config, "bf16")
        trace = synthetic_trace(
            PROMPT_TOKENS, len(config.moe_layers), config.n_routed_experts, config.num_experts_per_tok
        )
        model = synthetic_model(config, dtype)
        self.watch = CpuWatch(experts_in_ram(ram, pool), config, TraceRouting(trace))
        model.connect(self.watch)
        self.runner = CpuRunner(model, pool, dtype)
        self.many = min(MANY_CACHED, config.max_position_embeddings // 2)

    def efficiency(self) -> Efficiency:
        """See `probe_cpu`."""
        few, many = self._decode(FEW_CACHED), self._decode(self.many)
        item = self.runner.dtype.itemsize
        parts, layers = backbone_bytes(self.config, item), len(self.config.moe_layers)
        fast = self.ceilings.fast_gbps * GIGA
        head_s = _fastest(self._head)
        reached = max(parts.head / head_s, parts.moe_layer / few["wait_s"]) / fast
        layer_s = few["wait_s"] - parts.moe_layer / (reached * fast)
        once = parts.dense_layers + parts.head
        token_s = few["token_s"] - layers * (few["wait_s"] + few["cpu_s"]) - once / (reached * fast)
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        cached = (self.many - FEW_CACHED) * width * item
        attention_s = max(many["wait_s"] - few["wait_s"], cached / fast)
        picked = self.config.num_experts_per_tok * self.config.expert_bytes
        return Efficiency(
            source=f"measured on this box, {time.strftime('%Y-%m-%d')}",
            backbone=reached,
            experts=picked / few["cpu_s"] / (self.ceilings.ram_gbps * GIGA),
            roads=H200_BOX.roads,
            attention=cached / attention_s / fast,
            nvme=H200_BOX.nvme,
            layer_s=max(layer_s, 0.0),
            token_s=max(token_s, 0.0),
            read_s=H200_BOX.read_s,
            prefill=((PROMPT_TOKENS, self._of_prefill_floor()),),
        )

    def _decode(self, cached: int) -> dict[str, float]:
        """Medians of a token: its seconds, and of a MoE layer the experts' and everything else's."""
        cache = self._cache(cached)
        seconds: list[float] = []
        layers: list[list[float]] = []
        wait, work = LAYER_FIELDS.index("wait_s"), LAYER_FIELDS.index("cpu_s")
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < DECODE_S or len(seconds) <= 2 * WARMUP_TOKENS:
            self.watch.begin()
            token_s = _seconds(lambda: self.runner.forward([1], cache))
            seconds.append(token_s)
            # The first layer's wait has the dense layers and the embedding in it.
            rows = self.watch.decode_layers()
            later = rows[1:] if len(rows) > 1 else rows
            layers.append([float(later[:, wait].mean()), float(rows[:, work].mean())])
        waits, works = torch.tensor(layers[WARMUP_TOKENS:]).median(0).values.tolist()
        return {
            "token_s": float(torch.tensor(seconds[WARMUP_TOKENS:]).median()),
            "wait_s": waits,
            "cpu_s": works,
        }

    def _cache(self, cached: int) -> KVCache:
        """A cache of so many random tokens, with room for more."""
        cache = self.runner.new_cache(self.config.max_position_embeddings)
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        for layer in range(self.config.num_hidden_layers):
            cache.append(layer, torch.randn(cached, width).to(self.runner.dtype))
        cache.commit([0] * cached)
        return cache

    def _head(self) -> None:
        hidden = torch.zeros(1, self.config.hidden_size, dtype=self.runner.dtype)
        self.runner.model.logits(hidden)

    def _of_prefill_floor(self) -> float:
        """Part of the floor that a prompt's MoE layers reach."""
        tokens = min(PROMPT_TOKENS, self.config.max_position_embeddings)
        cache = self.runner.new_cache(tokens)
        self.watch.begin()
        self.runner.forward([1] * tokens, cache, last_only=True)
        layers = self.watch.prefill_layers(self.ceilings)
        return sum(layer.floor.seconds for layer in layers) / sum(layer.seconds for layer in layers)


def _keep_busy(seconds: float) -> None:
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass


def _fastest(call: Callable[[], object], repeats: int = 5) -> float:
    return min(_seconds(call) for _ in range(repeats))


def _seconds(call: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    call()
    return time.perf_counter() - began_s

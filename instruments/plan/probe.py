"""Measures what a model loses against the floor on this box: a few layers of random weights run for seconds.

The losses differ from CPU to CPU. The small model has the widths, the kinds of layers and the code of the
real model, with all experts in RAM.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from moebox.config import ModelConfig
from moebox.instruments.bench.instrumented_experts import InstrumentedCpuExperts
from moebox.instruments.bench.roads import LAYER_FIELDS
from moebox.instruments.measure.random_model import experts_in_ram, synthetic_model
from moebox.instruments.measure.timing import fastest_seconds, seconds_of
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
"""Experts of the small model, if the model has so many: many times what the CPU's caches hold."""
MOE_LAYERS = 2
VOCABULARY = 8192
DENSE_INNER = 2048
FEW_CACHED, MANY_CACHED = 16, 2048
WARMUP_TOKENS = 2
DECODE_S = 1.0
"""How long tokens are decoded, once with few and once with many cached tokens."""
PROMPT_TOKENS = 128
HEAD_REPEATS = 5
COLD_S, COLD_LAYERS = 1.5, 8
"""How long layers with cold experts are measured, and how many at least."""
BETWEEN_S = 0.002
"""Pause before each of those layers, as long as attention takes, in which worker threads fall asleep."""
AGE_TOKENS = 1000
"""Many half-lives of an expert's score."""


def small_config(config: ModelConfig) -> ModelConfig:
    """A model of the same widths that takes one or two gigabytes, or `config` itself if that is small."""
    if config.experts_bytes <= EXPERTS_BYTES:
        return config
    experts = EXPERTS_BYTES // (MOE_LAYERS * config.expert_bytes)
    return replace(
        config,
        num_hidden_layers=config.first_k_dense_replace + MOE_LAYERS,
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
        return CpuProbe(small, ceilings, threads).efficiency()


def probe_disk(folder: Path, stores: Sequence[Path] = (), threads: int | None = None) -> ColdReads:
    """Compute layers of a real checkpoint whose experts are cold; takes a few seconds.

    Raises:
        CheckpointError: the experts are not INT4, or cannot be read.
        PlanError: there is no memory for the few experts that RAM holds.
    """
    checkpoint = Checkpoint.open(folder, stores=stores)
    check_quantized(checkpoint)
    config = checkpoint.config
    with ExpertStore.open(checkpoint) as store:
        rows = least_ram_rows(config)
        experts = CpuExperts.load(config, store, cpu.ThreadPool(threads), rows)
        seconds = _cold_layers(experts)
        experts.cache.abandon()
    return cold_reads(config, seconds)


@dataclass(frozen=True)
class ColdSeconds:
    """Seconds of a layer: with k cold picks, with one cold pick alone, and with that one pick in RAM."""

    all_cold_s: float
    one_cold_s: float
    one_warm_s: float


def cold_reads(config: ModelConfig, seconds: ColdSeconds) -> ColdReads:
    """Latency and bandwidth that explain `seconds`.

    With `each_s` the time of one read, `all_cold_s = latency + k * each_s + one_warm_s` and `one_cold_s =
    latency + each_s + one_warm_s`.
    """
    top_k = config.num_experts_per_tok
    each_s = (seconds.all_cold_s - seconds.one_cold_s) / max(top_k - 1, 1)
    # On a busy box the difference is chance: a read then counts at least half of its average time.
    each_s = max(each_s, seconds.all_cold_s / (2 * top_k))
    latency_s = max(seconds.one_cold_s - seconds.one_warm_s - each_s, 0.0)
    return ColdReads(latency_s, config.expert_bytes / each_s / GIGA)


def _cold_layers(experts: CpuExperts) -> ColdSeconds:
    """Medians over layers that are chosen at random."""
    config, generator = experts.config, np.random.default_rng(0)
    k = config.num_experts_per_tok
    measured: list[tuple[float, float, float]] = []
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < COLD_S or len(measured) < COLD_LAYERS:
        moe = int(generator.integers(len(config.moe_layers)))
        first = moe * config.n_routed_experts
        order = generator.permutation(config.n_routed_experts).tolist()
        cold_first = sorted(order, key=lambda expert: experts.cache.in_ram(first + expert))
        all_cold, one = cold_first[:k], cold_first[k : k + 1]
        measured.append(
            (
                _cold_layer_seconds(experts, moe, all_cold),
                _cold_layer_seconds(experts, moe, one),
                layer_seconds(experts, moe, one),
            )
        )
    return ColdSeconds(*np.median(measured, axis=0).tolist())


def _cold_layer_seconds(experts: CpuExperts, moe: int, ids: list[int]) -> float:
    """Seconds of a layer with cold picks, which are in RAM afterwards."""
    experts.cache.residency.tick += AGE_TOKENS  # earlier picks lose their scores, and are evicted for these
    return layer_seconds(experts, moe, ids)


def layer_seconds(experts: CpuExperts, moe: int, ids: list[int]) -> float:
    """Seconds of the experts `ids` of a MoE layer, for one token."""
    hidden = torch.randn(1, experts.config.hidden_size)
    chosen, weights = torch.tensor([ids]), torch.full((1, len(ids)), 1 / len(ids))
    _keep_busy(BETWEEN_S)
    layer = experts.config.moe_layers[moe]
    return seconds_of(partial(experts.forward, layer, chosen, weights, hidden))


@dataclass(frozen=True)
class TokenSeconds:
    """Medians of a token: its seconds, and of one MoE layer the seconds of its experts and of all else."""

    token_s: float
    experts_s: float
    other_s: float


class CpuProbe:
    """A small model on the CPU, measured with few and with many cached tokens."""

    def __init__(self, config: ModelConfig, ceilings: Ceilings, threads: int | None) -> None:
        self.config, self.ceilings = config, ceilings
        pool = cpu.ThreadPool(threads)
        ram = RamSlab(config)
        ram.fill_synthetic()
        dtype = default_dtype(config, "bf16")
        routing = TraceRouting(synthetic_trace(PROMPT_TOKENS, *config.routing_shape))
        model = synthetic_model(config, dtype)
        self.experts = InstrumentedCpuExperts(experts_in_ram(ram, pool), config, routing)
        model.connect(self.experts)
        self.runner = CpuRunner(model, pool, dtype)

    def efficiency(self) -> Efficiency:
        """What is reached of the ceilings.

        Of the head and of a layer without experts, the one that reads its bytes faster gives the share of the
        bandwidth. A layer's and a token's time beyond bytes / (share * bandwidth) are `layer_s` and
        `token_s`.
        """
        many_cached = min(MANY_CACHED, self.config.max_position_embeddings // 2)
        few, many = self.decode_seconds(FEW_CACHED), self.decode_seconds(many_cached)
        item = self.runner.dtype.itemsize
        parts, layers = backbone_bytes(self.config, item), len(self.config.moe_layers)
        fast = self.ceilings.fast_gbps * GIGA
        reached = max(parts.head / self.head_seconds(), parts.moe_layer / few.other_s) / fast
        layer_s = few.other_s - parts.moe_layer / (reached * fast)
        once = parts.dense_layers + parts.head
        token_s = few.token_s - layers * (few.other_s + few.experts_s) - once / (reached * fast)
        cached_bytes = (many_cached - FEW_CACHED) * self.config.kv_width * item
        attention_s = max(many.other_s - few.other_s, cached_bytes / fast)
        picked = self.config.num_experts_per_tok * self.config.expert_bytes
        return Efficiency(
            source=f"measured on this box, {time.strftime('%Y-%m-%d')}",
            backbone=reached,
            experts=picked / few.experts_s / (self.ceilings.ram_gbps * GIGA),
            roads=H200_BOX.roads,
            attention=cached_bytes / attention_s / fast,
            nvme=H200_BOX.nvme,
            layer_s=max(layer_s, 0.0),
            token_s=max(token_s, 0.0),
            read_s=H200_BOX.read_s,
            prefill=((PROMPT_TOKENS, self._of_prefill_floor()),),
        )

    def decode_seconds(self, cached: int) -> TokenSeconds:
        """Decode behind `cached` random tokens for `DECODE_S`."""
        cache = self._cache(cached)
        seconds: list[float] = []
        layers: list[list[float]] = []
        wait, work = LAYER_FIELDS.index("wait_s"), LAYER_FIELDS.index("cpu_s")
        began_s = time.perf_counter()
        while time.perf_counter() - began_s < DECODE_S or len(seconds) <= 2 * WARMUP_TOKENS:
            self.experts.begin()
            seconds.append(seconds_of(lambda: self.runner.forward([1], cache)))
            rows = self.experts.decode_layers()
            # The first layer's wait includes the dense layers and the embedding.
            later = rows[1:] if len(rows) > 1 else rows
            layers.append([float(later[:, wait].mean()), float(rows[:, work].mean())])
        other_s, experts_s = torch.tensor(layers[WARMUP_TOKENS:]).median(0).values.tolist()
        token_s = float(torch.tensor(seconds[WARMUP_TOKENS:]).median())
        return TokenSeconds(token_s, experts_s, other_s)

    def _cache(self, cached: int) -> KVCache:
        cache = self.runner.new_cache(self.config.max_position_embeddings)
        for layer in range(self.config.num_hidden_layers):
            cache.append(layer, torch.randn(cached, self.config.kv_width).to(self.runner.dtype))
        cache.commit([0] * cached)
        return cache

    def head_seconds(self) -> float:
        """Seconds of one token's logits."""
        hidden = torch.zeros(1, self.config.hidden_size, dtype=self.runner.dtype)
        return fastest_seconds(lambda: self.runner.model.logits(hidden), HEAD_REPEATS)

    def _of_prefill_floor(self) -> float:
        """Share of the floor that a prompt's MoE layers reach."""
        tokens = min(PROMPT_TOKENS, self.config.max_position_embeddings)
        cache = self.runner.new_cache(tokens)
        self.experts.begin()
        self.runner.forward([1] * tokens, cache, last_only=True)
        layers = self.experts.prefill_layers(self.ceilings)
        return sum(layer.floor.seconds for layer in layers) / sum(layer.seconds for layer in layers)


def _keep_busy(seconds: float) -> None:
    until_s = time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        pass

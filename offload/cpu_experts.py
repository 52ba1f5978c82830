"""The routed experts of a box without a GPU: computed by the CPU from rows in RAM, misses read from disk.

Where an expert lies changes when it is computed, but no bit of the result. The kernel adds the outputs of a
token's experts in ascending order of their ids, and so does this module, in whatever order reads end.

Shapes: T tokens, H hidden_size, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.config import ModelConfig
from moebox.kernels import cpu
from moebox.offload.disk.base import Store
from moebox.offload.experts import TIERS, Progress, group_by_expert
from moebox.offload.memory.gpu_slab import spread_keys
from moebox.offload.memory.ram_cache import RamCache
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.prefetch.base import TokenPrefetcher
from moebox.offload.prefill.token_expert_pairs import recent_use
from moebox.offload.routing.recorder import RoutingRecorder
from moebox.offload.routing.statistics import RouterStatistics
from moebox.offload.traffic import Traffic

Floats = npt.NDArray[np.float32]


@dataclass
class LayerCounts:
    """What one call of `forward` did.

    Attributes:
        hits: experts that were in RAM.
        cold: experts that were read from disk, or were being prefetched.
        cold_bytes: of the latter.
        wait_s: seconds that the computation waited for reads.
    """

    hits: int = 0
    cold: int = 0
    cold_bytes: int = 0
    wait_s: float = 0.0


class CpuExperts:
    """Implements `Experts`. Not thread-safe.

    Attributes:
        config: of the model.
        cache: the rows, and reads into them.
        pool: computes.
        nbytes: INT4 bytes of all experts, wherever they lie.
        recorder: records the router's picks; None: picks are not recorded.
        prefetcher: prefetches experts of the next layers while a token is decoded, where set.
        part_tokens: tokens of one kernel call. A prompt of more gives the same bits as parts of so many
            tokens, given one after the other.
        last: what the last call of `forward` did.
    """

    def __init__(self, config: ModelConfig, cache: RamCache, pool: cpu.ThreadPool) -> None:
        self.config, self.cache, self.pool = config, cache, pool
        self.nbytes = config.experts_bytes
        self.recorder: RoutingRecorder | None = None
        self.prefetcher: TokenPrefetcher | None = None
        self.part_tokens = cpu.PART_TOKENS
        self.last = LayerCounts()
        self._hits = self._cold = 0

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        store: Store,
        pool: cpu.ThreadPool,
        rows: int,
        statistics: RouterStatistics | None = None,
        progress: Progress | None = None,
    ) -> CpuExperts:
        """Allocate rows and read experts into them, at the disk's speed.

        Args:
            store: has all experts.
            rows: of RAM; at least 2 k, if RAM does not hold all experts.
            statistics: give the order in which experts are read, and their first scores.
            progress: called with ("memory" | "experts", bytes done, bytes in all).

        Raises:
            PlanError: the system does not give so much memory.
            CheckpointError: an expert could not be read.
        """
        ram = RamSlab(config, rows, progress=progress)
        top_k = config.num_experts_per_tok
        cache = RamCache(ram, store, min(top_k, rows - top_k))
        known = statistics is not None and statistics.tokens > 0
        if statistics is None or not known:
            order = spread_keys(len(config.moe_layers), config.n_routed_experts)
        else:
            order = statistics.order()
        cache.fill(order[: rows - cache.reserve], progress)
        if statistics is not None and known:
            cache.residency.seed(np.arange(ram.n_keys, dtype=np.int32), statistics.seed_scores())
        return cls(config, cache, pool)

    @property
    def read_s(self) -> float:
        """Seconds in which the busiest drive had something to read, since loading began."""
        return self.cache.store.traffic().busy_s if self.cache.store is not None else 0.0

    def traffic(self) -> Traffic:
        """Where experts were found and what moved since loading began."""
        store, n = self.cache.store, self._hits + self._cold
        return Traffic(
            ram_hits=self._hits,
            disk_hits=self._cold,
            cpu_bytes=n * self.config.expert_bytes,
            disk_bytes=0 if store is None else store.traffic().nbytes,
        )

    def placement(self) -> npt.NDArray[np.uint8]:
        """Where each expert lies: uint8 [L, E] of indices into `TIERS`."""
        in_ram = [self.cache.in_ram(key) for key in range(self.cache.ram.n_keys)]
        tiers = np.where(in_ram, TIERS.index("RAM"), TIERS.index("drive")).astype(np.uint8)
        return tiers.reshape(-1, self.config.n_routed_experts)

    def forward(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, as `Experts.forward` defines it.

        Call it layer by layer, in order; the first layer begins a prompt or a token.

        Raises:
            CheckpointError: an expert could not be read.
        """
        moe = layer - self.config.first_k_dense_replace
        ids = expert_ids.numpy()
        if moe == 0:
            self.cache.residency.tick += len(ids)
        if self.recorder is not None:
            self.recorder.layer(moe, ids)
        work = _Work(self, moe, ids, weights.numpy(), hidden.contiguous())
        self.last = work.counts
        try:
            return work.decode() if len(ids) == 1 else work.prefill()
        except BaseException:
            self.cache.abandon()
            raise
        finally:
            self._hits += work.counts.hits
            self._cold += work.counts.cold


class _Part:
    """Some tokens of a prompt, grouped by expert. Experts must be added in ascending order.

    Attributes:
        chosen: ids of the experts with tokens, ascending.
        hidden, out: [T, H] of the part's tokens; `add` adds to `out`, fp32.
    """

    def __init__(
        self, ids: npt.NDArray[np.int64], weights: Floats, hidden: Tensor, out: Tensor, pool: cpu.ThreadPool
    ) -> None:
        self.chosen, self.offsets, self.tokens, order = group_by_expert(ids)
        self.weights = weights.reshape(-1)[order]
        self.hidden, self.out, self.pool = hidden, out, pool

    def add(self, first: int, last: int, experts: Sequence[cpu.Expert]) -> None:
        """Add the outputs of `chosen[first:last]`, whose weights are `experts`, to `out`."""
        if first == last:
            return
        begin, end = int(self.offsets[first]), int(self.offsets[last])
        cpu.experts_forward(
            self.pool,
            experts,
            self.offsets[first : last + 1] - begin if begin else self.offsets[: last + 1],
            self.tokens[begin:end],
            self.weights[begin:end],
            self.hidden,
            self.out,
        )


class _Work:
    """One layer's experts for one prompt or token.

    Attributes:
        keys: of the chosen experts, ascending.
        out: fp32 [T, H], the sum.
        counts: what was done so far.
    """

    def __init__(
        self, experts: CpuExperts, moe: int, ids: npt.NDArray[np.int64], weights: Floats, hidden: Tensor
    ) -> None:
        self.cache, self.pool, self.prefetcher = experts.cache, experts.pool, experts.prefetcher
        self.moe = moe
        self.out = torch.zeros(hidden.shape, dtype=torch.float32)
        size = experts.part_tokens
        if len(ids) <= size:
            self.parts = [_Part(ids, weights, hidden, self.out, self.pool)]
            self.chosen = self.parts[0].chosen
        else:
            rows = [slice(first, first + size) for first in range(0, len(ids), size)]
            self.parts = [
                _Part(ids[own], weights[own], hidden[own], self.out[own], self.pool) for own in rows
            ]
            self.chosen = sorted({expert for part in self.parts for expert in part.chosen})
        n_experts = experts.config.n_routed_experts
        self.keys = [moe * n_experts + expert for expert in self.chosen]
        if not self.cache.complete:
            recent = None if len(ids) == 1 else recent_use(ids, n_experts)[self.chosen]
            self.cache.use(np.array(self.keys, np.int32), recent)
        self.counts = LayerCounts()

    def decode(self) -> Tensor:
        """One token: experts in RAM are computed while others are read, and those as they arrive.

        Returns fp32 [1, H].
        """
        cache, keys, hidden = self.cache, self.keys, self.parts[0].hidden
        if self.prefetcher is not None:
            self.prefetcher.begin_layer(self.moe, self.chosen)
        cold = [i for i, key in enumerate(keys) if not cache.in_ram(key)]
        self._demand(keys, len(cold))
        if not cache.complete:  # while the drive reads
            cache.update_values(keys)
            cache.trim()
        if self.prefetcher is not None:
            self.prefetcher.prefetch_next(self.moe, hidden, self.chosen)
        if cold:
            self._sum_in_order(cold)
        else:
            self._add(0, len(keys))
        cache.done(keys)
        cache.trim()
        if self.prefetcher is not None:
            self.prefetcher.end_layer(self.moe)
            if self.moe == len(cache.ram.config.moe_layers) - 1:
                self.prefetcher.end_token()
        return self.out

    def _sum_in_order(self, cold: list[int]) -> None:
        """Compute each expert's output in a row of its own, in the order of arrival, and add the rows in
        ascending order of the experts, as the kernel does."""
        n, part = len(self.keys), self.parts[0]
        hidden = part.hidden.expand(n, -1).contiguous()
        rows = torch.zeros(hidden.shape)
        ready = sorted(set(range(n)) - set(cold))
        while ready or cold:
            if not ready:
                ready = self._arrived(cold)
                cold = [i for i in cold if i not in ready]
            experts = [self.cache.wait(self.keys[i]) for i in ready]
            picks = np.array(ready, np.int32)
            offsets = np.arange(len(ready) + 1, dtype=np.int32)
            cpu.experts_forward(self.pool, experts, offsets, picks, part.weights[picks], hidden, rows)
            ready = []
        for row in rows:
            self.out += row

    def _arrived(self, cold: list[int]) -> list[int]:
        """Wait for the read that began first; returns it, and all others that have ended."""
        self._wait(self.keys[cold[0]])
        return [cold[0], *(i for i in cold[1:] if self.cache.ready(self.keys[i]))]

    def prefill(self) -> Tensor:
        """Many tokens: experts in ascending order, as many in one call as are in RAM, while reads run ahead.

        Returns fp32 [T, H].
        """
        cache, keys, n = self.cache, self.keys, len(self.keys)
        cache.cancel_prefetches()
        ahead = first = 0
        while first < n:
            ahead = self._read_ahead(first, ahead)
            self._wait(keys[first])
            last = first + 1
            while last < ahead and cache.ready(keys[last]):
                last += 1
            self._add(first, last)
            cache.done(keys[first:last])
            first = last
        cache.trim()
        return self.out

    def _read_ahead(self, first: int, ahead: int) -> int:
        """Demand keys from index `ahead` on, until `reserve` misses from index `first` on are being read.

        More reads would evict experts that were just used. Returns the `ahead` of the next call.
        """
        cold = [not self.cache.in_ram(key) for key in self.keys[first:]]
        under_way = np.cumsum(cold)
        end = first + int(np.searchsorted(under_way, self.cache.reserve, side="right"))
        end = max(end, first + 1, ahead)
        self._demand(self.keys[ahead:end], sum(cold[ahead - first : end - first]))
        return end

    def _add(self, first: int, last: int) -> None:
        """Add the experts from index `first` to before `last`, which are in RAM, part by part."""
        experts = [self.cache.wait(key) for key in self.keys[first:last]]
        if len(self.parts) == 1:
            self.parts[0].add(first, last, experts)
            return
        chosen = self.chosen[first:last]
        by_id = dict(zip(chosen, experts, strict=True))
        for part in self.parts:
            begin, end = bisect_left(part.chosen, chosen[0]), bisect_right(part.chosen, chosen[-1])
            part.add(begin, end, [by_id[expert] for expert in part.chosen[begin:end]])

    def _demand(self, keys: Sequence[int], n_cold: int) -> None:
        self.cache.demand(*keys)
        self.counts.hits += len(keys) - n_cold
        self.counts.cold += n_cold
        self.counts.cold_bytes += n_cold * self.cache.ram.layout.nbytes

    def _wait(self, key: int) -> None:
        began_s = time.perf_counter()
        self.cache.wait(key)
        self.counts.wait_s += time.perf_counter() - began_s

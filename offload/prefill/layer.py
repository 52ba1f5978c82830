"""One layer's experts for many tokens, on two roads at once.

Experts in the cache are computed where they are. Of the others, those with most tokens are uploaded, in
groups, through a ring of slots, and the GPU computes each group while the next one is on its way; those with
fewest are computed by the CPU from RAM, batch by batch. While a batch runs, in a thread of its own, uploads
are queued that will last longer; then the split is looked at again, until the roads meet. Experts on disk
only follow in groups, shared out likewise as they arrive (`cold.py`). Then uploads go on with experts of the
next layer (`early.py`).

T tokens, H hidden_size, E n_routed_experts, k num_experts_per_tok; n experts and m pairs of token and expert
in a layer.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from statistics import median

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebox.kernels import cpu
from moebox.offload.device.base import Device, Event
from moebox.offload.machine.hardware import gpu_identity
from moebox.offload.memory.cold_rows import ColdTier
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP, GpuTier
from moebox.offload.memory.ram_slab import RamTier
from moebox.offload.prefill.admission import Admissions, ColdAdmissions
from moebox.offload.prefill.cold_reads import LayerReads
from moebox.offload.prefill.road_costs import cpu_share, first_costs, two_roads_s
from moebox.offload.prefill.staging import LayerRecord, Staging
from moebox.offload.prefill.token_expert_pairs import recent_use, sort_pairs
from moebox.offload.prefill.upload_ring import CERTAIN, EarlyGroup, EarlyUploads, Ring
from moebox.offload.routing.recorder import RoutingRecorder
from moebox.offload.traffic import Traffic

BATCH_S = 6e-3
"""What the CPU takes at once: long against the cost of a look, short against a layer."""
AHEAD = 1.2
AHEAD_S = 1e-3
"""Uploads are queued for `AHEAD` times the CPU's next batch and `AHEAD_S` more."""


class PrefillRoads:
    """Computes layers; keeps what they teach about the roads.

    Attributes:
        costs: live figures, to be set once when they were measured.
        records: of past layers, the last 1,024; call `settle` before you read them.
        recorder: is told what was routed, where set.
    """

    def __init__(
        self,
        device: Device,
        pool: cpu.ThreadPool,
        ram: RamTier,
        gpu: GpuTier,
        exclusive: bool = False,
        cold: ColdTier | None = None,
    ) -> None:
        """`cold`: where RAM does not hold what the GPU does not; only with `exclusive`."""
        config = ram.config
        self.cold = cold
        self.recorder: RoutingRecorder | None = None
        self.device, self.pool, self.ram, self.gpu, self.exclusive = device, pool, ram, gpu, exclusive
        self.shape = (config.hidden_size, config.moe_intermediate_size)
        self.n_experts = config.n_routed_experts
        self.top_k = config.num_experts_per_tok
        flops = 6.0 * config.hidden_size * config.moe_intermediate_size
        identity = gpu_identity(device.torch_device)
        self.costs = first_costs(config.expert_bytes, flops, pool.threads, identity)
        self.records: deque[LayerRecord] = deque(maxlen=1024)
        self.cpu_thread = ThreadPoolExecutor(1, "moebox-prefill")
        self.ring = Ring(gpu)
        self.early = EarlyUploads(device, ram, gpu, self.ring)
        self._traffic = Traffic()
        self._staging: Staging | None = None
        self._last: _Layer | None = None

    def run(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """`Experts.forward` for the MoE layer `layer`, counted from 0.

        Args:
            expert_ids: int64 [T, k], on the device or the CPU.
            weights: fp32 [T, k] on the device.
            hidden: bf16 [T, H] on the device.

        Raises:
            DeviceError: a copy failed; the cache is worthless then.
            CheckpointError: a cold expert could not be read.
        """
        staging = self._staging_for(len(hidden))
        current = _Layer(self, staging, layer, hidden)
        try:
            current.receive(expert_ids, weights)
            self._learn()
            current.compute_residents()
            current.begin_reads()
            current.compute_early()
            current.share_misses()
            out = current.combine()
        except BaseException:
            current.abandon()
            raise
        self._last = current
        self._traffic += current.record.traffic
        if self.recorder is not None:
            self.recorder.layer(layer, staging.ids[: len(hidden)].numpy())
        return out

    def traffic(self) -> Traffic:
        """Of all layers so far, without what was read from disk; see `Experts.traffic`."""
        return self._traffic + Traffic(pcie_bytes=self.early.uploaded * self.costs.expert_bytes)

    def settle(self) -> None:
        """Wait for the last layer, so that RAM, cache and records are as they will stay.

        What was uploaded for the next one is forgotten, uncounted.
        """
        self.early.settle()
        if self._last is not None:
            self._last.wait()
            self._learn()

    def _learn(self) -> None:
        if self._last is not None:
            self.records.append(self._last.finish())
            self._last = None

    def admissions(self) -> Admissions:
        """Of one layer."""
        if self.cold is None:
            return Admissions(self.device, self.ram, self.gpu, self.exclusive)
        return ColdAdmissions(self.device, self.ram, self.gpu, self.exclusive, tier=self.cold)

    def _staging_for(self, n_tokens: int) -> Staging:
        if self._staging is None or self._staging.capacity < n_tokens:
            self.settle()  # before the old memory goes
            self._staging = None
            capacity = 1 << (n_tokens - 1).bit_length()  # pinning takes 75 ms for 4,096 tokens
            self._staging = Staging(self.device, capacity, self.top_k, self.n_experts, self.shape[0])
        return self._staging

    def go_on_early(self, layer: int, n_tokens: int) -> None:
        """Queue uploads of the MoE layer `layer`, where there is one that will surely use them."""
        keys = range(layer * self.n_experts, (layer + 1) * self.n_experts)
        enough = n_tokens * self.top_k >= CERTAIN * self.n_experts
        if enough and keys.stop <= self.ram.n_keys and not self.exclusive:
            self.early.start(keys)


class _Layer:
    """One layer on its way."""

    def __init__(self, roads: PrefillRoads, staging: Staging, layer: int, hidden: Tensor) -> None:
        self.roads, self.staging, self.layer, self.hidden = roads, staging, layer, hidden
        self.device, self.gpu, self.ram, self.ring = roads.device, roads.gpu, roads.ram, roads.ring
        self.first_key = layer * roads.n_experts
        self.begun_s = time.perf_counter()
        self.begin = self.device.mark()
        self.out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        self.record = LayerRecord(layer, len(hidden), 0, roads.costs.expert_bytes)
        self.admissions = roads.admissions()
        self.reads: LayerReads | None = None
        self.early = roads.early.take()
        self.n_groups = 0
        self.queued: deque[tuple[Event, int]] = deque()
        self.uploads: list[tuple[Event, int]] = []  # where each group ends, behind where the first begins
        self.running: Future[tuple[int, int, float]] | None = None

    def receive(self, expert_ids: Tensor, weights: Tensor) -> None:
        """Bring the routing to the host, start copying what the CPU needs, and plan."""
        staging, n_tokens = self.staging, len(self.hidden)
        ids, router_weights = staging.ids[:n_tokens], staging.router_weights[:n_tokens]
        downloads = self.device.downloads
        self.device.fetch(ids, expert_ids)
        self.device.fetch(router_weights, weights)
        routed = self.device.mark()
        downloads.wait(routed)
        downloads.copy(staging.hidden[:n_tokens], self.hidden)
        self.cpu_ready = downloads.record()
        if self.roads.exclusive:
            self.device.uploads.wait(self.cpu_ready)  # and so for what moved to RAM in the last layer
        routed.synchronize()
        self._plan(ids.numpy())
        self._send_pairs(router_weights.numpy())

    def _plan(self, ids: npt.NDArray[np.int64]) -> None:
        residency, n_experts = self.gpu.residency, self.roads.n_experts
        self.slots = residency.table()[self.first_key : self.first_key + n_experts]
        self.pairs = sort_pairs(ids, self._turns(), len(self.early) + 3)
        use = recent_use(ids, n_experts)
        used = np.array(self.pairs.experts, np.int32)
        residency.use(used + np.int32(self.first_key), use[used])
        self.keys = [self.first_key + expert for expert in self.pairs.experts]
        self.front, self.back = int(self.pairs.starts[1]), int(self.pairs.starts[-2])
        self.record.cold = len(self.keys) - self.back
        if self.roads.cold is not None:
            self.roads.cold.residency.use(used + np.int32(self.first_key), use[used])
        elif self.record.cold:
            raise RuntimeError(f"MoE layer {self.layer}: an expert lies neither in RAM nor on the GPU")
        self.admissions.plan(self.keys[self.front :], self.keys[: self.front])
        self.bounds = self.pairs.offsets.tolist()
        self.counts = self.pairs.counts.tolist()
        self.record.residents = self.front

    def _turns(self) -> npt.NDArray[np.int32]:
        """Residents first, then early groups one by one, then the others, cold ones last: int32 [E]."""
        cold = self.ram.rows[self.first_key : self.first_key + self.roads.n_experts] < 0
        turns = np.where(self.slots >= 0, 0, len(self.early) + 1 + cold).astype(np.int32)
        for turn, group in enumerate(self.early, 1):
            experts = np.array(list(group.slots)) - self.first_key
            turns[experts[(experts >= 0) & (experts < len(turns))]] = turn  # else of a layer that never came
        return turns

    def _send_pairs(self, router_weights: npt.NDArray[np.float32]) -> None:
        n_pairs, staging = self.bounds[-1], self.staging
        tokens, weights = staging.tokens[:n_pairs], staging.weights[:n_pairs]
        tokens.numpy()[:] = self.pairs.tokens
        np.take(router_weights.reshape(-1), self.pairs.order, out=weights.numpy())
        self.tokens, self.weights = tokens.numpy(), weights.numpy()
        self.device_tokens = self.device.send(tokens)
        self.device_weights = self.device.send(weights)

    def compute_residents(self) -> None:
        """Queue the experts that lie in the cache."""
        n = self.front
        if not n:
            return
        table = self.staging.residents[: 2 * n + 1]
        words = table.numpy()
        words[:n] = self.slots[self.pairs.experts[:n]]
        words[n:] = self.bounds[: n + 1]
        self._compute(0, n, self.device.send(table), n)

    def _compute(self, first: int, last: int, table: Tensor, at: int) -> None:
        """Queue the experts `first` to `last`; `table` has slots in front and offsets from `at` on."""
        begin, end, n = self.bounds[first], self.bounds[last], last - first
        self.device.ops.experts_many(
            self.gpu.slab,
            self.roads.shape,
            table[:n],
            table[at : at + n + 1],
            self.device_tokens[begin:end],
            self.device_weights[begin:end],
            self.hidden,
            self.out,
            self.counts[first:last],
        )

    def begin_reads(self) -> None:
        """Have cold experts read, into rows that nothing of the last layer uses any more."""
        if self.record.cold:
            assert self.roads.cold is not None
            self.cpu_ready.synchronize()
            layer = range(self.first_key, self.first_key + self.roads.n_experts)
            busy = set(self.keys[self.front : self.back])
            self.reads = LayerReads(self.roads.cold, self.gpu, layer, self.keys[self.back :], busy)

    def compute_early(self) -> None:
        """Queue the experts that were uploaded before the layer began."""
        for group, n in zip(self.early, np.diff(self.pairs.starts[1:-2]).tolist(), strict=True):
            self.queued.append((group.end, len(group.slots)))
            self.device.compute_waits(group.end)
            self.record.early += n
            self.record.wasted += len(group.slots) - n
            if n:
                keys = self.keys[self.front : self.front + n]
                self._compute_next([group.slots[key] for key in keys])
                self._keep(group, keys)
                self.ring.read_until(group.turn, self.device.mark())

    def _keep(self, group: EarlyGroup, keys: Sequence[int]) -> None:
        """Copy from the ring who is to stay in the cache."""
        for key in keys:
            slot = self.admissions.slot(key)
            if slot is not None:
                self.device.fetch(self.gpu.slab[slot], self.gpu.slab[group.slots[key]])
        self.admissions.uploaded(group.end)

    def share_misses(self) -> None:
        """Let uploads go up from the front and the CPU down from the back until they meet."""
        self.record.host_s = time.perf_counter() - self.begun_s
        self.record.floor_s = two_roads_s(self.roads.costs, self.pairs.counts[self.record.residents :])
        cold = self.back
        self._share()
        if self.reads is not None:
            self._share_cold(self.reads, cold)
        self.roads.go_on_early(self.layer + 1, len(self.hidden))
        if self.running is not None:
            self._end_on_cpu()

    def _share(self) -> None:
        while self.front < self.back:
            n = self._next_batch()
            batch_s = self._begin_on_cpu(n) if n else float("inf")
            while self.front < self.back and self._ahead_s() < AHEAD * batch_s + AHEAD_S:
                self._upload(min(UPLOAD_GROUP, self.back - self.front))
            if self.running is not None and self.front < self.back:
                self._end_on_cpu()

    def _share_cold(self, reads: LayerReads, first: int) -> None:
        """Share out the experts from `first` on, as they arrive."""
        while batch := reads.next_batch(self._let_go_of_ram):
            if self.running is not None:
                self._end_on_cpu()
            self.uploads.append((self.device.uploads.record(), 0))  # the road stood empty
            self.front, self.back = first, first + len(batch)
            first = self.back
            self._share()
            self._let_go_of_ram()
            reads.settle()
        self.record.read_s = time.perf_counter() - self.begun_s

    def _let_go_of_ram(self) -> None:
        """Wait until nobody uses RAM's rows."""
        if self.running is not None:
            self._end_on_cpu()
        self.device.uploads.record().synchronize()
        self.device.downloads.record().synchronize()
        self.admissions.finish()

    def _next_batch(self) -> int:
        costs, left = self.roads.costs, self.pairs.counts[self.front : self.back]
        tail_s = self.out.nbytes / costs.pcie_gbps / 1e9
        return cpu_share(costs, left, self._ahead_s(), tail_s, BATCH_S)

    def _ahead_s(self) -> float:
        """Seconds of uploads that are queued; the one under way counts half."""
        while self.queued and self.queued[0][0].done():
            self.queued.popleft()
        n = sum(n for _, n in self.queued) - (self.queued[0][1] / 2 if self.queued else 0)
        return n * self.roads.costs.upload_s

    def _upload(self, n: int) -> None:
        """Queue the uploads of the next n experts, a group, and their computation."""
        uploads, turn = self.device.uploads, self.ring.enter(self.device.uploads)
        if not self.uploads:
            self.uploads.append((uploads.record(), 0))
        keys = self.keys[self.front : self.front + n]
        slots = [self._slot(key, turn, place) for place, key in enumerate(keys)]
        uploads.copy_all(
            [
                (self.gpu.slab[slot], self.ram.slab[int(self.ram.rows[key])])
                for slot, key in zip(slots, keys, strict=True)
            ]
        )
        uploaded = uploads.record()
        self.admissions.uploaded(uploaded)
        self.queued.append((uploaded, n))
        self.uploads.append((uploaded, n))
        self.device.compute_waits(uploaded)
        self._compute_next(slots)
        self.ring.read_until(turn, self.device.mark())

    def _slot(self, key: int, turn: int, place: int) -> int:
        slot = self.admissions.slot(key)
        return self.ring.slot(turn, place) if slot is None else slot

    def _compute_next(self, slots: Sequence[int]) -> None:
        """Queue the experts that come next, which lie in these slots of the cache or of the ring."""
        n = len(slots)
        self._compute(self.front, self.front + n, self._table(slots), UPLOAD_GROUP)
        self.record.uploads += n
        self.front += n

    def _table(self, slots: Sequence[int]) -> Tensor:
        n, base, table = len(slots), self.bounds[self.front], self.staging.tables[self.n_groups]
        self.n_groups += 1
        words = table.numpy()
        words[:n] = slots
        words[UPLOAD_GROUP : UPLOAD_GROUP + n + 1] = (
            self.pairs.offsets[self.front : self.front + n + 1] - base
        )
        return self.device.send(table)

    def _begin_on_cpu(self, n: int) -> float:
        """Let the CPU start on the last n of the experts that are left; returns what it should take."""
        first, self.back = self.back - n, self.back - n
        self.running = self.roads.cpu_thread.submit(self._compute_on_cpu, first, first + n)
        self.record.cpu += n
        return float(self.roads.costs.cpu_s(self.pairs.counts[first : first + n]).sum())

    def _end_on_cpu(self) -> None:
        assert self.running is not None
        first, last, seconds = self.running.result()
        self.running = None
        self.record.cpu_s += seconds
        self.roads.costs.learn_cpu(self.pairs.counts[first:last], seconds)

    def _compute_on_cpu(self, first: int, last: int) -> tuple[int, int, float]:
        """In the other thread, which changes nothing but the sums."""
        self.cpu_ready.synchronize()
        n_tokens, begin, end = len(self.hidden), self.bounds[first], self.bounds[last]
        rows = self.ram.rows[self.keys[first:last]].tolist()
        began_s = time.perf_counter()
        cpu.experts_forward(
            self.roads.pool,
            [self.ram.expert(row) for row in rows],
            (self.pairs.offsets[first : last + 1] - begin).astype(np.int32),
            self.tokens[begin:end],
            self.weights[begin:end],
            self.staging.hidden[:n_tokens],
            self.staging.sums[:n_tokens],
        )
        return first, last, time.perf_counter() - began_s

    def combine(self) -> Tensor:
        """Add the CPU's sum to the GPU's, and let go of what the layer was given."""
        n_tokens = len(self.hidden)
        if self.record.cpu:
            self.out += self.device.send(self.staging.sums[:n_tokens])
        self.device.compute_waits(self.cpu_ready)  # before the memory of the hidden states is used again
        self.end = self.device.mark()
        if self.record.cpu:
            self.device.downloads.wait(self.end)
            self.staging.clear_sums(n_tokens)
        out = self.out
        del self.out, self.hidden
        return out

    def abandon(self) -> None:
        """Something was raised: leave a cache that holds what it says, and nothing under way."""
        if self.running is not None:
            wait([self.running])
        try:
            self.device.synchronize()
            self.staging.sums.zero_()
        finally:
            self.roads.early.take()
            if self.reads is not None:
                self.reads.cancel()
            self.admissions.undo()

    def wait(self) -> None:
        """Wait for all of it, copies into RAM included."""
        self.end.synchronize()
        self.device.downloads.record().synchronize()

    def finish(self) -> LayerRecord:
        """What it took; the device has come to its end."""
        self.record.seconds = self.end.seconds_since(self.begin)
        if self.early:
            self.record.upload_s = self.early[-1].end.seconds_since(self.early[0].begin)
        if seconds := self._upload_seconds():
            self.record.upload_s += sum(s * n for s, n in seconds)
            # The median: where the host was late, as when a kernel is compiled, the road stood empty.
            self.roads.costs.learn_uploads(1, median(s for s, _ in seconds))
        self.admissions.finish()
        return self.record

    def _upload_seconds(self) -> list[tuple[float, int]]:
        """Of each group: seconds an upload, and how many."""
        return [
            (end.seconds_since(begin) / n, n)
            for (begin, _), (end, n) in zip(self.uploads[:-1], self.uploads[1:], strict=True)
            if n
        ]

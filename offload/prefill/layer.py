"""The routed experts of many tokens, layer by layer, computed on two roads at once.

A layer goes through these phases, each of which needs the result of the one before:

1. `route_layer` brings the routing to the host and sorts the experts by where they lie: a `RoutedLayer`.
2. `GpuQueue` queues the experts in the cache; `LayerReads` begins to read cold ones from the drive.
3. `LayerUploads` queues the experts that were uploaded ahead of the layer.
4. `TwoRoads` shares the missing ones: the PCIe road uploads those with most tokens in groups, through a
   ring of slots, and the GPU computes each group while the next one is on its way; the CPU road computes
   those with fewest from RAM. Cold ones follow in groups as they arrive, shared in the same way.
5. `NextLayerUploads` goes on uploading, for the next layer.
6. The CPU's sum is added to the GPU's. The layer is a `QueuedLayer` now; its record is complete when the GPU
   has reached the layer's end.

T tokens, H hidden_size, E n_routed_experts, k num_experts_per_tok.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from moebox.kernels import cpu
from moebox.offload.device.base import Event
from moebox.offload.machine.hardware import gpu_identity
from moebox.offload.memory.cold_reader import ColdReader
from moebox.offload.memory.gpu_slab import GpuSlab
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.memory.rows import RamRows
from moebox.offload.prefill.admission import Admissions, ColdAdmissions, ExclusiveAdmissions
from moebox.offload.prefill.cold_reads import LayerReads
from moebox.offload.prefill.cpu_batches import CpuBatches
from moebox.offload.prefill.gpu_queue import GpuQueue
from moebox.offload.prefill.layer_record import LayerRecord
from moebox.offload.prefill.layer_uploads import LayerUploads, UploadTimes
from moebox.offload.prefill.road_costs import first_costs, two_roads_s
from moebox.offload.prefill.routed_layer import RoutedLayer, route_layer
from moebox.offload.prefill.staging import Staging
from moebox.offload.prefill.two_roads import MissQueue, TwoRoads
from moebox.offload.prefill.upload_ring import CERTAIN, NextLayerUploads, Ring, UploadedGroup
from moebox.offload.routing.recorder import RoutingRecorder
from moebox.offload.traffic import Traffic

KEPT_RECORDS = 1024


@dataclass(frozen=True)
class QueuedLayer:
    """A layer that is computed by the CPU, and whose work on the GPU is queued from `begin` to `end`.

    Holds none of the layer's tensors.
    """

    record: LayerRecord
    begin: Event
    end: Event
    ahead: Sequence[UploadedGroup]
    times: UploadTimes
    admissions: Admissions

    def complete(self) -> LayerRecord:
        """Free what the layer's copies held, and update the costs by its times; the GPU has reached `end`."""
        ahead_s = self.ahead[-1].end.seconds_since(self.ahead[0].begin) if self.ahead else 0.0
        record = replace(
            self.record,
            seconds=self.end.seconds_since(self.begin),
            upload_s=ahead_s + self.times.learn(),
        )
        self.admissions.finish()
        return record


class PrefillExperts:
    """Computes layers, and learns from each what the two roads cost.

    Attributes:
        costs: live figures of the roads; set `pcie_gbps` once it was measured.
        records: of the last `KEPT_RECORDS` layers; call `synchronize` before you read them.
        recorder: records the router's picks; None: picks are not recorded.
        next_layer: uploads that go on for the layer to come.
    """

    def __init__(
        self,
        pool: cpu.ThreadPool,
        ram: RamSlab,
        gpu: GpuSlab,
        rows: RamRows | None = None,
        cold: ColdReader | None = None,
    ) -> None:
        """
        Args:
            pool: computes the CPU's experts.
            ram, gpu: the slabs; the GPU's device is used.
            rows: of RAM in exclusive mode, where an expert lies in RAM or on the GPU, but not in both. None:
                RAM holds all experts.
            cold: reads experts that lie in neither; None if there are none.
        """
        config = ram.config
        self.pool, self.ram, self.gpu, self.rows, self.cold = pool, ram, gpu, rows, cold
        self.recorder: RoutingRecorder | None = None
        flops = 6.0 * config.hidden_size * config.moe_intermediate_size
        identity = gpu_identity(gpu.device.torch_device)
        self.costs = first_costs(config.expert_bytes, flops, pool.threads, identity)
        self.records: deque[LayerRecord] = deque(maxlen=KEPT_RECORDS)
        self.cpu_thread = ThreadPoolExecutor(1, "moebox-prefill")
        self.ring = Ring(gpu)
        self.next_layer = NextLayerUploads(ram, gpu, self.ring)
        self._traffic = Traffic()
        self._staging: Staging | None = None
        self._last: QueuedLayer | None = None

    def run(self, layer: int, expert_ids: Tensor, weights: Tensor, hidden: Tensor) -> Tensor:
        """The sum of the chosen experts' outputs, as `Experts.forward` defines it.

        Args:
            layer: MoE layer, counted from 0.
            expert_ids: int64 [T, k], on the device or the CPU.
            weights: fp32 [T, k] on the device.
            hidden: bf16 [T, H] on the device.

        Returns:
            fp32 [T, H] on the device.

        Raises:
            DeviceError: a copy failed; the cache is worthless then.
            CheckpointError: a cold expert could not be read.
        """
        staging = self._staging_for(len(hidden))
        with ExitStack() as undo:
            admissions = self._begin(undo, staging)
            ahead = self.next_layer.take()
            routing, tiers, exclusive = (expert_ids, weights), (self.ram, self.gpu), self.rows is not None
            routed = route_layer(layer, routing, hidden, staging, tiers, ahead, exclusive=exclusive)
            self._use(routed)
            admissions.plan(routed.keys[routed.first_ahead :], routed.keys[: routed.first_ahead])
            self._learn()
            queued = self._compute(undo, routed, staging, admissions, ahead)
            undo.pop_all()
        self._last = queued
        self._traffic += queued.record.traffic
        if self.recorder is not None:
            self.recorder.layer(layer, staging.ids[: len(hidden)].numpy())
        return routed.out

    def traffic(self) -> Traffic:
        """What all layers so far have moved, without what was read from the drive."""
        return self._traffic + Traffic(pcie_bytes=self.next_layer.n_uploaded * self.costs.expert_bytes)

    def synchronize(self) -> None:
        """Wait for the last layer; then RAM, cache and records stay as they are.

        What was uploaded for the next layer is discarded; no record counts it.
        """
        self.next_layer.discard()
        if self._last is not None:
            self._last.end.synchronize()
            self.gpu.device.downloads.record().synchronize()
            self._learn()

    def _staging_for(self, n_tokens: int) -> Staging:
        if self._staging is None or self._staging.capacity < n_tokens:
            self.synchronize()  # its copies use the old memory
            self._staging = None
            capacity = 1 << (n_tokens - 1).bit_length()  # few sizes: pinning takes 75 ms for 4,096 tokens
            config = self.ram.config
            self._staging = Staging(
                self.gpu.device,
                capacity,
                config.num_experts_per_tok,
                config.n_routed_experts,
                config.hidden_size,
            )
        return self._staging

    def _begin(self, undo: ExitStack, staging: Staging) -> Admissions:
        """A layer's admissions. On an error, `undo` leaves nothing under way, and a cache that holds what its
        table says."""
        if self.rows is None:
            admissions = Admissions(self.gpu)
        elif self.cold is None:
            admissions = ExclusiveAdmissions(self.gpu, rows=self.rows)
        else:
            admissions = ColdAdmissions(self.gpu, rows=self.rows)
        undo.callback(admissions.undo)
        undo.callback(self.next_layer.take)
        undo.callback(staging.sums.zero_)
        undo.callback(self.gpu.device.synchronize)
        return admissions

    def _use(self, routed: RoutedLayer) -> None:
        """Add the layer's use to the scores of its experts."""
        if routed.n_cold and self.cold is None:
            raise RuntimeError(f"MoE layer {routed.layer}: an expert lies neither in RAM nor on the GPU")
        keys, use = np.array(routed.keys, np.int32), routed.recent_use[routed.pairs.experts]
        self.gpu.residency.use(keys, use)
        if self.cold is not None:
            self.cold.residency.use(keys, use)

    def _learn(self) -> None:
        if self._last is not None:
            self.records.append(self._last.complete())
            self._last = None

    def _compute(
        self,
        undo: ExitStack,
        routed: RoutedLayer,
        staging: Staging,
        admissions: Admissions,
        ahead: Sequence[UploadedGroup],
    ) -> QueuedLayer:
        queue = GpuQueue(self.gpu, staging, routed)
        queue.compute_residents()
        reads = self._begin_reads(routed)
        if reads is not None:
            undo.callback(reads.cancel)
        roads = self._roads(queue, routed, staging, admissions)
        undo.callback(roads.cpu.abandon)
        roads.uploads.compute_ahead(ahead)
        host_s = time.perf_counter() - routed.begun_s
        floor_s = two_roads_s(self.costs, routed.pairs.counts[routed.first_ahead :])
        roads.share(MissQueue(routed.first_missing, routed.first_cold))
        read_s = 0.0 if reads is None else self._share_cold(roads, reads, routed, admissions)
        self._upload_next(routed)
        roads.cpu.end()
        end = self._combine(routed, staging, from_cpu=roads.cpu.n_experts > 0)
        n_ahead = sum(routed.ahead_counts)
        record = LayerRecord(
            layer=routed.layer,
            tokens=routed.n_tokens,
            residents=routed.first_ahead,
            expert_bytes=self.costs.expert_bytes,
            uploads=roads.uploads.n_experts,
            cpu=roads.cpu.n_experts,
            early=n_ahead,
            wasted=sum(len(group.slots) for group in ahead) - n_ahead,
            cold=routed.n_cold,
            cpu_s=roads.cpu.seconds,
            read_s=read_s,
            host_s=host_s,
            floor_s=floor_s,
        )
        return QueuedLayer(record, routed.begin, end, ahead, roads.uploads.times, admissions)

    def _begin_reads(self, routed: RoutedLayer) -> LayerReads | None:
        """Have cold experts read, into rows that no copy or computation of the last layer uses any more."""
        if self.cold is None or not routed.n_cold:
            return None
        routed.hidden_on_host.synchronize()
        in_ram = routed.keys[routed.first_ahead : routed.first_cold]
        return LayerReads(self.cold, self.gpu, routed.all_keys, routed.keys[routed.first_cold :], in_ram)

    def _roads(
        self, queue: GpuQueue, routed: RoutedLayer, staging: Staging, admissions: Admissions
    ) -> TwoRoads:
        costs, counts = self.costs, routed.pairs.counts
        uploads = LayerUploads(self.ram, self.gpu, self.ring, admissions, queue, costs, routed)
        batches = CpuBatches(self.cpu_thread, self.pool, self.ram, staging, costs, routed)
        return TwoRoads(uploads, batches, costs, counts, tail_s=routed.out.nbytes / costs.pcie_gbps / 1e9)

    def _share_cold(
        self, roads: TwoRoads, reads: LayerReads, routed: RoutedLayer, admissions: Admissions
    ) -> float:
        """Share the cold experts as they arrive; returns the seconds since the layer began."""

        def release_rows() -> None:
            roads.cpu.end()
            for stream in (self.gpu.device.uploads, self.gpu.device.downloads):
                stream.record().synchronize()
            admissions.finish()

        roads.share_cold(reads, routed.first_cold, release_rows)
        return time.perf_counter() - routed.begun_s

    def _upload_next(self, routed: RoutedLayer) -> None:
        """Queue uploads for the layer to come, where there is one that will surely use them.

        In exclusive mode experts change places while a layer is computed, so nothing is uploaded ahead.
        """
        keys = range(routed.all_keys.stop, routed.all_keys.stop + len(routed.all_keys))
        enough = len(routed.pairs.tokens) >= CERTAIN * len(keys)
        if enough and keys.stop <= self.ram.n_keys and self.rows is None:
            self.next_layer.start(keys)

    def _combine(self, routed: RoutedLayer, staging: Staging, *, from_cpu: bool) -> Event:
        """Queue the addition of the CPU's sum to the GPU's; returns the layer's end."""
        device, out = self.gpu.device, routed.out
        if from_cpu:
            out += device.send(staging.sums[: routed.n_tokens])
        device.compute_waits(routed.hidden_on_host)  # before the memory of the hidden states is used again
        end = device.mark()
        if from_cpu:
            device.downloads.wait(end)
            staging.clear_sums(routed.n_tokens)
        return end

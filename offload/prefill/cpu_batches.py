"""The CPU road of a prompt layer: batches of experts, computed from RAM in a thread of their own."""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future, wait

import numpy as np

from moebox.kernels import cpu
from moebox.offload.memory.ram_slab import RamSlab
from moebox.offload.prefill.road_costs import RoadCosts
from moebox.offload.prefill.routed_layer import RoutedLayer
from moebox.offload.prefill.staging import Staging


class CpuBatches:
    """Computes batches of a routed layer's experts, at most one at a time, and adds to `Staging.sums`.

    Attributes:
        n_experts: computed so far, the running batch included.
        seconds: that the batches which have ended took.
    """

    def __init__(
        self,
        thread: Executor,
        pool: cpu.ThreadPool,
        ram: RamSlab,
        staging: Staging,
        costs: RoadCosts,
        routed: RoutedLayer,
    ) -> None:
        self._thread, self._pool, self._ram = thread, pool, ram
        self._staging, self._costs, self._routed = staging, costs, routed
        self._running: Future[float] | None = None
        self._batch = slice(0, 0)
        self.n_experts = 0
        self.seconds = 0.0

    def begin(self, first: int, n: int) -> float:
        """Start on the n experts from number `first` on; returns the seconds that this should take."""
        if self._running is not None:
            raise RuntimeError("the batch before is not finished")
        self._batch = slice(first, first + n)
        self._running = self._thread.submit(self._compute, first, first + n)
        self.n_experts += n
        return float(self._costs.cpu_s(self._routed.pairs.counts[self._batch]).sum())

    def end(self) -> None:
        """Wait for the running batch, if there is one, and learn from its time."""
        if self._running is None:
            return
        seconds = self._running.result()
        self._running = None
        self.seconds += seconds
        self._costs.learn_cpu(self._routed.pairs.counts[self._batch], seconds)

    def abandon(self) -> None:
        """Wait for the running batch, if there is one, whether it fails or not."""
        if self._running is not None:
            wait([self._running])

    def _compute(self, first: int, last: int) -> float:
        """Runs in the other thread; writes to nothing but the sums."""
        routed = self._routed
        routed.hidden_on_host.synchronize()
        begin, end = routed.bounds[first], routed.bounds[last]
        rows = self._ram.rows[routed.keys[first:last]].tolist()
        began_s = time.perf_counter()
        cpu.experts_forward(
            self._pool,
            [self._ram.expert(row) for row in rows],
            (routed.pairs.offsets[first : last + 1] - begin).astype(np.int32),
            routed.tokens[begin:end],
            routed.weights[begin:end],
            self._staging.hidden[: routed.n_tokens],
            self._staging.sums[: routed.n_tokens],
        )
        return time.perf_counter() - began_s

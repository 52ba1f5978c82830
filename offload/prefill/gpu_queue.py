"""The computation of a routed layer's experts on the GPU, queued group by group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moebox.offload.memory.gpu_slab import UPLOAD_GROUP, GpuSlab
from moebox.offload.prefill.routed_layer import RoutedLayer
from moebox.offload.prefill.staging import Staging


class GpuQueue:
    """Queues experts on the compute stream; their weights lie in slots of the GPU's slab.

    The GPU is told of a group by a table of int32: its slots, and offsets into its pairs.
    """

    def __init__(self, gpu: GpuSlab, staging: Staging, routed: RoutedLayer) -> None:
        self._gpu, self._staging, self._routed = gpu, staging, routed
        self._counts = routed.pairs.counts.tolist()
        self._n_groups = 0

    def compute_residents(self) -> None:
        """Queue the experts that lie in the cache."""
        n = self._routed.first_ahead
        if not n:
            return
        table = self._staging.residents[: 2 * n + 1]
        words = table.numpy()
        words[:n] = self._routed.resident_slots
        words[n:] = self._routed.bounds[: n + 1]
        self._compute(0, n, self._gpu.device.send(table), n)

    def compute(self, first: int, slots: Sequence[int]) -> None:
        """Queue a group: the experts from number `first` on, which lie in these slots."""
        n, offsets = len(slots), self._routed.pairs.offsets
        table = self._staging.tables[self._n_groups]
        self._n_groups += 1
        words = table.numpy()
        words[:n] = slots
        words[UPLOAD_GROUP : UPLOAD_GROUP + n + 1] = offsets[first : first + n + 1] - offsets[first]
        self._compute(first, first + n, self._gpu.device.send(table), UPLOAD_GROUP)

    def _compute(self, first: int, last: int, table: Tensor, at: int) -> None:
        """Queue the experts from `first` to before `last`; `table` has offsets from its word `at` on."""
        routed, n = self._routed, last - first
        begin, end = routed.bounds[first], routed.bounds[last]
        self._gpu.device.ops.experts_many(
            self._gpu.slab,
            self._gpu.shape,
            table[:n],
            table[at : at + n + 1],
            routed.device_tokens[begin:end],
            routed.device_weights[begin:end],
            routed.hidden,
            routed.out,
            self._counts[first:last],
        )

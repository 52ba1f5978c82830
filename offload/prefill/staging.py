"""What a prompt's layer is handed over in, and the record of how it went."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moebox.offload.device.base import Device
from moebox.offload.memory.gpu_slab import UPLOAD_GROUP
from moebox.offload.traffic import Traffic

TABLE = 2 * UPLOAD_GROUP + 1
"""int32 words that tell the GPU of a group: slots, then offsets."""
ZERO_ROWS = 512


@dataclass
class LayerRecord:
    """How a layer went.

    Attributes:
        layer: MoE index.
        tokens: T.
        residents, uploads, cpu: experts on each way.
        early: those of the uploads that began before the layer.
        cold: experts, of either way, that were read from disk.
        wasted: early uploads that found no use, neither here nor in the layer that they were meant for.
        expert_bytes: of one expert.
        seconds: of the whole layer on the device, from its input to its output: without its early uploads'
            time, but those of the next layer may slow it down.
        upload_s, cpu_s: from the first upload's start to the last one's end, the early ones counted apart and
            added; the CPU's work.
        read_s: from the first read's begin until the last cold expert was shared out.
        host_s: the host's cost before the first upload was queued.
        floor_s: the best split of the misses at the roads' live figures, see `split.two_roads_s`.
    """

    layer: int
    tokens: int
    residents: int
    expert_bytes: int
    uploads: int = 0
    cpu: int = 0
    early: int = 0
    wasted: int = 0
    cold: int = 0
    seconds: float = 0.0
    upload_s: float = 0.0
    cpu_s: float = 0.0
    read_s: float = 0.0
    host_s: float = 0.0
    floor_s: float = 0.0

    @property
    def traffic(self) -> Traffic:
        """What moved within the layer: early uploads, used or not, and reads are not part of it."""
        return Traffic(
            gpu_hits=self.residents,
            ram_hits=self.uploads + self.cpu - self.cold,
            disk_hits=self.cold,
            pcie_bytes=(self.uploads - self.early) * self.expert_bytes,
            cpu_bytes=self.cpu * self.expert_bytes,
        )

    @property
    def pcie_gbps(self) -> float:
        """GB/s of the uploads, wasted ones included."""
        n = self.uploads + self.wasted
        return n * self.expert_bytes / self.upload_s / 1e9 if self.upload_s else 0.0

    @property
    def cpu_gbps(self) -> float:
        """GB/s of experts that the CPU went through."""
        return self.cpu * self.expert_bytes / self.cpu_s / 1e9 if self.cpu_s else 0.0


class Staging:
    """Pinned memory that prefill hands data over in, for up to `capacity` tokens.

    Between layers `sums` is zero, or zeros are on their way by `downloads`.
    """

    def __init__(self, device: Device, capacity: int, top_k: int, n_experts: int, hidden_size: int) -> None:
        self.capacity = capacity
        self.ids = device.pinned((capacity, top_k), torch.int64)
        self.router_weights = device.pinned((capacity, top_k), torch.float32)
        self.hidden = device.pinned((capacity, hidden_size), torch.bfloat16)
        self.sums = device.pinned((capacity, hidden_size), torch.float32)
        self.tokens = device.pinned((capacity * top_k,), torch.int32)
        self.weights = device.pinned((capacity * top_k,), torch.float32)
        self.residents = device.pinned((2 * n_experts + 1,), torch.int32)
        # One row a group; at worst each is of one expert.
        self.tables = device.pinned((n_experts, TABLE), torch.int32)
        self._zeros = device.empty((min(capacity, ZERO_ROWS), hidden_size), torch.float32).zero_()
        self._downloads = device.downloads
        self._downloads.wait(device.mark())

    def clear_sums(self, n_tokens: int) -> None:
        """Queue zeros for the first rows of `sums`: by PCIe, since the CPU has better to do."""
        for first in range(0, n_tokens, len(self._zeros)):
            rows = self.sums[first : min(first + len(self._zeros), n_tokens)]
            self._downloads.copy(rows, self._zeros[: len(rows)])

"""The record of one prompt layer: how many experts took which road, and how long that took."""

from __future__ import annotations

from dataclasses import dataclass

from moebox.offload.traffic import Traffic


@dataclass(frozen=True)
class LayerRecord:
    """How the experts of one layer were computed.

    Attributes:
        layer: MoE index.
        tokens: T.
        residents, uploads, cpu: experts that were in the GPU's cache, uploaded, and computed by the CPU.
        early: uploads, counted in `uploads` too, that began before the layer was routed.
        cold: experts, counted in `uploads` or `cpu` too, that were read from the drive.
        wasted: experts that were uploaded before the layer was routed and got no tokens.
        expert_bytes: of one expert.
        seconds: of the whole layer on the device, from its input to its output. The uploads that began before
            the layer are not part of it; those that go on for the next layer may slow it down.
        upload_s: from the first upload's start to the last one's end; that of the uploads which began before
            the layer is measured apart and added.
        cpu_s: the CPU's computation.
        read_s: from the layer's start until the last cold expert was uploaded or computed; 0 without any.
        host_s: from the layer's start until its first upload was queued.
        floor_s: the least time that the missing experts can take, see `road_costs.two_roads_s`.
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
        """What moved within the layer, without reads and without the uploads that began before it."""
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
        """GB/s of expert weights that the CPU computed with."""
        return self.cpu * self.expert_bytes / self.cpu_s / 1e9 if self.cpu_s else 0.0

"""GPUs by name, to plan for hardware that is not here: their data sheets, and the share of them that is
reached.

A preset's bandwidths and rates are the vendor's. The share that a program reaches was measured on one H200
(docs/benchmarks.md) and is assumed for the others: 4.27 of 4.8 TB/s, 55 of 64 GB/s, 798 of 989 TFLOP/s.
docs/gpus.md says which of the vendors' figures were confirmed by a second source.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from moebox.errors import PlanError
from moebox.offload.machine.floor import Ceilings

MIB = 1 << 20

HBM_REACHED = 4.27 / 4.8
"""Bandwidth of a copy, counting reads and writes, over the data sheet's, on the H200."""
PCIE_REACHED = 55 / 64
FLOPS_REACHED = 798 / 989
CONTEXT_BYTES = 600 * MIB
"""Memory that the driver and CUDA's context take before a program can take any."""

PCIE_5_GBPS, PCIE_4_GBPS = 64.0, 32.0
"""16 lanes, one direction."""

REFERENCE_RAM_GBPS = 132.0
REFERENCE_CPU_TFLOPS = 5.4
REFERENCE_CPU = "16 cores of a Xeon Emerald Rapids"
"""The CPU that is assumed beside a GPU that is not here; figures are medians of docs/benchmarks.md."""


@dataclass(frozen=True)
class GpuPreset:
    """A GPU: its memory as the driver reports it; GB/s and dense bf16 TFLOP/s as on its data sheet."""

    name: str
    title: str
    memory_bytes: int
    hbm_gbps: float
    pcie_gbps: float
    bf16_tflops: float

    @property
    def free_bytes(self) -> int:
        """Memory that a program finds free if the GPU drives no display."""
        return self.memory_bytes - CONTEXT_BYTES

    def ceilings(self, ram_gbps: float, cpu_tflops: float, nvme_gbps: float) -> Ceilings:
        """Ceilings that a box with this GPU, CPU and disk is expected to measure."""
        return Ceilings(
            ram_gbps=ram_gbps,
            cpu_tflops=cpu_tflops,
            nvme_gbps=nvme_gbps,
            hbm_gbps=self.hbm_gbps * HBM_REACHED,
            hbm_copy_gbps=self.hbm_gbps * HBM_REACHED,
            pcie_gbps=self.pcie_gbps * PCIE_REACHED,
            gpu_tflops=self.bf16_tflops * FLOPS_REACHED,
        )


def _preset(name: str, title: str, mib: int, hbm: float, pcie: float, tflops: float) -> GpuPreset:
    return GpuPreset(name, title, mib * MIB, hbm, pcie, tflops)


PRESETS: dict[str, GpuPreset] = {
    preset.name: preset
    for preset in (
        _preset("rtx-3090-24gb", "GeForce RTX 3090", 24_576, 936, PCIE_4_GBPS, 71),
        _preset("rtx-4090-24gb", "GeForce RTX 4090", 24_564, 1_008, PCIE_4_GBPS, 165),
        _preset("rtx-5090-32gb", "GeForce RTX 5090", 32_607, 1_792, PCIE_5_GBPS, 210),
        _preset("a100-40gb", "A100 40 GB", 40_960, 1_555, PCIE_4_GBPS, 312),
        _preset("l40s-48gb", "L40S", 46_068, 864, PCIE_4_GBPS, 362),
        _preset("rtx-6000-ada-48gb", "RTX 6000 Ada", 49_140, 960, PCIE_4_GBPS, 364),
        _preset("a100-80gb", "A100 80 GB", 81_920, 2_039, PCIE_4_GBPS, 312),
        _preset("h100-pcie-80gb", "H100 PCIe 80 GB", 81_559, 2_000, PCIE_5_GBPS, 756),
        _preset("h100-80gb", "H100 SXM 80 GB", 81_559, 3_350, PCIE_5_GBPS, 989),
        _preset("h100-nvl-94gb", "H100 NVL", 95_830, 3_900, PCIE_5_GBPS, 835),
        _preset("rtx-pro-6000-96gb", "RTX PRO 6000 Blackwell", 97_887, 1_792, PCIE_5_GBPS, 504),
        _preset("h200-141gb", "H200", 143_771, 4_800, PCIE_5_GBPS, 989),
        _preset("b200-180gb", "B200", 183_359, 8_000, PCIE_5_GBPS, 2_250),
    )
}


def find_preset(name: str) -> GpuPreset:
    """The preset called `name`.

    Raises:
        PlanError: there is none; the message lists similar names, or all names.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.5) or list(PRESETS)
    raise PlanError(f"GPU {name!r} is not known", f"Try {', '.join(near)}.")


def next_larger(preset: GpuPreset) -> GpuPreset | None:
    """The preset with the next larger memory and no lower memory bandwidth, or None."""
    larger = (
        other
        for other in PRESETS.values()
        if other.memory_bytes > preset.memory_bytes + 4096 * MIB and other.hbm_gbps >= preset.hbm_gbps
    )
    return min(larger, key=lambda other: (other.memory_bytes, other.hbm_gbps), default=None)

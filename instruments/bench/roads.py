"""Bytes and GB/s of a layer's experts, by where they were found and how they were computed.

An expert is a hit if it is on the GPU. A miss in RAM takes one of two roads: PCIe uploads it and the GPU
computes it, or the CPU computes it. A cold expert is read from disk, and then the CPU computes it. L MoE
layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebox.config import ModelConfig
from moebox.offload.machine.floor import Ceilings
from moebox.units import GIGA

LAYER_FIELDS = (
    *("hits", "uploads", "part", "cpu", "cold"),
    *("wait_s", "schedule_s", "cpu_s", "upload_s", "read_s", "layer_s"),
)
"""Columns of a token's layers.

hits, uploads, cpu, cold: experts, see the module. part: the share, from 0 to 1, of the split expert that the
GPU reads over PCIe and computes; the CPU computes the rest, so that cpu may be a fraction. wait_s: the host
waited for the layer's routing while the GPU computed. schedule_s: from the routing's arrival until the
uploads were queued and the CPU computed. cpu_s, upload_s, read_s: seconds of each road, NaN where they are
not known. layer_s: from the routing's arrival until the CPU's sum was handed over."""

Samples = npt.NDArray[np.float64]
"""Values of one column: [tokens], or [tokens, L]."""


@dataclass(frozen=True)
class RoadFigures:
    """Mean bytes of a token's or a prompt's experts: hits, both roads, and reads from disk.

    `_gbps` are the rates of uploads, of the CPU and of the disk; `_of_ceiling` is such a rate divided by the
    bandwidth that was measured before the run. Both are None if no expert was timed.
    """

    hit_bytes: float
    upload_bytes: float
    cpu_bytes: float
    read_bytes: float
    upload_gbps: float | None
    cpu_gbps: float | None
    read_gbps: float | None
    upload_of_ceiling: float | None
    cpu_of_ceiling: float | None
    read_of_ceiling: float | None


def road_figures(columns: Mapping[str, Samples], config: ModelConfig, ceilings: Ceilings) -> RoadFigures:
    """Figures of some layers, `columns` named as in `LAYER_FIELDS`.

    What the GPU reads of split experts is counted as uploads.
    """
    size = config.expert_bytes
    over_pcie = columns["uploads"] + columns["part"]
    upload_gbps = _gbps(over_pcie * size, columns["upload_s"])
    cpu_gbps = _gbps(columns["cpu"] * size, columns["cpu_s"])
    read_gbps = _gbps(columns["cold"] * size, columns["read_s"])
    return RoadFigures(
        hit_bytes=size * mean_per_token(columns["hits"]),
        upload_bytes=size * mean_per_token(over_pcie),
        cpu_bytes=size * mean_per_token(columns["cpu"]),
        read_bytes=size * mean_per_token(columns["cold"]),
        upload_gbps=upload_gbps,
        cpu_gbps=cpu_gbps,
        read_gbps=read_gbps,
        upload_of_ceiling=_share(upload_gbps, ceilings.pcie_gbps),
        cpu_of_ceiling=_share(cpu_gbps, ceilings.ram_gbps),
        read_of_ceiling=_share(read_gbps, ceilings.nvme_gbps),
    )


def mean_per_token(values: Samples) -> float:
    """Mean over tokens of the sum over layers."""
    return float(values.reshape(len(values), -1).sum(axis=1).mean())


def _gbps(nbytes: Samples, seconds: Samples) -> float | None:
    """Sum of bytes over sum of seconds, of the samples whose seconds are known; None without any."""
    timed = np.isfinite(seconds) & (seconds > 0) & (nbytes > 0)
    if not timed.any():
        return None
    return float(nbytes[timed].sum() / seconds[timed].sum() / GIGA)


def _share(gbps: float | None, ceiling_gbps: float) -> float | None:
    return gbps / ceiling_gbps if gbps is not None and ceiling_gbps else None

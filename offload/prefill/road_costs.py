"""What an expert costs on each of the two roads, learned from live figures, and the best split between them.

PCIe road: an upload takes `bytes / pcie_gbps` seconds. CPU road: the CPU reads the same bytes from RAM, and
with many tokens it is limited by arithmetic instead: `max(bytes / cpu_gbps, tokens * flops / cpu_gflops)`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebox.kernels import cpu
from moebox.offload.machine.profile import MachineProfile

Counts = npt.NDArray[np.int64]
Seconds = npt.NDArray[np.float64]

LEARNING_RATE = 0.5
"""A figure is divided by `(measured seconds / expected seconds) ** LEARNING_RATE`."""
LARGEST_STEP = 4.0
"""Largest ratio of measured and expected seconds that is learned from; others are clipped to it."""
CPU_GBPS_PER_THREAD = 4.0
CPU_GFLOPS_PER_THREAD = 200.0
"""First figures of a CPU that was never measured."""


@dataclass
class RoadCosts:
    """Live figures of both roads.

    Attributes:
        expert_bytes: of one expert.
        token_flops: operations of one expert for one token, 6 * H * I.
        pcie_gbps: of uploads, while the CPU computes.
        cpu_gbps: at which the CPU reads experts with few tokens, during uploads.
        cpu_gflops: at which the CPU computes experts with many tokens.
    """

    expert_bytes: int
    token_flops: float
    pcie_gbps: float = 25.0
    cpu_gbps: float = 50.0
    cpu_gflops: float = 2000.0

    @property
    def upload_s(self) -> float:
        """Seconds of one expert's upload."""
        return self.expert_bytes / self.pcie_gbps / 1e9

    def cpu_s(self, counts: Counts) -> Seconds:
        """Seconds that the CPU takes for each expert: fp64 [n], from its number of tokens, `counts` [n]."""
        seconds: Seconds = np.maximum(self._read_s, counts * self._token_s)
        return seconds

    @property
    def _read_s(self) -> float:
        return self.expert_bytes / self.cpu_gbps / 1e9

    @property
    def _token_s(self) -> float:
        return self.token_flops / self.cpu_gflops / 1e9

    def learn_upload(self, seconds: float) -> None:
        """Learn from the seconds that the upload of one expert took."""
        if seconds > 0:
            self.pcie_gbps /= _step(seconds / self.upload_s, 1.0)

    def learn_cpu(self, counts: Counts, seconds: float) -> None:
        """Learn from the seconds that the CPU took for some experts.

        `cpu_gbps` learns with the share of the expected time in which reading is the limit, `cpu_gflops` with
        the rest.
        """
        expected = self.cpu_s(counts)
        reading = float(expected[counts * self._token_s <= self._read_s].sum() / expected.sum())
        ratio = seconds / float(expected.sum())
        self.cpu_gbps /= _step(ratio, reading)
        self.cpu_gflops /= _step(ratio, 1 - reading)


def _step(ratio: float, share: float) -> float:
    ratio = min(max(ratio, 1 / LARGEST_STEP), LARGEST_STEP)
    return float(ratio ** (LEARNING_RATE * share))


def first_costs(expert_bytes: int, token_flops: float, threads: int, gpu: str) -> RoadCosts:
    """The costs before any layer was measured: those of the machine's profile, else assumed figures.

    Args:
        expert_bytes, token_flops: as in `RoadCosts`.
        threads: that compute. The profile's figures are those of all threads that are allowed.
        gpu: the GPU's identity in the profile.
    """
    known = MachineProfile.load().ceilings(gpu=gpu)
    if known is None:
        cpu_gbps, cpu_gflops = CPU_GBPS_PER_THREAD * threads, CPU_GFLOPS_PER_THREAD * threads
        return RoadCosts(expert_bytes, token_flops, cpu_gbps=cpu_gbps, cpu_gflops=cpu_gflops)
    return RoadCosts(
        expert_bytes,
        token_flops,
        pcie_gbps=known.pcie_beside_gbps or known.pcie_gbps or RoadCosts.pcie_gbps,
        cpu_gbps=known.ram_beside_gbps or known.ram_gbps,
        cpu_gflops=known.cpu_tflops * 1e3 * min(threads / cpu.allowed_cpus(), 1.0) or RoadCosts.cpu_gflops,
    )


def cpu_share(costs: RoadCosts, counts: Counts, ahead_s: float, tail_s: float, batch_s: float) -> int:
    """How many of a layer's missing experts the CPU should take next.

    Args:
        counts: tokens of the experts that no road has taken, descending; the CPU takes from the end.
        ahead_s: seconds of the uploads that are queued.
        tail_s: seconds that the CPU's sum takes on its way to the device.
        batch_s: about the seconds of a batch; the last batch may take up to twice as long.

    Returns:
        The largest n for which the CPU has computed n experts, and sent their sum, before all others are
        uploaded; at most a batch. 0: upload all.
    """
    cpu_s = np.cumsum(costs.cpu_s(counts[::-1]))
    upload_s = ahead_s + costs.upload_s * np.arange(len(counts) - 1, -1, -1)
    in_time = int(np.searchsorted(cpu_s + tail_s - upload_s, 0.0, side="right"))
    if in_time == 0 or cpu_s[in_time - 1] <= 2 * batch_s:
        return in_time
    return max(1, int(np.searchsorted(cpu_s, batch_s, side="right")))


def two_roads_s(costs: RoadCosts, counts: Counts) -> float:
    """The floor of a layer's missing experts: the seconds of the best split, if nothing else takes time.

    With `counts` sorted descending, the floor is the least over q of
    `max(q * upload_s, sum(cpu_s(counts[q:])))`.
    """
    ordered = np.sort(counts)[::-1]
    cpu_s = np.concatenate([np.cumsum(costs.cpu_s(ordered)[::-1])[::-1], [0.0]])
    upload_s = costs.upload_s * np.arange(len(ordered) + 1)
    return float(np.maximum(cpu_s, upload_s).min())

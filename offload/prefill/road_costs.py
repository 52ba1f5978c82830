"""What a layer's experts cost on each road, learned while it runs, and the best split between the two.

An upload costs its bytes. The CPU reads the same bytes where they lie, and with many tokens it is bound by
arithmetic instead: `max(bytes / B_cpu, tokens * flops / F_cpu)` an expert.
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
LARGEST_STEP = 4.0
CPU_GBPS_PER_THREAD = 4.0
CPU_GFLOPS_PER_THREAD = 200.0
"""What the CPU of a machine that was never measured is taken for before it has computed anything."""


@dataclass
class RoadCosts:
    """Live figures of both roads.

    Attributes:
        expert_bytes: of one expert.
        token_flops: operations of one expert for one token, 6 * H * I.
        pcie_gbps: of uploads, while the CPU reads too.
        cpu_gbps: at which the CPU reads experts with few tokens, beside uploads.
        cpu_gflops: at which it computes those with many.
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
        """Seconds the CPU takes for each of some experts, from their numbers of tokens."""
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
        """Take in what the CPU took for some experts: the figure that decided most learns most."""
        expected = self.cpu_s(counts)
        reading = float(expected[counts * self._token_s <= self._read_s].sum() / expected.sum())
        ratio = seconds / float(expected.sum())
        self.cpu_gbps /= _step(ratio, reading)
        self.cpu_gflops /= _step(ratio, 1 - reading)


def _step(ratio: float, share: float) -> float:
    ratio = min(max(ratio, 1 / LARGEST_STEP), LARGEST_STEP)
    return float(ratio ** (LEARNING_RATE * share))


def first_costs(expert_bytes: int, token_flops: float, threads: int, gpu: str) -> RoadCosts:
    """What the roads are taken for before anything went that way: the machine's profile, or a guess.

    Args:
        expert_bytes, token_flops: see `RoadCosts`.
        threads: that compute; the profile has the figures of all that are allowed.
        gpu: its identity in the profile.
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
    """How many of some experts the CPU should take next.

    Args:
        counts: tokens of the experts that nobody has taken, descending; the CPU takes from the end.
        ahead_s: what the uploads that are queued already will take.
        tail_s: what the CPU's sum takes on its way to the device.
        batch_s: about what it may take at once; up to twice that where it is the last batch.

    Returns:
        As many as the CPU finishes before the uploads of all others would be; 0: upload them all.
    """
    cpu_s = np.cumsum(costs.cpu_s(counts[::-1]))
    upload_s = ahead_s + costs.upload_s * np.arange(len(counts) - 1, -1, -1)
    in_time = int(np.searchsorted(cpu_s + tail_s - upload_s, 0.0, side="right"))
    if in_time == 0 or cpu_s[in_time - 1] <= 2 * batch_s:
        return in_time
    return max(1, int(np.searchsorted(cpu_s, batch_s, side="right")))


def two_roads_s(costs: RoadCosts, counts: Counts) -> float:
    """The floor of a layer's misses: seconds of the best split, with nothing but the roads to wait for.

    Uploads take the experts with most tokens, the CPU those with fewest.
    """
    ordered = np.sort(counts)[::-1]
    cpu_s = np.concatenate([np.cumsum(costs.cpu_s(ordered)[::-1])[::-1], [0.0]])
    upload_s = costs.upload_s * np.arange(len(ordered) + 1)
    return float(np.maximum(cpu_s, upload_s).min())

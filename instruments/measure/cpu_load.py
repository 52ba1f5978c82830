"""Whether other programs use the cores, which makes measured bandwidths too low."""

from __future__ import annotations

import psutil

BUSY_SHARE = 0.1
"""Share of the allowed cores that other programs may use before measured bandwidths are doubted."""
BUSY_SAMPLE_S = 0.5


def busy_cpus() -> float:
    """CPUs that all programs use now, averaged over half a second."""
    return float(psutil.cpu_percent(BUSY_SAMPLE_S)) / 100 * (psutil.cpu_count() or 1)


def is_quiet(busy: float, allowed: int) -> bool:
    """Whether `busy` of `allowed` CPUs are few enough to measure bandwidths."""
    return busy <= BUSY_SHARE * allowed

"""The measured parts of the box: counters of GPU, processors and memory, or the stated watts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moebox.cost.energy.gpu_energy import open_gpu
from moebox.cost.energy.power_model import PowerModel
from moebox.cost.energy.rapl import POWERCAP, open_rapl
from moebox.cost.usage import SOURCES, Method, Source

if TYPE_CHECKING:
    import torch


class PowerSource(Protocol):
    """One part of the box whose energy is measured or estimated."""

    @property
    def source(self) -> Source:
        """The name of the part."""

    def joules(self) -> float:
        """Joules since the source was opened; never falls.

        Raises:
            DeviceError: the source cannot be read any more.
        """

    def method(self, seconds: float) -> Method:
        """How joules are obtained over a window of `seconds`."""

    def close(self) -> None:
        """Release what the source holds."""


class ModelEnergy:
    """Energy from stated watts: joules = watts x seconds + watts_per_core x core seconds of this process.

    Args:
        source: the part whose energy is estimated.
        watts: power at all times.
        watts_per_core: additional power of each core that works for this process.
        clock: monotonic seconds.
        cpu_clock: core seconds that this process used.
    """

    def __init__(
        self,
        source: Source,
        watts: float,
        watts_per_core: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self.source: Source = source
        self._watts, self._watts_per_core = watts, watts_per_core
        self._clock, self._cpu_clock = clock, cpu_clock
        self._began_s, self._began_cpu_s = clock(), cpu_clock()

    def joules(self) -> float:
        """Joules since the source was opened."""
        seconds, cpu_s = self._clock() - self._began_s, self._cpu_clock() - self._began_cpu_s
        return self._watts * seconds + self._watts_per_core * cpu_s

    def method(self, seconds: float) -> Method:
        """All joules are estimated."""
        return "estimated"

    def close(self) -> None:
        """Nothing is held."""


def open_sources(
    device: torch.device | None, model: PowerModel, powercap: Path = POWERCAP
) -> list[PowerSource]:
    """The box's parts in the order of `SOURCES`: the GPU if `device` is one, the processors, the memory.

    Processors and memory whose counters cannot be read are estimated from `model`; a GPU without a counter is
    left out. The log names both.

    Args:
        device: the GPU that computes; None or a CPU: none.
        powercap: the folder in which Linux shows RAPL.
    """
    counted: dict[Source, PowerSource] = {part.source: part for part in open_rapl(powercap)}
    gpu = open_gpu(device)
    if gpu is not None:
        counted["gpu"] = gpu
    modelled: dict[Source, PowerSource] = {
        "cpu": ModelEnergy("cpu", model.idle_watts, model.watts_per_core),
        "dram": ModelEnergy("dram", model.dram_watts),
    }
    found = modelled | counted
    return [found[source] for source in SOURCES if source in found]

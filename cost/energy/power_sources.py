"""Where energy comes from: counters of the GPU, the processors and the memory, or a stated model."""

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
    """One part of the box."""

    @property
    def source(self) -> Source:
        """Which part."""

    def joules(self) -> float:
        """Drawn since it was opened; never falls. Raises `DeviceError` where it cannot be read any more."""

    def method(self, seconds: float) -> Method:
        """How the joules of a window that long were obtained."""

    def close(self) -> None:
        """Give back what it holds."""


class ModelEnergy:
    """The stated model: so many watts all the time, and more for each second that a core works for us.

    Args:
        source: the part it stands for.
        watts: drawn all the time.
        watts_per_core: while a core works for this process.
        clock: seconds that only grow.
        cpu_clock: seconds of all cores that this process used.
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
        """Since this was opened."""
        seconds, cpu_s = self._clock() - self._began_s, self._cpu_clock() - self._began_cpu_s
        return self._watts * seconds + self._watts_per_core * cpu_s

    def method(self, seconds: float) -> Method:
        """Always "estimated"."""
        return "estimated"

    def close(self) -> None:
        """Nothing is held."""


def open_sources(
    device: torch.device | None, model: PowerModel, powercap: Path = POWERCAP
) -> list[PowerSource]:
    """The box's parts in the order of `SOURCES`: the GPU if `device` is one, the processors, the memory.

    Processors and memory whose counters cannot be read are estimated; a GPU without a counter is left out.
    Either is said.
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

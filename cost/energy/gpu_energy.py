"""Energy of an NVIDIA GPU: NVML's total-energy counter, and power times time between its steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from moebox.cost.usage import Method, Source
from moebox.errors import DeviceError

if TYPE_CHECKING:
    import torch

log = logging.getLogger("moebox")

STEP_S = 0.1
"""Time between two steps of the counter."""
SHORT_S = 10 * STEP_S
"""In longer windows, power times time gives less than a tenth of the energy: half a step at each end."""


class GpuReader(Protocol):
    """Reads a GPU's energy and power; both methods raise `DeviceError` where the GPU does not answer."""

    def millijoules(self) -> int:
        """The counter: energy since the driver was loaded."""

    def watts(self) -> float:
        """The present power."""


class GpuEnergy:
    """Joules at any moment, estimated between the steps of the counter.

    The counter lags behind by at most one step. With `counted` the joules of the counter, and `seconds` the
    time since the last call:

        seconds <= STEP_S:  last estimate + seconds x mean of the last and the present watts, but not below
                            counted, nor above counted + STEP_S x the larger of both
        seconds > STEP_S:   counted + STEP_S x present watts / 2, since the mean lag is half a step

    Where one window gets too much, the next gets too little, so the sum over any time differs from the
    counter by at most one step.

    Args:
        reader: the GPU.
        clock: monotonic seconds.
    """

    source: Source = "gpu"

    def __init__(self, reader: GpuReader, clock: Callable[[], float] = time.monotonic) -> None:
        self._reader, self._clock = reader, clock
        self._at = clock()
        self._watts = reader.watts()
        self._counter = reader.millijoules()
        self._counted = 0.0
        self._first = self._estimate = self._watts * STEP_S / 2

    def joules(self) -> float:
        """Joules since this was opened; never falls. Raises `DeviceError` where the GPU does not answer."""
        now = self._clock()
        watts = self._reader.watts()
        self._count()
        seconds, step = now - self._at, STEP_S * max(watts, self._watts)
        if seconds > STEP_S:
            estimate = self._counted + STEP_S * watts / 2
        else:
            estimate = self._estimate + seconds * (watts + self._watts) / 2
            estimate = min(max(estimate, self._counted), self._counted + step)
        self._at, self._watts = now, watts
        self._estimate = max(self._estimate, estimate)
        return self._estimate - self._first

    def _count(self) -> None:
        counter = self._reader.millijoules()
        # The counter restarts from 0 when the driver is loaded again.
        self._counted += max(0, counter - self._counter) / 1e3
        self._counter = counter

    def method(self, seconds: float) -> Method:
        """The counter serves windows of `SHORT_S` seconds and more; shorter ones rely on power times time."""
        return "counter" if seconds >= SHORT_S else "power"

    def close(self) -> None:
        """Does nothing: NVML stays open until the process ends."""


class NvmlReader:
    """A GPU by its UUID, such as `GPU-...`; `nvml` is the module pynvml."""

    def __init__(self, nvml: ModuleType, uuid: str) -> None:
        self._nvml: Any = nvml
        self._errors: type[Exception] = nvml.NVMLError
        try:
            nvml.nvmlInit()
            self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except self._errors as error:
            raise DeviceError(f"NVML does not know the GPU {uuid}: {error}") from error
        self.millijoules()
        self._read_watts = self._power_reading()

    def millijoules(self) -> int:
        """The counter: energy since the driver was loaded."""
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._errors as error:
            raise DeviceError(f"NVML gives no energy counter: {error}") from error

    def watts(self) -> float:
        """The present power; 0 where the GPU has no reading, so that only the counter's steps count."""
        try:
            return self._read_watts()
        except self._errors as error:
            raise DeviceError(f"NVML gives no power any more: {error}") from error

    def _power_reading(self) -> Callable[[], float]:
        # From Ampere on, the average reading covers a second: too slow for a short request.
        for reading in (self._instant_watts, self._average_watts):
            try:
                reading()
            except self._errors:
                continue
            return reading
        log.warning("NVML gives no power reading: the energy of requests below a second is uncertain")
        return lambda: 0.0

    def _instant_watts(self) -> float:
        nvml = self._nvml
        value = nvml.nvmlDeviceGetFieldValues(self._handle, [nvml.NVML_FI_DEV_POWER_INSTANT])[0]
        if value.nvmlReturn != nvml.NVML_SUCCESS:
            raise self._errors(value.nvmlReturn)
        return float(value.value.uiVal) / 1e3

    def _average_watts(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3


def open_gpu(device: torch.device | None) -> GpuEnergy | None:
    """The counter of a CUDA device; None where NVML or its counter is missing, which the log says."""
    if device is None or device.type != "cuda":
        return None
    try:
        import pynvml
        import torch

        return GpuEnergy(NvmlReader(pynvml, f"GPU-{torch.cuda.get_device_properties(device).uuid}"))
    except ImportError:
        log.warning("the package nvidia-ml-py is missing: the GPU's energy is not measured")
    except DeviceError as error:
        log.warning("%s: the GPU's energy is not measured", error)
    return None

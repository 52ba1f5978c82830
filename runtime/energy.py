"""Energy of a GPU from its own counter (NVML); nothing where there is none."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger("moebox")

Joules = Callable[[], float]
"""The counter's reading; differences count."""


def joule_counter(device: torch.device) -> Joules | None:
    """The total-energy counter of a CUDA device, which steps about ten times a second.

    None, said once by name, where the device is no CUDA device or NVML or its counter is missing.
    """
    if device.type != "cuda":
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except ImportError:
        log.warning("the package nvidia-ml-py is missing: energy is not measured")
        return None
    except pynvml.NVMLError as error:
        log.warning("NVML gives no energy counter (%s): energy is not measured", error)
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3

"""Opens devices by name."""

from __future__ import annotations

import torch

from moebox.errors import PlanError
from moebox.offload.device.base import Device
from moebox.offload.device.cuda import CudaDevice
from moebox.offload.device.stand_in import StandInDevice


def open_device(name: str) -> Device:
    """The device named "cuda", "cuda:0" and so on, or "stand-in" (CPU memory, for tests).

    Raises:
        PlanError: there is no such device.
    """
    if name == "stand-in":
        return StandInDevice()
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise PlanError(f"device {name!r}: not a device moebox knows", "Give cpu, cuda or cuda:N.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise PlanError(f"device {name!r}: torch sees {count} CUDA devices", "Use --device cpu.")
    return CudaDevice(int(number or 0))
